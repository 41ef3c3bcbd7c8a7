"""Hole masks from a keyed generator: the families that the paper and its peers train and are measured on (Sec. IV).

A mask is (H, W) uint8, {0, 1}, 1 = hole. Pixel lengths are the published ones and hold at a short side of 256 px; they
scale with min(H, W) / 256 [D], and every one stays at least 1 px. The same generator state, size and family give the
same mask on any machine.

No mask is empty: a box is at least 2 px wide before its inset, which leaves 1 px at least, and a stroke starts inside
the image with a disc. No mask is all hole: a box is shorter than the short side, and a family of strokes is drawn anew
when it left no valid pixel; `MAX_TRIES` draws without one raise `ValueError`, which takes settings far from the
published ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Annotated, Protocol

import numpy as np
from PIL import Image, ImageDraw
from pydantic import AfterValidator, Field
from pydantic.dataclasses import dataclass

from tmad.config import STRICT, NonNegativeFloat, PositiveFloat, PositiveInt

REFERENCE_SIDE_PX = 256
"""Short side at which the published pixel lengths hold."""
MIN_SIDE_PX = 8
"""Shortest side that a mask is drawn for."""
MAX_TRIES = 100
"""Draws of one mask before a family gives up on its conditions."""


def _ordered(ends: tuple[float, float]) -> tuple[float, float]:
    if ends[0] > ends[1]:
        raise ValueError(f"a range names its lower end first, got {ends}")
    return ends


IntRange = Annotated[tuple[PositiveInt, PositiveInt], AfterValidator(_ordered)]
"""Lowest and highest whole number that is drawn, both included."""
Fraction = Annotated[float, Field(ge=0, le=1)]


class MaskFamily(Protocol):
    """A way of drawing holes; frozen settings, no state."""

    def draw(self, height: int, width: int, rng: np.random.Generator) -> np.ndarray:
        """One mask (height, width), uint8, {0, 1}, 1 = hole, neither empty nor full."""
        ...


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Rectangle:
    """One box at random: DeepFill's by default (Yu et al. 2018), which the paper uses for rectangular holes."""

    box_px: PositiveInt = 128
    """Largest side of the box."""
    max_inset_px: Annotated[int, Field(ge=0)] = 16
    """Each side loses a whole number of pixels, uniform in 0..this (half of DeepFill's "max delta" 32), drawn once for
    rows and once for columns."""
    margin_px: Annotated[int, Field(ge=0)] = 0
    """Distance that the largest box keeps from the border."""
    centred: bool = True
    """The inset is taken off both ends (DeepFill: sides 96..128, even); off: at the top and left only (MMEditing)."""

    def __post_init__(self) -> None:
        if (2 if self.centred else 1) * self.max_inset_px >= self.box_px:
            raise ValueError(f"max_inset_px must leave something of box_px ({self.box_px}), got {self.max_inset_px}")
        if self.box_px + 2 * self.margin_px >= REFERENCE_SIDE_PX:
            raise ValueError(
                f"box_px + 2 * margin_px must be less than {REFERENCE_SIDE_PX} px, "
                f"got {self.box_px} + 2 * {self.margin_px}"
            )

    def draw(self, height: int, width: int, rng: np.random.Generator) -> np.ndarray:
        """A box whose corner is uniform in margin .. side - margin - box, the upper end excluded as published."""
        scale = _scale(height, width)
        box, margin, inset = (round(px * scale) for px in (self.box_px, self.margin_px, self.max_inset_px))
        box = min(max(box, 2), min(height, width) - 1)
        inset = min(inset, (box - 1) // 2)
        top, left = (margin + int(rng.integers(max(1, side - 2 * margin - box))) for side in (height, width))
        rows, columns = (int(cut) for cut in rng.integers(inset, size=2, endpoint=True))
        mask = np.zeros((height, width), dtype=np.uint8)
        bottom, right = top + box, left + box
        if self.centred:
            bottom, right = bottom - rows, right - columns
        mask[top + rows : bottom, left + columns : right] = 1
        return mask


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Brush:
    """DeepFill v2's free-form strokes (Yu et al. 2019), which the paper cites for irregular holes.

    Each stroke zigzags: every second segment has the mirrored angle. Its vertices are clipped to the image. The two
    random flips at the end of the published code keep nothing of the flipped image, so there are none here.
    """

    strokes: IntRange = (1, 3)
    """Fewest and most strokes."""
    segments: IntRange = (4, 11)
    """Fewest and most segments of a stroke."""
    mean_angle: PositiveFloat = 2 * math.pi / 5
    """Centre of the angles of a stroke's segments, radians."""
    max_spread: NonNegativeFloat = 2 * math.pi / 15
    """Each stroke widens its range of angles by up to this much below and above the centre, radians."""
    length_divisor: PositiveFloat = 8.0
    """Mean length of a segment L = image diagonal / this; normal with deviation floor(L / 2), clipped to [0, 2 L]."""
    width_px: IntRange = (12, 39)
    """Thinnest and widest stroke (published: a real number from 12 to below 40, truncated)."""

    def draw(self, height: int, width: int, rng: np.random.Generator) -> np.ndarray:
        """Strokes from vertices uniform over the image."""
        return _first_with_a_valid_pixel(self, lambda: self._draw_once(height, width, rng))

    def _draw_once(self, height: int, width: int, rng: np.random.Generator) -> np.ndarray:
        scale = _scale(height, width)
        length = math.hypot(height, width) / self.length_divisor
        deviation = length / scale // 2 * scale
        canvas = Image.new("L", (width, height), 0)
        for _ in range(rng.integers(*self.strokes, endpoint=True)):
            num_segments = int(rng.integers(*self.segments, endpoint=True))
            low, high = self.mean_angle + np.array([-1, 1]) * rng.uniform(0, self.max_spread, size=2)
            angles = rng.uniform(low, high, size=num_segments)
            angles[::2] = 2 * math.pi - angles[::2]
            lengths = np.clip(rng.normal(length, deviation, size=num_segments), 0, 2 * length)
            points = [(int(rng.integers(width)), int(rng.integers(height)))]
            for angle, step in zip(angles, lengths, strict=True):
                x = min(max(points[-1][0] + step * math.cos(angle), 0), width)
                y = min(max(points[-1][1] + step * math.sin(angle), 0), height)
                points.append((int(x), int(y)))
            stroke_px = max(1, round(int(rng.integers(*self.width_px, endpoint=True)) * scale))
            _draw_stroke(canvas, points, stroke_px)
        return np.array(canvas)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Irregular:
    """MMEditing's irregular masks, behind its published Partial Convolution and DeepFill v2 rows.

    Polylines whose segments each have their own width, drawn anew until the share of hole pixels lies strictly between
    the bounds. When `MAX_TRIES` draws all miss, the one that missed by the least is kept: this happens on tiny images,
    whose widths are only a few whole pixels. The published code swaps the axes of the start points, which is the same
    on square images only; here they are uniform over the image. An oblong image gets proportionally more polylines
    [D], since the same number would cover a smaller share of it.
    """

    polylines: IntRange = (4, 9)
    """Fewest and most polylines of a square image."""
    segments: IntRange = (1, 5)
    """Fewest and most segments of a polyline."""
    angle_steps: PositiveInt = 6
    """The angle of a segment is 0.01 + a whole number of radians below this; every second polyline has it mirrored."""
    length_px: IntRange = (20, 127)
    """Shortest and longest segment."""
    width_px: IntRange = (10, 44)
    """Thinnest and widest segment, as OpenCV counts: it draws a line of t pixels 2 * ceil(t / 2) + 1 pixels wide."""
    hole_fraction: Annotated[tuple[Fraction, Fraction], AfterValidator(_ordered)] = (0.15, 0.65)
    """The share of hole pixels lies strictly between these."""

    def draw(self, height: int, width: int, rng: np.random.Generator) -> np.ndarray:
        """Polylines until the hole fraction fits."""
        low, high = self.hole_fraction
        best: tuple[float, np.ndarray] | None = None
        for _ in range(MAX_TRIES):
            mask = self._draw_once(height, width, rng)
            fraction = float(mask.mean())
            if low < fraction < high:
                return mask
            missed_by = max(low - fraction, fraction - high)
            if fraction < 1 and (best is None or missed_by < best[0]):
                best = missed_by, mask
        if best is None:
            raise _only_full_masks(self)
        return best[1]

    def _draw_once(self, height: int, width: int, rng: np.random.Generator) -> np.ndarray:
        scale = _scale(height, width)
        canvas = Image.new("L", (width, height), 0)
        oblong = max(height, width) / min(height, width)
        num_polylines = round(int(rng.integers(*self.polylines, endpoint=True)) * oblong)
        for index in range(num_polylines):
            x, y = int(rng.integers(width)), int(rng.integers(height))
            num_segments = int(rng.integers(*self.segments, endpoint=True))
            angles = 0.01 + rng.integers(self.angle_steps, size=num_segments)
            if index % 2 == 0:
                angles = 2 * math.pi - angles
            lengths = rng.integers(*self.length_px, size=num_segments, endpoint=True) * scale
            widths = rng.integers(*self.width_px, size=num_segments, endpoint=True)
            for angle, length, stroke in zip(angles, lengths, widths, strict=True):
                end = int(x + length * math.cos(angle)), int(y + length * math.sin(angle))
                _draw_stroke(canvas, [(x, y), end], max(1, round(_as_opencv_draws(int(stroke)) * scale)))
                x, y = end
        return np.array(canvas)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class BrushOrRectangle:
    """The union of one box and one brush mask: DeepFill v2's training masks, here drawn per image."""

    rectangle: Rectangle = Rectangle()
    brush: Brush = Brush()

    def draw(self, height: int, width: int, rng: np.random.Generator) -> np.ndarray:
        """The box is drawn first, the strokes from what the generator gives next."""

        def draw_once() -> np.ndarray:
            return self.rectangle.draw(height, width, rng) | self.brush.draw(height, width, rng)

        return _first_with_a_valid_pixel(self, draw_once)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LineOrBoxes:
    """LaMa's evaluation masks (Suvorov et al. 2022): polylines, or, for some images, boxes.

    Draws are repeated while they cover more than `max_hole_fraction`, or nothing. Published masks are drawn on the
    whole image and cropped afterwards; here they are drawn on the crop.
    """

    polylines: IntRange
    """Fewest and most polylines; the most is one more than the published setting, as the published code draws."""
    width_px: IntRange
    """Thinnest and widest segment, as OpenCV counts."""
    length_px: IntRange
    """Shortest and longest segment."""
    segments: IntRange = (1, 5)
    """Fewest and most segments of a polyline."""
    angle_steps: PositiveInt = 4
    """The angle of a segment, from the downward axis, is 0.01 + a whole number of radians below this; every second
    polyline has it mirrored."""
    box_share: Fraction = 0.0
    """Share of the images that get boxes."""
    boxes: IntRange = (1, 1)
    """Fewest and most boxes."""
    box_px: IntRange = (10, 50)
    """Shortest and longest side of a box."""
    box_margin_px: Annotated[int, Field(ge=0)] = 0
    """Distance of boxes from the border."""
    max_hole_fraction: Fraction = 0.5
    """Masks with a larger share of hole are drawn anew."""

    def draw(self, height: int, width: int, rng: np.random.Generator) -> np.ndarray:
        """Polylines or boxes until the hole fraction fits; the smallest of `MAX_TRIES` draws if none does."""
        best: np.ndarray | None = None
        for _ in range(MAX_TRIES):
            boxes = rng.random() < self.box_share
            mask = (self._draw_boxes if boxes else self._draw_lines)(height, width, rng)
            if mask.any() and mask.mean() <= self.max_hole_fraction:
                return mask
            if mask.any() and not mask.all() and (best is None or mask.mean() < best.mean()):
                best = mask
        if best is None:
            raise _only_full_masks(self)
        return best

    def _draw_lines(self, height: int, width: int, rng: np.random.Generator) -> np.ndarray:
        scale = _scale(height, width)
        canvas = Image.new("L", (width, height), 0)
        for index in range(int(rng.integers(*self.polylines, endpoint=True))):
            x, y = int(rng.integers(width)), int(rng.integers(height))
            for _ in range(int(rng.integers(*self.segments, endpoint=True))):
                angle = 0.01 + int(rng.integers(self.angle_steps))
                angle = 2 * math.pi - angle if index % 2 == 0 else angle
                length = int(rng.integers(*self.length_px, endpoint=True)) * scale
                stroke = _as_opencv_draws(int(rng.integers(*self.width_px, endpoint=True)))
                end_x = min(max(int(x + length * math.sin(angle)), 0), width)
                end_y = min(max(int(y + length * math.cos(angle)), 0), height)
                _draw_stroke(canvas, [(x, y), (end_x, end_y)], max(1, round(stroke * scale)))
                x, y = end_x, end_y
        return np.array(canvas)

    def _draw_boxes(self, height: int, width: int, rng: np.random.Generator) -> np.ndarray:
        scale = _scale(height, width)
        margin = round(self.box_margin_px * scale)
        mask = np.zeros((height, width), dtype=np.uint8)
        for _ in range(int(rng.integers(*self.boxes, endpoint=True))):
            sides = [max(1, round(int(px) * scale)) for px in rng.integers(*self.box_px, size=2, endpoint=True)]
            tall, wide = (min(side, whole - 2 * margin) for side, whole in zip(sides, (height, width), strict=True))
            top = margin + int(rng.integers(height - 2 * margin - tall, endpoint=True))
            left = margin + int(rng.integers(width - 2 * margin - wide, endpoint=True))
            mask[top : top + tall, left : left + wide] = 1
        return mask


MASKS: Mapping[str, MaskFamily] = MappingProxyType(
    {
        "rectangle": Rectangle(),
        "rectangle_mmediting": Rectangle(max_inset_px=20, margin_px=20, centred=False),
        "brush": Brush(),
        "brush_or_rectangle": BrushOrRectangle(),
        "irregular": Irregular(),
        "lama_thin": LineOrBoxes(polylines=(4, 51), width_px=(5, 14), length_px=(10, 49)),
        "lama_medium": LineOrBoxes(
            polylines=(4, 6), width_px=(5, 54), length_px=(10, 109), box_share=0.3 / 1.3, boxes=(1, 5), box_px=(10, 50)
        ),
        "lama_thick": LineOrBoxes(
            polylines=(1, 6),
            width_px=(5, 104),
            length_px=(10, 209),
            box_share=0.3 / 1.3,
            boxes=(1, 3),
            box_px=(30, 150),
            box_margin_px=10,
        ),
    }
)
"""The families by name, with the parameters of their publications."""


def draw_mask(family: str, height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """One mask of a named family: (height, width), uint8, {0, 1}, 1 = hole; never empty, never all hole.

    Deterministic in *rng*. Raises `ValueError` for an unknown family or a side below `MIN_SIDE_PX`.
    """
    if family not in MASKS:
        raise ValueError(f"unknown mask family {family!r}; there are {', '.join(MASKS)}")
    if min(height, width) < MIN_SIDE_PX:
        raise ValueError(f"masks need sides of at least {MIN_SIDE_PX} px, got {height}x{width}")
    return MASKS[family].draw(height, width, rng)


def _scale(height: int, width: int) -> float:
    return min(height, width) / REFERENCE_SIDE_PX


def _as_opencv_draws(width: int) -> int:
    """The pixels across a line for which OpenCV was asked for *width*."""
    return (width + 1) // 2 * 2 + 1


def _draw_stroke(canvas: Image.Image, points: list[tuple[int, int]], width: int) -> None:
    """A polyline with round joints and ends: Pillow's are angular, so a disc stands at each (x, y)."""
    draw = ImageDraw.Draw(canvas)
    draw.line(points, fill=1, width=width)
    radius = width // 2
    for x, y in points:
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=1)


def _first_with_a_valid_pixel(family: MaskFamily, draw_once: Callable[[], np.ndarray]) -> np.ndarray:
    for _ in range(MAX_TRIES):
        mask = draw_once()
        if not mask.all():
            return mask
    raise _only_full_masks(family)


def _only_full_masks(family: MaskFamily) -> ValueError:
    return ValueError(f"{MAX_TRIES} draws left no valid pixel; make the strokes fewer or thinner: {family}")
