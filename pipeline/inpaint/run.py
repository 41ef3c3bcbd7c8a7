"""The batch job: finds the missing results, fills them with an actor pool, records them.

Tasks name a few images each; results appear atomically, a task's rows after its results. The same command again does
only what is missing. Results depend on image, mask, model and settings alone, so nothing of what was killed shows.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
from PIL import Image

from pipeline.data.collection import UNUSABLE, drop_of
from pipeline.data.sources.base import Source
from pipeline.data.sources.choose import is_ledger, open_source
from pipeline.data.tasks import iterate, run_on_actors
from pipeline.data.user_masks import stem_of
from pipeline.errors import MissingInput
from pipeline.inpaint.config import InpaintConfig
from pipeline.inpaint.holes import Holes, near_misses, open_holes
from pipeline.inpaint.ledger import LEDGER, PARTS, Row, encode, join_ledger, left_behind, results, settled, to_table
from pipeline.inpaint.worker import InpaintWorker, Job, make_inpainter, output_key
from pipeline.models import find_model, model_version
from pipeline.runs.cluster import models_side_by_side, real_cpus, require, start_ray
from pipeline.runs.lease import lease_folder
from pipeline.runs.progress import Progress
from pipeline.storage import UnsafeName, check_room, file_sizes, is_remote, join, read_bytes, redact
from pipeline.tracking import Tracker, check_tracking, resolve_tracking_uri
from tmad.checkpoint import CONFIG_FILE, WEIGHTS_FILE, model_digest
from tmad.files import open_file
from tmad.images import UnreadableImage, decode_image, to_rgb

EXPERIMENT = "tmad-inpaint"
CHECKED = 256
"""Pairs of image and mask that are read before a job."""
SAMPLED = 16
"""Images whose sizes tell how much room the results take."""
SHOWN = 10
"""Names in one line."""
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
    output among the inputs, a damaged model, and settings that do not fit the model.
    """
    began = time.monotonic()
    found = _open(config)
    config = found.config
    for line in found.warnings():
        log.warning("%s", line)
    digest = model_digest(found.model)
    with lease_folder(config.output, expiry_s=config.lease_expiry_s) as lease:
        job = Job(
            config=config,
            source=found.source,
            holes=found.holes,
            coarse=found.coarse,
            coarse_names=found.coarse_names,
            lease=lease,
            token=uuid.uuid4().hex[:12],
            model=model_version(config.model, tracking_uri=_named_tracking(config)),
            model_digest=digest,
            identity=config.identity(digest),
        )
        return _inpaint(job, found, began)


@dataclass(frozen=True)
class _Found:
    """All that a job reads, opened."""

    config: InpaintConfig
    """With absolute places."""
    source: Source
    holes: Holes
    keys: Sequence[str]
    beside: Mapping[str, str]
    """What lies among the images and is none, and the reason of each."""
    coarse: Source | None
    coarse_names: dict[str, str]
    model: Path

    def warnings(self) -> list[str]:
        """What a user should know before the work begins."""
        unmatched = self.holes.unmatched
        if not unmatched:
            return []
        near = near_misses(unmatched, self.keys)
        shown = [f"{name!r}" + (f" (is it that of {near[name]!r}?)" if name in near else "") for name in unmatched]
        more = f", and {len(shown) - SHOWN} more" if len(shown) > SHOWN else ""
        return [f"{len(unmatched)} masks belong to no image: {', '.join(shown[:SHOWN])}{more}"]


def _open(config: InpaintConfig) -> _Found:
    """Raises as `inpaint_all`, before anything is written."""
    config = config.with_absolute_places()
    _check_places(config)
    check_tracking(_named_tracking(config))
    source = open_source(config.input, root=config.root, image_column=config.image_column, key_column=config.key_column)
    own = _without_output(source.keys(), config)
    holes, keys = open_holes(config, source, config.input, own)
    masks = set(own) - set(keys)  # that lie among the images
    beside = {key: why for key, why in source.beside().items() if key not in masks}
    coarse = open_source(config.coarse_from) if config.coarse_from else None
    model = find_model(config.model, tracking_uri=_named_tracking(config))
    make_inpainter(model, config, device="cpu")  # in an actor, what does not fit would be Ray's text
    return _Found(
        config=config,
        source=source,
        holes=holes,
        keys=keys,
        beside={key: beside[key] for key in _without_output([*beside], config)},
        coarse=coarse,
        coarse_names={stem_of(name): name for name in (coarse.keys() if coarse else [])},
        model=model,
    )


