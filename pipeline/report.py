"""A report that is one HTML file: tables, measures with their formulas, pictures side by side.

The file asks for nothing from outside: no scripts, no fonts, pictures inside it as data. It follows the reader's light
or dark setting, works on a phone, and a picture that is clicked (or reached with Tab) fills the window.
"""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from pipeline import storage
from tmad.metrics import MEASURES, Measure

Picture = np.ndarray | Image.Image | bytes
"""(H, W, 3) or (H, W) uint8, a Pillow image, or the bytes of a PNG or JPEG file."""


@dataclass(frozen=True)
class Figure:
    """A cell of a plain table: a number as it is to be shown."""

    text: str
    small: str = ""
    """Below it, such as an interval."""
    bold: bool = False

    def __str__(self) -> str:
        text = f"**{self.text}**" if self.bold else self.text
        return f"{text} ({self.small})" if self.small else text


Zoom = tuple[float, float, float]
"""Top, left and side of a square in a picture, shares of its height, width and size."""


class Report:
    """Collects sections from top to bottom; `html` renders them, `write` stores the file."""

    def __init__(self, title: str, lead: str = "") -> None:
        """*lead*: one paragraph under the title that says what the reader is looking at."""
        self.title = title
        self._switches = 0
        self._parts: list[str] = [f"<h1>{html.escape(title)}</h1>"]
        if lead:
            self._parts.append(f'<p class="lead">{html.escape(lead)}</p>')

    def heading(self, text: str) -> None:
        """Start a section."""
        self._parts.append(f"<h2>{html.escape(text)}</h2>")

    def text(self, paragraph: str) -> None:
        """Add a paragraph of plain text."""
        self._parts.append(f"<p>{html.escape(paragraph)}</p>")

    def facts(self, facts: Mapping[str, object]) -> None:
        """Add names and values, such as model, data set, number of images."""
        rows = "".join(
            f"<tr><th scope='row'>{html.escape(name)}</th><td>{html.escape(str(value))}</td></tr>"
            for name, value in facts.items()
        )
        self._parts.append(f'<div class="scroll" tabindex="0"><table class="facts">{rows}</table></div>')

    def command(self, text: str) -> None:
        """Add a shell command to copy."""
        self._parts.append(f"<pre><code>{html.escape(text)}</code></pre>")

    def table(self, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Add a plain table; numbers are set to the right, and `Figure`s with what stands small below them."""
        numbers = [bool(rows) and isinstance(value, int | float | Figure) for value in (rows[0] if rows else header)]
        head = "".join(
            f"<th scope='col'{' class=number' if number else ''}>{html.escape(name)}</th>"
            for name, number in zip(header, numbers, strict=True)
        )
        body = "".join("<tr>" + "".join(_cell(value) for value in row) + "</tr>" for row in rows)
        self._parts.append(
            f'<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        )

    def measures(
        self,
        values: Mapping[str, Mapping[str, float | None]],
        measures: Mapping[str, Measure] = MEASURES,
        *,
        small: Mapping[str, Mapping[str, str]] | None = None,
        not_measured: Mapping[str, str] | None = None,
        note: str = "Means over the images; the best of each measure is bold.",
    ) -> None:
        """Add a table with a row for each measure, its formula under its name, and a column for each method.

        *values*: method, then measure, then its mean; what is missing or not finite shows as a dash. The best of each
        measure is bold. *small*: method, then measure, then what stands small under the value, such as an interval.
        *not_measured*: measure, then why it has no values. *note* stands below the table.
        """
        head = "".join(f"<th scope='col' class='number'>{html.escape(method)}</th>" for method in values)
        body = ""
        for name, entry in measures.items():
            reason = (not_measured or {}).get(name)
            if reason is not None:
                body += (
                    f"<tr><th scope='row'><code>{html.escape(name)}</code><small>{html.escape(entry.formula)}</small>"
                    f"</th><td colspan='{len(values)}'>not measured: {html.escape(reason)}</td></tr>"
                )
                continue
            if not any(name in row for row in values.values()):
                continue
            texts = {
                method: ("–" if text is None else f"<strong>{text}</strong>" if best else text)
                + "".join(f"<small>{html.escape(one)}</small>" for one in [_under(small, method, name)] if one)
                for method, (text, best) in measure_texts(name, entry, values).items()
            }
            unit = f", {html.escape(entry.unit)}" if entry.unit else ""
            body += (
                f"<tr><th scope='row'><code>{html.escape(name)}</code>{unit} {entry.direction}"
                f"<small>{html.escape(entry.formula)}</small></th>"
                + "".join(f"<td class='number'>{texts[method]}</td>" for method in values)
                + "</tr>"
            )
        self._parts.append(
            '<div class="scroll" tabindex="0"><table class="measures">'
            f"<thead><tr><th scope='col'>measure</th>{head}</tr></thead><tbody>{body}</tbody></table></div>"
            f"<p class='note'>{html.escape(note)}</p>"
        )

    def pictures(self, rows: Sequence[tuple[str, Mapping[str, Picture]]], *, zooms: Sequence[Zoom | None] = ()) -> None:
        """Add pictures side by side: one row an image, (caption, {column: picture}), the columns of the first row.

        *zooms*: for each row, what a switch above the pictures zooms on; without any there is no switch.
        """
        if not rows:
            return
        columns = list(rows[0][1])
        styles = ["" if zoom is None else f" style='{zoom_style(zoom)}'" for zoom in zooms] or [""] * len(rows)
        switch = ""
        if zooms:
            self._switches += 1
            name = f"zoom-{self._switches}"
            switch = f'<input type="checkbox" class="switch" id="{name}"><label for="{name}">zoom on the hole</label>'
        head = "".join(f"<th scope='col'>{html.escape(name)}</th>" for name in columns)
        body = ""
        for (caption, cells), style in zip(rows, styles, strict=True):
            pictures = "".join(
                "<td>"
                + (f"<div class='frame'>{_img(cells[name], f'{caption}: {name}')}</div>" if name in cells else "")
                + "</td>"
                for name in columns
            )
            body += (
                f"<tr><th class='caption' colspan='{len(columns)}'>{html.escape(caption)}</th></tr>"
                f"<tr{style}>{pictures}</tr>"
            )
        width = f" style='min-width: {6.5 * len(columns):g}rem'"
        self._parts.append(
            f'<div class="zoomable">{switch}<div class="scroll" tabindex="0"><table class="pictures"{width}>'
            f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div></div>"
            "<p class='note'>Click a picture, or reach it with Tab, to see it large.</p>"
        )

    def gallery(self, figures: Sequence[tuple[str, str, Sequence[Picture | None]]]) -> None:
        """Add small pictures that flow with the page's width: (name, what is to be said of it, its pictures side by
        side); none stands for a picture that cannot be shown."""
        items = "".join(
            "<figure><div>"
            + "".join("<i>no picture</i>" if one is None else _img(one, name) for one in pictures)
            + f"</div><figcaption><b>{html.escape(name)}</b>{html.escape(text)}</figcaption></figure>"
            for name, text, pictures in figures
        )
        self._parts.append(f'<div class="gallery">{items}</div>')

    def histogram(self, counts: Sequence[int], *, low: float, high: float, label: str) -> None:
        """Add a histogram with equal bins from *low* to *high*, drawn as SVG; *label* says what is counted."""
        width, height, top = 60, 120, max(*counts, 1)
        edges = [low + (high - low) * edge / len(counts) for edge in range(len(counts) + 1)]
        bars = "".join(
            f"<g><title>{edges[bin]:g} to {edges[bin + 1]:g}: {count}</title>"
            f'<rect x="{bin * width + 2}" y="{20 + height * (1 - count / top):.1f}" width="{width - 4}" '
            f'height="{height * count / top:.1f}"/>'
            f'<text x="{(bin + 0.5) * width:g}" y="{14 + height * (1 - count / top):.1f}">{count or ""}</text></g>'
            for bin, count in enumerate(counts)
        )
        ticks = "".join(f'<text x="{bin * width}" y="{height + 38}">{edge:g}</text>' for bin, edge in enumerate(edges))
        self._parts.append(
            f'<svg class="histogram" viewBox="-16 0 {width * len(counts) + 32} {height + 44}" role="img" '
            f'aria-label="{html.escape(label, quote=True)}">{bars}{ticks}</svg>'
            f"<p class='note'>{html.escape(label)}</p>"
        )

    def html(self) -> str:
        """The whole document."""
        body = "\n".join(self._parts)
        return (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{html.escape(self.title)}</title><style>{_STYLE}</style></head>\n<body><main>\n{body}\n</main></body></html>\n"
        )

    def write(self, uri: str) -> None:
        """Store the document at *uri*, wholly or not at all."""
        storage.write_atomic(uri, self.html().encode())


def picture_grid(rows: Sequence[tuple[str, Mapping[str, Picture]]], *, cell_px: int = 192) -> np.ndarray:
    """The same rows as one picture with headings, (H, W, 3) uint8, for MLflow and for looking at without a browser.

    Each picture is scaled to fit a square of *cell_px*.
    """
    from PIL import ImageDraw, ImageFont

    if not rows:
        raise ValueError("a picture grid needs at least one row")
    columns = list(rows[0][1])
    gap, head = 6, 22
    width = gap + len(columns) * (cell_px + gap)
    sheet = Image.new("RGB", (width, head + len(rows) * (cell_px + head + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=13)
    for column, name in enumerate(columns):
        draw.text((gap + column * (cell_px + gap), 4), name, fill="black", font=font)
    for index, (caption, cells) in enumerate(rows):
        top = head + index * (cell_px + head + gap)
        draw.text((gap, top + 3), caption, fill=(110, 110, 110), font=font)
        for column, name in enumerate(columns):
            if name in cells:
                picture = _as_image(cells[name]).convert("RGB")
                scale = cell_px / max(picture.size)
                size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
                sheet.paste(
                    picture.resize(size, Image.Resampling.LANCZOS), (gap + column * (cell_px + gap), top + head)
                )
    return np.asarray(sheet)


def png_bytes(picture: Picture) -> bytes:
    """*picture* as the bytes of a PNG file."""
    buffer = io.BytesIO()
    _as_image(picture).save(buffer, format="PNG", optimize=False)
    return buffer.getvalue()


def _as_image(picture: Picture) -> Image.Image:
    if isinstance(picture, bytes):
        return Image.open(io.BytesIO(picture))
    if isinstance(picture, Image.Image):
        return picture
    if picture.dtype != np.uint8:
        raise ValueError(f"a picture must be uint8, got {picture.dtype}; convert with tmad.images.to_uint8")
    return Image.fromarray(np.ascontiguousarray(picture))


def _img(picture: Picture, description: str) -> str:
    data = picture if isinstance(picture, bytes) else png_bytes(picture)
    kind = "jpeg" if data[:2] == b"\xff\xd8" else "png"
    text = html.escape(description, quote=True)
    return f'<img tabindex="0" alt="{text}" src="data:image/{kind};base64,{base64.b64encode(data).decode()}">'


def _cell(value: object) -> str:
    if isinstance(value, Figure):
        text = html.escape(value.text)
        small = f"<small>{html.escape(value.small)}</small>" if value.small else ""
        return f"<td class='number'>{f'<strong>{text}</strong>' if value.bold else text}{small}</td>"
    if isinstance(value, float):
        return f"<td class='number'>{'–' if not math.isfinite(value) else format(value, '.4g')}</td>"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"<td class='number'>{value}</td>"
    return f"<td>{html.escape('–' if value is None else str(value))}</td>"


def zoom_style(zoom: Zoom) -> str:
    """The custom properties that the style sheet needs to fill a frame with the box."""
    top, left, side = zoom
    scale = 1 / side
    return f"--zoom: {scale:.4f}; --left: {-100 * left * scale:.2f}%; --top: {-100 * top * scale:.2f}%"


def zoom_on(mask: np.ndarray, *, margin: float = 0.06) -> Zoom | None:
    """The smallest square around the hole of *mask* (H, W), with a margin; none without hole, or if all would show."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if len(rows) == 0:
        return None
    top, bottom, left, right = (
        rows[0] / mask.shape[0], (rows[-1] + 1) / mask.shape[0],
        columns[0] / mask.shape[1], (columns[-1] + 1) / mask.shape[1],
    )  # fmt: skip
    side = min(1.0, max(bottom - top, right - left) + 2 * margin)
    if side > 0.95:
        return None
    corners = (min(max(0.0, (low + high - side) / 2), 1 - side) for low, high in ((top, bottom), (left, right)))
    return (*corners, side)


