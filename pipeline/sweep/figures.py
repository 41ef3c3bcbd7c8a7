"""Figures of a sweep: parallel coordinates, importance, Pareto front, with settings on hover."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.report.page import Drawing
from pipeline.sweep.config import direction
from pipeline.sweep.space import Domain, LogRange
from pipeline.sweep.trials import Trial, pareto, sort_key

WIDTH = 960
BLUE, RED, GREY = "#3b7dd8", "#c65f3c", "#9aa5b1"


def parallel_coordinates(trials: Sequence[Trial], space: Mapping[str, Domain], objective: str) -> Drawing:
    """A line for each trial through an upright axis for each setting, and one for the objective, which colours it."""
    shown = [trial for trial in trials if objective in trial.metrics]
    top, height = 30, 240
    axes = {name: _of_setting(domain, [one.point[name] for one in shown]) for name, domain in space.items()}
    axes[objective] = _of_metric(shown, objective)
    xs = {name: 60 + place * (WIDTH - 120) / max(1, len(axes) - 1) for place, name in enumerate(axes)}
    drawing = Drawing(WIDTH, top + height + 14, f"parallel coordinates of {len(shown)} trials")
    for name, x in xs.items():
        drawing.line(x, top, x, top + height)
        short = name.rpartition(".")[2].removeprefix("weight_")
        drawing.add("text", short, title=name, x=x, y=14, text_anchor="middle")
        for share, text in axes[name].ticks:
            drawing.add("text", text, x=x + 4, y=top + height * (1 - share) + 4)
    goodness = _of_metric(shown, objective, reverse=direction(objective) == "min")
    alike = len({trial.metrics[objective] for trial in shown}) < 2
    for trial in sorted(shown, key=lambda one: goodness.share(one.metrics[objective])):
        row = {**trial.point, objective: trial.metrics[objective]}
        places = " ".join(
            f"{xs[name]:.1f},{top + height * (1 - axis.share(row[name])):.1f}" for name, axis in axes.items()
        )
        drawing.add(
            "polyline",
            title=_told(trial, objective),
            class_="trial" if trial.status == "finished" else "trial cut",
            points=places,
            stroke=_colour(1.0 if alike else goodness.share(trial.metrics[objective])),
        )
    return drawing


def bars(values: Mapping[str, float], label: str) -> Drawing:
    """A horizontal bar for each name, from the middle: values in [-1, 1]."""
    middle, unit = 560, 340
    drawing = Drawing(WIDTH, 12 + 22 * len(values), label)
    for row, (name, value) in enumerate(values.items()):
        y, end = 8 + 22 * row, middle + value * unit
        drawing.add("text", name, x=200, y=y + 12, text_anchor="end")
        drawing.add(
            "rect", x=min(middle, end), y=y, width=abs(value) * unit, height=15, fill=BLUE if value >= 0 else RED
        )
        gap, anchor = (6, "start") if value >= 0 else (-6, "end")
        drawing.add("text", f"{value:+.2f}", x=end + gap, y=y + 12, text_anchor=anchor)
    drawing.line(middle, 0, middle, drawing.height)
    return drawing


def front(trials: Sequence[Trial], x_name: str, y_name: str) -> Drawing:
    """Every trial by two metrics, the better to the right and up; the Pareto front of the finished ones as a line."""
    shown = [trial for trial in trials if x_name in trial.metrics and y_name in trial.metrics]
    best = pareto(trials, (x_name, y_name))
    top, left, height, width = 16, 70, 300, 640
    ends = {"max": "higher is better", "min": "reversed: lower is better"}
    axes = {name: _of_metric(shown, name, reverse=direction(name) == "min") for name in (x_name, y_name)}

    def place(trial: Trial) -> tuple[float, float]:
        x, y = (axis.share(trial.metrics[name]) for name, axis in axes.items())
        return left + 20 + (width - 40) * x, top + 20 + (height - 40) * (1 - y)

    drawing = Drawing(WIDTH, top + height + 40, f"{y_name} against {x_name}")
    drawing.line(left, top, left, top + height)
    drawing.line(left, top + height, left + width, top + height)
    for share, text in axes[x_name].ticks:
        drawing.add("text", text, x=left + 20 + (width - 40) * share, y=top + height + 15, text_anchor="middle")
    for share, text in axes[y_name].ticks:
        drawing.add("text", text, x=left - 6, y=top + 24 + (height - 40) * (1 - share), text_anchor="end")
    said = f"{x_name}, {ends[direction(x_name)]}"
    drawing.add("text", said, x=left + width / 2, y=top + height + 32, text_anchor="middle")
    drawing.add("text", f"{y_name}, {ends[direction(y_name)]}", x=left + 6, y=top + 4)
    line = " ".join("{:.1f},{:.1f}".format(*place(trial)) for trial in sorted(best, key=lambda one: place(one)[0]))
    drawing.add("polyline", class_="trial", points=line, stroke=BLUE)
    for trial in shown:
        x, y = place(trial)
        fill, opacity = BLUE if trial in best else GREY, 1 if trial.status == "finished" else 0.45
        drawing.add("circle", title=_told(trial, x_name, y_name), cx=x, cy=y, r=5, fill=fill, opacity=opacity)
        drawing.add("text", str(trial.number), x=x + 8, y=y + 4)
    return drawing


@dataclass(frozen=True)
class _Axis:
    """Where values stand between the ends of an axis, as shares of its length, and what is written along it."""

    share: Callable[[Any], float]
    ticks: list[tuple[float, str]]


def _of_numbers(low: float, high: float, *, log: bool = False, reverse: bool = False) -> _Axis:
    def share(value: float) -> float:
        if high <= low:
            return 0.5
        first, last, here = map(math.log, (low, high, value)) if log else (low, high, value)
        part = (here - first) / (last - first)
        return 1 - part if reverse else part

    return _Axis(share, [(share(value), f"{value:.4g}") for value in dict.fromkeys((low, high))])


def _of_metric(trials: Sequence[Trial], name: str, *, reverse: bool = False) -> _Axis:
    values = [trial.metrics[name] for trial in trials]
    return _of_numbers(min(values), max(values), reverse=reverse)


def _of_setting(domain: Domain, values: Sequence[Any]) -> _Axis:
    if isinstance(domain, LogRange):
        return _of_numbers(domain.low, domain.high, log=True)
    ordered = sorted({str(value): value for value in (*domain.values, *values)}.values(), key=sort_key)
    places = {_key(value): index / max(1, len(ordered) - 1) for index, value in enumerate(ordered)}
    return _Axis(lambda value: places[_key(value)], [(place, name) for name, place in places.items()])


def _key(value: Any) -> str:
    return str(tuple(value) if isinstance(value, list) else value)


def _colour(share: float) -> str:
    """From grey-violet, the worst, to orange."""
    worst, best = (112, 104, 160), (236, 130, 20)
    return "rgb({},{},{})".format(*(round(a + (b - a) * share) for a, b in zip(worst, best, strict=True)))


def _told(trial: Trial, *metrics: str) -> str:
    values = ", ".join(f"{name} {trial.metrics[name]:.4g}" for name in metrics)
    point = ", ".join(f"{name} {value}" for name, value in trial.point.items())
    return f"{trial.label}, {trial.status}: {values}; {point}"
