"""Texture memory: window counts against brute force, the two rules, every edge case."""

from __future__ import annotations

from itertools import chain
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tmad.tiny import make_mask
from tmad.memory import nearest_windows, select_pool, window_hole_counts

RULES = ["clean", "fewest"]


def counts_twin(mask: np.ndarray, patch_size: int, stride: int) -> list[list[int]]:
    """Hole pixels of every window, counted window by window."""
    height, width = mask.shape
    return [
        [int(mask[y : y + patch_size, x : x + patch_size].sum()) for x in range(0, width - patch_size + 1, stride)]
        for y in range(0, height - patch_size + 1, stride)
    ]


def pool(
    mask: np.ndarray, rule: str, *, patch_size: int = 8, stride: int = 4, size: int = 10, seed: int = 0
) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return select_pool(mask, patch_size=patch_size, stride=stride, pool_size=size, rule=rule, rng=rng)  # type: ignore[arg-type]


def holes_in(mask: np.ndarray, corners: np.ndarray, patch_size: int = 8) -> list[int]:
    return [int(mask[y : y + patch_size, x : x + patch_size].sum()) for y, x in corners]


@st.composite
def masks(draw: st.DrawFn) -> tuple[np.ndarray, int, int]:
    patch_size = draw(st.integers(1, 6))
    height, width = draw(st.integers(patch_size, 17)), draw(st.integers(patch_size, 17))
    bits = draw(st.binary(min_size=height * width, max_size=height * width))
    mask = (np.frombuffer(bits, np.uint8).reshape(height, width) > 127).astype(np.uint8)
    return mask, patch_size, draw(st.integers(1, patch_size))


@given(masks())
def test_window_counts_equal_counting_each_window(case: tuple[np.ndarray, int, int]) -> None:
    mask, patch_size, stride = case
    counts = window_hole_counts(mask, patch_size=patch_size, stride=stride)
    assert counts.tolist() == counts_twin(mask, patch_size, stride)


def test_counts_of_a_large_hole_do_not_overflow_the_mask_type() -> None:
    mask = np.ones((64, 64), dtype=np.uint8)
    assert window_hole_counts(mask, patch_size=32, stride=32).tolist() == [[1024, 1024], [1024, 1024]]


@settings(max_examples=60)
@given(masks(), st.sampled_from(RULES), st.integers(1, 30))
def test_every_pool_lies_inside_on_the_stride_and_has_the_fewest_holes_possible(
    case: tuple[np.ndarray, int, int], rule: str, size: int
) -> None:
    mask, patch_size, stride = case
    if mask.all():
        mask[0, 0] = 0
    corners = pool(mask, rule, patch_size=patch_size, stride=stride, size=size)
    assert corners.shape == (size, 2)
    assert corners.dtype == np.int16
    assert (corners >= 0).all()
    assert (corners + patch_size <= mask.shape).all()
    assert (corners % stride == 0).all()
    counts = sorted(chain(*counts_twin(mask, patch_size, stride)))
    with_texture = [count for count in counts if count < patch_size**2] or counts
    distinct = {tuple(corner) for corner in corners.tolist()}
    assert len(distinct) == min(size, len(with_texture))
    assert sorted(holes_in(mask, np.array(sorted(distinct)), patch_size)) == with_texture[: len(distinct)]


@pytest.mark.parametrize("rule", RULES)
def test_no_hole_pixel_enters_while_clean_windows_suffice(rule: str) -> None:
    mask = make_mask()
    for seed in range(20):
        assert holes_in(mask, pool(mask, rule, seed=seed)) == [0] * 10


