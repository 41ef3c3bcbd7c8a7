"""Structure of large holes, scale by scale [D].

A coarse network knows what to do in holes as deep as those that it was trained with; further in it makes colours up. So
a picture is halved until no hole pixel is further than `REACH` from what is known, and filled there. Each finer scale
then fills the hole anew as far as that, with the result of the coarser one behind.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from torch import Tensor
from torch.nn import functional as F

from tmad.coarse import compose
from tmad.holes import dilate
from tmad.patches import Part

REACH = 32
"""Pixels from what is known, rows and columns alike, as far as the coarse network is believed: half the depth of the
deepest holes of the preset `photographs`."""

SMALLEST = 64
"""Pixels of a side below which nothing is halved."""

Predict = Callable[[Tensor, Tensor, Part | None], Tensor]
"""`TMAD.predict_coarse`."""


def halvings(hole: np.ndarray) -> int:
    """How often the picture has to be halved, from its *hole* (H, W), 1 = hole."""
    known, number = hole == 0, 0
    while min(known.shape) >= 2 * SMALLEST and not dilate(known, REACH).all():
        height, width = (side // 2 * 2 for side in known.shape)
        known = known[:height, :width].reshape(height // 2, 2, width // 2, 2).any(axis=(1, 3))
        number += 1
    return number


def predict(coarse: Predict, image: Tensor, mask: Tensor, inner: Part | None, *, number: int, multiple: int) -> Tensor:
    """I_s of *inner* (none = all) of *image* (B, 3, H, W) with holes *mask* (B, 1, H, W), halved *number* times.

    Sides are multiples of *multiple*, which the network asks for.
    """
    if not number:
        return coarse(image, mask, inner)
    known = 1 - mask
    # A pixel of the smaller picture is the mean of what is known of its four, and a hole where nothing is.
    share = F.avg_pool2d(known, 2)
    small, hole = F.avg_pool2d(image * known, 2) / share.clamp(min=0.25), (share == 0).float()
    padding = (0, -small.shape[-1] % multiple, 0, -small.shape[-2] % multiple)
    small, hole = F.pad(small, padding, mode="replicate"), F.pad(hole, padding, mode="replicate")
    result = predict(coarse, small, hole, None, number=number - 1, multiple=multiple)
    filled = F.interpolate(compose(result, small, hole), scale_factor=2, mode="bicubic")
    behind = compose(filled[..., : image.shape[-2], : image.shape[-1]].clamp(-1, 1), image, mask)
    part = inner or (slice(None), slice(None))
    fine = coarse(behind, mask * _near(known, REACH), inner)
    # Passes over from the finer to the coarser one where the network is less and less to be believed.
    weight = _mean(_near(known, REACH * 3 // 4), REACH // 4)[..., *part]
    return weight * fine + (1 - weight) * behind[..., *part]


def _near(known: Tensor, reach: int) -> Tensor:
    """1 within *reach* pixels of what is *known* (B, 1, H, W)."""
    for size in ((2 * reach + 1, 1), (1, 2 * reach + 1)):
        known = F.max_pool2d(known, size, stride=1, padding=(size[0] // 2, size[1] // 2))
    return known


def _mean(weight: Tensor, reach: int) -> Tensor:
    """Means over squares that reach *reach* pixels to each side."""
    for size in ((2 * reach + 1, 1), (1, 2 * reach + 1)):
        padding = (size[0] // 2, size[1] // 2)
        weight = F.avg_pool2d(weight, size, stride=1, padding=padding, count_include_pad=False)
    return weight
