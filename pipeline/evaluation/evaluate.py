"""The evaluation from end to end: measured, compared, painted, written."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.data.schema import read_manifest
from pipeline.errors import FolderInUse
from pipeline.evaluation.compare import REPORT, Comparison, compare, folder_of, read_summary
from pipeline.evaluation.config import EvaluateConfig
from pipeline.evaluation.external import export_inputs
from pipeline.evaluation.measure import Evaluation, Opened, measure_set, open_inputs
from pipeline.evaluation.page import markdown, sections
from pipeline.evaluation.pictures import Shown, choose, paint
from pipeline.report.page import render
from pipeline.report.pictures import Row, picture_grid, png_bytes
from pipeline.runs.lease import holder_of, lease_folder
from pipeline.storage import absolute, check_room, file_sizes, join, read_bytes, redact
from pipeline.tracking import Tracker, check_run

_PNG_SHARE = 0.6
"""Of a photograph's bytes, what PNG leaves."""


@dataclass(frozen=True)
class Evaluated:
    """A finished evaluation."""

    evaluation: Evaluation
    shown: list[Shown]
    comparison: Comparison | None

    @property
    def summary(self) -> dict[str, Any]:
        """The content of report.json."""
        extra = {} if self.comparison is None else {"against": self.comparison.summary}
        return self.evaluation.summary | extra

    @property
    def means(self) -> dict[str, dict[str, float | None]]:
        """Method, then metric, then its mean or value."""
        return self.evaluation.means

    def sections(self) -> dict[str, Any]:
        """What the sections of a page show."""
        return sections(self.evaluation, self.shown, self.comparison)


def evaluate(config: EvaluateConfig) -> Evaluated:
    """Measure what is asked for and write into `config.out`: per_image/ (Parquet), results/, report.html, report.md,
    report.json, timing.json, pictures.png. report.json comes last and says that it is complete.

    Raises what `open_inputs`, `measure_set` and `compare` raise, `TrackingUnreachable`, and `FolderInUse` if another
    job writes there.
    """
    opened = _open(config)
    _room(opened)
    with lease_folder(config.out) as lease:
        lease.remove(REPORT)
        evaluation = measure_set(opened, lease)
        comparison = None if config.against is None else compare(evaluation, config.against)
        changed = [] if comparison is None else comparison.changed
        shown = paint(evaluation, [*(choose(evaluation) if evaluation.summary["images"] else []), *changed])
        done = Evaluated(evaluation, shown, comparison)
        lease.write("report.html", render("evaluation.html", e=done.sections()).encode())
        lease.write("report.md", markdown(done.summary, comparison).encode())
        if grid := grid_rows(shown):
            lease.write("pictures.png", png_bytes(picture_grid(grid)))
        text = json.dumps(done.summary, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        lease.write(REPORT, text.encode())
    if config.mlflow_run is not None:
        _track(done, config.out, Tracker(config.tracking, config.mlflow_run))
    return done


def check(config: EvaluateConfig) -> list[str]:
    """What an evaluation with this configuration would find, in lines; nothing is written and Ray is not started.
    Raises as `evaluate`."""
    opened = _open(config)
    job = opened.job
    if (theirs := holder_of(config.out)) is not None:
        raise FolderInUse(f"another job writes to {redact(config.out)}: {theirs}")
    images = min(job.manifest.records, config.limit or job.manifest.records)
    masks = len(job.variants)
    lines = [f"{images} images with {masks} masks each, of {redact(config.data)} (digest {job.manifest.digest})"]
    lines += [f"{row.title}: {row.not_measured or 'measured'}" for row in job.rows]
    return [*lines, _room(opened)]


def _room(opened: Opened) -> str:
    """How results that are kept and the page fit into what is free, in words. Raises `StorageFailed` if they do not."""
    config, job = opened.job.config, opened.job
    images = min(job.manifest.records, config.limit or job.manifest.records) * len(job.variants)
    shown = config.num_pictures + 4 * config.num_extremes
    pictures = images * len(config.keep) + shown * (len(job.rows) + 2)
    size = pictures * _PNG_SHARE * 3 * job.manifest.crop_size**2
    return check_room(config.out, size - sum(file_sizes(config.out).values()), "pictures", "--out")


def _open(config: EvaluateConfig) -> Opened:
    """What is read, and what is written to, looked at before hours of work."""
    if config.against is not None:
        if folder_of(config.against) == absolute(config.out):
            raise ValueError(f"against must be another evaluation than out, got {redact(config.out)} for both")
        read_summary(config.against)
    if config.mlflow_run is not None:
        assert config.tracking is not None, "the settings see to it"
        check_run(config.tracking, config.mlflow_run)
    return open_inputs(config)


def export(config: EvaluateConfig) -> int:
    """Write the set's inputs into the folder `config.export`; returns how many images and masks."""
    assert config.export is not None, "asked for"
    return export_inputs(config.data, config.export, manifest=read_manifest(config.data))


def grid_rows(shown: Sequence[Shown]) -> list[Row]:
    """The evenly spread images, for a picture grid."""
    return [one.row for one in shown if one.choice.why == "spread"]


def _track(done: Evaluated, out: str, tracker: Tracker) -> None:
    with tracker:
        for method, means in done.means.items():
            values = {f"evaluation/{method}/{name}": value for name, value in means.items() if value is not None}
            tracker.metrics(values, step=0)
        for name in ("report.html", "report.md", REPORT):
            tracker.artifact(read_bytes(join(out, name)), f"evaluation/{name}")
        if grid := grid_rows(done.shown):
            tracker.image("evaluation/pictures", picture_grid(grid))
