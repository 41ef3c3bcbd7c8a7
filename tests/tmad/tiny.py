"""What the tests of `tmad` share: the smallest configuration that has every part, batches made up from a seed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from tmad.batch import Batch, collate, make_sample
from tmad.config import (
    CarafeConfig,
    CoarseConfig,
    DiscriminatorsConfig,
    LossConfig,
    MemoryConfig,
    OptimConfig,
    PSNetConfig,
    RetrievalConfig,
    TMADConfig,
    TrainingConfig,
)
from tmad.memory import select_pool
from tmad.model import TMAD
from tmad.rng import numpy_generator, torch_generator
from tmad.step import TrainingState

MODEL = TMADConfig(
    patch_size=16,
    carafe=CarafeConfig(kernel=3, mid_channels=4),
    coarse=CoarseConfig(base_width=4, num_down_blocks=2, num_res_blocks=2),
    memory=MemoryConfig(pool_size=12, rule="fewest", stride_divisor=4),
    retrieval=RetrievalConfig(num_candidates=2, hidden_channels=4, embed_channels=2),
    psnet=PSNetConfig(base_width=4, num_res_blocks=1, num_texture_res_blocks=1),
)
"""Sizes are multiples of 16; a 64 x 64 image has 16 cells."""

TRAINING = TrainingConfig(
    model=MODEL,
    discriminators=DiscriminatorsConfig(patch_base_width=4, global_base_width=4),
    loss=LossConfig(),
    optim=OptimConfig(lr=2e-3, cosine_periods=1, ema_halflife_images=20),
)


class Features(nn.Module):
    """A feature network the size of a test: two frozen random convolutions, two maps."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, stride=2, padding=1)
        generator = torch_generator("tiny", "features")
        for parameter in self.parameters():
            parameter.requires_grad_(False).normal_(std=0.3, generator=generator)

    def forward(self, images: Tensor) -> list[Tensor]:
        first = self.first(images)
        return [first, self.second(first.relu())]


def with_loss(config: TrainingConfig = TRAINING, **changes: object) -> TrainingConfig:
    """*config* with some settings of its losses changed."""
    return replace(config, loss=replace(config.loss, **changes))


def with_optim(config: TrainingConfig = TRAINING, **changes: object) -> TrainingConfig:
    """*config* with some settings of its optimizer changed."""
    return replace(config, optim=replace(config.optim, **changes))


def make_state(config: TrainingConfig = TRAINING, *, seed: int = 0) -> TrainingState:
    """A fresh training state with the small feature network."""
    return TrainingState(config, seed=seed, perceptual=Features())


def with_noise(model: TMAD, std: float = 0.1) -> TMAD:
    """*model* with outputs of PSNet that depend on what it sees, as if trained; with a residual they start at zero."""
    generator = torch_generator("tiny", "noise")
    with torch.no_grad():
        for layer in (model.psnet.output, getattr(model.psnet, "gains", None)):
            if layer is not None:
                for parameter in layer.parameters():
                    parameter += std * torch.randn(parameter.shape, generator=generator)
    return model


def make_image(seed: int, side: int = 64) -> np.ndarray:
    """A picture (side, side, 3) uint8: colour gradient, stripes, a little noise."""
    rng = numpy_generator("tiny", "image", seed)
    y, x = np.mgrid[0:side, 0:side] / side
    light = rng.uniform(60, 200, 3) + 60 * (y[..., None] * rng.normal(size=3) + x[..., None] * rng.normal(size=3))
    stripes = np.sin(2 * np.pi * rng.uniform(4, 10) * (x + rng.uniform(-1, 1) * y))
    return np.clip(light + 25 * stripes[..., None] + rng.normal(0, 5, (side, side, 1)), 0, 255).astype(np.uint8)


def make_mask(side: int = 64, top: int = 20, left: int = 12, height: int = 30, width: int = 30) -> np.ndarray:
    """A mask (side, side) uint8 with one box of ones; by default it touches 9 of 16 cells and covers one."""
    mask = np.zeros((side, side), dtype=np.uint8)
    mask[top : top + height, left : left + width] = 1
    return mask


def make_batch(seed: int = 0, *, size: int = 2, num_cells: int = 9, config: TMADConfig = MODEL) -> Batch:
    """*size* samples 64 x 64, each with a box hole of its own; the same for the same seed."""
    samples = []
    for number in range(size):
        rng = numpy_generator("tiny", "batch", seed, number)
        mask = make_mask(top=int(rng.integers(4, 32)), left=int(rng.integers(4, 30)))
        pool = select_pool(
            mask,
            patch_size=config.patch_size,
            stride=config.memory_stride,
            pool_size=config.memory.pool_size,
            rule=config.memory.rule,
            rng=rng,
        )
        image = make_image(100 * seed + number)
        sample = make_sample(
            f"image-{seed}-{number}", image, mask, pool, patch_size=config.patch_size, num_cells=num_cells, rng=rng
        )
        samples.append(sample)
    return collate(samples)


def train(state: TrainingState, steps: int, phase: str = "joint", *, first: int = 0, fixed: bool = False) -> list[dict]:
    """Run *steps* steps, each on its own batch (or on one, *fixed*); returns their metrics as floats."""
    history = []
    for number in range(first, first + steps):
        batch = make_batch(0 if fixed else number)
        metrics = state.step(batch, phase, global_batch=len(batch), progress=0.0)  # type: ignore[arg-type]
        history.append({name: float(value) for name, value in metrics.items()})
    return history


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    """Copies of a module's parameters by name."""
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def moved(before: dict[str, Tensor], module: nn.Module) -> set[str]:
    """The names of the parameters that are no longer what they were in *before*, to the last bit."""
    return {name for name, parameter in module.named_parameters() if not torch.equal(before[name], parameter)}
