"""The evaluation from end to end: measured, compared, painted, written."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipeline.errors import FolderInUse
from pipeline.evaluation.compare import REPORT, Comparison, compare, folder_of, read_summary
from pipeline.evaluation.config import EvaluateConfig
from pipeline.evaluation.measure import measure_set, open_inputs
from pipeline.evaluation.page import sections, tables
from pipeline.evaluation.parts import Job
from pipeline.evaluation.pictures import Shown, choose, paint
from pipeline.report.page import render
from pipeline.report.pictures import picture_grid, png_bytes
from pipeline.runs.lease import holder_of, lease_folder
from pipeline.storage import absolute, check_room, file_sizes, redact
from pipeline.tracking import Tracker, check_run

_PNG_SHARE = 0.6
"""Of a photograph's bytes, what PNG leaves."""


@dataclass(frozen=True)
class Evaluated:
    """A finished evaluation."""

    summary: dict[str, Any]
    """The content of report.json."""
    rows: pa.Table
    """Per-image results (`measure.read_rows`)."""
    shown: list[Shown]
    comparison: Comparison | None

    @property
    def means(self) -> dict[str, dict[str, float | None]]:
        """Method, then metric, then its mean over the images, or its value for the set."""
        return {
            method: {name: value["mean"] for name, value in entry["metrics"].items()}
            for method, entry in self.summary["methods"].items()
        }

    def sections(self) -> dict[str, Any]:
        """What `evaluation_sections.html` shows."""
        return sections(self.summary, self.shown, self.comparison)


def evaluate(config: EvaluateConfig) -> Evaluated:
    """Measure what is asked for and write into `config.out`: per_image/ (Parquet), results/, report.html, report.md,
    report.json, timing.json, pictures.png. report.json comes last and says that it is complete.

    Raises what `open_inputs`, `measure_set` and `compare` raise, `TrackingUnreachable`, and `FolderInUse` if another
    job writes there.
    """
    job, files = _open(config)
    _room(job)
    with lease_folder(config.out) as lease:
        lease.remove(REPORT)
        summary, rows = measure_set(job, files, lease)
        comparison = None if config.against is None else compare(job, summary, rows, config.against)
        if comparison is not None:
            summary["against"] = comparison.summary
        changed = [] if comparison is None else [one for one, _ in comparison.changed]
        done = Evaluated(summary, rows, paint(job, files, [*choose(job, rows), *changed]), comparison)
        written = {
            "report.html": render("evaluation.html", e=done.sections()).encode(),
            "report.md": render("evaluation.md", **tables(summary)).encode(),
        }
        spread = [one.row for one in done.shown if one.choice.why == "spread"]
        if spread:
            written["pictures.png"] = png_bytes(picture_grid(spread))
        text = json.dumps(summary, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        written[REPORT] = text.encode()
        for name, content in written.items():
            lease.write(name, content)
    if config.mlflow_run is not None:
        with Tracker(config.tracking, config.mlflow_run) as tracker:
            for method, means in done.means.items():
                values = {f"evaluation/{method}/{name}": value for name, value in means.items() if value is not None}
                tracker.metrics(values, step=0)
            for name, content in written.items():
                tracker.artifact(content, f"evaluation/{name}")
    return done


def check(config: EvaluateConfig) -> list[str]:
    """What an evaluation with this configuration would find, in lines; nothing is written and Ray is not started.
    Raises as `evaluate`."""
    job, _ = _open(config)
    if (theirs := holder_of(config.out)) is not None:
        raise FolderInUse(f"another job writes to {redact(config.out)}: {theirs}")
    images, masks = job.images, len(job.variants)
    lines = [f"{images} images with {masks} masks each, of {redact(config.data)} (digest {job.manifest.digest})"]
    lines += [f"{row.title}: {row.not_measured or 'measured'}" for row in job.rows]
    return [*lines, _room(job)]


def _room(job: Job) -> str:
    """How results that are kept and the page fit into what is free, in words. Raises `StorageFailed` if they do not."""
    config = job.config
    shown = config.num_pictures + 4 * config.num_extremes
    pictures = job.images * len(job.variants) * len(config.keep) + shown * (len(job.rows) + 2)
    size = pictures * _PNG_SHARE * 3 * job.manifest.crop_size**2
    return check_room(config.out, size - sum(file_sizes(config.out).values()), "pictures", "--out")


def _open(config: EvaluateConfig) -> tuple[Job, dict[str, Any]]:
    """What is read, and what is written to, looked at before hours of work."""
    if config.against is not None:
        if folder_of(config.against) == absolute(config.out):
            raise ValueError(f"against must be another evaluation than out, got {redact(config.out)} for both")
        read_summary(config.against)
    if config.mlflow_run is not None:
        assert config.tracking is not None, "the settings see to it"
        check_run(config.tracking, config.mlflow_run)
    return open_inputs(config)
