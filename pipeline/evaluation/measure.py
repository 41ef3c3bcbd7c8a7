"""From settings to a table: inputs are checked, parts are measured on Ray, results are aggregated.

Every image goes by itself through every method, on one thread, and sums are taken in the order of the set: the same
set, model and settings give the same table, whatever the number of workers or the size of the parts, and however often
the job was stopped. Finished parts are kept, so the same command again does only what is missing.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pyarrow.parquet as pq
import ray
import torch

from pipeline.data.schema import Manifest, read_manifest, set_folder
from pipeline.data.tasks import iterate, run_tasks
from pipeline.errors import MissingInput
from pipeline.evaluation.config import EvaluateConfig
from pipeline.evaluation.external import Results, open_results
from pipeline.evaluation.methods import table_rows
from pipeline.evaluation.networks import NotMeasured, read_network
from pipeline.evaluation.parts import (
    ONE_THREAD,
    Job,
    Part,
    finished_parts,
    measure_part,
    part_file,
    plan_parts,
    row_schema,
)
from pipeline.evaluation.sets import measure_sets
from pipeline.evaluation.summary import Table, rows_of_images
from pipeline.models import ARTIFACT_FILES, find_model
from pipeline.runs.cluster import joined, models_side_by_side, require, start_ray
from pipeline.runs.lease import Lease
from pipeline.runs.progress import Progress
from pipeline.storage import absolute, file_sizes, join, list_files, read_bytes, redact
from tmad.checkpoint import load_model, model_digest
from tmad.metrics import METRICS
from tmad.retrieval import retrieval_gain
from tmad.swd import SMALLEST_LEVEL, VARIANTS

FORMAT = 3
"""Of report.json; also part of what decides whether parts of an earlier version are kept."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluation:
    """What was measured."""

    summary: dict[str, Any]
    """The content of report.json."""
    job: Job
    parts: list[Part]
    out: str
    """The folder of the results, absolute."""
    files: dict[str, Any] = field(repr=False, default_factory=dict)
    """The networks' files, for whoever fills more holes with them."""

    @property
    def means(self) -> dict[str, dict[str, float | None]]:
        """Method, then metric, then its mean over the images, or its value for the set."""
        return {
            method: {name: value["mean"] for name, value in entry["metrics"].items()}
            for method, entry in self.summary["methods"].items()
        }

    @property
    def rows(self) -> Iterator[dict[str, Any]]:
        """Per-image results, in the order of the set: `parts.FACTS` and each metric (or none)."""
        return read_rows(self.out, len(self.parts))


@dataclass(frozen=True)
class Opened:
    """All that an evaluation reads, found and held together."""

    job: Job
    files: dict[str, Any]
    """Of the model and of the measuring networks, by name."""
    reasons: dict[str, str]
    """Why metrics have no figures, by metric."""
    model: str | None
    """Its digest; `None` if nothing in the table comes from it."""


def open_inputs(config: EvaluateConfig) -> Opened:
    """Look at everything that is to be measured, before anything is written.

    Raises `ModelNotFound`, `MissingInput`, `UnfitResults` for results of other methods that do not fit the set, and
    `ValueError` for a damaged model and for a mask variant that the set does not have.
    """
    if config.use_gpu and not (torch.cuda.is_available() or joined()):
        raise ValueError("use_gpu is set, but PyTorch sees no CUDA device here; leave it out to run on the CPU")
    manifest = read_manifest(config.data)
    variants = _variants(config, manifest)
    if manifest.records == 0:
        raise MissingInput(f"the prepared set {redact(config.data)} has no image")
    folder = None
    if config.needs_model:
        folder = find_model(config.model, tracking_uri=config.tracking)
    externals = {
        name: open_results(name, place, data=config.data, manifest=manifest, variants=variants, limit=config.limit)
        for name, place in (*config.external_folders, *config.coarse_folders)
    }
    files: dict[str, Any] = {}
    reasons = _read_networks(config, files)
    model = None
    if folder is not None:
        load_model(folder)  # a damaged one is found now
        files["model"] = {name: (folder / name).read_bytes() for name in ARTIFACT_FILES}
        model = model_digest(folder)
    return Opened(_job(config, manifest, variants, externals, model, reasons), files, reasons, model)


