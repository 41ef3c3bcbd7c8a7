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
        return _Preparation(config, lease).run()


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
    looked, mean, reasons, counts = _look(collection, CHECKED, config)
    lines.append(f"{looked} were read: {looked - reasons.total()} can be used")
    lines += [f"{count} {reason}" for reason, count in reasons.most_common()]
    lines.append(check_room(out, mean * len(plan) - sum(file_sizes(out).values()), "crops", "--out"))
    return [*lines, *mask_warnings(join_counts([counts]), config.mask_from, config.mask_hole)]


def _look(collection: Collection, most: int, config: PrepareConfig) -> tuple[int, float, Counter[str], dict[str, int]]:
    """Read up to *most* photographs, evenly over the collection: how many were read, bytes that one takes in the set on
    average, how many are unusable by reason, and what was found about masks."""
    keys = collection.keys[:: max(1, math.ceil(len(collection.keys) / most))]
    reasons, size = Counter[str](), 0
    reader = MaskReader(collection.masks, max_pixels=config.max_pixels)
    for key in keys:
        try:
            rows = make_records(key, collection.source.read(key), config, masks=reader)
        except UNUSABLE as error:
            reasons[drop_of(key, error, 0)["reason"]] += 1
        else:
            size += sum(len(row["image"]) for row in rows)
    return len(keys), size / max(1, len(keys)), reasons, reader.counts


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


def _settings(out: str, config: PrepareConfig) -> dict[str, Any]:
    """Arguments of `compare_settings` and `settle`."""
    return {
        "uri": join(out, "settings.json"),
        "settings": {"schema_version": SCHEMA_VERSION, **config.settings()},
        "what": f"the set in {redact(out)}",
        "remedy": "choose another out or remove it",
    }


