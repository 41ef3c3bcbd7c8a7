"""Patch synthesis network, PSNet (Sec. III-C): a coarse window and its memory candidates in, one textured cell out."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tmad.blocks import DownBlock, ResidualBlock, UpBlock, conv, leaky, normalise_spectra, out_conv
from tmad.config import CarafeConfig, PSNetConfig


class PSNet(nn.Module):
    """Backbone, texture encoder and two skip connections; Table I, second and third column.

    Table I counts three up-blocks for two down-blocks, which cannot land on k x k. [D] The residual blocks run on the
    3k/4 grid, its central k/4 x k/4 is kept, two up-blocks reach k x k, and the third block of the count is a pair of
    convolutions at full resolution without up-sampling.
    """

    def __init__(self, config: PSNetConfig, carafe: CarafeConfig, num_candidates: int) -> None:
        super().__init__()
        base = config.base_width
        self.residual = config.residual
        self.encoder = nn.Sequential(
            conv(3, base, 1),
            leaky(),
            DownBlock(base, 2 * base),
            DownBlock(2 * base, 4 * base),
            *(ResidualBlock(4 * base) for _ in range(config.num_res_blocks)),
        )
        self.texture_half = nn.Sequential(conv(3 * num_candidates, base, 1), leaky(), DownBlock(base, 2 * base))
        self.texture_quarter = nn.Sequential(
            DownBlock(2 * base, 4 * base), *(ResidualBlock(4 * base) for _ in range(config.num_texture_res_blocks))
        )
        self.up_half = UpBlock(8 * base, 2 * base, carafe)
        self.up_full = UpBlock(4 * base, base, carafe)
        self.decode = nn.Sequential(conv(base, base), leaky(), conv(base, base), leaky())
        if config.spectral_norm:
            normalise_spectra(self)
        # Not normalised: the linear output has to reach the full range, and starts small [D].
        self.output = out_conv(base)
        if config.residual != "none":
            nn.init.zeros_(self.output.weight)

    def forward(self, windows: Tensor, candidates: Tensor) -> Tensor:
        """*windows* p~_s (M, 3, 3k, 3k) and *candidates* (M, 3 * N_c, k, k), in [-1, 1]; M cells of any images.

        Returns the synthesized cells (M, 3, k, k), linear.
        """
        k = candidates.shape[-1]
        features = self.encoder(windows)
        centre = features[..., k // 4 : k // 2, k // 4 : k // 2]
        half = self.texture_half(candidates)
        quarter = self.texture_quarter(half)
        decoded = self.up_half(torch.cat([centre, quarter], dim=1))
        decoded = self.up_full(torch.cat([decoded, half], dim=1))
        cells: Tensor = self.output(self.decode(decoded))
        if self.residual != "none":
            cells = cells + windows[..., k : 2 * k, k : 2 * k]
        if self.residual == "texture":
            cells = cells + fine_detail(candidates[:, :3])
        return cells


def fine_detail(patches: Tensor) -> Tensor:
    """What a box blur over about a quarter of their side takes away from patches (M, C, k, k) [D].

    Added to the coarse cell it gives what a classical exemplar fill would: the structure of one, the texture of the
    other.
    """
    side = 2 * (patches.shape[-1] // 8) + 1
    return patches - F.avg_pool2d(patches, side, stride=1, padding=side // 2, count_include_pad=False)