def check(config: InpaintConfig) -> list[str]:
    """What a job with this configuration would find, in lines; nothing is written and Ray is not started.

    Pairs of images and masks are read, up to `CHECKED` of them evenly over the collection. Raises as `inpaint_all`.
    """
    found = _open(config)
    config, keys = found.config, found.keys
    with_mask = [key for key in keys if found.holes.has_mask(key)]
    lines = [f"{len(keys)} images, {len(keys) - len(with_mask)} of them without a mask"]
    if found.beside:
        lines.append(f"{len(found.beside)} files beside them are no images, e.g. {next(iter(found.beside))!r}")
    lines += found.warnings()
    step = max(1, math.ceil(len(with_mask) / CHECKED))
    reasons: dict[str, list[str]] = {}
    looked, sizes = with_mask[::step], []
    for key in looked:
        try:
            file = open_file(data := found.source.read(key), max_pixels=config.max_pixels)
            found.holes.of(key, file, max_pixels=config.max_pixels)
            sizes.append(len(data))
        except UNUSABLE as error:
            reasons.setdefault(drop_of(key, error, 0)["reason"], []).append(key)
    bad = sum(map(len, reasons.values()))
    lines.append(f"{len(looked)} pairs of image and hole were read: {len(looked) - bad} can be filled")
    lines += [f"{len(some)} {reason}: {', '.join(map(repr, some[:SHOWN]))}" for reason, some in reasons.items()]
    there = file_sizes(config.output)
    lines.append(_room(found, sum(sizes) / max(1, len(looked)), there))
    lines.append(f"{redact(config.output)}: {'a ledger is there, what is settled stays' if LEDGER in there else 'new'}")
    return lines


def _room(found: _Found, mean: float, there: Mapping[str, int]) -> str:
    """How the results fit into what is free, in words; *mean*: bytes of one, about those of its image. Results that
    are *there* already are no more to come, nor in place what they replace. Raises `StorageFailed`."""
    count = len(found.keys) if found.config.without_hole == "copy" else sum(map(found.holes.has_mask, found.keys))
    return check_room(found.config.output, count * mean - sum(there.values()), "results", "--output")


def _sampled_size(found: _Found) -> float:
    """Mean bytes of some images, evenly over the collection; 0 where their number with holes is not known before."""
    if found.config.mask_from in ("alpha", "colour", "column") or is_remote(found.config.output):
        return 0.0
    looked, sizes = found.keys[:: max(1, math.ceil(len(found.keys) / SAMPLED))], []
    for key in looked:
        with suppress(*UNUSABLE):
            sizes.append(len(found.source.read(key)))
    return sum(sizes) / max(1, len(looked))


