"""Mask families: reproducible from their key, as published in size and statistics, never empty, never all hole."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from tmad.draws import hole_cells
from tmad.masks import MASKS, MAX_TRIES, Brush, BrushOrRectangle, Irregular, Rectangle, draw_mask
from tmad.rng import numpy_generator

DRAWS = 400
EVERY_FAMILY = pytest.mark.parametrize("family", MASKS)


@cache
def drawn(family: str) -> np.ndarray:
    """(DRAWS, 256, 256) masks."""
    return np.stack([draw_mask(family, 256, 256, numpy_generator(0, "mask", family, index)) for index in range(DRAWS)])


def box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Top, left, height and width of the smallest box around the hole."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return rows[0], columns[0], rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1


@EVERY_FAMILY
def test_a_mask_is_uint8_with_zeros_and_ones(family: str) -> None:
    mask = draw_mask(family, 48, 80, numpy_generator(0))
    assert mask.dtype == np.uint8
    assert mask.shape == (48, 80)
    assert set(np.unique(mask)) == {0, 1}
    assert mask.flags.writeable


def test_the_same_key_gives_the_same_masks_in_another_process() -> None:
    code = (
        "import hashlib; from tmad.masks import MASKS, draw_mask; from tmad.rng import numpy_generator\n"
        "masks = [draw_mask(name, 96, 160, numpy_generator(3, 'mask', 'a/b.jpg', 1)) for name in MASKS]\n"
        "print(hashlib.sha256(b''.join(mask.tobytes() for mask in masks)).hexdigest())"
    )
    elsewhere = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    here = [draw_mask(name, 96, 160, numpy_generator(3, "mask", "a/b.jpg", 1)) for name in MASKS]
    assert hashlib.sha256(b"".join(mask.tobytes() for mask in here)).hexdigest() == elsewhere


@EVERY_FAMILY
def test_another_image_id_gives_another_mask(family: str) -> None:
    first, second = (draw_mask(family, 256, 256, numpy_generator(0, "mask", name)) for name in ("a", "b"))
    assert (first != second).any()


@EVERY_FAMILY
@settings(max_examples=60, deadline=None)
@given(height=st.integers(8, 90), width=st.integers(8, 90), seed=st.integers(0, 10**6))
def test_no_mask_is_empty_or_all_hole_at_any_size(family: str, height: int, width: int, seed: int) -> None:
    mask = draw_mask(family, height, width, numpy_generator(seed))
    assert mask.shape == (height, width)
    assert 0 < mask.sum() < mask.size


def test_deepfills_boxes_have_even_sides_from_96_to_128_and_keep_to_the_published_places() -> None:
    masks = drawn("rectangle")
    tops, lefts, heights, widths = np.array([box(mask) for mask in masks]).T
    assert set(heights) == set(widths) == set(range(96, 129, 2))
    assert (heights != widths).any()
    assert (masks.sum(axis=(1, 2)) == heights * widths).all()
    # Before the inset of (128 - side) / 2 the corner is in 0..127: the last place, 128, is never drawn.
    for corners, sides in ((tops, heights), (lefts, widths)):
        before = corners - (128 - sides) // 2
        assert (before.min(), before.max()) == pytest.approx((0, 127), abs=3)
        assert before.min() >= 0
        assert before.max() <= 127


def test_mmeditings_boxes_have_sides_from_108_to_128_within_a_margin_of_20() -> None:
    tops, lefts, heights, widths = np.array([box(mask) for mask in drawn("rectangle_mmediting")]).T
    assert set(heights) == set(widths) == set(range(108, 129))
    for corners, sides in ((tops, heights), (lefts, widths)):
        before = corners - (128 - sides)
        assert before.min() >= 20
        assert before.max() <= 107
        assert (corners + sides).max() <= 107 + 128


# mean, 5 % and 95 % quantile of the hole fraction and mean of 10 log10(fraction), of the published generators run as
# published at 256 px, 800-2,000 draws each.
MEASURED = {
    "rectangle": (0.191, 0.155, 0.231, -7.22),
    "rectangle_mmediting": (0.213, 0.188, 0.239, -6.73),
    "brush": (0.152, 0.037, 0.293, -8.96),
    "brush_or_rectangle": (0.311, 0.208, 0.436, -5.18),
    "irregular": (0.347, 0.197, 0.508, -4.77),
}


@EVERY_FAMILY
def test_hole_fractions_are_distributed_as_those_of_the_published_generators(family: str) -> None:
    fractions = drawn(family).mean(axis=(1, 2))
    mean, low, high, decibels = MEASURED[family]
    error_of_mean = fractions.std() * np.sqrt(1 / DRAWS + 1 / 800)
    assert abs(fractions.mean() - mean) < 3 * error_of_mean
    assert np.quantile(fractions, 0.05) == pytest.approx(low, abs=0.02)
    assert np.quantile(fractions, 0.95) == pytest.approx(high, abs=0.03)
    assert 10 * np.log10(fractions).mean() == pytest.approx(decibels, abs=0.35)


@pytest.mark.parametrize(("family", "most"), [("rectangle", 25), ("rectangle_mmediting", 25)])
def test_no_box_touches_more_than_25_cells_of_32_pixels(family: str, most: int) -> None:
    assert max(len(hole_cells(mask, 32)) for mask in drawn(family)) <= most


def test_irregular_masks_keep_strictly_to_their_range_of_hole_fractions() -> None:
    fractions = drawn("irregular").mean(axis=(1, 2))
    assert fractions.min() > 0.15
    assert fractions.max() < 0.65


def test_irregular_masks_reach_their_range_on_a_panorama() -> None:
    fractions = [draw_mask("irregular", 64, 512, numpy_generator(index)).mean() for index in range(20)]
    assert all(0.15 < fraction < 0.65 for fraction in fractions)


def test_an_unreachable_range_gives_the_nearest_of_the_draws() -> None:
    family = Irregular(hole_fraction=(0.98, 0.99))
    mask = family.draw(32, 32, numpy_generator(0))
    rng = numpy_generator(0)
    draws = [family._draw_once(32, 32, rng).mean() for _ in range(MAX_TRIES)]
    assert mask.mean() == max(draws) < 0.98


def test_the_union_is_the_box_and_then_the_strokes_of_one_generator() -> None:
    rng = numpy_generator(5)
    parts = Rectangle().draw(256, 256, rng), Brush().draw(256, 256, rng)
    union = draw_mask("brush_or_rectangle", 256, 256, numpy_generator(5))
    assert (union == np.maximum(*parts)).all()
    assert union.sum() > max(part.sum() for part in parts)


@pytest.mark.parametrize("family", ["rectangle", "rectangle_mmediting", "brush", "irregular"])
def test_lengths_scale_with_the_short_side(family: str) -> None:
    fractions = [
        np.mean([draw_mask(family, side, side, numpy_generator(0, index)).mean() for index in range(150)])
        for side in (128, 256)
    ]
    assert fractions[0] == pytest.approx(fractions[1], rel=0.12)


def test_a_box_on_an_oblong_image_follows_the_short_side() -> None:
    sides = {box(draw_mask("rectangle", 256, 1000, numpy_generator(index)))[2:] for index in range(50)}
    assert {side for pair in sides for side in pair} <= set(range(96, 129, 2))
    lefts = [box(draw_mask("rectangle", 256, 1000, numpy_generator(index)))[1] for index in range(50)]
    assert max(lefts) > 600


def test_a_brush_stroke_is_as_wide_as_it_says_and_round_at_its_end() -> None:
    family = Brush(strokes=(1, 1), segments=(1, 1), width_px=(21, 21), mean_angle=1e-9, max_spread=0)
    mask = next(mask for index in range(99) if box(mask := family.draw(256, 256, numpy_generator(index)))[1] > 40)
    top, left, height, width = box(mask)
    assert abs(height - 21) <= 1
    assert width > 30
    assert mask[:, left].sum() < 12
    assert abs(int(mask[:, left + 12].sum()) - 21) <= 1
    assert (mask[top + 10, left : left + width] == 1).all()


def test_irregular_segments_are_as_wide_as_opencv_draws_them() -> None:
    family = Irregular(polylines=(1, 1), segments=(1, 1), length_px=(90, 90), width_px=(11, 11), hole_fraction=(0, 1))
    masks = [family.draw(400, 400, numpy_generator(index)) for index in range(20)]
    inside = [mask for mask in masks if not (mask[[0, -1]].any() or mask[:, [0, -1]].any())]
    scale = 400 / 256
    # 11 px become 13, with half a disc at either end.
    area = (90 * 13 + np.pi / 4 * 13**2) * scale**2
    assert np.mean([mask.sum() for mask in inside]) == pytest.approx(area, rel=0.07)


FILLING = {"strokes": (50, 50), "width_px": (255, 255)}


@pytest.mark.parametrize(
    "draw",
    [
        Brush(**FILLING).draw,
        BrushOrRectangle(brush=Brush(**FILLING)).draw,
        Irregular(polylines=(50, 50), width_px=(255, 255)).draw,
    ],
)
def test_settings_that_leave_no_valid_pixel_are_an_error_after_bounded_tries(
    draw: Callable[[int, int, np.random.Generator], np.ndarray],
) -> None:
    with pytest.raises(ValueError, match=r"100 draws left no valid pixel.*255"):
        draw(64, 64, numpy_generator(0))


def test_an_unknown_family_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'brushes'; there are rectangle, rectangle_mmediting, brush, "):
        draw_mask("brushes", 256, 256, numpy_generator(0))


def test_sides_below_eight_pixels_are_refused_with_their_size() -> None:
    with pytest.raises(ValueError, match="at least 8 px, got 7x64"):
        draw_mask("brush", 7, 64, numpy_generator(0))


def test_settings_that_contradict_themselves_are_refused() -> None:
    with pytest.raises(ValidationError, match=r"max_inset_px must leave something of box_px \(30\), got 16"):
        Rectangle(box_px=30)
    with pytest.raises(ValidationError, match=r"less than 256 px, got 200 \+ 2 \* 28"):
        Rectangle(box_px=200, margin_px=28)
    with pytest.raises(ValidationError, match=r"lower end first, got \(3, 1\)"):
        Brush(strokes=(3, 1))
    with pytest.raises(ValidationError, match="unexpected"):
        Brush(stroke=(1, 3))  # type: ignore[call-arg]
