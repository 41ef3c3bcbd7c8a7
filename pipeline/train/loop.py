"""The training loop: coarse network alone, then everything jointly (Sec. IV), with lengths in images.

Written once for any number of workers; it knows a `TrainContext`, a source of batches and a tracker, and neither Ray
nor MLflow. Everything random about a batch is drawn where it is made, from its position in the run, so a loop that is
stopped and continued computes what an unbroken one would have, bit for bit on the CPU.
"""

from __future__ import annotations

import json
import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.config import RunConfig, ScheduleConfig
from pipeline.errors import TrainingFailed
from pipeline.tracking import Tracker
from pipeline.train.context import TrainContext, checksums
from pipeline.train.initial import KeptWeights
from pipeline.train.validate import validate
from tmad.batch import Batch
from tmad.checkpoint import load_state, save_state
from tmad.step import Phase, TrainingState

RUN_FILE = "run.json"
"""In a checkpoint, beside the training state: configuration and newest validation."""

LAST_VALUES = ("lr", "bad_steps")
"""Terms of the step that are reported as they stand, not as the interval's mean."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Feed:
    """Where this worker's batches come from."""

    training: Callable[[int], Iterator[Batch]]
    """Endless, from so many images on."""
    validation: Callable[[], Iterator[Batch]]
    """This worker's share of the fixed validation images."""
    counts: Callable[[], dict[str, float]] = dict
    """What this worker's batches have met so far; metrics with the same names on all workers, which are summed."""


@dataclass(frozen=True)
class Stretch:
    """One phase of the schedule, as a stretch of images."""

    phase: Phase
    start: int
    end: int

    def progress(self, images: int) -> float:
        """Share of the phase that is done, in [0, 1)."""
        return (images - self.start) / (self.end - self.start)


def stretch_at(schedule: ScheduleConfig, images: int) -> Stretch:
    """The phase that trains after *images*."""
    if images < schedule.coarse_images:
        return Stretch("coarse", 0, schedule.coarse_images)
    return Stretch("joint", schedule.coarse_images, schedule.total_images)


def due(before: int, after: int, every: int) -> bool:
    """Whether a multiple of *every* lies in (before, after]."""
    return after // every > before // every


def checkpoint_name(images: int) -> str:
    """Sorts by images; the same for every repetition of the same work."""
    return f"images_{images:012d}"


def train_loop(
    config: RunConfig,
    context: TrainContext,
    feed: Feed,
    tracker: Tracker,
    perceptual: nn.Module | None = None,
    initial: KeptWeights | None = None,
) -> dict[str, Any]:
    """Train from the newest checkpoint, or from the start, to the end of both phases.

    *initial*: weights for the start instead of the seed's, not looked at where there is a checkpoint. Returns the
    summary `{"images", "checkpoint", "validation"}`. Raises `NonFiniteLoss` from the step, alike on all workers, and
    `TrainingFailed` if the workers' weights differ.
    """
    schedule = config.schedule
    state = TrainingState(config.training, seed=config.seed, device=context.device, perceptual=perceptual)
    validation = _restore(state, context, initial)
    _check_equal(state, context)
    batches: Iterator[Batch] | None = None
    meter = Meter()
    while state.images_seen < schedule.total_images:
        if batches is None:
            batches = feed.training(state.images_seen)
        stretch = stretch_at(schedule, state.images_seen)
        with meter.waiting():
            batch = next(batches)
        before = state.images_seen
        terms = state.step(
            batch,
            stretch.phase,
            global_batch=schedule.batch_images,
            progress=stretch.progress(before),
            workers=context.workers,
        )
        images = state.images_seen
        meter.add(terms, schedule.batch_images)
        phase_over = images >= stretch.end
        if phase_over or due(before, images, schedule.log_every_images):
            _check_equal(state, context)
            metrics = {**meter.read(context), **_summed(feed.counts(), context)}
            tracker.metrics(metrics, images)
            log.info("%s", progress_line(stretch, images, metrics))
        if phase_over or due(before, images, schedule.validate_every_images):
            validation, pictures = validate(state.ema_model, stretch.phase, feed.validation(), context)
            tracker.metrics(validation, images)
            if pictures is not None:
                tracker.image("validation", pictures, images)
            log.info("validation after %s images: %s", f"{images:,}", _shown(validation, "val/"))
        if images >= schedule.total_images or due(before, images, schedule.checkpoint_every_images):
            _save(state, config, context, validation)
        meter.resume()
    return {
        "images": state.images_seen,
        "bad_steps": state.bad_steps,
        "checkpoint": checkpoint_name(state.images_seen),
        "validation": validation,
    }


