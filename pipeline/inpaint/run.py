"""The batch job: what is missing is found, worked through by an actor pool, and written down.

Tasks name a few images each; results appear atomically, a task's rows after its results. The same command again does
only what is missing. Results depend on image, mask, model and settings alone, so nothing of what was killed shows.
"""

from __future__ import annotations

import logging
import math
import os
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
from PIL import Image

from pipeline.claim import claim_folder
from pipeline.cluster import joined, require, start_ray
from pipeline.data.own_masks import stem_of
from pipeline.data.sources.choose import open_source
from pipeline.data.tasks import iterate, run_on_actors
from pipeline.errors import MissingInput
from pipeline.inpaint.config import InpaintConfig
from pipeline.inpaint.holes import open_holes
from pipeline.inpaint.ledger import LEDGER, PARTS, Row, encode, join_ledger, settled, to_table
from pipeline.inpaint.worker import InpaintWorker, Job
from pipeline.models import find_model, model_version
from pipeline.storage import file_sizes, join, read_bytes, redact
from pipeline.tracking import Tracker, resolve_tracking_uri
from tmad.checkpoint import CONFIG_FILE, WEIGHTS_FILE, model_digest
from tmad.images import UnreadableImage, decode_image, to_rgb

EXPERIMENT = "tmad-inpaint"
PROGRESS_S = 10.0
"""Seconds between two progress lines."""
SAMPLES = 6
"""Pictures before and after that are kept in MLflow."""
_SAMPLE_SIDE = 512

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Summary:
    """Counts of a finished job, over the inputs that there are now."""

    done: int
    """Filled by this call."""
    kept: int
    """Settled by an earlier call with the same model and settings: filled, skipped or failed."""
    skipped: int
    """Without a hole, over both."""
    failed: int
    """Over both."""
    reasons: dict[str, int]
    """Skipped and failed inputs by reason."""
    seconds: float
    megapixels: float
    """Filled by this call."""
    model_digest: str


def inpaint_all(config: InpaintConfig) -> Summary:
    """Fill every image of `config.input` that has a hole; returns what happened, which the ledger says one by one.

    Raises `MissingInput` (no place, no image, no mask), `CorruptSource`, `ModelNotFound`, `ClusterTooSmall`,
    `FolderInUse` if another job writes to the output, `StorageFailed` in an outage of storage, and `ValueError` for an
    output among the inputs.
    """
    began = time.monotonic()
    config = config.with_absolute_places()
    _check_places(config)
    source = open_source(config.input, root=config.root, image_column=config.image_column, key_column=config.key_column)
    holes, keys = open_holes(config, source, config.input, _without_output(source.keys(), config))
    coarse = open_source(config.coarse_from) if config.coarse_from else None
    names = coarse.keys() if coarse else []
    folder = find_model(config.model, tracking_uri=_named_tracking(config))
    digest = model_digest(folder)
    with claim_folder(config.output, expiry_s=config.claim_expiry_s) as claim:
        job = Job(
            config=config,
            source=source,
            holes=holes,
            coarse=coarse,
            coarse_names={stem_of(name): name for name in names},
            claim=claim,
            token=uuid.uuid4().hex[:12],
            model=model_version(config.model, tracking_uri=_named_tracking(config)),
            model_digest=digest,
            identity=config.identity(digest),
        )
        return _inpaint(job, keys, folder, began)