def _inpaint(job: Job, found: _Found, began: float) -> Summary:
    config, lease, keys = job.config, job.lease, found.keys
    there = file_sizes(config.output)
    _room(found, _sampled_size(found), there)
    made_of = _made_of(found)
    table = join_ledger(lease, there)
    kept = set() if config.again else settled(table, there, job.identity, made_of, retry_failed=config.retry_failed)
    # In place, the image of an earlier call is the result.
    earlier = {} if config.output == config.input else results(table, there)
    known = _known_without_work(job, keys)
    known |= {key: left_behind(row, earlier[key], there[earlier[key]]) for key, row in known.items() if key in earlier}
    todo = {key: made_of[key] for key in keys if key not in known and key not in kept}
    log.info(
        "%d images: %d to fill, %d settled before by model %s, %d without a mask or with another's name",
        len(keys), len(todo), len(keys) - len(todo) - len(known), job.model_digest, len(known),
    )  # fmt: skip
    del kept, made_of, table
    known |= _rows_beside(job, found.beside)
    keys = [*keys, *found.beside]
    if known:
        lease.write(f"{PARTS}/{job.token}-known.parquet", encode(to_table(list(known.values()))))
    uri = _named_tracking(config)
    shown = {name: value for name, value in asdict(config).items() if value is not None}
    run_id = Tracker.create(uri, EXPERIMENT, Path(config.output).name, shown, {"model_digest": job.model_digest})
    with Tracker(uri, run_id) as tracker:
        done = 0
        behind = {key: (earlier[key], there[earlier[key]]) for key in todo if key in earlier}
        with Progress(len(todo)) as progress:
            for table in _fill_all(replace(job, earlier=behind), todo, found.model):
                filled = table.filter(pc.equal(table["status"], "done"))
                done += len(filled)
                megapixels = (pc.sum(pc.multiply(filled["height"], filled["width"])).as_py() or 0) / 1e6
                progress.add(len(table), megapixels=megapixels, reasons=_count(table["reason"]))
        there = file_sizes(config.output)
        rows = join_ledger(lease, there)
        _tell_of_results_left(config, earlier, rows, keys, there)
        rows = rows.filter(pc.is_in(rows["input"], value_set=pa.array(keys, pa.string())))
        _tell_of_losses(rows)
        summary = Summary(
            done=done,
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


def _made_of(found: _Found) -> dict[str, str]:
    """What stands for image, hole and coarse result of each key, told from listings: it changes with each."""
    keys, config = found.keys, found.config
    images, holes = found.source.versions(keys), found.holes.versions(keys)
    coarse = [""] * len(keys)
    if found.coarse is not None:
        names = [found.coarse_names.get(stem_of(key), "") for key in keys]
        coarse = [f"{name} {one}" for name, one in zip(names, found.coarse.versions(names), strict=True)]
    made = {}
    for key, *parts in zip(keys, images, holes, coarse, strict=True):
        if config.output == config.input and output_key(key, config, "") == key:
            parts[0] = "replaced by its result"
        made[key] = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
    return made


def _rows_beside(job: Job, beside: Mapping[str, str]) -> dict[str, Row]:
    """Rows of what is no image by its name."""
    details = {
        "not-an-image": "its name has no ending of a picture",
        "link": "a symbolic link to a folder, which is not followed",
        "not-a-file": "a pipe, a socket or a device",
        "no-key": "the row has no key",
        "same-key": "an earlier row has this key",
        "not-read": "the folder's other files were read: archives or tables",
    }
    facts: dict[str, Any] = {"model": job.model, "model_digest": job.model_digest, "identity": job.identity}
    now = time.time()
    return {
        key: Row(input=key, status="skipped", reason=why, detail=details[why], when=now, **facts)
        for key, why in beside.items()
    }


def _tell_of_losses(rows: pa.Table) -> None:
    """One line for each thing that results lack of their originals, with the number of results."""
    done = rows.filter(pc.equal(rows["status"], "done"))
    notes = Counter(note for detail in done["detail"].to_pylist() if detail for note in detail.split("; "))
    for note, count in notes.most_common(SHOWN):
        log.warning("%d results: %s", count, note)


def _tell_of_results_left(
    config: InpaintConfig, earlier: Mapping[str, str], rows: pa.Table, keys: Sequence[str], there: Mapping[str, int]
) -> None:
    """One line on files of *earlier* calls that are no results of this one: of other settings, or of what is gone."""
    columns = [rows[name].to_pylist() for name in ("input", "status", "output")]
    now = set(keys)
    mine = {output for key, status, output in zip(*columns, strict=True) if status != "failed" and key in now}
    left = sorted({output for output in earlier.values() if output in there} - mine)
    if left:
        log.warning(
            "%d results of earlier calls are still in %s, of images, masks or settings that are no longer: %s%s",
            len(left), redact(config.output), ", ".join(map(repr, left[:SHOWN])), ", ..." if len(left) > SHOWN else "",
        )  # fmt: skip


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
            if key not in found and _is_plain_name(key) and not job.holes.has_mask(key):
                detail = f"no mask for {stem_of(key)} in {redact(job.config.masks or '')}"
                found[key] = Row(input=key, status="skipped", reason="no-mask", detail=detail, **identity)
    return found


def _is_plain_name(key: str) -> bool:
    try:
        join("", key)
    except UnsafeName:
        return False  # which is the better reason
    return True


def _fill_all(job: Job, todo: Mapping[str, str], folder: Path) -> Iterator[pa.Table]:
    """Rows as tasks are finished, in any order; *todo*: keys, and what each is made of."""
    if not todo:
        return
    keys = list(todo)
    config = job.config
    start_ray()
    side_by_side = config.num_actors or models_side_by_side(
        use_gpu=config.use_gpu, cpus_each=config.cpus_per_actor or 1, gpus_each=config.gpus_per_actor
    )
    num_actors = min(side_by_side, len(keys))
    cpus = config.cpus_per_actor or (max(1, real_cpus() // num_actors) if config.use_gpu else 1)
    gpus = config.gpus_per_actor if config.use_gpu else 0
    require({"CPU": num_actors * cpus, "GPU": num_actors * gpus}, "--num-actors")
    files = ray.put({name: (folder / name).read_bytes() for name in (CONFIG_FILE, WEIGHTS_FILE)})
    # Small at the end of a small job, so that no copy waits for another's last task.
    most = config.images_per_task or (256 if config.use_gpu else 16)
    size = max(1, min(most, math.ceil(len(keys) / (4 * num_actors))))
    tasks = [
        {"number": number, "made_of": {key: todo[key] for key in keys[start : start + size]}}
        for number, start in enumerate(range(0, len(keys), size))
    ]
    dataset = run_on_actors(
        tasks,
        InpaintWorker,
        (files, replace(job, config=replace(config, cpus_per_actor=cpus))),
        size=num_actors,
        num_cpus=None if config.use_gpu else cpus,
        num_gpus=gpus or None,
    )
    yield from iterate(dataset, batch_size=None, batch_format="pyarrow", prefetch_batches=0)


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
    if config.output == config.input:
        return [key for key in keys if not is_ledger(key)]
    if not config.output.startswith(config.input + "/"):
        return keys
    below = config.output[len(config.input) + 1 :] + "/"
    return [key for key in keys if not key.startswith(below)]


def _named_tracking(config: InpaintConfig) -> str | None:
    uri = config.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
    return uri and resolve_tracking_uri(uri, config.output)


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
