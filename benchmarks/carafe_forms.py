"""CARAFE's reassembly written in several ways, all of them with the interface of `tmad.carafe.reassemble`.

`unfolded_large`, `unfolded_small` and `shifts` are what one finds or would write first; `shifts_channels_last` is
made to be compiled. Shapes: B images, C channels, H W input sides; kernel k.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def nearest(features: Tensor, weights: Tensor, kernel: int) -> Tensor:
    """Nearest-neighbour up-sampling: another function, the floor that no reassembly can reach."""
    return F.interpolate(features, scale_factor=2, mode="nearest")


def unfolded_large(features: Tensor, weights: Tensor, kernel: int) -> Tensor:
    """Up-sample first, then unfold the large map with dilation 2 and multiply: the naive form."""
    batch, channels, height, width = features.shape
    large = F.interpolate(features, scale_factor=2, mode="nearest")
    columns = F.unfold(large, kernel, dilation=2, padding=kernel - 1)
    columns = columns.reshape(batch, channels, kernel**2, 2 * height, 2 * width)
    grid = weights.reshape(batch, 2, 2, kernel**2, height, width).permute(0, 3, 4, 1, 5, 2)
    return (columns * grid.reshape(batch, 1, kernel**2, 2 * height, 2 * width)).sum(2)


def unfolded_small(features: Tensor, weights: Tensor, kernel: int) -> Tensor:
    """Unfold the small map, one matrix product a pixel."""
    batch, channels, height, width = features.shape
    columns = F.unfold(features, kernel, padding=kernel // 2).reshape(batch, channels, kernel**2, height, width)
    out = torch.einsum("bckhw,bskhw->bcshw", columns, weights)
    return F.pixel_shuffle(out.reshape(batch, 4 * channels, height, width), 2)


def shifts(features: Tensor, weights: Tensor, kernel: int) -> Tensor:
    """Sum over shifted views under plain autograd."""
    batch, channels, height, width = features.shape
    padded = F.pad(features, (kernel // 2,) * 4)
    out = features.new_zeros(batch, channels, 4, height, width)
    for shift in range(kernel**2):
        i, j = divmod(shift, kernel)
        out = out + padded[:, :, None, i : i + height, j : j + width] * weights[:, None, :, shift]
    return F.pixel_shuffle(out.reshape(batch, 4 * channels, height, width), 2)


def shifts_channels_last(features: Tensor, weights: Tensor, kernel: int) -> Tensor:
    """Sum over shifted views with the channels innermost, accumulated in the output's order; made to be compiled.

    Gives its result in channels-last memory, and wants its features so.
    """
    batch, channels, height, width = features.shape
    padded = F.pad(features.permute(0, 2, 3, 1), (0, 0, *(kernel // 2,) * 4))
    grid = weights.reshape(batch, 2, 2, kernel**2, height, width).permute(3, 0, 4, 1, 5, 2)[..., None]
    out = features.new_zeros(batch, height, 2, width, 2, channels)
    for shift in range(kernel**2):
        i, j = divmod(shift, kernel)
        out = out + padded[:, i : i + height, None, j : j + width, None] * grid[shift]
    return out.reshape(batch, 2 * height, 2 * width, channels).permute(0, 3, 1, 2)
