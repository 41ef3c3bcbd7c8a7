"""T-MAD: coarse network, texture memory, retrieval, PSNet, tiling (Fig. 2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tmad.coarse import CoarseNet, compose
from tmad.config import TMADConfig
from tmad.patches import cell_corners, cut, cut_windows, tile
from tmad.psnet import PSNet
from tmad.retrieval import Retrieval
from tmad.rng import seed_of


@dataclass(frozen=True)
class TMADOutput:
    """Everything between the coarse result and the final one; images and patches in [-1, 1]."""

    coarse_raw: Tensor
    """I_s (B, 3, H, W), or somebody's result in its place."""
    coarse: Tensor
    """I^_s (B, 3, H, W): I_s in the hole, the image outside."""
    pool: Tensor
    """T (B, N_pool, 3, k, k): the memory's patches; data, without gradient."""
    candidates: Tensor
    """T_c (B, N, N_c, 3, k, k), most similar first."""
    candidate_index: Tensor
    """(B, N, N_c) int64, which patches of the pool they are."""
    weights: Tensor
    """S (B, N, N_pool)."""
    patches: Tensor
    """Synthesized cells (B, N, 3, k, k), linear."""
    output: Tensor
    """I^_p (B, 3, H, W): the synthesized cells tiled into the hole, the image outside."""


class TMAD(nn.Module):
    """The generator. *seed* fixes the initial weights."""

    def __init__(self, config: TMADConfig, *, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(seed, "init", "generator"))
            self.coarse = CoarseNet(config.coarse, config.carafe)
            self.retrieval = Retrieval(config.retrieval, config.patch_size)
            self.psnet = PSNet(config.psnet, config.carafe, config.retrieval.num_candidates)

    def forward(
        self, image: Tensor, mask: Tensor, pool_yx: Tensor, cells: Tensor, filled: Tensor | None = None
    ) -> TMADOutput:
        """Fill the hole of each image.

        *image* I (B, 3, H, W) in [-1, 1], whose hole pixels are never read; *mask* M (B, 1, H, W) {0, 1}, 1 = hole;
        *pool_yx* (B, N_pool, 2) corners of the memory windows; *cells* (B, N) raster indices of the cells to
        synthesize; *filled* (B, 3, H, W) in [-1, 1], somebody's result that PSNet works on in place of the coarse
        network's, which is then not asked (Table V). H and W are multiples of `config.size_multiple`. A hole cell that
        is not named keeps the coarse result.
        """
        coarse_raw = self.predict_coarse(image, mask) if filled is None else filled
        coarse = compose(coarse_raw, image, mask)
        pool = self.read_memory(coarse, pool_yx)
        patches, candidates, index, weights = self.synthesize(coarse, pool, cells)
        output = compose(tile(coarse, patches, cells), image, mask)
        return TMADOutput(coarse_raw, coarse, pool, candidates, index, weights, patches, output)

    def predict_coarse(self, image: Tensor, mask: Tensor) -> Tensor:
        """I_s from I_m = I * (1 - M) and M (Sec. III-A), float32."""
        result: Tensor = self.coarse(compose(torch.zeros_like(image), image, mask), mask)
        return result.float()

    def read_memory(self, coarse: Tensor, pool_yx: Tensor) -> Tensor:
        """The memory's patches, cut from I^_s: intact pixels as they are, hole pixels of partly masked windows from
        the coarse result, as zeros would read as grey [D]. Without gradient: the memory is data."""
        return cut(coarse.detach(), pool_yx, self.config.patch_size)

    def synthesize(self, coarse: Tensor, pool: Tensor, cells: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Retrieval and PSNet for the named cells (Sec. III-B and III-C).

        Returns patches (B, N, 3, k, k) float32, candidates, candidate index and weights as in `TMADOutput`.
        """
        k = self.config.patch_size
        corners = cell_corners(cells, patch_size=k, width=coarse.shape[-1])
        found = self.retrieval(cut(coarse, corners, k), pool)
        windows = cut_windows(coarse, cells, k)
        patches = self.psnet(windows.flatten(0, 1), found.candidates.flatten(0, 1).flatten(1, 2))
        patches = patches.float().unflatten(0, cells.shape)
        return patches, found.candidates, found.index, found.weights