@pytest.mark.parametrize("rule", RULES)
def test_clean_windows_are_drawn_uniformly(rule: str) -> None:
    mask = make_mask(side=16, top=8, left=8, height=8, width=8)
    clean = [corner for corner in np.ndindex(3, 3) if corner[0] == 0 or corner[1] == 0]
    times = dict.fromkeys(clean, 0)
    rng = np.random.default_rng(0)
    for _ in range(1000):
        # One generator for all draws, as a long run has it.
        chosen = select_pool(mask, patch_size=8, stride=4, pool_size=1, rule=rule, rng=rng)  # type: ignore[arg-type]
        times[tuple(chosen[0] // 4)] += 1
    assert min(times.values()) > 150
    assert max(times.values()) < 250


@pytest.mark.parametrize("rule", RULES)
def test_too_few_clean_windows_are_completed_with_those_of_the_fewest_hole_pixels(rule: str) -> None:
    mask = np.ones((32, 32), dtype=np.uint8)
    mask[:12, :12] = 0
    corners = pool(mask, rule, size=6)
    counts = sorted(chain(*counts_twin(mask, 8, 4)))
    assert holes_in(mask, corners) == counts[:6]
    assert holes_in(mask, corners)[:4] == [0, 0, 0, 0]
    assert holes_in(mask, corners)[4] > 0


def test_ties_among_partly_masked_windows_are_drawn_at_random() -> None:
    mask = np.zeros((8, 32), dtype=np.uint8)
    mask[0] = 1
    firsts = {tuple(pool(mask, "fewest", size=1, seed=seed)[0]) for seed in range(60)}
    assert len(firsts) == 7


@pytest.mark.parametrize("rule", RULES)
def test_fewer_windows_than_the_pool_are_repeated_evenly(rule: str) -> None:
    corners = pool(np.zeros((8, 16), dtype=np.uint8), rule, size=8)
    unique, times = np.unique(corners, axis=0, return_counts=True)
    assert unique.tolist() == [[0, 0], [0, 4], [0, 8]]
    assert sorted(times) == [2, 3, 3]


@pytest.mark.parametrize("rule", RULES)
def test_an_image_of_one_window_is_its_own_memory(rule: str) -> None:
    mask = np.zeros((8, 8), dtype=np.uint8)
    mask[:3] = 1
    assert pool(mask, rule, size=5).tolist() == [[0, 0]] * 5


@pytest.mark.parametrize("rule", RULES)
def test_a_window_of_nothing_but_hole_is_left_out_even_where_the_pool_must_repeat(rule: str) -> None:
    mask = np.ones((8, 24), dtype=np.uint8)
    mask[:, 0] = 0
    assert pool(mask, rule, stride=8, size=4).tolist() == [[0, 0]] * 4


@pytest.mark.parametrize("rule", RULES)
def test_texture_between_the_windows_alone_still_gives_a_pool(rule: str) -> None:
    mask = np.ones((8, 20), dtype=np.uint8)
    mask[:, 16:] = 0
    assert pool(mask, rule, stride=8, size=4).shape == (4, 2)


@pytest.mark.parametrize("rule", RULES)
def test_nothing_but_hole_is_an_error(rule: str) -> None:
    with pytest.raises(ValueError, match="nothing but hole"):
        pool(np.ones((16, 16), dtype=np.uint8), rule)


def test_sides_shorter_than_a_patch_and_longer_than_int16_are_errors() -> None:
    with pytest.raises(ValueError, match=r"at least patch_size \(8\), got 7x64"):
        pool(np.zeros((7, 64), dtype=np.uint8), "clean")
    with pytest.raises(ValueError, match="up to 32767, got 8x32768"):
        pool(np.zeros((8, 32768), dtype=np.uint8), "clean")


@pytest.mark.parametrize("rule", RULES)
def test_the_pool_is_a_function_of_mask_and_generator(rule: str) -> None:
    mask = make_mask()
    assert pool(mask, rule, seed=3).tolist() == pool(mask, rule, seed=3).tolist()
    assert pool(mask, rule, seed=3).tolist() != pool(mask, rule, seed=4).tolist()


@pytest.mark.parametrize("rule", ["clean", "fewest"])
@pytest.mark.parametrize("hole", [12, 40], ids=["many-clean-windows", "few-clean-windows"])
def test_the_first_windows_of_a_larger_memory_are_a_smaller_memory(rule: str, hole: int) -> None:
    mask = np.zeros((64, 64), dtype=np.uint8)
    mask[4 : 4 + hole, 4 : 4 + hole] = 1
    counts = window_hole_counts(mask, patch_size=16, stride=8)
    options: dict[str, Any] = {"patch_size": 16, "stride": 8, "rule": rule}
    large = select_pool(mask, pool_size=24, rng=np.random.default_rng(1), **options)
    small = select_pool(mask, pool_size=6, rng=np.random.default_rng(2), **options)
    # Other windows, as chance has it, with as many hole pixels.
    found, expected = (sorted(counts[y // 8, x // 8] for y, x in pool) for pool in (large[:6], small))
    assert found == expected


def test_the_windows_nearest_to_the_hole_are_clean_and_on_the_grid_and_come_first() -> None:
    mask = np.zeros((160, 200), np.uint8)
    mask[70:90, 100:130] = 1
    found = nearest_windows(mask, patch_size=16, stride=8, most=10**6)
    places = {(y, x) for y in range(0, 145, 8) for x in range(0, 185, 8) if not mask[y : y + 16, x : x + 16].any()}
    assert {tuple(place) for place in found.tolist()} == places
    assert len(found) == len(places)
    dirty = np.argwhere(window_hole_counts(mask, patch_size=16, stride=8)) * 8
    distances = np.abs(found[:, None].astype(int) - dirty).max(-1).min(-1)
    assert (np.diff(distances) >= 0).all()
    few = nearest_windows(mask, patch_size=16, stride=8, most=50)
    assert len(few) == 50
    assert np.abs(few[:, None].astype(int) - dirty).max(-1).min(-1).max() <= distances[50]


def test_all_windows_are_near_to_a_hole_that_none_of_the_grid_touches() -> None:
    mask = np.zeros((64, 70), np.uint8)
    mask[15:17, 69] = 1
    assert len(nearest_windows(mask, patch_size=16, stride=8, most=100)) == 7 * 7
    assert len(nearest_windows(np.ones((64, 64), np.uint8), patch_size=16, stride=8, most=100)) == 0
