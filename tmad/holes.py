"""Holes: masks of any kind read, grown and faded; groups of holes with the context around them.

Masks are (H, W), uint8, {0, 1}, 1 = hole, as everywhere outside the model.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import numpy as np
from PIL import Image

from tmad.images import to_rgb

MASK_THRESHOLD = 127
"""Grey values above it are hole."""

MAX_USUAL_HOLE = 0.5
"""A mask with more hole than this, and more than this share of its border, is probably inverted."""


class MaskPolarityWarning(UserWarning):
    """The mask looks inverted: white should be the hole."""


class EmptyMaskWarning(UserWarning):
    """The mask has grey values, but none that counts as hole."""


class UnusableInput(ValueError):
    """Image and mask that cannot be worked on. `reason` is a short name to count by: `size-mismatch`, `all-hole`,
    `unreadable-array`."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(reason, message)
        self.reason = reason

    def __str__(self) -> str:
        return str(self.args[1])


class Box(NamedTuple):
    """A part of a picture, in pixels; the lower and right ends are not in it."""

    top: int
    left: int
    bottom: int
    right: int

    @property
    def height(self) -> int:
        """Rows."""
        return self.bottom - self.top

    @property
    def width(self) -> int:
        """Columns."""
        return self.right - self.left

    @property
    def slices(self) -> tuple[slice, slice]:
        """What indexes an array (H, W, ...)."""
        return slice(self.top, self.bottom), slice(self.left, self.right)

    @property
    def corners(self) -> tuple[int, int, int, int]:
        """Left, upper, right, lower: as Pillow counts."""
        return self.left, self.top, self.right, self.bottom


def hole_mask(mask: np.ndarray | Image.Image, *, image_id: str = "") -> tuple[np.ndarray, tuple[str, ...]]:
    """A mask as (H, W) uint8 {0, 1}, 1 = hole, and notes about it.

    Boolean: true = hole. Integers: with no value above 1, 1 = hole; otherwise grey, above 127 = hole (16-bit values
    count by their upper byte). Floats must lie in [0, 1]: above 0.5 = hole. Pillow images: 1-bit as boolean, grey of 8
    or 16 bits as integers, everything else by its grey value; alpha is ignored. Grey values of which none is above 127
    warn.

    Raises `UnusableInput` for more than two dimensions and for values out of range.
    """
    if isinstance(mask, Image.Image):
        plain = mask.mode in ("1", "L", "I") or mask.mode.startswith("I;16")
        values = np.asarray(mask if plain else Image.fromarray(to_rgb(mask)).convert("L"))
    else:
        values = np.asarray(mask)
    trouble = _mask_trouble(values)
    if trouble:
        raise UnusableInput("unreadable-array", named(image_id) + trouble)
    if values.dtype.kind in "bf":
        return (values > 0.5).astype(np.uint8), ()
    high = values.max()
    if high <= 1:
        return values.astype(np.uint8), ()
    grey = values >> 8 if high > 255 else values
    hole = (grey > MASK_THRESHOLD).astype(np.uint8)
    notes: tuple[str, ...] = ()
    if not hole.any():
        notes = (f"the mask has values up to {high}, none above {MASK_THRESHOLD}: nothing counts as hole",)
        warnings.warn(named(image_id) + notes[0], EmptyMaskWarning, stacklevel=3)
    return hole, notes


def _mask_trouble(values: np.ndarray) -> str:
    if values.ndim != 2 or values.size == 0:
        return f"the mask must have two dimensions (H, W), got {values.shape}"
    if values.dtype.kind not in "buif":
        return f"the mask must be bool, integer or float, got {values.dtype}"
    low, high = values.min(), values.max()
    if values.dtype.kind == "f" and not (low >= 0 and high <= 1):
        return f"a float mask must lie in [0, 1], got [{low:g}, {high:g}]"
    if values.dtype.kind in "ui" and not (low >= 0 and high <= 65535):
        return f"mask values must lie in [0, 255] or [0, 65535], got [{low}, {high}]"
    return ""


def polarity_notes(hole: np.ndarray, image_id: str) -> tuple[str, ...]:
    """A note, also given as a warning, if most of the image and of its border is hole."""
    border = np.concatenate([hole[0], hole[-1], hole[1:-1, 0], hole[1:-1, -1]])
    if hole.mean() <= MAX_USUAL_HOLE or border.mean() <= MAX_USUAL_HOLE:
        return ()
    note = (
        f"the mask may be inverted: {hole.mean():.0%} of the image and {border.mean():.0%} of its border are hole; "
        "white (1) is the hole, black (0) is kept"
    )
    warnings.warn(named(image_id) + note, MaskPolarityWarning, stacklevel=3)
    return (note,)