class Meter:
    """Collects the terms of the steps of an interval, and how its time was spent."""

    def __init__(self) -> None:
        self._clear()
        self._resumed = time.perf_counter()

    def _clear(self) -> None:
        self._terms: dict[str, list[Tensor]] = {}
        self._images = 0
        self._waited_s = 0.0
        self._trained_s = 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around the wait for a batch."""
        began = time.perf_counter()
        yield
        self._waited_s += time.perf_counter() - began

    def add(self, terms: Mapping[str, Tensor], images: int) -> None:
        """One step's terms, 0-dim; *images* counts all workers'."""
        for name, value in terms.items():
            self._terms.setdefault(name, []).append(value)
        self._images += images
        self._trained_s += time.perf_counter() - self._resumed
        self._resumed = time.perf_counter()

    def resume(self) -> None:
        """What was done since the step (validation, checkpoint) is not training time."""
        self._resumed = time.perf_counter()

    def read(self, context: TrainContext) -> dict[str, float]:
        """Means over the interval and the workers, the rates, and a new interval. Not-finite values are left out, as
        those steps changed nothing; `bad_steps` counts them."""
        names = sorted(self._terms)
        sums = torch.zeros(len(names) + 1, 2, dtype=torch.float64)
        for row, name in enumerate(names):
            values = torch.stack(self._terms[name][-1 if name in LAST_VALUES else 0 :]).double().cpu()
            finite = values[values.isfinite()]
            sums[row] = torch.tensor([finite.sum(), finite.numel()], dtype=torch.float64)
        sums[-1] = torch.tensor([self._waited_s, self._trained_s], dtype=torch.float64)
        with torch.no_grad():
            means = context.workers.mean(sums.to(context.device)).cpu()
        metrics = {name: float(total / count) for name, (total, count) in zip(names, means, strict=False) if count > 0}
        waited_s, trained_s = means[-1].tolist()
        metrics["rate/images_per_s"] = self._images / max(trained_s, 1e-9)
        metrics["rate/data_wait_share"] = waited_s / max(trained_s, 1e-9)
        self._clear()
        return metrics


def progress_line(stretch: Stretch, images: int, metrics: Mapping[str, float]) -> str:
    """`coarse 800/4,000 images, total 1.23, ..., 12.1 images/s, 1 % waiting for data, phase ends in 4 min`."""
    rate = metrics["rate/images_per_s"]
    done, length = images - stretch.start, stretch.end - stretch.start
    parts = [f"{stretch.phase} {min(done, length):,}/{length:,} images", _shown(metrics, "loss/")]
    parts += [f"{rate:.1f} images/s", f"{100 * metrics['rate/data_wait_share']:.0f} % waiting for data"]
    if metrics.get("bad_steps"):
        parts.append(f"{metrics['bad_steps']:.0f} steps skipped so far (not finite)")
    if metrics.get("data/replaced"):
        parts.append(f"{metrics['data/replaced']:.0f} images replaced since the start (they cannot be used)")
    if done < length:
        parts.append(f"phase ends in {duration((length - done) / max(rate, 1e-9))}")
    return ", ".join(parts)


def _summed(counts: Mapping[str, float], context: TrainContext) -> dict[str, float]:
    """The counts of all workers together."""
    if not counts:
        return {}
    own = torch.tensor(list(counts.values()), dtype=torch.float64, device=context.device)
    with torch.no_grad():
        totals = context.workers.mean(own) * context.world_size
    return dict(zip(counts, totals.tolist(), strict=True))


def duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3 h 05 min`, `2 d 4 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def _shown(metrics: Mapping[str, float], prefix: str) -> str:
    parts = [f"{name.removeprefix(prefix)} {value:.4g}" for name, value in metrics.items() if name.startswith(prefix)]
    return ", ".join(parts)


def _check_equal(state: TrainingState, context: TrainContext) -> None:
    sums = checksums([state.model, state.ema_model, state.patch_critic, state.global_critic])
    if not context.same_everywhere(sums):
        raise TrainingFailed(
            f"the workers' weights differ after {state.images_seen} images, though every gradient is averaged; unequal "
            "hardware or library versions among the workers? The run goes on from its newest checkpoint"
        )


def _restore(state: TrainingState, context: TrainContext, initial: KeptWeights | None) -> dict[str, float]:
    """Continue *state* from the newest checkpoint, if there is one; returns the validation kept with it."""
    with context.newest_checkpoint() as folder:
        if folder is None:
            if initial is not None:
                state.start_from(initial.read())
            return {}
        load_state(state, folder)
        log.info("continuing after %s images", f"{state.images_seen:,}")
        validation: dict[str, float] = json.loads((Path(folder) / RUN_FILE).read_text())["validation"]
        return validation


def _save(state: TrainingState, config: RunConfig, context: TrainContext, validation: dict[str, float]) -> None:
    name = checkpoint_name(state.images_seen)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="tmad-checkpoint-") as temporary:
        folder = Path(temporary) if context.rank == 0 else None
        if folder is not None:
            save_state(state, folder)
            content = {"images": state.images_seen, "validation": validation, "config": asdict(config)}
            (folder / RUN_FILE).write_text(json.dumps(content, indent=2) + "\n")
        context.keep(folder, name, {"images": float(state.images_seen), **validation})
    log.info("checkpoint %s kept (%.1f s)", name, time.perf_counter() - began)
