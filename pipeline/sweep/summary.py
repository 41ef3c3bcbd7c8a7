"""The page that a sweep ends in: trials, figures, the same holes filled by every trial."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline import storage
from pipeline.errors import ModelNotFound
from pipeline.evaluation.config import EvaluateConfig
from pipeline.evaluation.evaluate import Evaluated, evaluate
from pipeline.report import Picture
from pipeline.side_by_side import side_by_side
from pipeline.sweep.config import DISTORTION, TEXTURE, SweepConfig
from pipeline.sweep.figures import FigureReport, bars, front, parallel_coordinates
from pipeline.sweep.results import Trial
from pipeline.sweep.space import Domain
from pipeline.sweep.trial import trial_folder

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
    counts = {status: sum(one.status == status for one in trials) for status in dict.fromkeys(t.status for t in trials)}
    report = FigureReport(
        f"Sweep {config.name}",
        f"{len(trials)} trials of {config.run.schedule.joint_images:,} images in the joint phase, compared by "
        f"{objective} of {config.run.schedule.validation_images:,} validation images with fixed masks.",
    )
    report.facts(
        {
            "winner": f"trial {best['number']} ({best['name']}): "
            + ", ".join(f"{name} {value:.4g}" for name, value in best["measures"].items()),
            "settings of the winner": ", ".join(f"{name} {value}" for name, value in best["point"].items()),
            "trials": ", ".join(f"{count} {status}" for status, count in counts.items()),
            "search": config.search + (", ASHA" if config.stop_early else ""),
        }
    )
    report.text("A longer run with the winner's settings:")
    report.command(f"python jobs/train_places.py --config {storage.redact(folder)}/winner.json --name best")
    report.heading("Trials")
    report.table(*rows(trials, list(space), config.objectives))
    report.text(
        "A trial that was stopped early was measured at fewer images than the others: its figures say where it stood "
        "then. Differences between few trials are partly chance; repeat the best ones with other seeds before "
        "believing them."
    )
    if any(objective in one.measures for one in trials):
        report.heading("Settings and objective")
        report.figure(
            parallel_coordinates(trials, space, objective),
            f"A line for each trial, orange where {objective} is best; dashed: not trained to the end. Point at a line "
            "for its settings.",
        )
    if found := summary["importance"]:
        report.figure(
            bars(found, "rank correlation of settings and objective"),
            f"Importance: Spearman's rank correlation of each setting with {objective} at the last validation that all "
            f"trials reached, positive where larger values are better. {chance(len(trials))}",
        )
    if any(DISTORTION in one.measures and TEXTURE in one.measures for one in trials):
        report.heading("Distortion against texture")
        report.figure(
            front(trials, DISTORTION, TEXTURE),
            "Pareto front of the finished trials (blue): no other one is better in one measure and not worse in the "
            "other. Pale: not trained to the end.",
        )
    pictures = picture_rows(config, folder, trials)
    if pictures:
        report.heading("The same holes")
        report.pictures(pictures)
    report.write(storage.join(folder, REPORT_FILE))


def chance(trials: int) -> str:
    """Which rank correlations of so many trials say nothing."""
    # Two standard deviations of the rank correlation of things that have nothing to do with each other.
    bound = 2 / max(1, trials - 1) ** 0.5
    if bound >= 1:
        return f"With {trials} trials any value may be chance."
    return f"With {trials} trials, values between -{bound:.1f} and {bound:.1f} may be chance."


def rows(
    trials: Sequence[Trial], settings: Sequence[str], measures: Sequence[str]
) -> tuple[list[str], list[list[object]]]:
    """Header and rows of the table of trials, the best first."""
    wanted = list(dict.fromkeys((*measures, DISTORTION, TEXTURE)))
    header = ["trial", "status", "images", *wanted, *settings, "what went wrong"]
    body: list[list[object]] = [
        [
            trial.number,
            trial.status,
            trial.images,
            *(trial.measures.get(name) for name in wanted),
            *(_short(trial.point.get(name)) for name in settings),
            trial.error or "",
        ]
        for trial in _best_first(trials, measures[0])
    ]
    return header, body


def picture_rows(config: SweepConfig, folder: str, trials: Sequence[Trial]) -> list[tuple[str, dict[str, Picture]]]:
    """The first validation images as the best trials fill them, each with its newest model."""
    results: dict[str, Evaluated] = {}
    for trial in _best_first(trials, config.objectives[0])[:MAX_COLUMNS]:
        place = trial_folder(folder, trial.name)
        try:
            results[trial.label] = measured(place, config, storage.join(place, "pictures"), limit=config.num_pictures)
        except ModelNotFound as error:
            log.warning("no pictures of %s: %s", trial.label, error)
    return side_by_side(results)


def measured(model: str, config: SweepConfig, out: str, *, limit: int | None) -> Evaluated:
    """The evaluation of *model* on the first *limit* images of the validation set, or on all of them."""
    # It tells its progress, and that a stopped trial's newest checkpoint is taken, which is what is wanted here.
    for name in ("pipeline.evaluation", "pipeline.models"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return evaluate(
        EvaluateConfig(
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
    )


def table(trials: Sequence[Trial], settings: Sequence[str], measures: Sequence[str]) -> str:
    """The table of trials as text, for a terminal."""
    header, body = rows(trials, settings, measures)
    lines: list[list[object]] = [[*header], *body]
    texts = [[_cell(value) for value in row] for row in lines]
    widths = [max(len(row[column]) for row in texts) for column in range(len(header))]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in texts
    )


def _best_first(trials: Sequence[Trial], objective: str) -> list[Trial]:
    from pipeline.sweep.config import direction

    sign = -1 if direction(objective) == "max" else 1

    def key(trial: Trial) -> tuple[Any, ...]:
        value = trial.measures.get(objective)
        return (trial.status != "finished", value is None, sign * (value or 0.0), trial.number)

    return sorted(trials, key=key)


def _short(value: object) -> object:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _cell(value: object) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
