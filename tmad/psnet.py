"""Patch synthesis network, PSNet (Sec. III-C): coarse result and mosaics of memory candidates in, texture out."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tmad.blocks import DownBlock, ResidualBlock, UpBlock, conv, decoded_from, leaky, normalise_spectra, out_conv
from tmad.config import CarafeConfig, PSNetConfig
from tmad.mosaic import NUM_BANDS
from tmad.patches import Part, enlarged, grown, reduced, within


class PSNet(nn.Module):
    """Backbone, texture encoder and two skip connections; Table I, second and third column.

    [D] The paper runs these layers cell by cell, on 3k x 3k windows. Here they run on the whole picture, or on any part
    of it with `reach` pixels around: no cell has a border at which a convolution would see zeros, so no grid of cells
    can appear, and neighbouring windows do not compute the same features nine times. Candidates come as mosaics
    (`mosaic.lay_out`), each where its cell is.

    Table I counts three up-blocks for two down-blocks. [D] Two up-blocks lead back to full resolution; the third of the
    count is a pair of convolutions there, without up-sampling.
    """

    def __init__(self, config: PSNetConfig, carafe: CarafeConfig, num_candidates: int) -> None:
        super().__init__()
        base = config.base_width
        self.residual, self._carafe = config.residual, carafe
        # Full resolution: two convolutions each of the first down-block, the last up-block and the final pair; half:
        # those of the second and first, and the reassembly; quarter: the residual blocks and the reassembly.
        blocks = max(config.num_res_blocks, config.num_texture_res_blocks)
        reassembly = max(carafe.kernel, carafe.encoder_kernel) // 2
        self.reach = 6 + 2 * (4 + reassembly) + 4 * (2 * blocks + reassembly + 1)
        """Pixels beyond which nothing changes a pixel of the output."""
        # What the texture encoder sees around a pixel of its features, in whole pixels of them.
        self._texture_reach = 8 * (config.num_texture_res_blocks + 1)
        self.encoder = nn.Sequential(
            conv(4, base, 1),
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
        if config.residual == "detail":
            self.gains = out_conv(base, num_candidates * NUM_BANDS)
            nn.init.zeros_(self.gains.weight)
            with torch.no_grad():
                self.gains.bias.view(num_candidates, NUM_BANDS)[0] = 1.0  # type: ignore[union-attr]

    def forward(
        self, coarse: Tensor, mask: Tensor, mosaics: Tensor, details: Tensor, inner: Part | None = None
    ) -> Tensor:
        """Synthesize the texture of a part of the picture.

        *coarse* I^_s (B, 3, H, W) in [-1, 1]; *mask* (B, 1, H, W) {0, 1}, 1 = hole; *mosaics* (B, N_c, 3, H, W) and
        *details* (B, N_c, NUM_BANDS, 3, H, W) as `mosaic.lay_out` gives them; *inner*, rows and columns that are wanted
        (default: all): texture is encoded and decoded there and as far around as it matters. Sides and places are
        multiples of 4. Returns (B, 3, h, w) of the inner part, linear.
        """
        height, width = coarse.shape[-2:]
        inner = inner or (slice(0, height), slice(0, width))
        decoded_part = grown(inner, 2, height, width)  # by the pair of convolutions
        half_part, quarter_part = decoded_from(decoded_part, height, width, self._carafe, 2)
        texture_part = grown(enlarged(quarter_part, 4), self._texture_reach, height, width)
        dtype = self.output.weight.dtype
        features = self.encoder(torch.cat([coarse, mask], dim=1).to(dtype))[..., *quarter_part]
        half = self.texture_half(mosaics[..., *texture_part].flatten(1, 2).to(dtype))
        quarter = self.texture_quarter(half)[..., *within(quarter_part, reduced(texture_part, 4))]
        half = half[..., *within(half_part, reduced(texture_part, 2))]
        decoded = self.up_half(torch.cat([features, quarter], dim=1))
        decoded = decoded[..., *within(half_part, enlarged(quarter_part, 2))]
        decoded = self.up_full(torch.cat([decoded, half], dim=1))
        decoded = decoded[..., *within(decoded_part, enlarged(half_part, 2))]
        decoded = self.decode(decoded)[..., *within(inner, decoded_part)]
        coarse, details = coarse[..., *inner], details[..., *inner]
        result: Tensor = self.output(decoded).float()
        if self.residual != "none":
            result = result + coarse
        if self.residual == "detail":
            # How much of each candidate's detail is wanted, from place to place; it starts with all of the first's.
            gains = self.gains(decoded).float()[:, :, None]
            result = result + (gains * details.flatten(1, 2)).sum(1)
        return result
