"""The plan of a run and a check of everything it needs (`--dry-run`).

Every check is made, so that one call lists all that is wrong. Nothing is left behind: a probe object is written to the
runs and removed; no set is prepared, no weights are downloaded, no run is begun.
"""

from __future__ import annotations

import math
import os
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pipeline import storage
from pipeline.config import RunConfig
from pipeline.data.coarse_results import CoarseResults
from pipeline.data.schema import Manifest, read_manifest, read_records, set_folder
from pipeline.errors import ClusterTooSmall, CorruptSet, FolderInUse, StorageFailed, TMADError, one_line
from pipeline.models.pretrained import check_perceptual
from pipeline.runs.cluster import available, joined, shortage, shown
from pipeline.runs.lease import holder_of
from pipeline.storage import mb
from pipeline.tracking import check_tracking, resolve_tracking_uri
from pipeline.train.footprint import Footprint, checkpoint_count, kept_bytes, measure, measured_rates
from pipeline.train.initial import find_initial
from pipeline.train.launch import (
    check_name,
    check_set,
    open_training_set,
    place_of,
    resolve,
    resources,
    room_for_run,
    was_begun,
)
from pipeline.train.loop import duration

UNKNOWN_RATE = (
    "unknown, as this machine has no GPU: ask on one that has, or state the rate with --images-per-s, as an earlier "
    "run recorded it (rate/images_per_s)"
)


@dataclass(frozen=True)
class Check:
    """One thing that a run needs."""

    name: str
    ok: bool
    text: str
    """What is there, or what is wrong and what to do."""


@dataclass(frozen=True)
class Preflight:
    """What is known before a run."""

    plan: list[tuple[str, str]]
    """Name and text of each line."""
    checks: list[Check]

    @property
    def ok(self) -> bool:
        """Whether nothing that was looked at would stop the run."""
        return all(check.ok for check in self.checks)

    def text(self) -> str:
        """Both as lines for people."""
        failed = sum(not check.ok for check in self.checks)
        end = f"{failed} of {len(self.checks)} checks failed" if failed else f"{len(self.checks)} checks passed"
        lines = ["plan:", *(f"  {name:<12} {text}" for name, text in self.plan), "checks:"]
        lines += [f"  {'ok' if check.ok else 'FAILED':<7} {check.name:<12} {check.text}" for check in self.checks]
        return "\n".join([*lines, end])


def preflight(config: RunConfig, *, images_per_s: float | None = None) -> Preflight:
    """Look at everything that a run of *config* needs. *images_per_s*: of all workers together, if known."""
    named = config.name is not None
    config = resolve(config)
    checks: list[Check] = []
    sets: dict[str, Manifest] = {}
    footprints: list[Footprint] = []

    def check(name: str, look: Callable[[], str]) -> None:
        try:
            checks.append(Check(name, True, look()))
        except (TMADError, ValueError, OSError) as error:
            checks.append(Check(name, False, storage.redact(one_line(error))))

    def look_at_set(which: str) -> str:
        manifest = open_training_set(config, None)[0] if which == "train" else read_manifest(config.data.validation_set)
        sets[which] = manifest
        check_set(config, manifest, which)
        if (place := config.data.training_set if which == "train" else config.data.validation_set) is not None:
            _complete(set_folder(place), manifest)
        return f"{manifest.records:,} records of {manifest.crop_size} pixels, {place_of(config, which)}"

    def look_at_step() -> str:
        crop_size = sets["train"].crop_size if "train" in sets else config.data.images.crop_size
        footprints.append(measure(config, crop_size=crop_size))
        of = "of the training set" if "train" in sets else "supposed, as there is no training set"
        return f"a small step was made here; crops of {crop_size} pixels {of}"

    check("data.train", lambda: look_at_set("train"))
    check("data.val", lambda: look_at_set("val"))
    if config.data.coarse_from is not None:
        check("data.coarse_from", lambda: _results(config))
    check("runs", lambda: _writable(config.runs))
    if named:
        check("name", lambda: _state_of_run(config, sets))
    check("tracking", lambda: _tracking(config))
    check("resources", lambda: _resources(config))
    check("perceptual", lambda: check_perceptual(config))
    if config.init_from is not None:
        check(
            "init_from", lambda: find_initial(config, resolve_tracking_uri(config.tracking.uri, config.runs)).summary()
        )
    check("model", look_at_step)
    if footprints and all(one.ok for one in checks if one.name == "runs"):
        size = kept_bytes(config, checkpoint=footprints[0].checkpoint, model=footprints[0].average)
        check("room", lambda: room_for_run(config, size))
    crop_size = sets["train"].crop_size if "train" in sets else config.data.images.crop_size
    length = _length(config, crop_size, images_per_s) if footprints else "unknown, as no step could be made"
    return Preflight(_plan(config, sets, footprints[0] if footprints else None, length), checks)


def _length(config: RunConfig, crop_size: int, images_per_s: float | None) -> str:
    """How long the run takes at the rate that is stated, or else is measured here, in words."""
    schedule, number = config.schedule, config.workers.num_workers
    if images_per_s is not None:
        taken = duration(schedule.total_images / images_per_s)
        return f"{taken} at {images_per_s:g} images/s, as stated; without start and validation"
    rates = measured_rates(config, crop_size=crop_size)
    if rates is None:
        return UNKNOWN_RATE
    lengths = {"coarse": schedule.coarse_images, "joint": schedule.joint_images}
    taken = duration(sum(lengths[phase] / rate / number for phase, rate in rates.items()))
    shown = ", ".join(f"{phase} {number * rate:.3g} images/s" for phase, rate in rates.items())
    times = "" if number == 1 else f" ({number} times that of one worker)"
    return f"{taken} at {shown}{times}, measured here; without start, input and validation"


