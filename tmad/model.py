"""T-MAD: coarse network, texture memory, retrieval, PSNet, tiling (Fig. 2)."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrize import is_parametrized

from tmad.coarse import CoarseNet, compose
from tmad.config import TMADConfig
from tmad.mosaic import lay_out, with_details
from tmad.patches import Part, cell_corners, cut, tile
from tmad.psnet import PSNet
from tmad.retrieval import Retrieval, Retrieved
from tmad.rng import seed_of


@dataclass(frozen=True)
class TMADOutput:
    """Everything between the coarse result and the final one; images and patches in [-1, 1]."""

    coarse_raw: Tensor
    """I_s (B, 3, H, W), or another method's result in its place."""
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
    """I^_p (B, 3, H, W): the synthesized cells in the hole, the image outside."""


class TMAD(nn.Module):
    """The generator. *seed* fixes the initial weights."""

    def __init__(self, config: TMADConfig, *, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(seed, "init", "generator"))
            self.coarse = CoarseNet(config.coarse, config.carafe)
            self.retrieval = Retrieval(config.retrieval)
            self.psnet = PSNet(config.psnet, config.carafe, config.retrieval.num_candidates)

    def forward(
        self, image: Tensor, mask: Tensor, pool_yx: Tensor, cells: Tensor, filled: Tensor | None = None
    ) -> TMADOutput:
        """Fill the hole of each image.

        *image* I (B, 3, H, W) in [-1, 1], whose hole pixels are never read; *mask* M (B, 1, H, W) {0, 1}, 1 = hole;
        *pool_yx* (B, N_pool, 2) corners of the memory windows; *cells* (B, N) raster indices of the cells to
        synthesize; *filled* (B, 3, H, W) in [-1, 1], another method's result that PSNet works on in place of the
        coarse network's, which is then not asked (Table V). H and W are multiples of `config.size_multiple`. A hole
        cell that is not named keeps the coarse result.
        """
        coarse_raw = self.predict_coarse(image, mask) if filled is None else filled
        coarse = compose(coarse_raw, image, mask)
        return self.fill(image, mask, coarse_raw, coarse, self.read_memory(coarse, pool_yx), cells)

    def fill(
        self, image: Tensor, mask: Tensor, coarse_raw: Tensor, coarse: Tensor, memory: Tensor, cells: Tensor
    ) -> TMADOutput:
        """Texture for the named cells of images, or of parts of them, whose coarse result and memory are there."""
        found = self.retrieve(coarse, memory, cells)
        synthesized = self.synthesize(coarse, mask, found.candidates, cells)
        corners = cell_corners(cells, patch_size=self.config.patch_size, width=image.shape[-1])
        patches = cut(synthesized, corners, self.config.patch_size)
        # A hole cell that was not drawn keeps the coarse result; the image's own pixels stay as they are.
        output = compose(tile(coarse, patches, cells), image, mask)
        return TMADOutput(
            coarse_raw=coarse_raw,
            coarse=coarse,
            pool=self.patches(memory),
            candidates=self.patches(found.candidates),
            candidate_index=found.index,
            weights=found.weights,
            patches=patches,
            output=output,
        )

    def predict_coarse(self, image: Tensor, mask: Tensor, inner: Part | None = None) -> Tensor:
        """I_s from I_m = I * (1 - M) and M (Sec. III-A), float32; of the part *inner* alone, if one is named."""
        result: Tensor = self.coarse(compose(torch.zeros_like(image), image, mask), mask, inner)
        return result.float()

    def read_memory(self, coarse: Tensor, pool_yx: Tensor) -> Tensor:
        """The memory's windows (B, N_pool, mosaic.CHANNELS, k + 2o, k + 2o), each a patch with `overlap` pixels around
        it and its bands of detail, cut from I^_s: intact pixels as they are, hole pixels of partly masked windows from
        the coarse result, as zeros would read as grey [D]. Without gradient: the memory is data."""
        o = self.config.overlap
        # Detached: Eq. 5 differentiates S alone; T is data.
        source = with_details(coarse.detach(), self.config.patch_size)
        return cut(F.pad(source, (o,) * 4, mode="reflect"), pool_yx, self.config.patch_size + 2 * o)

    def patches(self, windows: Tensor) -> Tensor:
        """The memory patches (..., 3, k, k) in the middle of windows as `read_memory` gives them."""
        k, o = self.config.patch_size, self.config.overlap
        return windows[..., :3, o : o + k, o : o + k]

    def retrieve(self, coarse: Tensor, memory: Tensor, cells: Tensor) -> Retrieved:
        """The most similar windows of *memory* for each of *cells* (B, N) of I^_s (Sec. III-B)."""
        k = self.config.patch_size
        corners = cell_corners(cells, patch_size=k, width=coarse.shape[-1])
        return self.retrieval(cut(coarse, corners, k), self.patches(memory), memory)

    def synthesize(
        self,
        coarse: Tensor,
        mask: Tensor,
        candidates: Tensor,
        cells: Tensor,
        inner: Part | None = None,
        area: Part | None = None,
        continued: Tensor | None = None,
    ) -> Tensor:
        """PSNet over a part of the picture (Sec. III-C), in which the windows *candidates* were retrieved for *cells*.

        *coarse* I^_s (B, 3, H, W), *mask* (B, 1, H, W), sides multiples of k; *area* and *continued* as for
        `mosaic.lay_out`. Returns *inner* of (B, 3, H, W), float32, linear.
        """
        k = self.config.patch_size
        mosaics, details = lay_out(candidates, cells, coarse, mask, patch_size=k, area=area, continued=continued)
        del candidates  # as large as all that PSNet computes
        return self.psnet(coarse, mask, mosaics, details, inner)


def folded(model: TMAD) -> TMAD:
    """A copy of *model* that computes the same, for inference alone: spectral norms are computed once and for all,
    weights need no gradient."""
    model = copy.deepcopy(model).eval()
    # Not `remove_parametrizations`: a copied layer shares its class, and the property in it, with the original.
    with torch.random.fork_rng(devices=[]):  # new layers draw weights
        for parent in [*model.modules()]:
            for name, layer in parent.named_children():
                if is_parametrized(layer):
                    setattr(parent, name, _plain(layer))
    return model.requires_grad_(False)


def _plain(layer: nn.Module) -> nn.Conv2d:
    assert isinstance(layer, nn.Conv2d), "convolutions alone are normalised"
    sizes: Any = (layer.in_channels, layer.out_channels, layer.kernel_size)
    more: dict[str, Any] = {name: getattr(layer, name) for name in ("stride", "padding", "dilation")}
    weight = layer.weight
    # Not `skip_init`, which imports SymPy: seconds.
    plain = nn.Conv2d(*sizes, **more).to(weight)
    plain.load_state_dict({"weight": weight, "bias": layer.bias})
    return plain.eval()
