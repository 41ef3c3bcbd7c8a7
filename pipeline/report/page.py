"""Renders templates: self-contained pages, tables with the formulas of their metrics, figures.

A page has no scripts and no fonts, and its pictures are inside it as data. It follows the reader's light or dark
setting, works on a phone, and a picture that is clicked (or reached with Tab) fills the window.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import jinja2

from pipeline.report.pictures import Picture, png_bytes
from tmad.metrics import METRICS

Entry = Mapping[str, Any]
"""Of a metric: `mean`, and `low` and `high` of its interval, each none where there is none."""


@dataclass(frozen=True)
class Cell:
    """A cell of a table as it is shown."""

    text: str
    small: str = ""
    """Below it, such as an interval."""
    kind: str = ""
    """`number`, `best`, or `name`: of a metric, with its formula below it."""
    unit: str = ""
    """Behind a name."""
    span: int = 1

    def __str__(self) -> str:
        """As Markdown; a formula is left to the page."""
        if self.kind == "name":
            return f"`{self.text}`{self.unit}"
        text = f"**{self.text}**" if self.kind == "best" else self.text
        return f"{text} ({self.small})" if self.small else text


@dataclass(frozen=True)
class Table:
    """A table of a page, of Markdown or of a terminal."""

    header: Sequence[str]
    rows: Sequence[Sequence[object]]
    heading: str = ""
    note: str = ""

    def cells(self) -> list[list[Cell]]:
        """The rows as they are shown; numbers have four digits, and none is a dash."""
        return [[as_cell(value) for value in row] for row in self.rows]

    def text(self) -> str:
        """In columns, for a terminal."""
        lines = [list(self.header), *([str(cell) for cell in row] for row in self.cells())]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)

    def markdown(self) -> str:
        """As Markdown."""
        cells = self.cells()
        numbers = [cell.kind in ("number", "best") for cell in cells[0]] if cells else [False] * len(self.header)
        rule = ["---:" if number else "---" for number in numbers]
        bodies = [[str(cell) for one in row for cell in (one, *[""] * (one.span - 1))] for row in cells]
        escaped = [[text.replace("|", "\\|") for text in line] for line in (self.header, rule, *bodies)]
        return "\n".join(f"| {' | '.join(line)} |" for line in escaped)


def as_cell(value: object) -> Cell:
    """How *value* is shown."""
    if isinstance(value, Cell):
        return value
    if isinstance(value, float):
        return Cell(format(value, ".4g") if math.isfinite(value) else "–", kind="number")
    if isinstance(value, int) and not isinstance(value, bool):
        return Cell(str(value), kind="number")
    return Cell("–" if value is None else str(value))


def measure_cells(name: str, entries: Sequence[Entry | None]) -> list[Cell]:
    """A row of the metric *name*: means with their intervals; the best are marked, equal figures equally."""
    digits = decimals(name)
    means = [None if entry is None else entry["mean"] for entry in entries]
    texts = [None if mean is None or not math.isfinite(mean) else f"{mean:.{digits}f}" for mean in means]
    finite = [text for text in texts if text is not None]
    choose = {"higher": max, "lower": min}.get(METRICS[name].better)
    best = choose(finite, key=float) if choose and finite and len(entries) > 1 else None
    return [
        Cell(text or "–", interval(entry, digits) if entry else "", "best" if text and text == best else "number")
        for text, entry in zip(texts, entries, strict=True)
    ]


def metrics_table(
    columns: Mapping[str, Mapping[str, Entry]], *, not_measured: Mapping[str, str] | None = None, note: str = ""
) -> Table:
    """A row for each metric, with its formula, and a column for each method: title, then metric, then its entry.

    *not_measured*: metric, then why it has no values; each reason is one row.
    """
    rows: list[list[object]] = []
    without: dict[str, list[str]] = {}
    for name, metric in METRICS.items():
        unit = (f", {metric.unit}" if metric.unit else "") + f", {metric.direction}"
        first = Cell(name, metric.formula, "name", unit)
        if name in (not_measured or {}):
            without.setdefault((not_measured or {})[name], []).append(name)
        elif any(name in entries for entries in columns.values()):
            rows.append([first, *measure_cells(name, [entries.get(name) for entries in columns.values()])])
    for reason, names in without.items():
        formulas = "; ".join(METRICS[name].formula for name in names)
        rows.append([Cell(", ".join(names), formulas, "name"), Cell(f"not measured: {reason}", span=len(columns))])
    return Table(["metric", *columns], rows, note=note)


def interval(entry: Entry, digits: int, *, sign: str = "") -> str:
    """In words; empty where there is none."""
    low, high = entry.get("low"), entry.get("high")
    return "" if low is None or high is None else f"{low:{sign}.{digits}f} to {high:{sign}.{digits}f}"


def decimals(metric: str) -> int:
    """Decimals that a metric is shown with."""
    return 2 if METRICS[metric].unit in ("dB", "grey levels", "1e-3") else 3


@dataclass
class Drawing:
    """A figure in SVG: shapes in the order in which they are drawn."""

    width: float
    height: float
    label: str
    """What it shows, for those who do not see it."""
    left: float = 0.0
    shapes: list[tuple[str, dict[str, object], str, str]] = field(default_factory=list)
    """Element, attributes, text, and what is said of it under the pointer."""

    def add(self, element: str, text: str = "", *, title: str = "", **attributes: object) -> None:
        """Add a shape; `text_anchor` is spelled `text-anchor`, `class_` is `class`, and numbers are rounded."""
        named = {name.rstrip("_").replace("_", "-"): value for name, value in attributes.items()}
        rounded = {name: round(value, 2) if isinstance(value, float) else value for name, value in named.items()}
        self.shapes.append((element, rounded, text, title))

    def line(self, x1: float, y1: float, x2: float, y2: float) -> None:
        """Add a line of an axis."""
        self.add("line", x1=x1, y1=y1, x2=x2, y2=y2, class_="axis")


def histogram(counts: Sequence[int], *, low: float, high: float, label: str) -> Drawing:
    """Equal bins from *low* to *high*; *label* says what is counted."""
    width, height, top = 60, 120, max(*counts, 1)
    drawing = Drawing(width * len(counts) + 32, height + 44, label, left=-16)
    for bin, count in enumerate(counts):
        begin, end = (low + (high - low) * edge / len(counts) for edge in (bin, bin + 1))
        y = 20 + height * (1 - count / top)
        said = f"{begin:g} to {end:g}: {count}"
        drawing.add("rect", title=said, x=bin * width + 2, y=y, width=width - 4, height=height * count / top,
                    fill="#3b7dd8")  # fmt: skip
        drawing.add("text", str(count or ""), x=(bin + 0.5) * width, y=y - 6, text_anchor="middle")
    for edge in range(len(counts) + 1):
        shown = f"{low + (high - low) * edge / len(counts):g}"
        drawing.add("text", shown, x=edge * width, y=height + 38, text_anchor="middle")
    return drawing


def render(template: str, **values: object) -> str:
    """The text of *template* with *values*; a value that the template does not get is an error."""
    return _templates().get_template(template).render(values)


@cache
def _templates() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=lambda name: name is None or not name.endswith(".md"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["data_uri"] = _data_uri
    return environment


def _data_uri(picture: Picture) -> str:
    data = picture if isinstance(picture, bytes) else png_bytes(picture)
    kind = "jpeg" if data[:2] == b"\xff\xd8" else "png"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