def _inpaint(job: Job, keys: Sequence[str], folder: Path, began: float) -> Summary:
    config, claim = job.config, job.claim
    there = file_sizes(config.output)
    kept = settled(join_ledger(claim, there), there, job.identity, retry_failed=config.retry_failed)
    known = _known_without_work(job, keys)
    todo = [key for key in keys if key not in known and not _is_settled(key, kept, job)]
    log.info(
        "%d images: %d to fill, %d settled before by model %s, %d without a mask or with another's name",
        len(keys), len(todo), len(keys) - len(todo) - len(known), job.model_digest, len(known),
    )  # fmt: skip
    del kept
    if known:
        claim.write(f"{PARTS}/{job.token}-known.parquet", encode(to_table(list(known.values()))))
    uri = resolve_tracking_uri(_named_tracking(config), config.output) if _named_tracking(config) else None
    shown = {name: value for name, value in asdict(config).items() if value is not None}
    run_id = Tracker.create(uri, EXPERIMENT, Path(config.output).name, shown, {"model_digest": job.model_digest})
    with Tracker(uri, run_id) as tracker:
        progress = _Progress(len(todo))
        for table in _fill_all(job, todo, folder):
            progress.add(table)
        rows = join_ledger(claim, file_sizes(config.output))
        rows = rows.filter(pc.is_in(rows["input"], value_set=pa.array(keys, pa.string())))
        summary = Summary(
            done=progress.done,
            kept=len(keys) - len(todo) - len(known),
            skipped=pc.sum(pc.equal(rows["status"], "skipped")).as_py(),
            failed=pc.sum(pc.equal(rows["status"], "failed")).as_py(),
            reasons=_count(rows["reason"]),
            seconds=time.monotonic() - began,
            megapixels=progress.megapixels,
            model_digest=job.model_digest,
        )
        if uri is not None:
            _track(tracker, summary, rows, job)
    return summary


def _is_settled(key: str, kept: Mapping[str, str | None], job: Job) -> bool:
    """Whether nothing has to be done about *key*; one that had no mask may have one now."""
    if key not in kept:
        return False
    by_name = job.config.mask_from in ("paired", "boxes")
    return not (by_name and kept[key] == "no-mask" and job.holes.has_mask(key))


def _count(reasons: pa.ChunkedArray) -> dict[str, int]:
    return dict(Counter(reason for reason in reasons.to_pylist() if reason).most_common())


def _known_without_work(job: Job, keys: Sequence[str]) -> dict[str, Row]:
    """Rows of inputs that need not be opened: without a mask, or with a result that another one's would replace."""
    identity: dict[str, Any] = {"model": job.model, "model_digest": job.model_digest, "identity": job.identity}
    identity["when"] = time.time()
    found = {}
    if job.config.format == "png":
        stems = Counter(map(stem_of, keys))
        for key in keys:
            if stems[stem_of(key)] > 1:
                detail = f"{stems[stem_of(key)]} images are named {stem_of(key)}.*: their results would have one name"
                found[key] = Row(input=key, status="failed", reason="same-name", detail=detail, **identity)
    if job.config.without_hole == "skip":
        for key in keys:
            if key not in found and not job.holes.has_mask(key):
                detail = f"no mask for {stem_of(key)} in {redact(job.config.masks or '')}"
                found[key] = Row(input=key, status="skipped", reason="no-mask", detail=detail, **identity)
    return found


def _fill_all(job: Job, keys: Sequence[str], folder: Path) -> Iterator[pa.Table]:
    """Rows as tasks are finished, in any order."""
    if not keys:
        return
    config = job.config
    start_ray()
    num_actors = _num_actors(config, len(keys))
    require({"CPU": num_actors * config.cpus_per_actor, "GPU": num_actors if config.use_gpu else 0})
    files = ray.put({name: (folder / name).read_bytes() for name in (CONFIG_FILE, WEIGHTS_FILE)})
    # Small at the end of a small job, so that no copy waits for another's last task.
    size = max(1, min(config.images_per_task, math.ceil(len(keys) / (4 * num_actors))))
    tasks = [
        {"number": number, "keys": list(keys[start : start + size])}
        for number, start in enumerate(range(0, len(keys), size))
    ]
    dataset = run_on_actors(
        tasks,
        InpaintWorker,
        (files, job),
        size=num_actors,
        num_cpus=None if config.use_gpu else config.cpus_per_actor,
        num_gpus=1 if config.use_gpu else None,
    )
    yield from iterate(dataset, batch_size=None, batch_format="pyarrow", prefetch_batches=0)


def _num_actors(config: InpaintConfig, num_keys: int) -> int:
    if config.num_actors is not None:
        return min(config.num_actors, num_keys)
    there = ray.cluster_resources()
    if config.use_gpu:
        return max(1, min(int(there.get("GPU", 0)), num_keys))
    cpus = there.get("CPU", 1)
    # An embedded Ray counts more CPUs than this machine may have; the model needs real ones.
    cpus = cpus if joined() else min(cpus, os.cpu_count() or 1)
    return max(1, min(int(cpus / config.cpus_per_actor), num_keys))


