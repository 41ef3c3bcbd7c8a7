"""From settings to a table: inputs are checked, parts are measured on Ray, results are aggregated.

Every image goes by itself through every method, on one thread, and sums are taken in the order of the set: the same
set, model and settings give the same table, whatever the number of workers or the size of the parts, and however often
the job was stopped. Finished parts are kept, so the same command again does only what is missing.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch

from pipeline.data.schema import Manifest, read_manifest, set_folder
from pipeline.data.tasks import iterate, run_tasks
from pipeline.errors import MissingInput
from pipeline.evaluation.config import EvaluateConfig
from pipeline.evaluation.external import open_results
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
)
from pipeline.evaluation.sets import measure_sets
from pipeline.evaluation.summary import Entries, summarize
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


def open_inputs(config: EvaluateConfig) -> tuple[Job, dict[str, Any]]:
    """Look at everything that is to be measured, before anything is written; the files are those of the model and of
    the measuring networks, by name.

    Raises `ModelNotFound`, `MissingInput`, `UnfitResults` for results of other methods that do not fit the set, and
    `ValueError` for a damaged model and for a mask variant that the set does not have.
    """
    if config.use_gpu and not (torch.cuda.is_available() or joined()):
        raise ValueError("use_gpu is set, but PyTorch sees no CUDA device here; leave it out to run on the CPU")
    config = replace(config, data=absolute(config.data))
    manifest = read_manifest(config.data)
    variants = _variants(config, manifest)
    if manifest.records == 0:
        raise MissingInput(f"the prepared set {redact(config.data)} has no image")
    folder = find_model(config.model, tracking_uri=config.tracking) if config.needs_model else None
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
    rows = table_rows(config)
    for row in rows:
        if row.not_measured:
            log.warning("%s: not measured: %s", row.title, row.not_measured)
    metrics = tuple(name for name in config.shown_metrics() if name not in reasons)
    decides = [
        *(FORMAT, manifest.digest, model, config.deciding(), metrics, variants),
        *({name: results.digest for name, results in externals.items()}, [asdict(row) for row in rows]),
        min(manifest.records, config.limit or manifest.records),
    ]
    digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:16]
    return Job(config, manifest, rows, metrics, variants, externals, digest, reasons, model), files


def measure_set(job: Job, files: dict[str, Any], lease: Lease) -> tuple[dict[str, Any], pa.Table]:
    """Measure everything that is asked for and write per_image/ and timing.json; the content of report.json, and the
    rows of `read_rows`.

    Images that cannot be filled (nothing but hole) are left out and listed in the summary. Raises `ClusterTooSmall`.
    """
    parts = plan_parts(job.manifest, job.config)
    receipts = _measure_parts(job, parts, files, lease)
    for file in file_sizes(lease.folder):
        # What an evaluation with more, smaller parts left.
        number = file.rpartition("/")[2].split(".")[0]
        if file.startswith(("parts/", "per_image/")) and (not number.isdigit() or int(number) >= len(parts)):
            lease.remove(file)
    rows = read_rows(lease.folder)
    summary = _summary(job, rows, receipts, lease.folder)
    # Seconds are a property of the machine, so they have a file of their own.
    images = sum(receipt["images"] for receipt in receipts) * len(job.variants)
    seconds = {
        name: sum(receipt["seconds"].get(name, 0.0) for receipt in receipts) / images for name in job.measured_methods
    }
    lease.write("timing.json", (json.dumps({"seconds_per_image": seconds}, indent=2) + "\n").encode())
    return summary, rows


def read_rows(out: str) -> pa.Table:
    """Per-image results below the evaluation's folder *out*, in the order of the set: `parts.FACTS`, each metric (or
    none), and the number of the part."""
    tables = []
    for index in range(len(list_files(join(out, "per_image"), (".parquet",)))):
        table = pq.read_table(io.BytesIO(read_bytes(join(out, part_file(index, "rows")))))
        tables.append(table.append_column("part", pa.array([index] * len(table), pa.int64())))
    return pa.concat_tables(tables)


def on_workers(
    job: Job, files: dict[str, Any], tasks: Sequence[Any], function: Callable[..., pa.Table], *, in_order: bool = False
) -> Iterator[Any]:
    """What *function* has `made` of each task, a dataclass, by tasks of Ray Data side by side on one thread each.
    Raises `ClusterTooSmall`."""
    start_ray()
    config = job.config
    workers = min(config.num_workers or models_side_by_side(use_gpu=config.use_gpu), len(tasks))
    require({"CPU": workers, "GPU": workers if config.use_gpu else 0}, "--num-workers")
    dataset = run_tasks(
        [asdict(task) for task in tasks],
        partial(function, files=ray.put(files), job=job),
        in_order=in_order,
        num_cpus=1,
        num_gpus=int(config.use_gpu),
        at_once=workers,
        runtime_env=ONE_THREAD,
    )
    for rows in iterate(dataset, batch_size=None, batch_format="numpy", prefetch_batches=0):
        yield from rows["made"]


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


def _measure_parts(job: Job, parts: Sequence[Part], files: dict[str, Any], lease: Lease) -> list[dict[str, Any]]:
    """Receipts of all parts in order; those that are not there yet are measured."""
    receipts = finished_parts(job, parts, lease.folder)
    total, before = sum(part.records for part in parts), sum(receipt["images"] for receipt in receipts.values())
    if receipts:
        log.info("%d of %d images are measured already and are kept", before, total)
    if todo := [part for part in parts if part.index not in receipts]:
        with Progress(total, done=before) as progress:
            for receipt in map(json.loads, on_workers(job, files, todo, partial(measure_part, lease=lease))):
                receipts[receipt["index"]] = receipt
                progress.add(receipt["images"])
    return [receipts[part.index] for part in parts]


def _summary(job: Job, rows: pa.Table, receipts: Sequence[Mapping[str, Any]], out: str) -> dict[str, Any]:
    """The content of report.json."""
    config, manifest, methods = job.config, job.manifest, job.measured_methods
    overall, groups = summarize(rows, methods, job.row_metrics, config)
    images = len(rows) // max(1, len(methods))
    of_sets = measure_sets(job, len(receipts), images, out)
    if "retrieval_gain" in job.metrics and (gain := _retrieval_gain(overall)):
        of_sets["tmad"] = {**gain, **of_sets["tmad"]}
    for method, values in of_sets.items():
        overall[method] |= {
            name: {"mean": value, "low": None, "high": None, "images": images} for name, value in values.items()
        }
    without = dict(job.reasons)
    if manifest.crop_size < SMALLEST_LEVEL:
        without |= dict.fromkeys(VARIANTS, f"the images are smaller than {SMALLEST_LEVEL} pixels")
    settings = manifest.settings
    families = settings.get("families") or [settings.get("mask", settings.get("mask_from", "own"))]
    fractions = rows["hole_fraction"].to_pylist()[:: max(1, len(methods))]
    return {
        "format": FORMAT,
        "model": redact(config.model) if config.needs_model else None,
        "model_digest": job.model,
        "data": redact(set_folder(config.data)),
        "data_digest": manifest.digest,
        "images": images,
        "mask": ", ".join(families),
        "mask_variants": list(job.variants),
        "mean_hole_fraction": float(np.cumsum(fractions)[-1]) / images if images else None,
        "seed": config.seed,
        "resamples": config.resamples,
        "confidence": config.confidence,
        "networks": {
            option: {"network": redact(str(network.network)), "sha256": network.sha256}
            for option, network in (("fid", config.fid), ("lpips", config.lpips))
            if network.network is not None
        },
        "failed": {name: reason for receipt in receipts for name, reason in receipt["failed"].items()},
        "methods": {
            row.name: {
                "title": row.title,
                "not_measured": row.not_measured,
                "metrics": {name: entries[name] for name in METRICS if name in entries},
            }
            for row in job.rows
            for entries in [overall.get(row.name, {})]
        },
        "groups": groups,
        "metrics": {
            name: {
                **{"unit": METRICS[name].unit, "better": METRICS[name].better, "formula": METRICS[name].formula},
                **({"not_measured": without[name]} if name in without else {}),
            }
            for name in config.shown_metrics()
        },
    }


def _retrieval_gain(overall: Entries) -> dict[str, float | None]:
    """`retrieval_gain` of T-MAD, from the means of all images, where it can be had."""
    places = (("tmad", "retrieval_top_l1"), ("blended", "retrieval_top_l1"), ("tmad", "retrieval_best_l1"))
    means = [overall[method][name]["mean"] for method, name in places if method in overall]
    if len(means) < len(places) or None in means:
        return {}
    return {"retrieval_gain": retrieval_gain(*means)}