class _Preparation:
    """A job that holds the lease of its set, and the receipts of the shards that are finished, by number."""

    def __init__(self, config: PrepareConfig, lease: Lease) -> None:
        self.config, self.lease, self.out = config, lease, lease.folder
        self.other = None if config.against is None else read_other_facts(config.against)
        collection = open_collection(config.source, config, config, label_column=config.label_column, cache=self.out)
        self.source = collection.source
        settle(**_settings(self.out, config), write=partial(lease.write, "settings.json"))
        self._check_count(collection.keys)
        if not is_remote(self.out):
            _, mean, _, _ = _look(collection, SAMPLED, config)
            there = sum(file_sizes(self.out).values())
            check_room(self.out, mean * len(collection.keys) - there, "crops", "--out")
        self.plan = self._settle_plan(collection.keys)
        self.inputs = self.plan.inputs(self.source, config, collection.masks)
        self.maker = ShardMaker(collection.masks, lease, config, self.inputs)
        self.receipts: dict[int, dict[str, Any]] = {}

    def run(self) -> Manifest:
        """The manifest, of a set made now or found finished."""
        there = file_sizes(self.out)
        self.receipts = read_receipts(self.out, self.inputs, there)
        if self.receipts:
            logger.info("%d of %d shards are already there and are kept", len(self.receipts), len(self.inputs))
        todo = [index for index in self.inputs if index not in self.receipts]
        unplanned = unplanned_files(there, self.inputs)
        if not (todo or unplanned) and self.other is None and self._is_finished(there):
            self._check_drops(self.receipts)
        else:
            for file in [MANIFEST_NAME, *unplanned] if todo or unplanned else []:
                self.lease.remove(file)
            self._make(todo)
            self._finish()
        manifest = self._manifest()
        _tell(manifest, self.receipts, self.config)
        return manifest

    def _check_count(self, keys: Sequence[str]) -> None:
        """Compare with the partition that was named, write what was found, and stop if it is something else."""
        if self.config.expect is None:
            return
        report = compare(self.config.expect, self.source, keys)
        values = {**dataclasses.asdict(report), "agrees": report.agrees}
        self.lease.write("source_report.json", (json.dumps(values, indent=2) + "\n").encode())
        if report.agrees:
            logger.info("%s", report.message())
        elif self.config.allow_count_difference:
            logger.warning("%s; going on all the same", report.message())
        else:
            raise WrongCount(
                f"{redact(self.config.source)}: {report.message()}; the whole report is "
                f"{redact(self.out)}/source_report.json, allow_count_difference continues with what is there",
                report=values,
            )

    def _settle_plan(self, keys: Sequence[str]) -> ShardPlan:
        """The plan that is there, or a new one for the images of the source as they are now."""
        old = read_plan(self.out)
        plan = extend_plan(old, keys, self.config)
        if plan is not old:
            if old is not None:
                logger.info("the set had %d images, the source has %d: planning again", len(old), len(plan))
            self.lease.remove(MANIFEST_NAME)
            self.lease.write(PLAN_NAME, plan.encode())
        return plan

    def _manifest(self) -> Manifest:
        return make_manifest(list(self.receipts.values()), len(self.plan), self.config)

    def _is_finished(self, there: Mapping[str, int]) -> bool:
        """Whether these files are a finished set: the manifest is written last, and removed before anything changes."""
        own = {LISTING_NAME} if self.config.split == "val" else set()
        if not {MANIFEST_NAME, "quarantine.jsonl", "report.json", "report.html", *own} <= there.keys():
            return False
        return read_bytes(join(self.out, MANIFEST_NAME)) == self._manifest().to_json().encode()

    def _make(self, todo: Sequence[int]) -> None:
        done = sum(receipt["images"] for receipt in self.receipts.values())
        with Progress(len(self.plan), done=done, exported_as=(redact(self.out), "prepare")) as progress:
            progress.reasons.update(count_drops(self.receipts.values()))
            for receipt in make_shards(self.source, self.plan, todo, self.maker):
                self.receipts[receipt["index"]] = receipt
                progress.add(receipt["images"], reasons=count_drops([receipt]))
                if progress.reasons.total() > self.config.max_bad_fraction * len(self.plan):
                    self._check_drops(self.receipts)
        self.receipts = {index: self.receipts[index] for index in self.inputs}

    def _finish(self) -> None:
        """Leave copies out, and write all that is said about the whole set; the manifest last."""
        facts = read_facts(self.out, list(self.inputs))
        copies = find_copies(facts, self.other, self.config)
        planned = {
            index: with_copies(self.receipts[index], dropped)
            for index, dropped in zip(self.inputs, copies.dropped, strict=True)
        }
        self._check_drops(planned)
        self._leave_out_copies(planned)
        self._report(self.receipts, facts, copies.kept)
        manifest = self._manifest()
        if manifest.records == 0:
            raise MissingInput(
                f"none of the {len(self.plan)} images in {redact(self.config.source)} can be used: "
                f"{by_reason(manifest.drops)}; each one's reason is in {redact(self.out)}/quarantine.jsonl"
            )
        if self.config.split == "val":
            self.lease.write(LISTING_NAME, listing(self.out, manifest))
        self.lease.write(MANIFEST_NAME, manifest.to_json().encode())

    def _leave_out_copies(self, planned: dict[int, dict[str, Any]]) -> None:
        """Write anew the shards that do not hold what is *planned*."""
        changed = [index for index, receipt in planned.items() if receipt["drops"] != self.receipts[index]["drops"]]
        if not changed:
            return
        self.lease.remove(MANIFEST_NAME)

        def left_out(receipt: dict[str, Any]) -> set[str]:
            return {drop["key"] for drop in receipt["drops"]}

        # An earlier run may have left out what now, with other images in the source, is the first of its kind.
        lacking = [index for index in changed if not left_out(self.receipts[index]) <= left_out(planned[index])]
        for receipt in make_shards(self.source, self.plan, lacking, self.maker):
            self.receipts[receipt["index"]] = receipt
        copied = [
            {**self.receipts[index], "drops": planned[index]["drops"]}
            for index in changed
            if planned[index]["drops"] != self.receipts[index]["drops"]
        ]
        logger.info("leaving copies out of %d of %d shards", len(copied), len(planned))
        for receipt in leave_out_copies(copied, self.maker):
            self.receipts[receipt["index"]] = receipt

    def _report(self, receipts: Mapping[int, dict[str, Any]], facts: Facts, kept: Sequence[dict[str, Any]]) -> str:
        """Write quarantine and report, in the order of the shards; the place of the page."""
        ordered = [receipt for _, receipt in sorted(receipts.items())]
        lines = [json.dumps(drop) + "\n" for receipt in ordered for drop in receipt["drops"]]
        self.lease.write("quarantine.jsonl", "".join(lines).encode())
        self.lease.check()
        return write_report(
            self.out,
            ordered,
            facts,
            kept,
            listed=len(self.plan),
            source=self.source,
            config=self.config,
            other=self.other,
        )

    def _check_drops(self, receipts: Mapping[int, dict[str, Any]]) -> None:
        """Write quarantine and report and stop the job if too many images are left out by these *receipts*."""
        drops = count_drops(receipts.values())
        bad, listed = sum(drops.values()), len(self.plan)
        if bad > self.config.max_bad_fraction * listed:
            report = self._report(receipts, read_facts(self.out, sorted(receipts)), [])
            raise TooManyBadImages(
                f"{bad} of {listed} images cannot be used, more than max_bad_fraction="
                f"{self.config.max_bad_fraction:g} allows: {by_reason(drops)}; each one's reason is in "
                f"{redact(self.out)}/quarantine.jsonl, pictures are in {redact(report)}",
                reasons=drops,
            )


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
