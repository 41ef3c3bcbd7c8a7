"""An ablation of the paper: its variants trained alike, and the paper's table or figure beside ours.

A variant is trained with several seeds where that is asked for: what seeds differ in is what no single figure shows.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal

import numpy as np
from pydantic.dataclasses import dataclass as checked_dataclass

from pipeline import storage
from pipeline.config import RunConfig
from pipeline.data.schema import read_records
from pipeline.errors import SweepFailed
from pipeline.evaluation.pictures import Shown, centred_hole, side_by_side
from pipeline.models import load_any_model
from pipeline.presets import PRESETS
from pipeline.report.page import Table, render
from pipeline.report.pictures import Row as Strip
from pipeline.runs import cluster
from pipeline.runs.lease import lease_folder
from pipeline.sweep.config import SweepConfig
from pipeline.sweep.launch import (
    Finished,
    check_points,
    finish,
    resolve,
    room,
    room_on_disk,
    run_trials,
    sweep_folder,
    told,
)
from pipeline.sweep.space import Point
from pipeline.sweep.studies import STUDIES, Study
from pipeline.sweep.summary import measured
from pipeline.sweep.trial import trial_folder
from pipeline.tracking import check_tracking, resolve_tracking_uri
from pipeline.train.launch import resources
from tmad.config import STRICT, PositiveInt
from tmad.inpaint import Inpainter, UnusableInput
from tmad.metrics import METRICS, Summary, measure
from tmad.swd import SMALLEST_LEVEL, SlicedWasserstein

REPORT_FILE = "report.html"

SHOWN = (
    "l1_hole_pct",
    "psnr_hole",
    "ssim_full",
    "tv_l1_hole_pct",
    "swd_hole_truthscaled",
    "seam_ratio_hole",
    "retrieval_top_l1",
    "retrieval_distinct",
)
"""Metrics of the table. The paper's TV has no formula and gets a column of its own; FID needs its network."""

log = logging.getLogger(__name__)


@checked_dataclass(frozen=True, kw_only=True, config=STRICT)
class AblateConfig:
    """One ablation."""

    study: Literal["candidates", "retrieval", "relativistic", "blending", "mask_size"] = "candidates"
    """`candidates`: Table IV; `relativistic`: Fig. 7; `blending`: Fig. 8; `mask_size`: Fig. 9; `retrieval`: Eq. 5
    against the expected distance."""
    name: str = "ablation"
    """The folder below run.runs is <name>-<study>. The same command with the same name continues it."""
    seeds: PositiveInt = 1
    """Seeds that each variant is trained with: run.seed and those after it."""
    init_from: str | None = None
    """Model, checkpoint or run whose coarse network all variants start from; default: the coarse phase of `run` is run
    once, before them."""
    max_concurrent: PositiveInt | None = None
    """Runs side by side; default: as many as the cluster has room for."""
    num_pictures: PositiveInt = 6
    """Validation images that are shown."""
    run: RunConfig = RunConfig()
    """The run that every variant is, but for what the study varies."""


ABLATE_PRESETS = {
    name: (lambda make=make: AblateConfig(run=replace(make(), name=None))) for name, make in PRESETS.items()
}
"""The presets of training, as the `run` of an ablation."""


@dataclass(frozen=True)
class Row:
    """One line of the table: a variant, or a hole's size."""

    label: str
    metrics: dict[str, float | None]
    """Means over seeds."""
    spread: dict[str, float]
    """Largest minus smallest of the seeds; empty with one seed."""


def as_sweep(config: AblateConfig) -> tuple[SweepConfig, list[Point], list[str]]:
    """The sweep without search that trains the variants, its points, and the variant's label of each."""
    study = STUDIES[config.study]
    runs = [
        (label, {**point, "seed": config.run.seed + number})
        for number in range(config.seeds)
        for label, point in study.variants.items()
    ]
    points = [point for _, point in runs]
    sweep = SweepConfig(
        name=f"{config.name}-{config.study}",
        # Nothing is drawn from it: the points are given.
        space=(f"seed={config.run.seed},{config.run.seed + 1 + config.seeds}",),
        trials=len(points),
        stop_early=False,
        objectives=("psnr_hole", "swd_hole_truthscaled"),
        max_concurrent=config.max_concurrent,
        init_from=config.init_from,
        num_pictures=config.num_pictures,
        run=config.run,
    )
    return resolve(sweep), points, [label for label, _ in runs]


def check(config: AblateConfig) -> list[str]:
    """The variants that would be trained, in lines; nothing is written. Raises what would stop them."""
    sweep, points, labels = as_sweep(config)
    check_points(sweep, {}, points)
    there = cluster.available()
    concurrent = room(sweep, there)
    lines = [f"{label:20} {point}" for label, point in zip(labels, points, strict=True)]
    lines.append(f"{concurrent} side by side, {cluster.shown(resources(sweep.run))} each of {cluster.shown(there)}")
    lines.append(f"room: {room_on_disk(sweep)}")
    return [*lines, f"tracking: {check_tracking(resolve_tracking_uri(sweep.run.tracking.uri, sweep.run.runs))}"]