def measure_set(opened: Opened, lease: Lease) -> Evaluation:
    """Measure everything that is asked for and write per_image/; pages and report.json are the caller's.

    Images that cannot be filled (nothing but hole) are left out and listed in the summary. Raises `ClusterTooSmall`.
    """
    job = opened.job
    parts = plan_parts(job.manifest, job.config)
    receipts = _measure_parts(job, parts, opened.files, lease)
    _remove_other_parts(len(parts), lease)
    table, failed = _summed_up(job, len(parts), receipts, lease.folder)
    start_ray()
    sets = measure_sets(job, len(parts), lease.folder)
    summary = _summary(job, table, sets, failed, opened.reasons, opened.model)
    lease.write("timing.json", _timing(job, receipts).encode())
    return Evaluation(summary, job, parts, lease.folder, opened.files)


def read_rows(out: str, num_parts: int | None = None) -> Iterator[dict[str, Any]]:
    """Per-image results below the evaluation's folder *out*, in the order of the set, each with the number of its
    part; memory of one part."""
    if num_parts is None:
        num_parts = len(list_files(join(out, "per_image"), (".parquet",)))
    for index in range(num_parts):
        for row in pq.read_table(io.BytesIO(read_bytes(join(out, part_file(index, "rows"))))).to_pylist():
            yield {**row, "part": index}


def _variants(config: EvaluateConfig, manifest: Manifest) -> tuple[int, ...]:
    if config.mask_variant is None:
        return tuple(range(manifest.num_variants))
    if config.mask_variant >= manifest.num_variants:
        raise ValueError(
            f"mask_variant must be below {manifest.num_variants}, the masks per image of "
            f"{redact(config.data)}, got {config.mask_variant}"
        )
    return (config.mask_variant,)


def _read_networks(config: EvaluateConfig, files: dict[str, Any]) -> dict[str, str]:
    """Read the measuring networks into *files*; why metrics have no figures, by metric."""
    reasons: dict[str, str] = {}
    shown = config.shown_metrics()
    for option, names in (("fid", ("fid_full", "kid_full")), ("lpips", ("lpips_full",))):
        if not (wanted := [name for name in names if name in shown]):
            continue
        try:
            files[option] = read_network(getattr(config, option))
        except NotMeasured as reason:
            reasons |= dict.fromkeys(wanted, str(reason))
            if getattr(config, option).network is not None or config.metrics:
                log.warning("%s: not measured: %s", ", ".join(wanted), reason)
    return reasons


def _job(
    config: EvaluateConfig,
    manifest: Manifest,
    variants: tuple[int, ...],
    externals: dict[str, Results],
    model: str | None,
    reasons: Mapping[str, str],
) -> Job:
    rows = table_rows(config)
    for row in rows:
        if row.not_measured:
            log.warning("%s: not measured: %s", row.title, row.not_measured)
    metrics = tuple(name for name in config.shown_metrics() if name not in reasons)
    resolved = replace(config, data=absolute(config.data))
    decides = [
        *(FORMAT, manifest.digest, model, resolved.deciding(), metrics, variants),
        *({name: results.digest for name, results in externals.items()}, [dataclasses.asdict(row) for row in rows]),
        min(manifest.records, config.limit or manifest.records),
    ]
    digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]
    return Job(resolved, manifest, rows, metrics, variants, externals, digest)


def _measure_parts(job: Job, parts: Sequence[Part], files: dict[str, Any], lease: Lease) -> dict[int, dict[str, Any]]:
    """Receipts of all parts by number; those that are not there yet are measured by tasks of Ray Data."""
    receipts = finished_parts(job, parts, lease.folder)
    todo = [part for part in parts if part.index not in receipts]
    total, before = sum(part.records for part in parts), sum(receipt["images"] for receipt in receipts.values())
    if receipts:
        log.info("%d of %d images are measured already and are kept", before, total)
    if not todo:
        return receipts
    start_ray()
    workers = num_workers(job.config, len(todo))
    shared = ray.put(files)
    require({"CPU": workers, "GPU": workers if job.config.use_gpu else 0}, "--num-workers")
    dataset = run_tasks(
        [dataclasses.asdict(part) for part in todo],
        partial(measure_part, files=shared, job=job, lease=lease),
        **resources(job.config, workers),
    )
    with Progress(total, done=before) as progress:
        for rows in iterate(dataset, batch_size=None, batch_format="numpy", prefetch_batches=0):
            (receipt,) = map(json.loads, rows["receipt"])
            receipts[receipt["index"]] = receipt
            progress.add(receipt["images"])
    return receipts


def resources(config: EvaluateConfig, workers: int) -> dict[str, Any]:
    """What each of *workers* tasks that run side by side gets, for `run_tasks`."""
    return {"num_cpus": 1, "num_gpus": int(config.use_gpu), "at_once": workers, "runtime_env": ONE_THREAD}


def num_workers(config: EvaluateConfig, num_parts: int) -> int:
    """How many actors work side by side."""
    return min(config.num_workers or models_side_by_side(use_gpu=config.use_gpu), num_parts)


