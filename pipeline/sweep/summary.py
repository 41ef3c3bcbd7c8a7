"""The report of a sweep: trials, figures, the same holes filled by every trial."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from pipeline import storage
from pipeline.errors import ModelNotFound
from pipeline.evaluation.config import EvaluateConfig
from pipeline.evaluation.evaluate import Evaluated, evaluate
from pipeline.evaluation.pictures import Shown, side_by_side
from pipeline.report.page import Table, render
from pipeline.report.pictures import Row
from pipeline.sweep.config import DISTORTION, TEXTURE, SweepConfig
from pipeline.sweep.figures import bars, front, parallel_coordinates
from pipeline.sweep.space import Domain
from pipeline.sweep.trial import trial_folder
from pipeline.sweep.trials import Trial, goodness

REPORT_FILE = "report.html"

MAX_COLUMNS = 8
"""Trials whose pictures stand side by side: the winner and the next best."""

log = logging.getLogger(__name__)


def write_summary(
    config: SweepConfig, folder: str, trials: Sequence[Trial], space: Mapping[str, Domain], summary: Mapping[str, Any]
) -> None:
    """Write `report.html` into *folder*. *summary* is the content of summary.json."""
    objective = config.objectives[0]
    best = summary["winner"]
    counts = Counter(one.status for one in trials)
    page = render(
        "sweep.html",
        config=config,
        objective=objective,
        trials=trials,
        folder=storage.redact(folder),
        facts={
            "winner": f"trial {best['number']} ({best['name']}): "
            + ", ".join(f"{name} {value:.4g}" for name, value in best["metrics"].items()),
            "settings of the winner": ", ".join(f"{name} {value}" for name, value in best["point"].items()),
            "trials": ", ".join(f"{count} {status}" for status, count in counts.items()),
            "search": config.search + (", ASHA" if config.stop_early else ""),
        },
        pictures=picture_rows(config, folder, trials),
        table=table(trials, list(space), config.objectives),
        coordinates=parallel_coordinates(trials, space, objective)
        if any(objective in one.metrics for one in trials)
        else None,
        importance=bars(found, "rank correlation of settings and objective")
        if (found := summary["importance"])
        else None,
        chance=chance(len(trials)),
        front=front(trials, DISTORTION, TEXTURE)
        if any(DISTORTION in one.metrics and TEXTURE in one.metrics for one in trials)
        else None,
    )
    storage.write_atomic(storage.join(folder, REPORT_FILE), page.encode())


def chance(trials: int) -> str:
    """Which rank correlations of this many trials say nothing."""
    # Two standard deviations of the rank correlation of things that have nothing to do with each other.
    bound = 2 / max(1, trials - 1) ** 0.5
    if bound >= 1:
        return f"With {trials} trials any value may be chance."
    return f"With {trials} trials, values between -{bound:.1f} and {bound:.1f} may be chance."


def table(trials: Sequence[Trial], settings: Sequence[str], metrics: Sequence[str]) -> Table:
    """The trials, the best first."""
    wanted = list(dict.fromkeys((*metrics, DISTORTION, TEXTURE)))
    rows = [
        [
            trial.number,
            trial.status,
            trial.images,
            *(trial.metrics.get(name) for name in wanted),
            *(_short(trial.point.get(name)) for name in settings),
            trial.error or "",
        ]
        for trial in _best_first(trials, metrics[0])
    ]
    return Table(["trial", "status", "images", *wanted, *settings, "what went wrong"], rows)


def picture_rows(config: SweepConfig, folder: str, trials: Sequence[Trial]) -> list[Row]:
    """The first validation images as the best trials fill them, each with its newest model."""
    results: dict[str, list[Shown]] = {}
    for trial in _best_first(trials, config.objectives[0])[:MAX_COLUMNS]:
        place = trial_folder(folder, trial.name)
        try:
            results[trial.label] = measured(
                place, config, storage.join(place, "pictures"), limit=config.num_pictures
            ).shown
        except ModelNotFound as error:
            log.warning("no pictures of %s: %s", trial.label, error)
    return side_by_side(results)


def measured(model: str, config: SweepConfig, out: str, *, limit: int | None) -> Evaluated:
    """The evaluation of *model* on the first *limit* images of the validation set, or on all of them."""
    settings = EvaluateConfig(
        model=model,
        data=config.run.data.validation_set,
        out=out,
        methods=("tmad",),
        limit=limit,
        mask_variant=0,
        num_pictures=config.num_pictures,
        num_extremes=0,
        keep=(),
        use_gpu=False,
    )
    # It tells its progress, and that a stopped trial's newest checkpoint is taken, which is what is wanted here.
    with _only_errors("pipeline.evaluation", "pipeline.models"):
        return evaluate(settings)


@contextmanager
def _only_errors(*names: str) -> Iterator[None]:
    """Of these loggers, inside the block."""
    loggers = [logging.getLogger(name) for name in names]
    before = [one.level for one in loggers]
    for one in loggers:
        one.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for one, level in zip(loggers, before, strict=True):
            one.setLevel(level)


def _best_first(trials: Sequence[Trial], objective: str) -> list[Trial]:
    def key(trial: Trial) -> tuple[Any, ...]:
        there = objective in trial.metrics
        return (trial.status != "finished", not there, -goodness(trial, objective) if there else 0.0, trial.number)

    return sorted(trials, key=key)


def _short(value: object) -> object:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
