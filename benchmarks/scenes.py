"""What the networks are measured on: noise with a hole in the middle, since their time does not depend on content."""

from __future__ import annotations

import numpy as np

from tmad.batch import Batch, collate, make_sample
from tmad.config import TMADConfig
from tmad.memory import select_pool
from tmad.rng import numpy_generator


def picture(side: int, *key: int | str) -> np.ndarray:
    """Noise (side, side, 3) uint8, the same for the same *key*."""
    return numpy_generator("picture", *key).integers(0, 256, (side, side, 3), dtype=np.uint8)


def centred_hole(side: int, hole_side: int) -> np.ndarray:
    """(side, side) uint8, {0, 1}: a square hole of *hole_side* pixels in the middle."""
    mask = np.zeros((side, side), dtype=np.uint8)
    begin = (side - hole_side) // 2
    mask[begin : begin + hole_side, begin : begin + hole_side] = 1
    return mask


def training_batch(config: TMADConfig, *, side: int, images: int, cells: int) -> Batch:
    """A batch as training sees it: the hole covers a quarter of each image."""
    mask = centred_hole(side, side // 2)
    samples = []
    for number in range(images):
        rng = numpy_generator("sample", number)
        pool_yx = select_pool(
            mask,
            patch_size=config.patch_size,
            stride=config.memory_stride,
            pool_size=config.memory.pool_size,
            rule=config.memory.rule,
            rng=rng,
        )
        image = picture(side, number)
        samples.append(
            make_sample(str(number), image, mask, pool_yx, patch_size=config.patch_size, num_cells=cells, rng=rng)
        )
    return collate(samples)
