"""Holes: masks of any kind read, grown and faded; groups of holes with the context around them.

Masks are (H, W), uint8, {0, 1}, 1 = hole, as everywhere outside the model.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

from tmad.images import DEEP_MODES, to_rgb

MaskValue = Literal["grey", "nonzero", "alpha"]
Colour = Literal["white", "black"]

MASK_THRESHOLD = 127
"""Grey values above it are white."""

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


@dataclass(frozen=True)
class MaskRule:
    """How a picture of a hole is read, everywhere; the table is in docs/inpaint.md."""

    hole: Colour = "white"
    """Which colour is the hole; it is never guessed."""
    value: MaskValue = "grey"
    """`grey`: the brightest of a pixel's channels counts, alpha is not looked at; `nonzero`: everything that is not 0
    (a palette's index, a label's number) is white; `alpha`: what is opaque is white."""
    threshold: int = MASK_THRESHOLD
    """0 to 254: values above it are white, on a scale to 255."""

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 254:
            raise ValueError(f"mask_threshold must lie in 0 to 254, got {self.threshold}")
        if self.value == "nonzero" and self.threshold != MASK_THRESHOLD:
            raise ValueError("mask_threshold does not go with mask_value=nonzero, which has one of its own: 0")


PLAIN_MASK = MaskRule()
"""White is the hole."""


def hole_mask(
    mask: np.ndarray | Image.Image, rule: MaskRule = PLAIN_MASK, *, image_id: str = ""
) -> tuple[np.ndarray, tuple[str, ...]]:
    """A mask as (H, W) uint8 {0, 1}, 1 = hole, and a note where it shows something, but nothing that counts as white.

    Arrays are (H, W), (1, H, W), (H, W, 1), or (H, W, 3) and (H, W, 4), of whose colours the brightest counts: boolean,
    true = white; integers, with no value above 1, 1 = white, else grey to 255, or to 65535; floats in [0, 1]. Pillow
    images may have any mode. What is white says *rule*. The note is given as an `EmptyMaskWarning` too.

    Raises `UnusableInput` for another shape, for values out of range, and for a mask without alpha where *rule* asks
    for it.
    """
    grey = mask_grey(mask, rule.value, image_id=image_id)
    white = grey > (0 if rule.value == "nonzero" else rule.threshold)
    notes: tuple[str, ...] = ()
    if not white.any():
        other = (
            "a hole in its alpha channel: mask_value alpha" if rule.value != "alpha" and _has_varied_alpha(mask) else ""
        )
        if grey.any():
            other = other or "mask_value nonzero, or a lower mask_threshold, if these are the hole"
            notes = (f"the mask has values up to {grey.max()}, none above {rule.threshold}: nothing is white; {other}",)
        elif other:
            notes = (f"the mask is black, with {other}",)
    if notes:
        warnings.warn(named(image_id) + notes[0], EmptyMaskWarning, stacklevel=3)
    return (white if rule.hole == "white" else ~white).view(np.uint8), notes


def mask_grey(mask: np.ndarray | Image.Image, value: MaskValue = "grey", *, image_id: str = "") -> np.ndarray:
    """What of a mask is looked at, as (H, W) uint8 on a scale to 255. Raises `UnusableInput`, as `hole_mask`."""
    values = _of_picture(mask, value, image_id) if isinstance(mask, Image.Image) else np.asarray(mask)
    if values.ndim == 3 and values.shape[2] in (1, 3, 4):
        of_alpha = value == "alpha" and values.shape[2] == 4
        values = values[..., 3] if of_alpha else values[..., :3].max(axis=2)
    elif values.ndim == 3 and len(values) == 1:
        values = values[0]
    if trouble := _mask_trouble(values):
        raise UnusableInput("unreadable-array", named(image_id) + trouble)
    if value == "nonzero":
        return (values != 0) * np.uint8(255)
    if values.dtype.kind == "b":
        return values * np.uint8(255)
    if values.dtype.kind == "f":
        return np.ceil(values * 255 - 0.5).astype(np.uint8)  # one half is not above one half
    high = values.max()
    if high <= 1:
        return values.astype(np.uint8, copy=False) * np.uint8(255)
    return ((values.astype(np.int64) + 128) // 257).astype(np.uint8) if high > 255 else values.astype(np.uint8)


def _of_picture(mask: Image.Image, value: MaskValue, image_id: str) -> np.ndarray:
    if value == "alpha":
        if not mask.has_transparency_data:
            message = f"the mask's mode {mask.mode} has no alpha channel, which mask_value=alpha asks for"
            raise UnusableInput("no-alpha", named(image_id) + message)
        alpha = np.asarray((mask.convert("LA") if mask.mode == "La" else mask).convert("RGBA").getchannel("A"))
        return alpha
    if mask.mode in ("P", "PA") and value == "nonzero":
        return np.asarray(mask.getchannel("P") if mask.mode == "PA" else mask)
    if mask.mode == "F":
        values = np.nan_to_num(np.asarray(mask), nan=0.0)
        return values if values.min() >= 0 and values.max() <= 1 else np.clip(values, 0, 255).astype(np.uint8)
    if mask.mode in ("1", "L", *DEEP_MODES):
        return np.asarray(mask)
    return to_rgb(mask).max(axis=2)


def _has_varied_alpha(mask: np.ndarray | Image.Image) -> bool:
    if not isinstance(mask, Image.Image) or not mask.has_transparency_data:
        return False
    low, high = mask.convert("RGBA").getchannel("A").getextrema()
    return low != high


def _mask_trouble(values: np.ndarray) -> str:
    if values.ndim != 2 or values.size == 0:
        return f"the mask must be (H, W), (1, H, W), or (H, W) with 1, 3 or 4 channels, got {values.shape}"
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


def scaled_hole(hole: np.ndarray, height: int, width: int) -> np.ndarray:
    """A hole (H, W) at another size, by the nearest pixel: it stays 0 and 1."""
    return np.asarray(Image.fromarray(hole).resize((width, height), Image.Resampling.NEAREST))


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
    for axis in (1, 0):  # first along the rows, which NumPy does faster
        block = ((np.arange(hole.shape[axis]) + 0.5) / size).astype(np.int64)
        starts = np.flatnonzero(np.diff(block, prepend=-1))
        hole = np.maximum.reduceat(hole, starts, axis=axis)
    return hole > 0


def dilate(hole: np.ndarray, pixels: int) -> np.ndarray:
    """The hole grown by *pixels* to all sides, corners square; itself if there is nothing to grow."""
    if not hole.any():
        return hole
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
