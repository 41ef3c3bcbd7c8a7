"""Averaged generator weights, used for evaluation and for the model that is handed out."""

from __future__ import annotations

import torch
from torch import nn

RAMP = 0.1
"""The half-life is never longer than this share of the images seen so far, so that the start is forgotten [D]."""


def decay(images: int, images_seen: int, halflife_images: float) -> float:
    """Share of the old average kept by a step of *images*, after *images_seen* in all; 0 for a half-life of 0."""
    halflife = min(halflife_images, RAMP * images_seen)
    return float(0.5 ** (images / halflife)) if halflife > 0 else 0.0


@torch.no_grad()
def update(average: nn.Module, model: nn.Module, keep: float) -> None:
    """average = keep * average + (1 - keep) * model, in place; buffers are copied."""
    for old, new in zip(average.parameters(), model.parameters(), strict=True):
        old.lerp_(new, 1 - keep)
    for target, source in zip(average.buffers(), model.buffers(), strict=True):
        target.copy_(source)