def _summed_up(
    job: Job, num_parts: int, receipts: Mapping[int, dict[str, Any]], out: str
) -> tuple[Table, dict[str, str]]:
    """The table of all parts, in order, and what could not be filled."""
    metrics = [name for name in row_schema(job).names if name in METRICS]
    table = Table(job.measured_methods, metrics, resamples=job.config.resamples, seed=job.config.seed)
    for rows in rows_of_images(read_rows(out, num_parts)):
        table.add(rows)
    failed = {name: reason for index in range(num_parts) for name, reason in receipts[index]["failed"].items()}
    return table, failed


def _remove_other_parts(num_parts: int, lease: Lease) -> None:
    """Remove what an evaluation with more, smaller parts left."""
    for file in file_sizes(lease.folder):
        number = file.rpartition("/")[2].split(".")[0]
        if file.startswith(("parts/", "per_image/")) and (not number.isdigit() or int(number) >= num_parts):
            lease.remove(file)


def _summary(
    job: Job,
    table: Table,
    sets: Mapping[str, Mapping[str, float | None]],
    failed: Mapping[str, str],
    reasons: Mapping[str, str],
    model: str | None,
) -> dict[str, Any]:
    config, manifest = job.config, job.manifest
    overall = table.overall(config.confidence)
    small = manifest.crop_size < SMALLEST_LEVEL
    methods: dict[str, Any] = {}
    gains = retrieval_gains(overall) if "retrieval_gain" in job.metrics else {}
    for row in job.rows:
        metrics = dict(overall.get(row.name, {}))
        if row.name in gains:
            metrics["retrieval_gain"] = {"mean": gains[row.name], "low": None, "high": None, "images": table.images}
        for name, value in sets.get(row.name, {}).items():
            metrics[name] = {"mean": value, "low": None, "high": None, "images": table.images}
        ordered = {name: metrics[name] for name in METRICS if name in metrics}
        methods[row.name] = {"title": row.title, "not_measured": row.not_measured, "metrics": ordered}
    legend = {}
    for name in config.shown_metrics():
        entry = METRICS[name]
        legend[name] = {"unit": entry.unit, "better": entry.better, "formula": entry.formula}
        if name in reasons:
            legend[name]["not_measured"] = reasons[name]
        elif name in VARIANTS and small:
            legend[name]["not_measured"] = f"the images are smaller than {SMALLEST_LEVEL} pixels"
    return {
        "format": FORMAT,
        "model": redact(config.model) if config.needs_model else None,
        "model_digest": model,
        "data": redact(set_folder(config.data)),
        "data_digest": manifest.digest,
        "images": table.images,
        "mask": ", ".join(_families(manifest)),
        "mask_variants": list(job.variants),
        "mean_hole_fraction": table.hole_sum / table.images if table.images else None,
        "seed": config.seed,
        "resamples": config.resamples,
        "confidence": config.confidence,
        "networks": {
            option: {"network": redact(str(network.network)), "sha256": network.sha256}
            for option, network in (("fid", config.fid), ("lpips", config.lpips))
            if network.network is not None
        },
        "failed": dict(failed),
        "methods": methods,
        "groups": table.groups(config.confidence),
        "metrics": legend,
    }


def retrieval_gains(overall: Mapping[str, Mapping[str, Any]]) -> dict[str, float | None]:
    """`retrieval_gain` of the methods that retrieve, from the means of all images."""

    def mean(method: str, name: str) -> float | None:
        value: float | None = overall.get(method, {}).get(name, {}).get("mean")
        return value

    found, untrained, best = (
        mean("tmad", "retrieval_top_l1"),
        mean("blended", "retrieval_top_l1"),
        mean("tmad", "retrieval_best_l1"),
    )
    if found is None or untrained is None or best is None:
        return {}
    return {"tmad": retrieval_gain(found, untrained, best)}


def _families(manifest: Manifest) -> list[str]:
    settings = manifest.settings
    return list(settings.get("families") or [settings.get("mask", settings.get("mask_from", "own"))])


def _timing(job: Job, receipts: Mapping[int, dict[str, Any]]) -> str:
    """Seconds of filling an image by method: a property of the machine, so it has a file of its own."""
    images = sum(receipt["images"] for receipt in receipts.values()) * len(job.variants)
    names = job.measured_methods
    totals = {name: sum(receipt["seconds"].get(name, 0.0) for receipt in receipts.values()) for name in names}
    return json.dumps({"seconds_per_image": {name: total / images for name, total in totals.items()}}, indent=2) + "\n"
