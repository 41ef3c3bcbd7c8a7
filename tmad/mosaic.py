"""Mosaics: what was borrowed from the memory, laid out over the picture, each piece where its cell is.

The windows that are borrowed are wider than their cells and blended where neighbours overlap, so that no texture ends
at a cell's border [D]. Shapes: B images, N cells of an image, C candidates of a cell, k patch side, o overlap (how far
a window reaches into each neighbouring cell), H W image sides.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from tmad.coherence import NEIGHBOURS
from tmad.patches import Part

NUM_BANDS = 2
"""Bands of detail that a window carries beside its colours."""

CHANNELS = 3 * (1 + NUM_BANDS)
"""Of a window: colours, then the bands' colours, finest first."""

DETAIL_POWER = math.log2(1.5)
"""Where windows overlap, detail is weighted by the colours' weights to this power [D]. 1/2 would keep the variance of
uncorrelated detail. But detail has heavy tails, the sum of two is nearer to a Gaussian, and at equal variance its mean
absolute steps are larger: a faint grid. log2(3/2) keeps the mean absolute value of Laplacian detail."""


def with_details(image: Tensor, patch_size: int) -> Tensor:
    """*image* (B, 3, H, W) and its bands of detail: what box blurs over a quarter and a half of *patch_size* take away
    from it. Returns (B, CHANNELS, H, W)."""
    levels = [image]
    for divisor in (8, 4):
        reach = patch_size // divisor
        levels.append(_box_blur(_box_blur(image, (reach, 0)), (0, reach)))
    return torch.cat([image, *(fine - blurred for fine, blurred in pairwise(levels))], dim=1)


def _box_blur(image: Tensor, reach: tuple[int, int]) -> Tensor:
    """Means of *image* (B, C, H, W) over boxes that reach this many rows and columns to either side."""
    size = [2 * one + 1 for one in reach]
    return F.avg_pool2d(image, size, stride=1, padding=list(reach), count_include_pad=False)


def ramp(patch_size: int, overlap: int) -> Tensor:
    """Weights (k + 2o, k + 2o) of a window for blending; *overlap* is at most half of *patch_size*.

    A raised cosine: where two neighbours reach, their weights add up to 1, so that sum(w x) keeps the mean of what is
    blended.
    """
    weights = torch.ones(patch_size + 2 * overlap)
    if overlap:
        steps = (torch.arange(2 * overlap) + 0.5) / (2 * overlap)
        weights[: 2 * overlap] = torch.sin(steps * (math.pi / 2)).square()
        weights[-2 * overlap :] = weights[: 2 * overlap].flip(0)
    return weights[:, None] * weights


def lay_out(
    windows: Tensor,
    cells: Tensor,
    coarse: Tensor,
    mask: Tensor,
    *,
    patch_size: int,
    area: Part | None = None,
    continued: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Blend the windows that were borrowed for *cells* into pictures.

    *windows* (B, N, C, CHANNELS, k + 2o, k + 2o); *cells* (B, N), raster indices, none twice; *coarse* I^_s (B, 3, H,
    W); *mask* (B, 1, H, W), 1 = hole. Cells without a hole pixel take no part: their windows would reach into those
    that have one. *area*, rows and columns that hold all *cells*, multiples of k: nothing is blended beyond it (none =
    the whole picture). *continued* (B, N, C, 8) as `coherence.continued` gives it: windows that continue each other
    hold the same pixels where they overlap, and are weighted there as one window (none = none does).

    Returns mosaics (B, C, 3, H, W), the candidates' colours, with *coarse* where nothing was borrowed and outside the
    hole; and details (B, C, NUM_BANDS, 3, H, W), 0 where nothing was borrowed.
    """
    if area is not None:
        top, left = (one.start // patch_size for one in area)
        columns, inner = coarse.shape[-1] // patch_size, (area[1].stop - area[1].start) // patch_size
        moved = (cells // columns - top) * inner + cells % columns - left
        parts = coarse[..., *area], mask[..., *area]
        there = lay_out(windows, moved, *parts, patch_size=patch_size, continued=continued)
        mosaics = coarse[:, None].to(there[0].dtype).repeat(1, windows.shape[2], 1, 1, 1)
        details = there[1].new_zeros(*mosaics.shape[:2], NUM_BANDS, *mosaics.shape[2:])
        mosaics[..., *area], details[..., *area] = there
        return mosaics, details
    num_candidates, side = windows.shape[2], windows.shape[-1]
    size = coarse.shape[-2:]
    touched = F.max_pool2d(mask.float(), patch_size).flatten(1).gather(1, cells)[:, :, None, None, None]
    own = ramp(patch_size, (side - patch_size) // 2).to(windows)
    weights = own * touched
    total = overlap_add(weights, cells, patch_size=patch_size, size=size)
    covered = total > 0
    # Not clamped: at the corner of a wide window that has no neighbour, weights are as small as 1e-7.
    total = torch.where(covered, total, 1)

    def blend(part: Tensor, weights: Tensor, total: Tensor) -> Tensor:
        added = overlap_add((part * weights.unsqueeze(3)).flatten(2, 3), cells, patch_size=patch_size, size=size)
        return (added / total).unflatten(1, (num_candidates, -1))

    colours = blend(windows[:, :, :, :3], weights, total)
    if continued is None:
        weights = weights**DETAIL_POWER
    else:
        joint = own.expand(*continued.shape[:3], -1, -1).clone()
        for beside, reaching in zip(continued.to(own).unbind(-1), _neighbours(own, patch_size), strict=True):
            joint.addcmul_(beside[..., None, None], reaching)
        weights = weights * joint ** (DETAIL_POWER - 1)
    details = blend(windows[:, :, :, 3:], weights, total**DETAIL_POWER)
    mosaics = torch.where((covered & (mask > 0))[:, None], colours, coarse[:, None].to(colours.dtype))
    return mosaics, details.unflatten(2, (NUM_BANDS, 3))


def _neighbours(own: Tensor, patch_size: int) -> Tensor:
    """A window's weights *own* (k + 2o, k + 2o) as far as those of its neighbours reach into it, (8, k + 2o, k + 2o) in
    the order of `NEIGHBOURS`."""
    side, k = len(own), patch_size
    padded = F.pad(own, (k,) * 4)
    return torch.stack([padded[k - dy * k :, k - dx * k :][:side, :side] for dy, dx in NEIGHBOURS])


def overlap_add(windows: Tensor, cells: Tensor, *, patch_size: int, size: tuple[int, ...]) -> Tensor:
    """Add up windows where they overlap.

    *windows* (B, N, C, k + 2o, k + 2o), each centred on its cell of *cells* (B, N), none twice; *size* (H, W). Returns
    (B, C, H, W) without what reaches beyond the border. Deterministic on every device.
    """
    batch, _, channels, side, _ = windows.shape
    height, width = size
    places = (height // patch_size) * (width // patch_size)
    image = torch.arange(batch, device=cells.device)[:, None].expand_as(cells)
    grid = windows.new_zeros(batch, places, channels * side * side).index_put_((image, cells), windows.flatten(2))
    del windows  # which `fold` copies once more
    over = (side - patch_size) // 2
    padded = (height + 2 * over, width + 2 * over)
    added = F.fold(grid.transpose(1, 2), padded, kernel_size=side, stride=patch_size)
    return added[..., over : over + height, over : over + width]
