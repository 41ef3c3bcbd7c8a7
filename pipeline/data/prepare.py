"""A collection of photographs to a prepared set: shards by Ray Data, nothing done twice.

A shard is finished when its receipt is there, the set when its manifest is. Its bytes depend on settings and images
alone: not on the number of workers, on the order in which shards finish, or on how often the job was stopped. Copies
are found when all shards are there, and those shards that hold some are written anew without them.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from pipeline.data.collection import UNUSABLE, Collection, drop_of, open_collection
from pipeline.data.contract_report import write_report
from pipeline.data.duplicates import Facts, find_copies, read_facts, read_other_facts
from pipeline.data.evaluation_set import LISTING_NAME, listing
from pipeline.data.plan import PLAN_NAME, ShardPlan, extend_plan, read_plan
from pipeline.data.prepare_config import PrepareConfig as PrepareConfig
from pipeline.data.receipts import (
    count_drops,
    make_manifest,
    read_receipts,
    unplanned_files,
    with_copies,
)
from pipeline.data.records import make_records
from pipeline.data.schema import MANIFEST_NAME, SCHEMA_VERSION, Manifest, read_manifest, set_folder
from pipeline.data.shards import ShardMaker, leave_out_copies, make_shards
from pipeline.data.sources.base import Source
from pipeline.data.sources.partitions import compare
from pipeline.data.user_masks import MaskReader, join_counts, mask_warnings
from pipeline.errors import FolderInUse, MissingInput, TooManyBadImages, WrongCount
from pipeline.runs.lease import Lease, holder_of, lease_folder
from pipeline.runs.progress import Progress, by_reason
from pipeline.runs.settings import compare_settings, settle
from pipeline.storage import absolute, check_room, file_sizes, is_remote, join, read_bytes, redact

logger = logging.getLogger(__name__)

CHECKED = 256
"""Photographs that are read before a job."""
SAMPLED = 8
"""Photographs whose crops tell how much room the set takes."""


def prepare(config: PrepareConfig) -> Manifest:
    """Make, or complete, the prepared set `config.out` and return its manifest.

    A bad image is left out with its reason (`quarantine.jsonl`, `report.html`). Raises `MissingInput` if there is no
    image or no usable one, `CorruptSource` if it cannot be listed, `WrongCount` if it is not the partition `expect`,
    `TooManyBadImages` beyond `max_bad_fraction`, `SharedImages` as `shared_images` says, `VanishedImages` as `vanished`
    says, `ConfigMismatch` if the folder holds a set made with other settings, `FolderInUse` if another job writes
    to it.
    """
    _check_places(config)
    with lease_folder(absolute(config.out), expiry_s=config.lease_expiry_s) as lease:
        return _prepare(config, lease)


def check(config: PrepareConfig) -> list[str]:
    """What a preparation with this configuration would find, in lines; nothing is written and Ray is not started.

    Photographs and their masks are read, up to `CHECKED` of them evenly over the collection. Raises as `prepare`.
    """
    _check_places(config)
    out = absolute(config.out)
    if config.against is not None:
        read_manifest(config.against)
    if (theirs := holder_of(out)) is not None:
        raise FolderInUse(f"another job writes to {redact(out)}: {theirs}")
    collection = open_collection(config.source, config, config, label_column=config.label_column)
    compare_settings(**_settings(out, config))
    there = read_plan(out)
    plan = extend_plan(there, collection.keys, config)
    lines = [f"{len(plan)} images in {len(plan.shards())} shards, {len(there) if there else 0} of them planned before"]
    if beside := collection.source.beside():
        lines.append(f"{len(beside)} files beside them are no images, e.g. {next(iter(beside))!r}")
    step = max(1, math.ceil(len(collection.keys) / CHECKED))
    looked = collection.keys[::step]
    mean, reasons, counts = _look(collection, looked, config)
    lines.append(f"{len(looked)} were read: {len(looked) - reasons.total()} can be used")
    lines += [f"{count} {reason}" for reason, count in reasons.most_common()]
    lines.append(_room(out, mean * len(plan), file_sizes(out)))
    return [*lines, *mask_warnings(join_counts([counts]), config.mask_from, config.mask_hole)]


def _look(
    collection: Collection, keys: Sequence[str], config: PrepareConfig
) -> tuple[float, Counter[str], dict[str, int]]:
    """Bytes that one of these photographs takes in the set, on average; how many are unusable, by reason; and what was
    found about masks."""
    reasons, size = Counter[str](), 0
    reader = MaskReader(collection.masks, max_pixels=config.max_pixels)
    for key in keys:
        try:
            rows = make_records(key, collection.source.read(key), config, masks=reader)
        except UNUSABLE as error:
            reasons[drop_of(key, error, 0)["reason"]] += 1
        else:
            size += sum(len(row["image"]) for row in rows)
    return size / max(1, len(keys)), reasons, reader.counts


def _room(out: str, size: float, there: Mapping[str, int]) -> str:
    """How a set with crops of *size* bytes fits into what is free beside what is *there* of it, in words; masks and
    coordinates are a few percent more. Raises `StorageFailed` if it does not."""
    return check_room(out, size - sum(there.values()), "crops", "--out")


def _check_places(config: PrepareConfig) -> None:
    if config.against is not None and set_folder(absolute(config.against)) == absolute(config.out):
        raise ValueError(f"against must be another prepared set than out, got {redact(config.against)} for both")
    out = absolute(config.out)
    for name, place in (("source", config.source), ("masks", config.masks)):
        if place is not None and (out == absolute(place) or out.startswith(absolute(place) + "/")):
            raise ValueError(
                f"out ({redact(out)}) is or lies in {name} ({redact(place)}): the set's files would be taken for what "
                "belongs there; choose another out"
            )


def _prepare(config: PrepareConfig, lease: Lease) -> Manifest:
    out = lease.folder
    other = None if config.against is None else read_other_facts(config.against)
    collection = open_collection(config.source, config, config, label_column=config.label_column, cache=out)
    source, keys, masks = collection.source, collection.keys, collection.masks
    _settle_settings(lease, config)
    _check_count(keys, source, lease, config)
    if not is_remote(out):
        mean, _, _ = _look(collection, keys[:: max(1, math.ceil(len(keys) / SAMPLED))], config)
        _room(out, mean * len(keys), file_sizes(out))
    plan = _settle_plan(lease, keys, config)
    del keys, collection
    inputs = plan.inputs(source, config, masks)
    maker = ShardMaker(masks, lease, config, inputs)
    there = file_sizes(out)
    receipts = read_receipts(out, inputs, there)
    if receipts:
        logger.info("%d of %d shards are already there and are kept", len(receipts), len(inputs))
    todo = [index for index in inputs if index not in receipts]
    unplanned = unplanned_files(there, inputs)
    if todo or unplanned:
        lease.remove(MANIFEST_NAME)
        for file in unplanned:
            lease.remove(file)
    elif config.against is None and (manifest := _as_it_was(there, receipts, plan, config)) is not None:
        _check_drops(receipts, len(plan), source, lease, config)
        _tell(manifest, receipts, config)
        return manifest
    done = sum(receipt["images"] for receipt in receipts.values())
    with Progress(len(plan), done=done, exported_as=(redact(out), "prepare")) as progress:
        progress.reasons.update(count_drops(list(receipts.values())))
        for receipt in make_shards(source, plan, todo, maker):
            receipts[receipt["index"]] = receipt
            progress.add(receipt["images"], reasons=count_drops([receipt]))
            if progress.reasons.total() > config.max_bad_fraction * len(plan):
                _check_drops(receipts, len(plan), source, lease, config)
    facts = read_facts(out, list(inputs))
    copies = find_copies(facts, other, config)
    planned = {
        index: with_copies(receipts[index], dropped) for index, dropped in zip(inputs, copies.dropped, strict=True)
    }
    _check_drops(planned, len(plan), source, lease, config, other)
    receipts = _without_copies({index: receipts[index] for index in inputs}, planned, source, plan, maker)
    lease.write("quarantine.jsonl", _quarantine(receipts))
    ordered = list(receipts.values())
    lease.check()
    write_report(out, ordered, facts, copies.kept, listed=len(plan), source=source, config=config, other=other)
    manifest = make_manifest(ordered, len(plan), config)
    if manifest.records == 0:
        raise MissingInput(
            f"none of the {len(plan)} images in {redact(config.source)} can be used: {by_reason(manifest.drops)}; "
            f"each one's reason is in {redact(out)}/quarantine.jsonl"
        )
    if config.split == "val":
        lease.write(LISTING_NAME, listing(lease.folder, manifest))
    lease.write(MANIFEST_NAME, manifest.to_json().encode())
    _tell(manifest, receipts, config)
    return manifest


def _as_it_was(
    there: Mapping[str, int], receipts: Mapping[int, dict[str, Any]], plan: ShardPlan, config: PrepareConfig
) -> Manifest | None:
    """The manifest, if these files are a finished set: it is written last, and removed before anything is changed."""
    own = {LISTING_NAME} if config.split == "val" else set()
    if not {MANIFEST_NAME, "quarantine.jsonl", "report.json", "report.html", *own} <= there.keys():
        return None
    manifest = make_manifest(list(receipts.values()), len(plan), config)
    kept = read_bytes(join(absolute(config.out), MANIFEST_NAME))
    return manifest if kept == manifest.to_json().encode() else None


def _tell(manifest: Manifest, receipts: Mapping[int, dict[str, Any]], config: PrepareConfig) -> None:
    """Say what the set holds, and what is odd about its masks."""
    if config.mask_from != "family":
        counts = join_counts([receipt["masks"] for receipt in receipts.values()])
        for warning in mask_warnings(counts, config.mask_from, config.mask_hole):
            logger.warning("%s", warning)
    out = redact(absolute(config.out))
    logger.info(
        "prepared set %s: %d records of %d images in %d shards, %d left out%s; digest %s",
        out,
        manifest.records,
        manifest.images_used,
        len(manifest.shards),
        sum(manifest.drops.values()),
        f" ({by_reason(manifest.drops)})" if manifest.drops else "",
        manifest.digest,
    )
    logger.info("what was found and left out, with pictures: %s/report.html", out)


def _settle_settings(lease: Lease, config: PrepareConfig) -> None:
    """Write `settings.json`, or compare with the one that is there."""
    settle(**_settings(lease.folder, config), write=partial(lease.write, "settings.json"))


def _settings(out: str, config: PrepareConfig) -> dict[str, Any]:
    """Arguments of `compare_settings` and `settle`."""
    return {
        "uri": join(out, "settings.json"),
        "settings": {"schema_version": SCHEMA_VERSION, **config.settings()},
        "what": f"the set in {redact(out)}",
        "remedy": "choose another out or remove it",
    }


def _settle_plan(lease: Lease, keys: Sequence[str], config: PrepareConfig) -> ShardPlan:
    """The plan that is there, or a new one for the images of the source as they are now."""
    old = read_plan(lease.folder)
    plan = extend_plan(old, keys, config)
    if plan is not old:
        if old is not None:
            logger.info("the set had %d images, the source has %d: planning again", len(old), len(plan))
        lease.remove(MANIFEST_NAME)
        lease.write(PLAN_NAME, plan.encode())
    return plan


def _check_count(keys: Sequence[str], source: Source, lease: Lease, config: PrepareConfig) -> None:
    """Compare with the partition that was named, write what was found, and stop if it is something else."""
    if config.expect is None:
        return
    report = compare(config.expect, source, keys)
    values = {**dataclasses.asdict(report), "agrees": report.agrees}
    lease.write("source_report.json", (json.dumps(values, indent=2) + "\n").encode())
    if report.agrees:
        logger.info("%s", report.message())
    elif config.allow_count_difference:
        logger.warning("%s; going on all the same", report.message())
    else:
        raise WrongCount(
            f"{redact(config.source)}: {report.message()}; the whole report is "
            f"{redact(lease.folder)}/source_report.json, allow_count_difference continues with what is there",
            report=values,
        )


def _without_copies(
    receipts: dict[int, dict[str, Any]],
    planned: dict[int, dict[str, Any]],
    source: Source,
    plan: ShardPlan,
    maker: ShardMaker,
) -> dict[int, dict[str, Any]]:
    """Write anew the shards that do not hold what is *planned*; the receipts of all shards, in order."""
    changed = [index for index, receipt in planned.items() if receipt["drops"] != receipts[index]["drops"]]
    if not changed:
        return receipts
    maker.lease.remove(MANIFEST_NAME)

    def left_out(receipt: dict[str, Any]) -> set[str]:
        return {drop["key"] for drop in receipt["drops"]}

    # An earlier run may have left out what now, with other images in the source, is the first of its kind.
    lacking = [index for index in changed if not left_out(receipts[index]) <= left_out(planned[index])]
    receipts = {**receipts, **{receipt["index"]: receipt for receipt in make_shards(source, plan, lacking, maker)}}
    copied = [
        {**receipts[index], "drops": planned[index]["drops"]}
        for index in changed
        if planned[index]["drops"] != receipts[index]["drops"]
    ]
    logger.info("leaving copies out of %d of %d shards", len(copied), len(planned))
    return {**receipts, **{receipt["index"]: receipt for receipt in leave_out_copies(copied, maker)}}


def _quarantine(receipts: Mapping[int, dict[str, Any]]) -> bytes:
    """The content of quarantine.jsonl, in the order of the shards."""
    lines = [json.dumps(drop) for _, receipt in sorted(receipts.items()) for drop in receipt["drops"]]
    return "".join(line + "\n" for line in lines).encode()


def _check_drops(
    receipts: Mapping[int, dict[str, Any]],
    listed: int,
    source: Source,
    lease: Lease,
    config: PrepareConfig,
    other: Facts | None = None,
) -> None:
    """Write quarantine and report and stop the job as soon as too many images are left out."""
    out = lease.folder
    drops = count_drops(list(receipts.values()))
    bad = sum(drops.values())
    if bad > config.max_bad_fraction * listed:
        lease.write("quarantine.jsonl", _quarantine(receipts))
        ordered = [receipt for _, receipt in sorted(receipts.items())]
        facts = read_facts(out, [receipt["index"] for receipt in ordered])
        report = write_report(out, ordered, facts, [], listed=listed, source=source, config=config, other=other)
        raise TooManyBadImages(
            f"{bad} of {listed} images cannot be used, more than max_bad_fraction={config.max_bad_fraction:g} allows: "
            f"{by_reason(drops)}; each one's reason is in {redact(out)}/quarantine.jsonl, pictures are in "
            f"{redact(report)}",
            reasons=drops,
        )
