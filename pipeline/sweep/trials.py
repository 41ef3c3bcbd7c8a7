"""Reads trial results from their folders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from pipeline import storage
from pipeline.sweep.config import OBJECTIVES, direction
from pipeline.sweep.space import Point
from pipeline.sweep.trial import DIVERGED_FILE, ERROR_FILE, POINT_FILE, metrics_of, trial_folder
from pipeline.tracking import read_json_lines

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

    def as_dict(self) -> dict[str, Any]:
        """For summary.json."""
        values = {name: value for name, value in asdict(self).items() if name != "history"}
        return values | {"seconds": round(self.seconds, 1)}


def read_trial(folder: str, number: int, name: str) -> Trial:
    """The trial *name* of the sweep in *folder*."""

    def read(file: str) -> Any:
        return storage.read_json(storage.join(trial_folder(folder, name), file))

    rows = read_json_lines(storage.join(trial_folder(folder, name), "metrics.jsonl"))
    history = {
        int(row["step"]): {"images": row["step"], **found} for row in rows if (found := metrics_of(row, OBJECTIVES))
    }
    finished, diverged, failed = map(read, ("finished.json", DIVERGED_FILE, ERROR_FILE))
    ended: dict[Status, Any] = {"finished": finished, "diverged": diverged, "failed": failed}
    status: Status = next((status for status, note in ended.items() if note is not None), "stopped early")
    last = history[max(history)] if history else {}
    return Trial(
        number=number,
        name=name,
        point=read(POINT_FILE) or {},
        status=status,
        images=int(finished["images"] if finished else max((row["step"] for row in rows), default=0)),
        metrics={metric: value for metric, value in last.items() if metric != "images"},
        history=[history[images] for images in sorted(history)],
        seconds=rows[-1]["time_s"] - rows[0]["time_s"] if rows else 0.0,
        error=ended[status]["error"] if status in ("diverged", "failed") else None,
        mlflow_run_id=(read("tracking.json") or {}).get("run_id"),
    )


def winner(trials: Sequence[Trial], objective: str) -> Trial | None:
    """The best of the finished ones by *objective*; the earlier one of two that are equal."""
    finished = [one for one in trials if one.status == "finished" and objective in one.metrics]
    return max(finished, key=lambda one: goodness(one, objective), default=None)


def goodness(trial: Trial, metric: str) -> float:
    """The trial's value, larger where it is better."""
    return _sign(metric) * trial.metrics[metric]


def pareto(trials: Sequence[Trial], metrics: Sequence[str]) -> list[Trial]:
    """The finished trials that no other finished one is at least as good as in all *metrics*, and better in one."""
    there = [one for one in trials if one.status == "finished" and all(name in one.metrics for name in metrics)]

    def beats(other: Trial, one: Trial) -> bool:
        gains = [goodness(other, name) - goodness(one, name) for name in metrics]
        return min(gains) >= 0 and max(gains) > 0

    return [one for one in there if not any(beats(other, one) for other in there)]


def importance(trials: Sequence[Trial], objective: str) -> dict[str, float]:
    """How strongly each searched setting goes with *objective*: Spearman's rank correlation, in [-1, 1], positive where
    larger values are better, over all trials with a value at the last validation that all of them reached."""
    histories = [(one.point, [row for row in one.history if objective in row]) for one in trials if one.point]
    reached = min((rows[-1]["images"] for _, rows in histories if rows), default=0)
    values = [(point, [row[objective] for row in rows if row["images"] <= reached]) for point, rows in histories]
    compared = [(point, found[-1]) for point, found in values if found]
    if len(compared) < 3:
        return {}
    better = _ranks([_sign(objective) * value for _, value in compared])
    found = {
        name: _correlation(_ranks([sort_key(point[name]) for point, _ in compared]), better) for name in compared[0][0]
    }
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
