"""One trial: a run of `pipeline.train` at one point of the space, inside Ray Tune.

Ray Tune starts the function here in an actor of its own, and Ray Train starts the workers from there. What a trial
reports are metrics of the validation; the last ones go to Tune when the model is kept, so that a trial is never
stopped between its last step and its end.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray.tune
from ray.tune.integration.ray_train import TuneReportCallback

from pipeline import storage
from pipeline.config import RunConfig, from_json
from pipeline.errors import MissingInput, TrainingFailed, one_line
from pipeline.runs.cli import configure_logging
from pipeline.runs.lease import EXPIRY_S
from pipeline.sweep.space import Point, apply
from pipeline.train.launch import train

POINT_FILE, DIVERGED_FILE, ERROR_FILE = "point.json", "diverged.json", "error.json"
"""In a trial's folder, beside what every run has: its point; why its losses are no longer finite; why it failed."""

TRIALS_FOLDER = "trials"

DRIVER_CPUS = 0.01
"""Of the actor that a trial is for Tune: it waits for its workers."""


@dataclass(frozen=True)
class Job:
    """What all trials of a sweep have in common, as it travels to them."""

    folder: str
    """The sweep's."""
    run: str
    """The run that each trial is, as JSON."""
    init_from: str | None
    """Where the coarse network comes from; `None` if the run has a coarse phase, or no given network."""
    objectives: tuple[str, ...]
    tracking_uri: str | None
    parent_run: str | None


def trial_folder(folder: str, name: str) -> str:
    """Of the trial *name* of the sweep in *folder*."""
    return storage.join(folder, TRIALS_FOLDER, name)


def trial_run(job: Job, point: Mapping[str, Any], name: str) -> RunConfig:
    """The run of the trial *name*. Raises `ValueError` for a point whose values do not go together."""
    run = apply(from_json(job.run), point)
    schedule = replace(run.schedule, checkpoint_every_images=run.schedule.validate_every_images)
    tracking = replace(run.tracking, uri=job.tracking_uri or "none", register=False, parent_run=job.parent_run)
    run = replace(run, name=name, runs=storage.join(job.folder, TRIALS_FOLDER), tracking=tracking, schedule=schedule)
    if job.init_from is None:
        return run
    return replace(run, init_from=job.init_from, init_networks="coarse", schedule=replace(schedule, coarse_images=0))


def encode(point: Point) -> Point:
    """As Tune and its searchers carry it: numbers, and JSON for all else."""
    return {name: value if isinstance(value, float) else json.dumps(value) for name, value in point.items()}


def decode(point: Mapping[str, Any]) -> Point:
    """What `encode` was given."""
    return {name: json.loads(value) if isinstance(value, str) else value for name, value in point.items()}


def run_trial(config: dict[str, Any]) -> None:
    """The function that Tune runs; *config* holds `job`, a `Job` as dictionary, and `point`."""
    job = Job(**config["job"])
    name = ray.tune.get_context().get_trial_id()
    configure_logging(name)
    folder, point = trial_folder(job.folder, name), decode(config["point"])
    for file in (ERROR_FILE, DIVERGED_FILE):
        storage.remove(storage.join(folder, file))  # an earlier attempt's
    storage.write_atomic(storage.join(folder, POINT_FILE), (json.dumps(point, indent=2) + "\n").encode())
    try:
        run = trial_run(job, point, name)
        # An attempt before this one, on a machine that was lost, still has the name until its lease expires.
        reports = ReportValidations(run.schedule.total_images, job.objectives)
        finished = train(run, [reports], wait_s=2 * EXPIRY_S)
        last = metrics_of(finished["validation"], job.objectives)
        if missing := [metric for metric in job.objectives if metric not in last]:
            raise MissingInput(
                f"the validation gave no value of {', '.join(missing)}: no image of "
                f"{storage.redact(run.data.validation_set)} has one (SSIM needs sides of 11 pixels, texture 16 and "
                "patches inside the hole); take another objective or set"
            )
    except TrainingFailed as error:
        if not error.details.get("not_finite"):
            _note(folder, ERROR_FILE, error)
            raise
        _note(folder, DIVERGED_FILE, error)
        return
    except Exception as error:
        _note(folder, ERROR_FILE, error)
        raise
    ray.tune.report({"images": finished["images"], **last})


class ReportValidations(TuneReportCallback):
    """Hands the validation of each checkpoint but the last to Tune."""

    def __init__(self, total_images: int, objectives: Sequence[str]) -> None:
        super().__init__()
        self._total_images = total_images
        self._objectives = tuple(objectives)

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        """Of all workers; the first one's are everyone's."""
        values = metrics_of(metrics[0], self._objectives)
        if len(values) == len(self._objectives) and metrics[0]["images"] < self._total_images:
            super().after_report(run_context, [{"images": metrics[0]["images"], **values}], None)


def metrics_of(validation: Mapping[str, Any], names: Sequence[str]) -> dict[str, float]:
    """Those of *names* that a validation (`val/...`) has."""
    return {name: validation[f"val/{name}"] for name in names if validation.get(f"val/{name}") is not None}


def _note(folder: str, file: str, error: BaseException) -> None:
    text = storage.redact(f"{type(error).__name__}: {one_line(error)}")
    storage.write_atomic(storage.join(folder, file), (json.dumps({"error": text}, indent=2) + "\n").encode())
