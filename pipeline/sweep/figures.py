"""Small SVG figures of a sweep: parallel coordinates, importance, Pareto front. No plotting library."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.report import Report
from pipeline.sweep.config import direction
from pipeline.sweep.results import Trial, pareto, sort_key
from pipeline.sweep.space import Domain, LogRange

STYLE = (
    "<style>.figure{display:block;width:100%;max-width:60rem;height:auto}"
    ".figure text{font:11px system-ui,sans-serif;fill:var(--soft)}.figure .axis{stroke:var(--line)}"
    ".figure .trial{fill:none;stroke-width:1.6;opacity:.8}.figure .trial:hover{stroke-width:4;opacity:1}"
    ".figure .cut{stroke-dasharray:4 3;opacity:.45}</style>"
)

WIDTH = 960


class FigureReport(Report):
    """A report that can hold figures."""

    def figure(self, svg: str, caption: str) -> None:
        """Add *svg*, with *caption* below it."""
        self._parts.append(f"{STYLE}{svg}<p class='note'>{html.escape(caption)}</p>")


def parallel_coordinates(trials: Sequence[Trial], space: Mapping[str, Domain], objective: str) -> str:
    """A line for each trial through an upright axis for each setting, and one for the objective, which colours it."""
    shown = [trial for trial in trials if objective in trial.measures]
    top, height = 30, 240
    names = [*space, objective]
    gap = (WIDTH - 120) / max(1, len(names) - 1)
    values = [trial.measures[objective] for trial in shown]
    axes = [_Axis.of_setting(space[name], [trial.point[name] for trial in shown]) for name in space]
    axes.append(_Axis.of_numbers(values))

    def y(share: float) -> float:
        return top + height * (1 - share)

    parts = []
    for index, (name, axis) in enumerate(zip(names, axes, strict=True)):
        x = 60 + index * gap
        parts.append(f'<line class="axis" x1="{x:.0f}" x2="{x:.0f}" y1="{top}" y2="{top + height}"/>')
        short = html.escape(name.rpartition(".")[2].removeprefix("weight_"))
        parts.append(f'<text x="{x:.0f}" y="14" text-anchor="middle">{short}<title>{html.escape(name)}</title></text>')
        parts += [
            f'<text x="{x + 4:.0f}" y="{y(share) + 4:.0f}">{html.escape(text)}</text>' for share, text in axis.ticks
        ]
    for trial in sorted(shown, key=lambda one: _goodness(one.measures[objective], values, objective)):
        rows = [*(trial.point[name] for name in space), trial.measures[objective]]
        places = " ".join(
            f"{60 + index * gap:.1f},{y(axis.share(row)):.1f}"
            for index, (axis, row) in enumerate(zip(axes, rows, strict=True))
        )
        colour = _colour(_goodness(trial.measures[objective], values, objective))
        cut = "" if trial.status == "finished" else " cut"
        parts.append(
            f'<polyline class="trial{cut}" points="{places}" stroke="{colour}"><title>{_told(trial, objective)}</title>'
            "</polyline>"
        )
    return _svg(parts, top + height + 14, f"parallel coordinates of {len(shown)} trials")


def bars(values: Mapping[str, float], label: str) -> str:
    """A horizontal bar for each name, from the middle: values in [-1, 1]."""
    parts, middle, unit = [], 560, 340
    for row, (name, value) in enumerate(values.items()):
        y = 8 + 22 * row
        left = middle + min(0.0, value) * unit
        colour = "#3b7dd8" if value >= 0 else "#c65f3c"
        parts.append(
            f'<text x="200" y="{y + 12}" text-anchor="end">{html.escape(name)}</text>'
            f'<rect x="{left:.1f}" y="{y}" width="{abs(value) * unit:.1f}" height="15" fill="{colour}"/>'
            f'<text x="{middle + (value * unit) + (6 if value >= 0 else -6):.1f}" y="{y + 12}" '
            f'text-anchor="{"start" if value >= 0 else "end"}">{value:+.2f}</text>'
        )
    height = 12 + 22 * len(values)
    parts.append(f'<line class="axis" x1="{middle}" x2="{middle}" y1="0" y2="{height}"/>')
    return _svg(parts, height, label)


def front(trials: Sequence[Trial], x_name: str, y_name: str) -> str:
    """Every trial by two measures, the better to the right and up; the Pareto front of the finished ones as a line."""
    shown = [trial for trial in trials if x_name in trial.measures and y_name in trial.measures]
    best = pareto(trials, (x_name, y_name))
    top, left, height, width = 16, 70, 300, 640
    axes = {name: _Axis.of_numbers([trial.measures[name] for trial in shown]) for name in (x_name, y_name)}

    def place(trial: Trial) -> tuple[float, float]:
        shares = []
        for name in (x_name, y_name):
            share = axes[name].share(trial.measures[name])
            shares.append(share if direction(name) == "max" else 1 - share)
        return left + 20 + (width - 40) * shares[0], top + 20 + (height - 40) * (1 - shares[1])

    parts = [
        f'<line class="axis" x1="{left}" x2="{left}" y1="{top}" y2="{top + height}"/>',
        f'<line class="axis" x1="{left}" x2="{left + width}" y1="{top + height}" y2="{top + height}"/>',
    ]
    for name in (x_name, y_name):
        for share, text in axes[name].ticks:
            along = share if direction(name) == "max" else 1 - share
            if name == x_name:
                parts.append(
                    f'<text x="{left + 20 + (width - 40) * along:.0f}" y="{top + height + 15}" text-anchor="middle">'
                    f"{text}</text>"
                )
            else:
                y = top + 24 + (height - 40) * (1 - along)
                parts.append(f'<text x="{left - 6}" y="{y:.0f}" text-anchor="end">{text}</text>')
    ends = {"max": "higher is better", "min": "reversed: lower is better"}
    parts.append(f'<text x="{left + width / 2:.0f}" y="{top + height + 32}" text-anchor="middle">{x_name}, '
                 f"{ends[direction(x_name)]}</text>")  # fmt: skip
    parts.append(f'<text x="{left + 6}" y="{top + 4}">{y_name}, {ends[direction(y_name)]}</text>')
    line = " ".join("{:.1f},{:.1f}".format(*place(trial)) for trial in sorted(best, key=lambda one: place(one)[0]))
    parts.append(f'<polyline class="trial" points="{line}" stroke="#3b7dd8"/>')
    for trial in shown:
        x, y = place(trial)
        fill = "#3b7dd8" if trial in best else "#9aa5b1"
        opacity = 1 if trial.status == "finished" else 0.45
        parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{fill}" opacity="{opacity}"><title>'
            f"{_told(trial, x_name, y_name)}</title></circle>"
            f'<text x="{x + 8:.1f}" y="{y + 4:.1f}">{trial.number}</text>'
        )
    return _svg(parts, top + height + 40, f"{y_name} against {x_name}")


class _Axis:
    """Where values stand between the ends of an axis."""

    def __init__(self, places: Mapping[Any, float] | None, low: float, high: float, log: bool) -> None:
        self._places, self._low, self._high, self._log = places, low, high, log

    @classmethod
    def of_numbers(cls, values: Sequence[float]) -> _Axis:
        return cls(None, min(values, default=0.0), max(values, default=1.0), False)

    @classmethod
    def of_setting(cls, domain: Domain, values: Sequence[Any]) -> _Axis:
        if isinstance(domain, LogRange):
            return cls(None, domain.low, domain.high, True)
        ordered = sorted({str(value): value for value in (*domain.values, *values)}.values(), key=sort_key)
        last = max(1, len(ordered) - 1)
        return cls({_key(value): index / last for index, value in enumerate(ordered)}, 0, 1, False)

    def share(self, value: Any) -> float:
        if self._places is not None:
            return self._places[_key(value)]
        if self._high <= self._low:
            return 0.5
        if self._log:
            return math.log(value / self._low) / math.log(self._high / self._low)
        return (value - self._low) / (self._high - self._low)

    @property
    def ticks(self) -> list[tuple[float, str]]:
        if self._places is not None:
            return [(place, name) for name, place in self._places.items()]
        return [(self.share(value), f"{value:.4g}") for value in dict.fromkeys((self._low, self._high))]


def _key(value: Any) -> str:
    return str(tuple(value) if isinstance(value, list) else value)


def _goodness(value: float, values: Sequence[float], objective: str) -> float:
    low, high = min(values), max(values)
    share = (value - low) / (high - low) if high > low else 1.0
    return share if direction(objective) == "max" else 1 - share


def _colour(share: float) -> str:
    """From grey-violet, the worst, to orange."""
    worst, best = (112, 104, 160), (236, 130, 20)
    return "rgb({},{},{})".format(*(round(a + (b - a) * share) for a, b in zip(worst, best, strict=True)))


def _told(trial: Trial, *measures: str) -> str:
    values = ", ".join(f"{name} {trial.measures[name]:.4g}" for name in measures)
    point = ", ".join(f"{name} {value}" for name, value in trial.point.items())
    return html.escape(f"{trial.label}, {trial.status}: {values}; {point}")


def _svg(parts: Sequence[str], height: float, label: str) -> str:
    return (
        f'<svg class="figure" viewBox="0 0 {WIDTH} {height:.0f}" role="img" '
        f'aria-label="{html.escape(label, quote=True)}">{"".join(parts)}</svg>'
    )
