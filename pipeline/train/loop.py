"""The training loop: coarse network alone, then everything jointly (Sec. IV), with lengths in images.

Written once for any number of workers; it knows a `TrainContext`, a source of batches and a tracker, and neither Ray
nor MLflow. Everything random about a batch is drawn where it is made, from its position in the run, so a loop that is
stopped and continued computes what an unbroken one would have, bit for bit on the CPU.
"""

from __future__ import annotations

import json
import logging
import resource
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from pipeline.config import RunConfig, ScheduleConfig
from pipeline.errors import Interrupted, TrainingFailed
from pipeline.tracking import Tracker
from pipeline.train.checkpoints import checkpoint_name, newest_usable, seal
from pipeline.train.context import TrainContext, checksums
from pipeline.train.early_stopping import RUN_FILE, Course, keep_best, write_run_file
from pipeline.train.initial import KeptWeights
from pipeline.train.preemption import Notice
from pipeline.train.validate import validate
from tmad.batch import Batch
from tmad.checkpoint import load_state, save_state
from tmad.step import BadStep, NonFiniteLoss, Phase, TrainingState

LAST_VALUES = ("lr", "bad_steps")
"""Terms of the step that are reported as they stand, not as the interval's mean."""

SHOWN_IMAGES = 8
"""Most images of a batch that a message names."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Feed:
    """Where this worker's batches come from."""

    training: Callable[[int], Iterator[Batch]]
    """Endless, beginning after this many images."""
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


def train_loop(
    config: RunConfig,
    context: TrainContext,
    feed: Feed,
    tracker: Tracker,
    perceptual: nn.Module | None = None,
    initial: KeptWeights | None = None,
    best: str | None = None,
) -> dict[str, Any]:
    """Train from the newest checkpoint that can be trusted, or from the start, to the end of both phases, or until
    `schedule.stop_after_validations` ends the second one.

    *initial*: weights for the start instead of the seed's, not looked at where there is a checkpoint. *best*: folder
    or URI of the best model. Returns the summary `{"images", "bad_steps", "rollbacks", "stopped", "checkpoint",
    "validation"}`, `stopped` being why it ended early. Raises, alike on all workers, `NonFiniteLoss` if going back to a
    checkpoint did not help or there is none, `CheckpointsDamaged` if none can be used, `TrainingFailed` if the
    workers' weights differ, and `Interrupted`, after a last checkpoint, when the run is asked to end.

    Going back takes weights and moments of the newest checkpoint. Images, steps and schedule stay where the bad row
    ended, and data go on from there: the same batches would end the same way. The images since that checkpoint are
    spent.
    """
    schedule = config.schedule
    state = TrainingState(config.training, seed=config.seed, device=context.device, perceptual=perceptual)
    if config.workers.lays_channels_last:
        state.use_channels_last()
    if config.workers.compile:
        state.compile()
    checkpoint, course = _restore(state, context, tracker)
    if checkpoint is None and initial is not None:
        state.start_from(initial.read())
    _check_equal(state, context)
    if checkpoint is not None:
        log.info("continuing after %s images", f"{state.images_seen:,}")
    batches: Iterator[Batch] | None = None
    meter = Meter()
    save_due = rolled_back = False
    told: BadStep | None = None
    while state.images_seen < schedule.total_images and not course.stopped(schedule):
        if batches is None:
            batches = feed.training(state.images_seen)
        stretch = stretch_at(schedule, state.images_seen)
        with meter.waiting():
            batch = next(batches)
        before = state.images_seen
        try:
            terms = state.step(
                batch,
                stretch.phase,
                global_batch=schedule.batch_images,
                progress=stretch.progress(before),
                workers=context.workers,
            )
        except NonFiniteLoss as error:
            cause = _told(error, state.bad_step, context)
            if checkpoint is None or rolled_back:
                raise NonFiniteLoss(f"{cause}; {_no_way_back(checkpoint)}") from error
            checkpoint, course = _roll_back(state, context, tracker, course, cause)
            healthy, rolled_back = False, True
        else:
            healthy = True
            meter.add(terms, schedule.batch_images)
            bad = state.bad_step
            if bad is not None and bad is not told and state.bad_steps_in_row == 1:
                told = bad
                _warn(bad, context)
        images = state.images_seen
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
            course = course.after(validation, stretch.phase, images, schedule)
            if best is not None and context.rank == 0 and course.best_images == images:
                keep_best(best, state.ema_model, course, config)
        save_due = save_due or due(before, images, schedule.checkpoint_every_images)
        # In a row of bad steps it waits: one of those steps may have found weights that no longer give finite losses.
        over = images >= schedule.total_images or course.stopped(schedule) is not None
        notice = context.notice()
        if over or save_due or notice is not None:
            state.settle()
            if over or (healthy and state.bad_steps_in_row == 0):
                tracker.flush()
                checkpoint = _save(state, config, context, course, tracker)
                save_due = rolled_back = False
        if notice is not None and not over:
            _obey(notice, checkpoint, images, context)
        meter.resume()
    if stopped := course.stopped(schedule):
        log.info("training ends after %s images: %s", f"{state.images_seen:,}", stopped)
    return {
        "images": state.images_seen,
        "bad_steps": state.bad_steps,
        "rollbacks": course.rollbacks,
        "stopped": course.stopped(schedule),
        "checkpoint": checkpoint,
        "validation": course.validation,
    }


