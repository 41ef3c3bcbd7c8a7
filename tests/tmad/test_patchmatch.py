"""The PatchMatch fill: continues a texture, repeats itself, never reads the hole."""

from __future__ import annotations

import numpy as np
import pytest

from tests.tmad.tiny import make_image, make_mask
from tmad.masks import MASKS, draw_mask
from tmad.metrics import measure
from tmad.patchmatch import patchmatch_fill
from tmad.rng import numpy_generator


def checkers(side: int = 96, period: int = 12) -> np.ndarray:
    y, x = np.mgrid[0:side, 0:side]
    tone = ((y // (period // 2) + x // (period // 2)) % 2 * 160 + 40).astype(np.uint8)
    return np.repeat(tone[..., None], 3, axis=2)


def fill(image: np.ndarray, mask: np.ndarray, seed: int = 0) -> np.ndarray:
    return patchmatch_fill(np.where(mask[..., None] > 0, np.uint8(0), image), mask, numpy_generator(seed, "patchmatch"))


def test_a_repeating_texture_is_continued_with_its_contrast() -> None:
    image, mask = checkers(), make_mask(96, top=40, left=30, height=14, width=14)
    filled = fill(image, mask)
    inside = filled[mask > 0].astype(float)
    assert inside.std() > 0.6 * image[mask > 0].std()
    mean = np.where(mask[..., None] > 0, image.mean().astype(np.uint8), image)
    assert measure(filled, image, mask)["psnr_hole"] > measure(mean, image, mask)["psnr_hole"] + 3


def test_the_same_generator_gives_the_same_fill_and_valid_pixels_stay() -> None:
    image, mask = make_image(1), make_mask()
    first = fill(image, mask)
    assert np.array_equal(first, fill(image, mask))
    assert not np.array_equal(first, fill(image, mask, seed=1))
    assert np.array_equal(first[mask == 0], image[mask == 0])


def test_what_lies_under_the_hole_is_never_read() -> None:
    image, mask = make_image(1), make_mask()
    other = np.where(mask[..., None] > 0, 255 - image, image)
    fills = [patchmatch_fill(one, mask, numpy_generator(0)) for one in (image, other)]
    assert np.array_equal(*fills)


@pytest.mark.parametrize("family", MASKS)
@pytest.mark.parametrize("size", [(9, 9), (40, 71), (8, 130)])
def test_every_family_and_size_is_filled(family: str, size: tuple[int, int]) -> None:
    image = np.random.default_rng(0).integers(50, 60, (*size, 3), dtype=np.uint8)
    mask = draw_mask(family, *size, numpy_generator(0, family))
    filled = fill(image, mask)
    assert filled.shape == image.shape
    assert filled.min() >= 50
    assert filled.max() < 60


def test_degenerate_masks() -> None:
    image = make_image(0)
    assert np.array_equal(fill(image, np.zeros((64, 64), np.uint8)), image)
    with pytest.raises(ValueError, match="nothing but hole"):
        fill(image, np.ones((64, 64), np.uint8))
    mask = np.ones((64, 64), np.uint8)
    mask[5, 5] = 0
    assert (fill(image, mask) == image[5, 5]).all()
