"""Averaged generator weights, used for evaluation and for the model that is handed out."""

from __future__ import annotations

import torch
from torch import Tensor, nn

RAMP = 0.1
"""The half-life is never longer than this share of the images seen so far, so that the start is forgotten [D]."""


def decay(images: int, images_seen: int, halflife_images: float) -> float:
    """Share of the old average kept by a step of *images*, after *images_seen* in all; 0 for a half-life of 0."""
    halflife = min(halflife_images, RAMP * images_seen)
    return float(0.5 ** (images / halflife)) if halflife > 0 else 0.0


@torch.no_grad()
def update(average: nn.Module, model: nn.Module, keep: float, finite: Tensor) -> None:
    """average = keep * average + (1 - keep) * model, in place; buffers are copied.

    *finite*, 0-dim on the same device: if it is false, the step left the model as it was, and so stays the average.
    """
    old: list[Tensor] = list(average.parameters())
    new: list[Tensor] = list(model.parameters())
    if keep == 0:
        torch._foreach_copy_(old, new)
    else:
        change = torch._foreach_sub(new, old)
        torch._foreach_mul_(change, (1 - keep) * finite)
        torch._foreach_add_(old, change)
    if buffers := list(average.buffers()):
        torch._foreach_copy_(buffers, list(model.buffers()))