def ablate(config: AblateConfig) -> tuple[Finished, str]:
    """Train and measure every variant; writes report.html and summary.json. Returns the runs, and the table as text.

    Raises what `launch.sweep` raises.
    """
    study = STUDIES[config.study]
    sweep, points, labels = as_sweep(config)
    folder = sweep_folder(sweep)
    with lease_folder(folder):
        done = run_trials(sweep, {}, points, kind=f"ablation {config.study}")
        if done.summary:
            log.info("ablation %s is finished: %s; nothing to do", sweep.name, storage.redact(folder))
            return done, str(done.summary["table"])
        if any(trial.status != "finished" for trial in done.trials) or len(done.trials) < len(points):
            raise SweepFailed(f"not every variant came to its end; {told(done.trials)}")
        models = [(label, trial_folder(folder, trial.name)) for label, trial in zip(labels, done.trials, strict=True)]
        if study.hole_sides:
            at_sizes = [_at_size(models[0][1], sweep, side) for side in study.hole_sides]
            rows = [row for row, _ in at_sizes]
            pictures = [strip for _, strips in at_sizes for strip in strips[: 1 + len(strips) // 3]]
        else:
            variants = [_variant(label, [m for one, m in models if one == label], sweep) for label in study.variants]
            rows = [row for row, _ in variants]
            pictures = side_by_side({row.label: shown for row, shown in variants})
        ours = table(rows, study)
        runs = [
            [
                one.name,
                ", ".join(f"{name} {value}" for name, value in one.point.items()),
                one.images,
                round(one.seconds),
            ]
            for one in done.trials
        ]
        page = render(
            "ablation.html",
            study=study,
            pictures=pictures,
            table=ours,
            scale=scale(config, study),
            runs=Table(["run", "settings", "images", "seconds"], runs),
        )
        storage.write_atomic(storage.join(folder, REPORT_FILE), page.encode())
        summary = {
            "study": config.study,
            "rows": [{"label": row.label, "metrics": row.metrics, "spread": row.spread} for row in rows],
            "paper": {label: dict(values) for label, values in study.paper.items()},
            "trials": [one.as_dict() for one in done.trials],
            "config": json.loads(json.dumps(asdict(config))),
            "table": ours.text(),
        }
        finish(sweep, done, summary, (REPORT_FILE,))
    return replace(done, summary=summary), ours.text()


def table(rows: Sequence[Row], study: Study) -> Table:
    """Ours beside the paper's."""
    columns = list(dict.fromkeys(name for values in study.paper.values() for name in values))

    def ours(row: Row, name: str) -> str | None:
        spread = f" ±{row.spread[name] / 2:.2g}" if name in row.spread else ""
        return None if (value := row.metrics.get(name)) is None else f"{value:.4g}{spread}"

    def papers(row: Row, name: str) -> str | None:
        return None if (value := study.paper.get(row.label, {}).get(name)) is None else str(value)

    body = [[row.label, *(ours(row, name) for name in SHOWN), *(papers(row, name) for name in columns)] for row in rows]
    return Table(["", *SHOWN, *(f"paper: {name}" for name in columns)], body)


def _variant(label: str, models: Sequence[str], sweep: SweepConfig) -> tuple[Row, list[Shown]]:
    """Means over the runs of a variant, and the pictures of the first."""
    results = [measured(model, sweep, storage.join(model, "evaluation"), limit=None) for model in models]
    values = [result.means["tmad"] for result in results]
    means: dict[str, float | None] = {}
    spread: dict[str, float] = {}
    for name in SHOWN:
        found = [float(one[name]) for one in values if one.get(name) is not None]  # type: ignore[arg-type]
        means[name] = sum(found) / len(found) if found else None
        if len(found) > 1:
            spread[name] = max(found) - min(found)
    return Row(label, means, spread), results[0].shown


def _at_size(model: str, sweep: SweepConfig, share: float) -> tuple[Row, list[Strip]]:
    """The same images with a square hole in the middle, *share* of their side."""
    label = f"hole of {share:.3g} of the side"
    inpainter, means = Inpainter(load_any_model(model)), Summary()
    texture: SlicedWasserstein | None = None
    pictures: list[Strip] = []
    for record in read_records(sweep.run.data.validation_set):
        truth = record.pixels()
        mask = centred_hole(*truth.shape[:2], share=share)
        try:
            result = np.asarray(inpainter(truth, mask, image_id=record.image_id).output)
        except UnusableInput as error:
            log.warning("left out: %s", error)
            continue
        means.add(measure(result, truth, mask, [name for name in SHOWN if METRICS[name].function]))
        if texture is None and min(mask.shape) >= SMALLEST_LEVEL:
            texture = SlicedWasserstein(side=min(mask.shape))
        if texture is not None:
            texture.add(record.image_id, result, truth, mask)
        if len(pictures) < sweep.num_pictures:
            given = np.where(mask[..., None] > 0, np.uint8(255), truth)
            pictures.append((f"{record.image_id}, {label}", {"input": given, "result": result, "truth": truth}))
    values = {**means.means(), **(texture.values() if texture else {})}
    return Row(label, {name: values.get(name) for name in SHOWN}, {}), pictures


def scale(config: AblateConfig, study: Study) -> str:
    """How long the variants were trained, and what that allows to be said."""
    schedule = config.run.schedule
    coarse = (
        f"the coarse network of {storage.redact(config.init_from)}"
        if config.init_from
        else f"{schedule.coarse_images:,} images coarse network alone"
    )
    said = (
        f"Ours: {coarse}, shared by all variants, then "
        f"{schedule.joint_images:,} images jointly ({schedule.batch_images} a step), {config.seeds} "
        f"{'seed' if config.seeds == 1 else 'seeds (mean ± half the range)'}. "
    )
    if study.paper:
        said += "The paper: Places365, millions of images a run. Compare the order of the lines, not the figures. "
    if config.seeds == 1:
        said += "With one seed a difference between lines may be chance: --seeds 3 shows how much the same line varies."
    return said