def _check_places(config: InpaintConfig) -> None:
    """Refuse an output that is or lies in the input, unless that is asked for, or in the masks."""
    output = config.output
    places = {"masks": config.masks if config.mask_from == "paired" else None, "coarse_from": config.coarse_from}
    if not config.in_place:
        places["input"] = config.input
    for name, folder in places.items():
        same_as_input = config.in_place and folder == config.input
        if folder is None or same_as_input:
            continue
        if output == folder or output.startswith(folder + "/"):
            advice = (
                "choose another place, or --in-place if that is wanted" if name == "input" else "choose another place"
            )
            raise ValueError(
                f"output ({redact(output)}) is or lies in {name} ({redact(folder)}): results would be taken for what "
                f"belongs there; {advice}"
            )


def _without_output(keys: list[str], config: InpaintConfig) -> list[str]:
    """The keys that are no results of an earlier call."""
    if not config.output.startswith(config.input + "/"):
        return keys
    below = config.output[len(config.input) + 1 :] + "/"
    return [key for key in keys if not key.startswith(below)]


def _named_tracking(config: InpaintConfig) -> str | None:
    uri = config.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    return None if uri is None or uri.lower() == "none" else uri


def by_reason(reasons: Mapping[str, int]) -> str:
    """`3 no-mask, 1 truncated`."""
    return ", ".join(f"{count} {reason}" for reason, count in reasons.items())


def _track(tracker: Tracker, summary: Summary, rows: pa.Table, job: Job) -> None:
    """The summary, the ledger and some pictures before and after, for MLflow."""
    values = {name: value for name, value in asdict(summary).items() if isinstance(value, int | float)}
    values |= {f"reason/{reason}": count for reason, count in summary.reasons.items()}
    values["images_per_s"] = summary.done / max(summary.seconds, 1e-9)
    values["megapixels_per_s"] = summary.megapixels / max(summary.seconds, 1e-9)
    tracker.metrics(values, step=summary.done + summary.kept)
    tracker.artifact(read_bytes(join(job.config.output, LEDGER)), LEDGER)
    done = rows.filter(pc.equal(rows["status"], "done"))
    for number in range(min(SAMPLES, len(done))):
        row = done.slice(number * len(done) // SAMPLES if len(done) > SAMPLES else number, 1).to_pylist()[0]
        try:
            before, after = (
                _small(decode_image(data, max_pixels=job.config.max_pixels))
                for data in (job.source.read(row["input"]), read_bytes(join(job.config.output, row["output"])))
            )
        except (UnreadableImage, MissingInput) as error:
            log.warning("no picture of %s: %s", row["input"], error)
            continue
        tracker.image(f"samples/{number}", np.concatenate([before, after], axis=1))


def _small(image: Image.Image) -> np.ndarray:
    picture = Image.fromarray(to_rgb(image))
    picture.thumbnail((_SAMPLE_SIDE, _SAMPLE_SIDE))
    return np.asarray(picture)


class _Progress:
    """A line with rates, remaining time and failures by reason, at most every `PROGRESS_S` seconds."""

    def __init__(self, total: int) -> None:
        self.total, self.count, self.done, self.megapixels = total, 0, 0, 0.0
        self.reasons: Counter[str] = Counter()
        self.began = self.last = time.monotonic()

    def add(self, rows: pa.Table) -> None:
        """Count the inputs of a task."""
        done = rows.filter(pc.equal(rows["status"], "done"))
        self.count += len(rows)
        self.done += len(done)
        self.megapixels += (pc.sum(pc.multiply(done["height"], done["width"])).as_py() or 0) / 1e6
        self.reasons.update(_count(rows["reason"]))
        now = time.monotonic()
        if now - self.last < PROGRESS_S and self.count < self.total:
            return
        self.last, spent = now, max(now - self.began, 1e-9)
        rate = self.count / spent
        log.info(
            "%d of %d images, %.2f images/s, %.2f megapixels/s, %.0f s to go%s",
            self.count,
            self.total,
            rate,
            self.megapixels / spent,
            (self.total - self.count) / rate,
            f"; not filled: {by_reason(self.reasons)}" if self.reasons else "",
        )
