"""Pictures of a report: as files, as one sheet, and where the zoom goes."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Picture = np.ndarray | Image.Image | bytes
"""(H, W, 3) or (H, W) uint8, a Pillow image, or the bytes of a PNG or JPEG file."""

Row = tuple[str, Mapping[str, Picture]]
"""Caption, and the pictures of a row by the heading of their column."""

Zoom = tuple[float, float, float]
"""Top, left and side of a square in a picture, shares of its height, width and size."""


def as_image(picture: Picture) -> Image.Image:
    """*picture* as Pillow has it. Raises `ValueError` for an array that is not uint8."""
    if isinstance(picture, bytes):
        return Image.open(io.BytesIO(picture))
    if isinstance(picture, Image.Image):
        return picture
    if picture.dtype != np.uint8:
        raise ValueError(f"a picture must be uint8, got {picture.dtype}; convert with tmad.images.to_uint8")
    return Image.fromarray(np.ascontiguousarray(picture))


def png_bytes(picture: Picture) -> bytes:
    """*picture* as the bytes of a PNG file."""
    buffer = io.BytesIO()
    as_image(picture).save(buffer, format="PNG", optimize=False)
    return buffer.getvalue()


def jpeg_bytes(picture: Picture, *, quality: int = 92) -> bytes:
    """*picture* as the bytes of a JPEG file with full colour."""
    buffer = io.BytesIO()
    as_image(picture).save(buffer, "JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()


def zoom_on(mask: np.ndarray, *, margin: float = 0.06) -> Zoom | None:
    """The smallest square around the hole of *mask* (H, W), with a margin; none without hole, or if all would show."""
    ends = []
    for axis, length in ((1, mask.shape[0]), (0, mask.shape[1])):
        places = np.flatnonzero(mask.any(axis=axis))
        if len(places) == 0:
            return None
        ends.append((places[0] / length, (places[-1] + 1) / length))
    side = min(1.0, max(high - low for low, high in ends) + 2 * margin)
    if side > 0.95:
        return None
    top, left = (min(max(0.0, (low + high - side) / 2), 1 - side) for low, high in ends)
    return top, left, side


def picture_grid(rows: Sequence[Row], *, cell_px: int = 192) -> np.ndarray:
    """*rows* as one picture with headings, (H, W, 3) uint8, for MLflow and for looking at without a browser.

    Each picture is scaled to fit a square of *cell_px*; the columns are those of the first row.
    """
    if not rows:
        raise ValueError("a picture grid needs at least one row")
    columns = list(rows[0][1])
    gap, head = 6, 22
    sheet = Image.new("RGB", (gap + len(columns) * (cell_px + gap), head + len(rows) * (cell_px + head + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=13)
    lefts = {name: gap + place * (cell_px + gap) for place, name in enumerate(columns)}
    for name, left in lefts.items():
        draw.text((left, 4), name, fill="black", font=font)
    for index, (caption, cells) in enumerate(rows):
        top = head + index * (cell_px + head + gap)
        draw.text((gap, top + 3), caption, fill=(110, 110, 110), font=font)
        for name in columns:
            if name in cells:
                picture = as_image(cells[name]).convert("RGB")
                scale = cell_px / max(picture.size)
                size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
                sheet.paste(picture.resize(size, Image.Resampling.LANCZOS), (lefts[name], top + head))
    return np.asarray(sheet)
