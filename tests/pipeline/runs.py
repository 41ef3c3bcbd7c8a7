"""What the tests of the training loop share: the smallest run, its batches, and what it reported."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.config import PerceptualConfig, RunConfig, ScheduleConfig
from pipeline.tracking import Tracker
from pipeline.train.context import CHECKPOINT
from pipeline.train.loop import Feed, train_loop
from pipeline.train.preemption import Notice
from tests.tmad.tiny import TRAINING, Features, make_batch
from tmad.batch import Batch
from tmad.step import OneWorker, Workers


class LocalContext:
    """The calling process alone; checkpoints are folders below *checkpoints*, the newest by name."""

    def __init__(self, checkpoints: Path, *, workers: Workers, device: str = "cpu") -> None:
        self.rank = 0
        self.world_size = 1
        self.device = torch.device(device)
        self.workers = workers
        self._folder = checkpoints

    def same_everywhere(self, value: Tensor) -> bool:
        """Nothing to compare with."""
        return True

    def everyones(self, value: Any) -> list[Any]:
        """This one's."""
        return [value]

    def notice(self) -> Notice | None:
        """Nobody announces anything; the signal itself ends the process."""
        return None

    def checkpoints(self) -> dict[str, bool]:
        """Folders by name; each was put there by one renaming."""
        names = (path.name for path in self._folder.glob("*"))
        return dict.fromkeys(sorted(filter(CHECKPOINT.fullmatch, names), reverse=True), True)

    def checkpoint(self, name: str) -> Path:
        """The folder itself."""
        return self._folder / name

    def keep(self, folder: Path | None, name: str, metrics: dict[str, float]) -> str:
        """Copy the folder."""
        assert folder is not None
        free = next(one for one in (name, f"{name}_2", f"{name}_3") if not (self._folder / one).exists())
        copy = shutil.copytree(folder, self._folder / f".{free}", dirs_exist_ok=True)
        copy.rename(self._folder / free)
        return free


CONFIG = RunConfig(
    name="test",
    model=TRAINING.model,
    discriminators=TRAINING.discriminators,
    optim=TRAINING.optim,
    perceptual=PerceptualConfig(features="untrained"),
    schedule=ScheduleConfig(
        coarse_images=4,
        joint_images=8,
        batch_images=2,
        patches_per_image=9,
        validate_every_images=100,
        validation_images=2,
        checkpoint_every_images=4,
        log_every_images=4,
    ),
)


class Stopped(Exception):
    """The process was killed here."""


class Recorder(Tracker):
    """Keeps what a run would have sent."""

    def __init__(self) -> None:
        super().__init__(None, None)
        self.values: list[tuple[int, dict[str, float]]] = []
        self.images: list[tuple[int | None, np.ndarray]] = []

    def metrics(self, values: Any, step: int) -> None:
        self.values.append((step, dict(values)))

    def image(self, name: str, array: np.ndarray, step: int | None = None) -> None:
        self.images.append((step, array))

    def at(self, step: int) -> dict[str, float]:
        return {name: value for when, values in self.values if when == step for name, value in values.items()}


def make_feed(stop_at: int | None = None, *, nan_at: tuple[int, ...] = (), from_images: int = 0) -> Feed:
    """Batches that depend on their position alone, as those of a prepared set; *stop_at*: fail there; *nan_at*:
    there the mask is NaN, and so is the loss; none before *from_images* may be asked for."""

    def training(start_images: int) -> Iterator[Batch]:
        assert start_images >= from_images
        for images in range(start_images, 10**6, 2):
            if images == stop_at:
                raise Stopped
            batch = make_batch(images)
            yield replace(batch, mask=batch.mask * torch.nan) if images in nan_at else batch

    return Feed(training=training, validation=lambda: iter([make_batch(999)]))


def run_in(
    folder: Path,
    config: RunConfig = CONFIG,
    *,
    feed: Feed | None = None,
    tracker: Tracker | None = None,
    features: nn.Module | None = None,
    best: Path | None = None,
) -> dict[str, Any]:
    context = LocalContext(folder, workers=OneWorker())
    feed, tracker = feed or make_feed(), tracker or Recorder()
    return train_loop(config, context, feed, tracker, features or Features(), best=best and str(best))
