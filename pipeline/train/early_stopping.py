"""Validation history of a run: newest value, best value, validations since the last improvement."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from pipeline import storage
from pipeline.config import RunConfig, ScheduleConfig
from pipeline.train.checkpoints import MANIFEST_FILE, checkpoint_name, seal
from tmad.checkpoint import save_model
from tmad.metrics import METRICS
from tmad.model import TMAD
from tmad.step import Phase

RUN_FILE = "run.json"
"""In a checkpoint and beside the best model: images, the `Course`, the configuration."""


@dataclass(frozen=True)
class Course:
    """The same on all workers, and kept in every checkpoint."""

    validation: dict[str, float] = field(default_factory=dict)
    """The newest one."""
    best: float | None = None
    """Best value of `schedule.best_metric` so far."""
    best_images: int | None = None
    """Images after which it was reached."""
    stale: int = 0
    """Validations of the joint phase in a row that did not improve it."""
    rollbacks: int = 0
    """How often the run went back to a checkpoint because its steps were no longer finite."""

    def after(self, validation: dict[str, float], phase: Phase, images: int, schedule: ScheduleConfig) -> Course:
        """With one more validation. A metric that it has no value for changes nothing."""
        course = replace(self, validation=validation)
        value = validation.get(f"val/{schedule.best_metric}")
        if value is None:
            return course
        if is_better(value, self.best, schedule.best_metric):
            return replace(course, best=value, best_images=images, stale=0)
        return replace(course, stale=self.stale + (phase == "joint"))

    def stopped(self, schedule: ScheduleConfig) -> str | None:
        """Why training ends early, or none."""
        patience = schedule.stop_after_validations
        if patience is None or self.stale < patience:
            return None
        return (
            f"val/{schedule.best_metric} has not improved for {self.stale} validations in a row since "
            f"{self.best:.4g} after {self.best_images:,} images"
        )

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> Course:
        """From the content of a run file."""
        return cls(**{name: content[name] for name in cls.__dataclass_fields__})


def is_better(value: float, than: float | None, metric: str) -> bool:
    """Whether *value* of *metric* (a name in `tmad.metrics`, `coarse_` before it or not) improves on *than*."""
    if than is None:
        return True
    lower = METRICS[metric.removeprefix("coarse_")].better == "lower"
    return value < than if lower else value > than


def write_run_file(folder: Path, images: int, course: Course, config: RunConfig) -> None:
    """Beside what belongs to it."""
    content = {"images": images, **asdict(course), "config": asdict(config)}
    (folder / RUN_FILE).write_text(json.dumps(content, indent=2) + "\n")


def keep_best(best: str, model: TMAD, course: Course, config: RunConfig) -> str:
    """Put *model*, which has the best value so far, into a folder of its own below *best*; returns that folder.

    An older one goes only when the new one is complete, so a crash leaves one of them, or both. One that is better, of
    a stretch that a crash undid, stays in place of the new one.
    """
    assert course.best_images is not None
    name = checkpoint_name(course.best_images)
    # One of a stretch that is repeated is there already, and must not be half replaced.
    if not storage.exists(storage.join(best, name, MANIFEST_FILE)):
        with tempfile.TemporaryDirectory(prefix="tmad-best-") as temporary:
            save_model(model, Path(temporary) / "model")
            write_run_file(Path(temporary), course.best_images, course, config)
            seal(Path(temporary))
            for key in sorted(storage.file_sizes(temporary), key=lambda key: key == MANIFEST_FILE):
                storage.write_atomic(storage.join(best, name, key), (Path(temporary) / key).read_bytes())
    kept = best_kept(best, config.schedule.best_metric)
    assert kept is not None
    for name in {key.split("/", 1)[0] for key in storage.file_sizes(best)} - {kept["name"]}:
        storage.remove(storage.join(best, name, MANIFEST_FILE))
        storage.remove_folder(storage.join(best, name))
    return storage.join(best, kept["name"])


def best_kept(best: str, metric: str) -> dict[str, Any] | None:
    """The best of the complete models below *best*: `{"name", "model", "metric", "value", "images"}`."""
    keys = storage.file_sizes(best) if storage.exists(best) else {}
    found: dict[str, Any] | None = None
    for name in sorted({key.split("/", 1)[0] for key in keys if key.endswith("/" + MANIFEST_FILE)}):
        content = json.loads(storage.read_bytes(storage.join(best, name, RUN_FILE)))
        if found is None or is_better(content["best"], found["value"], metric):
            found = {
                "name": name,
                "model": storage.join(best, name),
                "metric": f"val/{metric}",
                "value": content["best"],
                "images": content["best_images"],
            }
    return found
