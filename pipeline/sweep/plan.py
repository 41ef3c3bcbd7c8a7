"""The plan of a sweep (`--dry-run`): trials, resources, expected hours."""

from __future__ import annotations

import os

from pipeline.config import RunConfig
from pipeline.runs.cluster import available, joined, shown
from pipeline.sweep.config import SweepConfig
from pipeline.sweep.launch import check_points, resolve, room, room_on_disk
from pipeline.sweep.space import make_space, sample
from pipeline.tracking import check_tracking, resolve_tracking_uri
from pipeline.train.footprint import measured_rates
from pipeline.train.launch import open_training_set, resources
from pipeline.train.loop import duration


def plan(config: SweepConfig, *, images_per_s: float | None = None) -> str:
    """What the sweep would do, as lines for people. *images_per_s*: of one trial; default: measured here by a few
    steps, if trials would train on this machine's CPU.

    Raises what would stop the sweep: data that is missing or does not fit, `ClusterTooSmall`, `ClusterUnreachable`,
    `TrackingUnreachable`.
    """
    config = resolve(config)
    run, schedule = config.run, config.run.schedule
    space = make_space(config.space, run)
    points = sample(space, config.trials, config.seed) if config.search == "random" else None
    check_points(config, space, points)
    there = available()
    concurrent = room(config, there)
    each, metrics = resources(run), ", ".join(config.objectives)
    of = "the cluster" if joined() else "this machine"
    coarse = 0 if config.init_from else schedule.coarse_images
    lines = [
        f"space        {', '.join(f'{name} {domain}' for name, domain in space.items())}",
        f"trials       {config.trials} by {config.search}, {concurrent} side by side; {schedule.joint_images:,} images "
        f"each, validated every {schedule.validate_every_images:,} ({metrics} of {schedule.validation_images} images)",
        f"start        {_start(config, coarse)}",
        f"resources    {shown(each)} a trial with its data, {of} has {shown(there)}",
        f"room         {room_on_disk(config)}",
        f"tracking     {check_tracking(resolve_tracking_uri(run.tracking.uri, run.runs))}",
    ]
    if images_per_s is None and not run.workers.use_gpu and not joined():
        alone = _rate_here(run)
        # Logical CPUs may be more than there are: trials share those.
        busy = concurrent * run.workers.num_workers * run.threads
        images_per_s = alone * min(1.0, (os.cpu_count() or 1) / busy)
        rate = f"{images_per_s:.2g} images/s a trial: {alone:.2g} alone, measured here"
    elif images_per_s is None:
        return "\n".join([*lines, "duration     unknown; state the rate of one trial with --images-per-s"])
    else:
        rate = f"{images_per_s:g} images/s a trial, as stated"
    most = (coarse + schedule.joint_images * config.trials / concurrent) / images_per_s
    text = f"at most {_hours(most)}"
    if config.stop_early:
        expected = (coarse + expected_images(config) / concurrent) / images_per_s
        text = f"about {_hours(expected)} with early stopping, {text}"
    return "\n".join([*lines, f"duration     {text} ({rate}; without start of processes and validation)"])


def expected_images(config: SweepConfig) -> float:
    """Images of all trials if each rung lets through one in `reduction` of those that reach it."""
    total, reached = config.run.schedule.joint_images, float(config.trials)
    rung = float(min(config.first_rung_images or config.run.schedule.validate_every_images, total))
    images, before = 0.0, 0.0
    while rung < total:
        images += reached * (rung - before)
        reached, before, rung = max(1.0, reached / config.reduction), rung, rung * config.reduction
    return images + reached * (total - before)


def _start(config: SweepConfig, coarse: int) -> str:
    if config.init_from:
        return f"the coarse network of {config.init_from}"
    return f"one coarse phase of {coarse:,} images, shared by all trials" if coarse else "random weights"


def _rate_here(run: RunConfig) -> float:
    """Images per second of a trial's joint steps on this machine's CPU, with the crops of the training set."""
    manifest, _ = open_training_set(run, None)
    rates = measured_rates(run, crop_size=manifest.crop_size, phases=["joint"])
    assert rates is not None, "asked for on a CPU only"
    return rates["joint"] * run.workers.num_workers


def _hours(seconds: float) -> str:
    return duration(seconds) if seconds < 3600 else f"{seconds / 3600:.1f} hours"
