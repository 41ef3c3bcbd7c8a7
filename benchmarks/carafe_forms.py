"""CARAFE's reassembly written in several ways, all of them with the interface of `tmad.carafe.reassemble`.

`unfolded_large`, `unfolded_small` and `shifts` are what one finds or would write first; `shifts_rows` and
`shifts_channels_last` are candidates for something better. Shapes: B images, C channels, H W input sides; kernel k.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional as F

ROWS = 8
"""Input rows that `shifts_rows` finishes before it goes on."""


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


class _ByRows(torch.autograd.Function):
    """The shipped function, a few rows at a time, so that accumulator and views stay in the cache."""

    @staticmethod
    def forward(ctx: FunctionCtx, features: Tensor, weights: Tensor, kernel: int) -> Tensor:
        batch, channels, height, width = features.shape
        padded = F.pad(features, (kernel // 2,) * 4)
        out = features.new_empty(batch, channels, height, 2, width, 2)
        for top in range(0, height, ROWS):
            rows = min(ROWS, height - top)
            block = features.new_zeros(batch, channels, 4, rows, width)
            for shift in range(kernel**2):
                i, j = divmod(shift, kernel)
                view = padded[:, :, None, top + i : top + i + rows, j : j + width]
                block.addcmul_(view, weights[:, None, :, shift, top : top + rows])
            grid = block.reshape(batch, channels, 2, 2, rows, width)
            out[:, :, top : top + rows] = grid.permute(0, 1, 4, 2, 5, 3)
        ctx.save_for_backward(padded, weights)
        ctx.kernel = kernel  # type: ignore[attr-defined]
        return out.reshape(batch, channels, 2 * height, 2 * width)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        padded, weights = ctx.saved_tensors  # type: ignore[attr-defined]
        kernel: int = ctx.kernel  # type: ignore[attr-defined]
        batch, channels = padded.shape[:2]
        height, width = weights.shape[-2:]
        grid = grad.reshape(batch, channels, height, 2, width, 2)
        grad_padded = torch.zeros_like(padded)
        grad_weights = torch.empty_like(weights)
        for top in range(0, height, ROWS):
            rows = min(ROWS, height - top)
            block = grid[:, :, top : top + rows].permute(0, 1, 3, 5, 2, 4).reshape(batch, channels, 4, rows, width)
            for shift in range(kernel**2):
                i, j = divmod(shift, kernel)
                window = (slice(None), slice(None), slice(top + i, top + i + rows), slice(j, j + width))
                weight = weights[:, :, shift, top : top + rows]
                target = grad_padded[window]
                for corner in range(4):
                    target.addcmul_(block[:, :, corner], weight[:, None, corner])
                grad_weights[:, :, shift, top : top + rows] = (block * padded[window][:, :, None]).sum(1)
        half = kernel // 2
        return grad_padded[..., half : half + height, half : half + width], grad_weights, None


def shifts_rows(features: Tensor, weights: Tensor, kernel: int) -> Tensor:
    """The shipped function in blocks of `ROWS` input rows."""
    result: Tensor = _ByRows.apply(features, weights, kernel)
    return result