def _plan(
    config: RunConfig, sets: dict[str, Manifest], footprint: Footprint | None, length: str
) -> list[tuple[str, str]]:
    schedule, workers = config.schedule, config.workers
    batch, total = schedule.batch_images, schedule.total_images
    coarse, steps = math.ceil(schedule.coarse_images / batch), math.ceil(total / batch)
    device = "GPU" if workers.use_gpu else f"CPU, threads {config.threads}"
    records = sets["train"].records if "train" in sets else 0
    epochs = f", {total / records:,.1f} times through {records:,} records" if records else ""
    count, kept = checkpoint_count(config), schedule.keep_checkpoints
    lines = [
        ("workers", f"{workers.num_workers} ({device}, {config.precision}), {shown(resources(config))} in all"),
        ("batch", f"{batch} images a step, {batch // workers.num_workers} a worker"),
        ("steps", f"{steps:,}: {coarse:,} coarse ({schedule.coarse_images:,} images), then {steps - coarse:,} jointly "
         f"({schedule.joint_images:,} images){epochs}"),
        ("validation", f"every {schedule.validate_every_images:,} images, {schedule.validation_images:,} images"),
    ]  # fmt: skip
    checkpoints = (
        f"{count:,}, every {schedule.checkpoint_every_images:,} images and at the end, {min(kept, count)} kept"
    )
    memory = "unknown, as no step could be made"
    if footprint is not None:
        size = footprint.checkpoint
        checkpoints += f"; {mb(size)} each, {mb(size * min(kept, count))} in storage, {mb(size * count)} written in all"
        memory = (
            f"about {mb(footprint.worker)} of tensors a worker: {mb(footprint.held)} held (counted: networks "
            f"{mb(footprint.networks)}, average {mb(footprint.average)}, Adam {mb(footprint.moments)}, VGG-19 "
            f"{mb(footprint.features)}) and {mb(footprint.step)} in a step (estimated: {footprint.formula})"
        )
    return [*lines, ("checkpoints", checkpoints), ("memory", memory), ("duration", length)]


def _complete(folder: str, manifest: Manifest) -> None:
    """Every shard is there and of its size, by one listing."""
    there = storage.file_sizes(folder)
    wrong = [shard.file for shard in manifest.shards if there.get(shard.file) != shard.size]
    if wrong:
        raise CorruptSet(
            f"{len(wrong)} of the {len(manifest.shards)} shards in {storage.redact(folder)} are missing or of another "
            f"size than the manifest says, {wrong[0]} first; run jobs/prepare.py again, it makes what is missing"
        )


def _results(config: RunConfig) -> str:
    """One of each set is looked for and decoded."""
    assert config.data.coarse_from is not None
    assert config.data.training_set is not None
    results = CoarseResults(config.data.coarse_from)
    for place in (config.data.training_set, config.data.validation_set):
        for record in read_records(place, 1):
            results.read(record.image_id, record.height, record.width)
    return f"{len(results.keys):,} results in {storage.redact(config.data.coarse_from)}"


def _writable(uri: str) -> str:
    """Write a probe object, read it, remove it, and the folders that were made for it."""
    if not storage.is_remote(uri):
        storage.check_place(uri)
    new = [] if storage.is_remote(uri) else _absent(Path(storage.absolute(uri)))
    probe = storage.join(uri, f"probe-{uuid.uuid4().hex}")
    try:
        storage.write_atomic(probe, probe.encode())
        if storage.read_bytes(probe) != probe.encode():
            raise StorageFailed(f"{storage.redact(probe)} was written and reads back as something else", kind="other")
        storage.remove(probe)
        if storage.exists(probe):
            raise StorageFailed(f"{storage.redact(probe)} was removed and is still there", kind="other")
    finally:
        for folder in new:
            if folder.is_dir() and not os.listdir(folder):
                folder.rmdir()
    return f"{storage.redact(uri)} can be written, read and deleted"


def _absent(folder: Path) -> list[Path]:
    """*folder* and those above it that are not there, the deepest first."""
    return [one for one in (folder, *folder.parents) if not one.exists()]


def _state_of_run(config: RunConfig, sets: dict[str, Manifest]) -> str:
    assert config.name is not None
    folder = storage.join(config.runs, config.name)
    check_name(folder)
    if not was_begun(folder, config, sets):
        return f"{config.name} is new"
    if (theirs := holder_of(folder)) is not None:
        raise FolderInUse(f"another job trains {config.name}: {theirs}")
    if storage.exists(storage.join(folder, "finished.json")):
        return f"{config.name} is finished, nothing would be done"
    return f"{config.name} was started before and would be continued"


def _tracking(config: RunConfig) -> str:
    uri = resolve_tracking_uri(config.tracking.uri, config.runs)
    text = check_tracking(uri)
    if uri is not None and uri.startswith("sqlite:///"):
        _writable(str(Path(uri.removeprefix("sqlite:///")).parent))
    return text


def _resources(config: RunConfig) -> str:
    asked, there = resources(config), available()
    of = "the cluster" if joined() else "this machine"
    if missing := shortage(asked, there):
        wait = f"; a run would wait {config.workers.start_timeout_s:g} s for it to grow" if joined() else ""
        raise ClusterTooSmall(f"asked for {shown(asked)}, {of} has {shown(there)}: {missing}{wait}")
    return f"asked for {shown(asked)}, {of} has {shown(there)}"
