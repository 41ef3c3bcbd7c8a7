"""Reads trial results from their folders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pipeline import storage
from pipeline.sweep.config import OBJECTIVES, direction
from pipeline.sweep.space import Point
from pipeline.sweep.trial import DIVERGED_FILE, ERROR_FILE, POINT_FILE, metrics_of, trial_folder
from pipeline.tracking import read_json_lines
from pipeline.train.early_stopping import is_better

Status = Literal["finished", "stopped early", "diverged", "failed"]


@dataclass(frozen=True)
class Trial:
    """One trial, as far as it came."""

    number: int
    """From 1, in the order in which trials were begun."""
    name: str
    """Of its folder below trials/."""
    point: Point
    status: Status
    images: int
    """Images that it was trained on."""
    metrics: dict[str, float]
    """Of its last validation."""
    history: list[dict[str, float]]
    """`images` and metrics of each validation."""
    seconds: float
    """Between its first and its last sign of training."""
    error: str | None
    """Why it failed or diverged."""
    mlflow_run_id: str | None

    @property
    def label(self) -> str:
        """For tables and pictures."""
        return f"trial {self.number}"


def read_trial(folder: str, number: int, name: str) -> Trial:
    """The trial *name* of the sweep in *folder*."""
    place = trial_folder(folder, name)
    rows = read_json_lines(storage.join(place, "metrics.jsonl"))
    history = {
        int(row["step"]): {"images": row["step"], **found} for row in rows if (found := metrics_of(row, OBJECTIVES))
    }
    finished = storage.read_json(storage.join(place, "finished.json"))
    notes = {file: storage.read_json(storage.join(place, file)) for file in (DIVERGED_FILE, ERROR_FILE)}
    status: Status = "stopped early"
    if finished is not None:
        status = "finished"
    elif notes[DIVERGED_FILE] is not None:
        status = "diverged"
    elif notes[ERROR_FILE] is not None:
        status = "failed"
    last = history[max(history)] if history else {}
    return Trial(
        number=number,
        name=name,
        point=storage.read_json(storage.join(place, POINT_FILE)) or {},
        status=status,
        images=int(finished["images"] if finished else max((row["step"] for row in rows), default=0)),
        metrics={metric: value for metric, value in last.items() if metric != "images"},
        history=[history[images] for images in sorted(history)],
        seconds=rows[-1]["time_s"] - rows[0]["time_s"] if rows else 0.0,
        error=next((note["error"] for note in notes.values() if note and status in ("diverged", "failed")), None),
        mlflow_run_id=(storage.read_json(storage.join(place, "tracking.json")) or {}).get("run_id"),
    )


def winner(trials: Sequence[Trial], objective: str) -> Trial | None:
    """The best of the finished ones by *objective*; the earlier one of two that are equal."""
    best: Trial | None = None
    for trial in trials:
        value = trial.metrics.get(objective)
        if trial.status != "finished" or value is None:
            continue
        if best is None or is_better(value, best.metrics[objective], objective):
            best = trial
    return best


def pareto(trials: Sequence[Trial], metrics: Sequence[str]) -> list[Trial]:
    """The finished trials that no other finished one is at least as good as in all *metrics*, and better in one."""
    there = [one for one in trials if one.status == "finished" and all(name in one.metrics for name in metrics)]

    def beats(other: Trial, one: Trial) -> bool:
        gains = [_sign(name) * (other.metrics[name] - one.metrics[name]) for name in metrics]
        return min(gains) >= 0 and max(gains) > 0

    return [one for one in there if not any(beats(other, one) for other in there)]


def importance(trials: Sequence[Trial], objective: str) -> dict[str, float]:
    """How strongly each searched setting goes with *objective*: Spearman's rank correlation, in [-1, 1], positive where
    larger values are better, over all trials with a value at the last validation that all of them reached."""
    compared = [one for one in trials if one.point and any(objective in row for row in one.history)]
    if len(compared) < 3:
        return {}
    reached = min(max(row["images"] for row in one.history if objective in row) for one in compared)
    values = [
        [row[objective] for row in one.history if objective in row and row["images"] <= reached][-1:]
        for one in compared
    ]
    found: dict[str, float] = {}
    usable = [index for index, value in enumerate(values) if value]
    if len(usable) < 3:
        return {}
    goodness = _ranks([_sign(objective) * values[index][0] for index in usable])
    for name in compared[0].point:
        setting = _ranks([sort_key(compared[index].point[name]) for index in usable])
        found[name] = _correlation(setting, goodness)
    return dict(sorted(found.items(), key=lambda item: -abs(item[1])))


def sort_key(value: Any) -> tuple[Any, ...]:
    """Orders numbers, truth values, words and pairs among their like."""
    if isinstance(value, bool | int | float):
        return (0, float(value))
    if isinstance(value, list | tuple):
        return (1, *map(sort_key, value))
    return (2, str(value))


def _ranks(values: Sequence[Any]) -> list[float]:
    """From 0; equal ones share the mean of theirs."""
    ordered = sorted(values)
    return [ordered.index(value) + (ordered.count(value) - 1) / 2 for value in values]


def _correlation(a: Sequence[float], b: Sequence[float]) -> float:
    mean_a, mean_b = sum(a) / len(a), sum(b) / len(b)
    product = sum((x - mean_a) * (y - mean_b) for x, y in zip(a, b, strict=True))
    spread = (sum((x - mean_a) ** 2 for x in a) * sum((y - mean_b) ** 2 for y in b)) ** 0.5
    return product / spread if spread else 0.0


def _sign(metric: str) -> int:
    return 1 if direction(metric) == "max" else -1


def as_dict(trial: Trial) -> Mapping[str, Any]:
    """For summary.json."""
    return {
        "number": trial.number,
        "name": trial.name,
        "status": trial.status,
        "point": trial.point,
        "images": trial.images,
        "metrics": trial.metrics,
        "seconds": round(trial.seconds, 1),
        "error": trial.error,
        "mlflow_run_id": trial.mlflow_run_id,
    }