def named(image_id: str) -> str:
    """What stands before a message about an image that has a name."""
    return f"{image_id}: " if image_id else ""


def group_holes(hole: np.ndarray, *, multiple: int, context: int) -> list[Box]:
    """Boxes that hold all holes, each with at least *context* pixels around it as far as the picture goes.

    Holes nearer to each other than *context* share a box; no box reaches into the hole of another. Corners are
    multiples of *multiple*, ends too, except at the picture's own. In raster order of their upper left corners.
    """
    height, width = hole.shape
    margin = -(-context // multiple)
    found = []
    for top, left, bottom, right in _cut(block_any(hole, multiple), 0, 0, max(1, margin)):
        box = (max(0, top - margin), max(0, left - margin), bottom + margin, right + margin)
        top, left, bottom, right = (side * multiple for side in box)
        found.append(Box(top, left, min(bottom, height), min(right, width)))
    return sorted(found)


def _cut(grid: np.ndarray, top: int, left: int, gap: int) -> list[tuple[int, int, int, int]]:
    """Boxes of the true cells of *grid*, parted wherever *gap* rows or columns are empty from side to side."""
    for axis in (0, 1):
        parts = _runs(np.asarray(grid.any(axis=1 - axis)), gap)
        if len(parts) != 1:
            return [
                box
                for first, last in parts
                for box in _cut(
                    grid[first:last] if axis == 0 else grid[:, first:last],
                    top + first * (axis == 0),
                    left + first * (axis == 1),
                    gap,
                )
            ]
        first, last = parts[0]
        grid = grid[first:last] if axis == 0 else grid[:, first:last]
        top, left = (top + first, left) if axis == 0 else (top, left + first)
    if len(_runs(np.asarray(grid.any(axis=1)), gap)) > 1:  # columns that were cut off may have joined two parts
        return _cut(grid, top, left, gap)
    return [(top, left, top + grid.shape[0], left + grid.shape[1])]


def _runs(line: np.ndarray, gap: int) -> list[tuple[int, int]]:
    """[first, last) of the stretches of true values that at least *gap* false ones part."""
    places = np.flatnonzero(line)
    if places.size == 0:
        return []
    ends = np.flatnonzero(np.diff(places) > gap)
    firsts = places[np.concatenate([[0], ends + 1])]
    lasts = places[np.concatenate([ends, [places.size - 1]])]
    return [(int(first), int(last) + 1) for first, last in zip(firsts, lasts, strict=True)]


def block_any(hole: np.ndarray, size: float) -> np.ndarray:
    """Which blocks of *size* x *size* pixels hold a hole pixel, bool; *size* may have a fraction, the last blocks may
    reach beyond the picture."""
    for axis in (0, 1):
        block = ((np.arange(hole.shape[axis]) + 0.5) / size).astype(np.int64)
        starts = np.flatnonzero(np.diff(block, prepend=-1))
        hole = np.maximum.reduceat(hole, starts, axis=axis)
    return hole > 0


def dilate(hole: np.ndarray, pixels: int) -> np.ndarray:
    """The hole grown by *pixels* to all sides, corners square; a new array unless *pixels* is 0."""
    for axis in (0, 1):
        grown = 0
        while grown < pixels:
            # What has grown so far, moved by as much again, grows twice as far.
            step = min(max(1, grown), pixels - grown)
            rest, moved = (slice(None, -step), slice(step, None))
            here, there = ((part, slice(None)) if axis == 0 else (slice(None), part) for part in (rest, moved))
            wider = hole.copy()
            wider[here] |= hole[there]
            wider[there] |= hole[here]
            hole, grown = wider, grown + step
    return hole


def fade(hole: np.ndarray, pixels: int) -> np.ndarray:
    """How much of the filled picture is shown, (H, W), uint8: 255 in the hole, falling to 0 over *pixels* around it."""
    weight = hole * np.uint8(255)
    for distance in range(1, pixels + 1):
        hole = dilate(hole, 1)
        weight[(weight == 0) & (hole > 0)] = round(255 * (1 - distance / (pixels + 1)))
    return weight
