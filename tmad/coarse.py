"""Coarse network (Sec. III-A): masked image and mask in, a global structural prior out."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from tmad.blocks import DownBlock, ResidualBlock, UpBlock, conv, decoded_from, leaky, start_linear
from tmad.carafe import SCALE
from tmad.config import CarafeConfig, CoarseConfig
from tmad.patches import Part, enlarged, reduced, within


class CoarseNet(nn.Module):
    """Encoder, dilated residual blocks, CARAFE decoder; Table I, first column."""

    def __init__(self, config: CoarseConfig, carafe: CarafeConfig) -> None:
        super().__init__()
        self._carafe, self._levels = carafe, config.num_down_blocks
        widths = [config.base_width * 2**level for level in range(config.num_down_blocks + 1)]
        dilations = [config.dilations[i % len(config.dilations)] for i in range(config.num_res_blocks)]
        self.layers = nn.Sequential(
            conv(4, widths[0], 1),
            leaky(),
            *(DownBlock(a, b) for a, b in pairwise(widths)),
            *(ResidualBlock(widths[-1], dilation) for dilation in dilations),
            *(UpBlock(b, a, carafe) for a, b in reversed(list(pairwise(widths)))),
            conv(widths[0], 3, 1),
        )
        start_linear(self.layers[0], first=True)  # type: ignore[arg-type]
        start_linear(self.layers[-1], last=True)  # type: ignore[arg-type]
        for block in self.layers:
            if isinstance(block, (DownBlock, UpBlock)):
                for layer in block:
                    if isinstance(layer, nn.Conv2d):
                        start_linear(layer)

    def forward(self, masked: Tensor, mask: Tensor, inner: Part | None = None) -> Tensor:
        """*masked* I_m (B, 3, H, W) in [-1, 1], *mask* M (B, 1, H, W) {0, 1}, sides multiples of 2^num_down_blocks;
        *inner*, rows and columns that are wanted (default: all): no more than these are decoded.

        Returns I_s (B, 3, h, w) of the inner part, clipped to [-1, 1].
        """
        height, width = masked.shape[-2:]
        whole = slice(0, height), slice(0, width)
        parts = decoded_from(inner or whole, height, width, self._carafe, self._levels)
        held = reduced(whole, SCALE**self._levels)
        # Weights may be bfloat16 where there is no autocast.
        first: Any = self.layers[0]
        features = torch.cat([masked, mask], dim=1).to(first.weight.dtype)
        for layer in self.layers:
            if isinstance(layer, UpBlock):
                part = parts.pop()
                features, held = features[..., *within(part, held)], enlarged(part, SCALE)
            features = layer(features)
        result: Tensor = _Clip.apply(features[..., *within(inner or whole, held)])
        return result


class _Clip(torch.autograd.Function):
    """Clip to [-1, 1]; the gradient passes unchanged.

    A plain clip has no gradient beyond the range: a network that one large step throws there never comes back.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor) -> Tensor:
        return x.clamp(-1, 1)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> Tensor:
        return grad


def compose(fill: Tensor, image: Tensor, mask: Tensor) -> Tensor:
    """*fill* inside the hole, *image* outside: how I_s becomes I^_s, and the tiled patches I^_p (Sec. III)."""
    # I^_s = M * I_s + (1 - M) * I, as a selection: known pixels stay exact, whatever I holds under the hole.
    return torch.where(mask > 0, fill, image.to(fill.dtype))
