"""Sliced Wasserstein distance: against its formula written out, its order, its symmetry, its bounds."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache, partial

import numpy as np
import pytest
from PIL import Image, ImageFilter
from scipy import ndimage
from skimage import data

from tmad import swd
from tmad.masks import draw_mask
from tmad.rng import numpy_generator
from tmad.swd import VARIANTS, SlicedWasserstein, laplacian_pyramid


def blurred(radius: float, image: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(radius)))


CHANGES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "none": lambda image: image,
    **{f"blur {radius}": partial(blurred, radius) for radius in (0.7, 1.5, 3.0)},
}


@cache
def photographs(side: int) -> list[np.ndarray]:
    """Crops (side, side, 3) of sample photographs, scaled to 300 px."""
    crops = []
    for photograph in (data.astronaut(), data.chelsea(), data.coffee(), data.rocket()):
        image = np.asarray(Image.fromarray(photograph).resize((400, 300), Image.Resampling.LANCZOS))
        crops += [image[y : y + side, x : x + side] for y, x in ((20, 60), (40, 130))]
    return crops


@cache
def distances(change: str, side: int, swap: bool = False) -> dict[str, float | None]:
    """What a change in the hole of keyed boxes makes of the photographs."""
    collected = SlicedWasserstein(side=side)
    for index, truth in enumerate(photographs(side)):
        mask = draw_mask("rectangle", side, side, numpy_generator(0, index))
        result = np.where(mask[..., None] > 0, CHANGES[change](truth), truth)
        first, second = (truth, result) if swap else (result, truth)
        collected.add(str(index), first, second, mask)
    return collected.values()


def test_parts_collected_apart_and_merged_in_any_order_are_the_whole() -> None:
    whole = SlicedWasserstein(side=64, max_patches=300, num_images=8)
    parts = [SlicedWasserstein(side=64, max_patches=300, num_images=8) for _ in range(3)]
    for index, truth in enumerate(photographs(64)):
        mask = draw_mask("rectangle", 64, 64, numpy_generator(0, index))
        result = np.where(mask[..., None] > 0, blurred(1.5, truth), truth)
        whole.add(str(index), result, truth, mask)
        parts[index % 3].add(str(index), result, truth, mask)
    states = [part.state() for part in parts]
    # 300 of 8 * 128 are kept: what ranks above twice that share is dropped before it is stored.
    assert all(len(states[part]["full-0-ranks"]) < 128 * 3 for part in range(3))
    merged = SlicedWasserstein(side=64, max_patches=300, num_images=8)
    for part in (2, 0, 1):
        merged.merge(states[part])
    assert merged.values() == whole.values()
    assert merged.skipped() == whole.skipped()


def test_equal_sets_are_exactly_zero_apart() -> None:
    assert distances("none", 64) == dict.fromkeys(VARIANTS, 0.0)


@pytest.mark.parametrize("side", [64, 128])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_distance_grows_with_the_blur_of_the_hole(variant: str, side: int) -> None:
    found = [distances(change, side)[variant] for change in ("none", "blur 0.7", "blur 1.5", "blur 3.0")]
    assert found == sorted(found)
    assert found[-1] > 2 * found[1] > 0


def test_blur_shows_more_in_the_hole_than_in_the_whole_image() -> None:
    values = distances("blur 1.5", 128)
    assert values["swd_hole"] > 1.5 * values["swd_full"]


def test_half_of_the_contrast_lost_shows_only_when_scaled_by_the_truth() -> None:
    collected = SlicedWasserstein(side=64)
    for index, truth in enumerate(photographs(64)):
        dull = np.round(64 + truth / 2).astype(np.uint8)
        collected.add(str(index), dull, truth, np.ones((64, 64), np.uint8))
    values = collected.values()
    assert values["swd_hole"] < 15
    assert values["swd_hole_truthscaled"] > 150


def test_result_and_truth_change_places_without_changing_the_published_distance() -> None:
    one, other = distances("blur 1.5", 64), distances("blur 1.5", 64, swap=True)
    assert one["swd_full"] == pytest.approx(other["swd_full"], rel=1e-9)
    assert one["swd_hole"] == pytest.approx(other["swd_hole"], rel=1e-9)


def test_the_order_of_the_images_does_not_matter_even_when_patches_are_dropped() -> None:
    truths = photographs(64)
    mask = draw_mask("rectangle", 64, 64, numpy_generator(0))
    results = [blurred(2, truth) for truth in truths]
    found = []
    for order in (range(8), (5, 2, 7, 0, 1, 6, 4, 3)):
        collected = SlicedWasserstein(side=64, max_patches=150)
        for index in order:
            collected.add(str(index), results[index], truths[index], mask)
        found.append(collected.values())
    assert found[0] == found[1]


@pytest.mark.parametrize("threads", ["1", "3"])
def test_the_same_seed_gives_the_same_distance_in_another_process_with_any_number_of_threads(threads: str) -> None:
    code = (
        "import numpy as np; from tmad.swd import SlicedWasserstein\n"
        "rng = np.random.default_rng(0); s = SlicedWasserstein(side=32, seed=3)\n"
        "s.add('a', *rng.integers(0, 256, (2, 32, 32, 3), dtype=np.uint8), np.ones((32, 32), np.uint8))\n"
        "print(s.values())"
    )
    limits = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), threads)
    elsewhere = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ | limits
    ).stdout
    here = {}
    for seed in (3, 4):
        images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
        collected = SlicedWasserstein(side=32, seed=seed)
        collected.add("a", *images, np.ones((32, 32), np.uint8))
        here[seed] = collected.values()
    assert elsewhere.strip() == str(here[3])
    assert here[3] != here[4]


def test_what_is_held_stays_below_twice_the_bound() -> None:
    collected = SlicedWasserstein(side=32, patches_per_image=50, max_patches=100)
    rng = np.random.default_rng(0)
    for index in range(20):
        collected.add(str(index), *rng.integers(0, 256, (2, 32, 32, 3), dtype=np.uint8), np.ones((32, 32), np.uint8))
        for samples in collected._samples.values():
            assert all(sum(map(len, sample._patches)) < 200 for sample in samples)
    ranks, patches = collected._samples["full"][0].kept()
    assert patches.shape == (100, 2, 49, 3)
    assert ranks.max() < 0.2


@pytest.mark.parametrize("size", [(32, 48), (33, 47)])
def test_the_pyramid_is_the_binomial_one_and_its_levels_add_up_to_the_image(size: tuple[int, int]) -> None:
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    pyramid = laplacian_pyramid(image, 3)
    kernel = np.outer([1, 4, 6, 4, 1], [1, 4, 6, 4, 1])[..., None] / 256
    level = image.astype(float)
    expected = []
    for _ in range(2):
        smaller = ndimage.convolve(level, kernel, mode="mirror")[::2, ::2]
        spread = np.zeros_like(level)
        spread[::2, ::2] = smaller
        expected.append(level - ndimage.convolve(spread, 4 * kernel, mode="mirror"))
        level = smaller
    for got, wanted in zip(pyramid, [*expected, level], strict=True):
        np.testing.assert_allclose(got, wanted, atol=1e-3)


def test_the_distance_is_the_mean_gap_of_sorted_projections_of_normalised_patches() -> None:
    rng = np.random.default_rng(0)
    patches = rng.gamma(2, 30, (40, 2, 49, 3)).astype(np.float32)
    patches[:, 0] *= 1.7

    def written_out(scale_of: tuple[int, int]) -> float:
        sides = []
        for side, scale in enumerate(scale_of):
            channels = [
                (patches[:, side, :, c] - patches[:, scale, :, c].mean()) / patches[:, scale, :, c].std()
                for c in range(3)
            ]
            sides.append(np.stack(channels, axis=-1).reshape(40, 147))
        directions = numpy_generator(0, "swd", "directions").standard_normal((4 * 128, 147))
        gaps = []
        for direction in directions:
            direction = direction / np.sqrt((direction**2).sum())
            gaps.append(np.mean([abs(a - b) for a, b in zip(*(sorted(s @ direction) for s in sides), strict=True)]))
        return float(np.mean(gaps))

    assert swd._distance(patches, "own", 0) == pytest.approx(written_out((0, 1)), rel=1e-4)
    assert swd._distance(patches, "truth", 0) == pytest.approx(written_out((1, 1)), rel=1e-4)


def test_patches_of_the_hole_are_centred_in_it_at_every_level() -> None:
    # The truth is coordinates, so a low-pass patch's centre tells where it was cut.
    rows, columns = np.mgrid[0:64, 0:64]
    image = np.stack([rows * 4, columns * 4, rows * 0], axis=-1).astype(np.uint8)
    mask = np.zeros((64, 64), dtype=np.uint8)
    mask[20:40, 28:60] = 1
    collected = SlicedWasserstein(side=64)
    collected.add("a", image, image, mask)
    _, patches = collected._samples["hole"][2].kept()
    centres = patches[:, 0, 24, :2] / 4
    assert (centres[:, 0].min(), centres[:, 0].max()) == pytest.approx((20, 36), abs=0.5)
    assert (centres[:, 1].min(), centres[:, 1].max()) == pytest.approx((28, 48), abs=0.5)


def test_an_empty_hole_gives_no_hole_distance_and_is_counted() -> None:
    truth = photographs(64)[0]
    collected = SlicedWasserstein(side=64)
    collected.add("a", blurred(2, truth), truth, np.zeros((64, 64), np.uint8))
    values = collected.values()
    assert values["swd_full"] > 0
    assert values["swd_hole"] is values["swd_hole_truthscaled"] is None
    assert collected.skipped() == {"swd_full": 0, "swd_hole": 1, "swd_hole_truthscaled": 1}


def test_an_image_too_small_for_the_coarsest_level_is_left_out_and_counted() -> None:
    collected = SlicedWasserstein(side=64)
    image = photographs(64)[0]
    for index, side in enumerate((24, 25)):
        small = image[:side, :side]
        collected.add(str(index), small, small, np.ones((side, side), np.uint8))
    assert collected.skipped()["swd_full"] == 1
    assert collected.values()["swd_full"] == 0


@pytest.mark.parametrize(("side", "levels"), [(16, 1), (31, 1), (64, 3), (255, 4), (256, 5), (512, 6)])
def test_there_is_a_level_for_each_halving_down_to_16_pixels(side: int, levels: int) -> None:
    assert len(SlicedWasserstein(side=side).levels("swd_full")) == levels


def test_no_image_at_all_gives_no_distance() -> None:
    assert SlicedWasserstein().values() == dict.fromkeys(VARIANTS)


def test_flat_images_of_different_colour_are_no_texture_apart() -> None:
    one, other = (np.full((64, 64, 3), colour, dtype=np.uint8) for colour in (87, 143))
    collected = SlicedWasserstein(side=64)
    collected.add("a", one, other, np.ones((64, 64), np.uint8))
    assert collected.values()["swd_full"] == pytest.approx(0, abs=1e-6)


def test_sides_below_16_and_wrong_inputs_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 16 px, got side 15"):
        SlicedWasserstein(side=15)
    with pytest.raises(ValueError, match="result must be uint8"):
        SlicedWasserstein().add("a", np.zeros((64, 64)), np.zeros((64, 64, 3), np.uint8), np.zeros((64, 64)))