class Meter:
    """Collects the terms of the steps of an interval, and how its time was spent."""

    def __init__(self) -> None:
        self._clear()
        self._resumed = time.perf_counter()
        psutil.cpu_percent()  # the first figure counts from here

    def _clear(self) -> None:
        self._terms: dict[str, list[Tensor]] = {}
        self._images = 0
        self._waited_s = 0.0
        self._trained_s = 0.0
        self._began, self._began_busy_s = time.perf_counter(), time.process_time()

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
        busy_s = time.process_time() - self._began_busy_s
        metrics["system/processors"] = busy_s / max(time.perf_counter() - self._began, 1e-9)
        self._clear()
        return metrics | _system(context.device)


def _system(device: torch.device) -> dict[str, float]:
    """Use of this worker's node under MLflow's names, and the most that the worker itself has held, in GB: of the
    machine's memory since its start, of the GPU's tensors since the last call."""
    found = {
        "system/cpu_utilization_percentage": psutil.cpu_percent(),
        "system/system_memory_usage_percentage": psutil.virtual_memory().percent,
        # Linux counts in KiB.
        "system/memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
    }
    if device.type == "cuda":
        found["system/gpu_memory_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
        torch.cuda.reset_peak_memory_stats(device)
        # NVML's errors share no class with torch's; a container may lack NVML, and training needs no such figure.
        with suppress(Exception):
            found["system/gpu_utilization_percentage"] = float(torch.cuda.utilization(device))
    return found


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
    sums = checksums([state.model, state.ema_model, state.patch_discriminator, state.global_discriminator])
    if not context.same_everywhere(sums):
        raise TrainingFailed(
            f"the workers' weights differ after {state.images_seen} images, though every gradient is averaged; unequal "
            "hardware or library versions among the workers? The run continues from its newest checkpoint"
        )


def _restore(state: TrainingState, context: TrainContext, tracker: Tracker) -> tuple[str | None, Course]:
    """Continue *state* from the newest usable checkpoint, if there is one; returns its name and its course."""
    if (found := newest_usable(context)) is None:
        return None, Course()
    load_state(state, found.folder)
    course = Course.of(json.loads((found.folder / RUN_FILE).read_text()))
    if found.passed_over:
        tracker.metrics({"health/damaged_checkpoints": found.passed_over}, state.images_seen)
    return found.name, course


def _save(state: TrainingState, config: RunConfig, context: TrainContext, course: Course, tracker: Tracker) -> str:
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="tmad-checkpoint-") as temporary:
        folder = Path(temporary) if context.rank == 0 else None
        if folder is not None:
            save_state(state, folder)
            write_run_file(folder, state.images_seen, course, config)
            seal(folder)
        metrics = {"images": float(state.images_seen), **course.validation}
        name = context.keep(folder, checkpoint_name(state.images_seen), metrics)
    seconds = time.perf_counter() - began
    tracker.metrics({"system/checkpoint_s": seconds}, state.images_seen)
    log.info("checkpoint %s kept (%.1f s)", name, seconds)
    return name


def _roll_back(
    state: TrainingState, context: TrainContext, tracker: Tracker, course: Course, cause: str
) -> tuple[str | None, Course]:
    """Weights and moments of the newest usable checkpoint, with the counters as they stand."""
    images, steps, bad_steps = state.images_seen, state.steps, state.bad_steps
    name, _ = _restore(state, context, tracker)
    if context.rank == 0:
        log.warning(
            "back to the weights of checkpoint %s; data continue after %s images: %s", name, f"{images:,}", cause
        )
    state.images_seen, state.steps, state.bad_steps, state.bad_steps_in_row = images, steps, bad_steps, 0
    course = replace(course, rollbacks=course.rollbacks + 1)
    tracker.metrics({"health/rollbacks": course.rollbacks}, images)
    return name, course


def _obey(notice: Notice, checkpoint: str | None, images: int, context: TrainContext) -> None:
    """Say what was announced and where the run stands; raise `Interrupted` if it is to end now."""
    kept = "no checkpoint yet" if checkpoint is None else f"checkpoint {checkpoint} is kept"
    told = f"{notice.reason} after {images:,} images; {kept}"
    if context.rank == 0:
        log.warning("%s", told)
    if notice.kind != "drain":
        raise Interrupted(told, restart=notice.kind == "restart")


def _told(error: NonFiniteLoss, bad: BadStep | None, context: TrainContext) -> str:
    """The error with the images of the workers whose own losses were not finite, or with all of the step if it was the
    averaged gradients alone, which are everyone's."""
    everyones = context.everyones((_own(error.terms), bad.image_id if bad else []))
    told = [
        f"{', '.join(names)} on worker {rank} with images {_listed(images)}"
        for rank, (names, images) in enumerate(everyones)
        if names
    ]
    return "; ".join([str(error), *(told or [f"images {_listed([one for _, ids in everyones for one in ids])}"])])


def _warn(bad: BadStep, context: TrainContext) -> None:
    """Of the first step of a bad row, from the workers where it began, and the first one in any case."""
    if context.rank == 0 or _own(bad.terms):
        where = f"after {bad.images_seen:,} images, with {_listed(bad.image_id)}"
        log.warning("step skipped, not finite: %s (%s)", ", ".join(bad.terms), where)


def _own(names: Iterable[str]) -> list[str]:
    """Those terms that are of this worker's batch alone."""
    return [name for name in names if not name.startswith("grad_norm/")]


def _no_way_back(checkpoint: str | None) -> str:
    if checkpoint is None:
        return "there is no checkpoint yet to go back to"
    return f"going back to checkpoint {checkpoint} did not help"


def _listed(names: list[str]) -> str:
    return ", ".join(names[:SHOWN_IMAGES]) + (f" and {left} more" if (left := len(names) - SHOWN_IMAGES) > 0 else "")
