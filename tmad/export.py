"""The generator as one graph of `torch.export`, for runtimes that have PyTorch but not this package.

What stays outside of the graph is NumPy: reading files, padding, `memory.select_pool`, `draws.hole_cells`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from tmad.model import TMAD, folded


class Fill(nn.Module):
    """`TMAD` from picture to picture."""

    def __init__(self, model: TMAD) -> None:
        super().__init__()
        self.model = folded(model)

    def forward(self, image: Tensor, mask: Tensor, pool_yx: Tensor, cells: Tensor) -> Tensor:
        """I^_p (1, 3, H, W) in about [-1, 1]; arguments as for `TMAD`."""
        output: Tensor = self.model(image, mask, pool_yx, cells).output
        return output


def export_fill(model: TMAD, *, height: int, width: int) -> ExportedProgram:
    """The graph of `Fill` for pictures of *height* and *width*, float32, on the model's device.

    It takes *image* (1, 3, H, W) in [-1, 1], *mask* (1, 1, H, W) {0, 1}, *pool_yx* (1, P, 2) int64 and *cells* (1, N)
    int64, with P and N from 2 to 4096 and P at least `retrieval.num_candidates`. `torch.export.save` writes it. Raises
    `ValueError` for sides that are no multiples of `config.size_multiple`.
    """
    multiple = model.config.size_multiple
    if height % multiple or width % multiple:
        raise ValueError(f"height and width must be multiples of {multiple} (size_multiple), got {height} and {width}")
    device = next(model.parameters()).device
    count = model.config.retrieval.num_candidates + 3
    example = (
        torch.zeros(1, 3, height, width, device=device),
        torch.ones(1, 1, height, width, device=device),
        torch.zeros(1, count, 2, dtype=torch.int64, device=device),
        torch.arange(2, device=device)[None],
    )
    windows, cells = Dim("windows", min=2, max=4096), Dim("cells", min=2, max=4096)
    with torch.no_grad():
        return torch.export.export(
            Fill(model), example, dynamic_shapes=(None, None, {1: windows}, {1: cells}), strict=False
        )