def _under(small: Mapping[str, Mapping[str, str]] | None, method: str, name: str) -> str:
    return (small or {}).get(method, {}).get(name, "")


def digits_of(entry: Measure) -> int:
    """Decimals that a measure is shown with."""
    return 2 if entry.unit in ("dB", "grey levels", "1e-3") else 3


def measure_texts(
    name: str, entry: Measure, values: Mapping[str, Mapping[str, float | None]]
) -> dict[str, tuple[str | None, bool]]:
    """Method -> what stands in a table (none where there is no value), and whether it is the best; equal figures are
    equally good."""
    digits = digits_of(entry)
    texts = {
        method: None if value is None or not math.isfinite(value) else f"{value:.{digits}f}"
        for method, value in ((method, row.get(name)) for method, row in values.items())
    }
    finite = [text for text in texts.values() if text is not None]
    best = None
    if len(values) > 1 and finite and entry.better != "neither":
        best = max(finite, key=float) if entry.better == "higher" else min(finite, key=float)
    return {method: (text, text is not None and text == best) for method, text in texts.items()}


_STYLE = """
:root { color-scheme: light dark; --ink: #1d232b; --soft: #5b6673; --line: #d7dce2; --page: #ffffff; --band: #f4f6f8; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ed; --soft: #9aa5b1; --line: #3a424c; --page: #15191e; --band: #1e242b; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 76rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .5rem; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .6rem; padding-bottom: .25rem; border-bottom: 1px solid var(--line); }
.lead { font-size: 1.05rem; color: var(--soft); max-width: 60rem; margin-top: 0; }
.note { color: var(--soft); font-size: .85rem; }
.scroll { overflow-x: auto; }
.scroll:focus-visible, .switch:focus-visible { outline: 2px solid #3b7dd8; outline-offset: 2px; }
table { border-collapse: collapse; font-size: .92rem; }
th, td { padding: .35rem .8rem .35rem 0; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top; }
thead th { vertical-align: bottom; }
td small { display: block; color: var(--soft); font-size: .82rem; white-space: nowrap; }
code { font-family: ui-monospace, monospace; }
th[scope=row] { font-weight: 600; white-space: nowrap; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
.measures th[scope=row] { white-space: normal; font-weight: 400; min-width: 11rem; }
.measures code { font-weight: 600; }
.measures small { display: block; color: var(--soft); font-size: .82rem; max-width: 38rem; }
.measures thead th { max-width: 11rem; }
.facts td { overflow-wrap: anywhere; }
pre { background: var(--band); padding: .7rem .9rem; border-radius: 6px; overflow-x: auto; font-size: .88rem; }
.pictures { width: 100%; min-width: 44rem; table-layout: fixed; }
.pictures thead th { font-size: .85rem; line-height: 1.25; overflow-wrap: break-word; }
.pictures td { padding: 0 .3rem .7rem 0; border: 0; }
.pictures .caption { border: 0; color: var(--soft); font-weight: 400; font-size: .82rem; padding: .3rem 0 .15rem;
  overflow-wrap: anywhere; }
.frame { overflow: hidden; border-radius: 3px; }
.switch:checked ~ .scroll [style*="--zoom"] .frame img:not(:focus) {
  transform-origin: 0 0; transform: translate(var(--left), var(--top)) scale(var(--zoom)); image-rendering: pixelated; }
.switch { width: 1.1rem; height: 1.1rem; vertical-align: -.15rem; margin: .3rem .5rem .6rem 0; }
.switch + label { cursor: pointer; }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(10rem, 1fr)); gap: .9rem; }
.gallery figure { margin: 0; min-width: 0; }
.gallery figure div { display: flex; gap: 2px; height: 8rem; background: var(--band); border-radius: 4px; }
.gallery figure div > * { flex: 1 1 0; min-width: 0; margin: auto; text-align: center; }
.gallery figure img { height: 100%; object-fit: contain; }
.gallery i { color: var(--soft); font-size: .82rem; }
.gallery figcaption { font-size: .8rem; color: var(--soft); overflow-wrap: anywhere; padding-top: .2rem; }
.gallery b { display: block; color: var(--ink); font-weight: 600; }
.histogram { display: block; width: 100%; max-width: 42rem; height: auto; }
.histogram rect { fill: #3b7dd8; }
.histogram text { font: 13px system-ui, sans-serif; fill: var(--soft); text-anchor: middle; }
img { display: block; width: 100%; height: auto; border-radius: 3px; cursor: zoom-in; }
img:focus, .gallery figure img:focus { position: fixed; inset: 0; margin: auto; width: auto; height: auto;
  min-height: min(90vh, 90vw);
  max-width: 96vw; max-height: 96vh; object-fit: contain; z-index: 9; cursor: zoom-out; background: var(--page);
  box-shadow: 0 0 0 100vmax rgb(0 0 0 / .75); outline: none; }
@media (max-width: 40rem) {
  th[scope=row] { white-space: normal; }
  th, td { padding-right: .5rem; }
  table { font-size: .82rem; } }
"""
