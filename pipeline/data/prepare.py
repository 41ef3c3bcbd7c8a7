"""A collection of photographs to a prepared set, by Ray Data: one task a shard, nothing done twice.

A shard is finished when its receipt is there, the set when its manifest is. Its bytes depend on settings and images
alone: not on the number of workers, on the order in which shards finish, or on how often the job was stopped. Copies
are found when all shards are there, and those shards that hold some are written anew without them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic.dataclasses import dataclass

from pipeline.cluster import start_ray
from pipeline.data.collection import UNUSABLE, CollectionConfig, drop_of, open_collection
from pipeline.data.contract import ContractConfig, examine, summarise_holes
from pipeline.data.contract_report import write_report
from pipeline.data.copies import (
    SET_WIDE,
    Facts,
    encode_facts,
    facts_file,
    find_copies,
    read_facts,
    read_other_facts,
)
from pipeline.data.own_masks import MaskReader, OwnMasks, join_counts, mask_warnings
from pipeline.data.pool_pixels import check_group_bytes, with_patches
from pipeline.data.records import RecordConfig, make_records, open_as
from pipeline.data.schema import (
    MANIFEST_NAME,
    PATCHES_FIELD,
    RECORD_SCHEMA,
    SCHEMA_VERSION,
    Manifest,
    Shard,
    open_shard,
    set_folder,
)
from pipeline.data.sources.base import Source
from pipeline.data.sources.partitions import PartitionName, compare
from pipeline.data.tasks import iterate, run_tasks
from pipeline.errors import ConfigMismatch, MissingInput, TooManyBadImages, WrongCount
from pipeline.storage import absolute, exists, join, list_files, read_bytes, redact, remove, size, write_atomic
from tmad.config import STRICT

logger = logging.getLogger(__name__)

PROGRESS_S = 5.0
"""Seconds between two progress lines."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PrepareConfig(RecordConfig, ContractConfig, CollectionConfig):
    """Preparation of a data set: where from, where to, how it is cut into shards."""

    source: str
    """Path or fsspec URI: folder with images at any depth, tar file (ARCHIVE.tar/FOLDER: a folder in it) or folder of
    tar files, Parquet file or folder of those, or text list of keys."""
    out: str
    """Folder of the prepared set: a path or any fsspec URI."""
    label_column: str | None = None
    """Column of a Parquet source with whole numbers that are kept as labels; none = no labels."""
    pool_pixels: bool = False
    """Keep the pixels of the memory's windows beside their coordinates, for readers outside this project: about 300 kB
    more a hole, none of which training reads."""
    expect: PartitionName | None = None
    """Official partition that the source should be: its number of images and, for a list, the presence of each are
    checked and reported in source_report.json."""
    allow_count_difference: bool = False
    """Go on, with a warning, where the source is not what expect says."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pool_pixels:
            check_group_bytes(
                rows=self.row_group_rows,
                variants=self.masks_per_image,
                pool_size=self.memory.pool_size,
                patch_size=self.patch_size,
            )

    def settings(self) -> dict[str, Any]:
        """What decides the content of the set, for the manifest and for comparison with an earlier run."""
        values = dataclasses.asdict(self)
        for name in ("out", "max_bad_fraction", "expect", "allow_count_difference"):
            del values[name]
        for name in ("source", "root", "masks"):
            values[name] = redact(absolute(values[name])) if values[name] else None
        values["against"] = redact(set_folder(absolute(self.against))) if self.against else None
        # Settings that not every set has stand only where they are given: the other sets keep their identity.
        for name in ("root", "image_column", "key_column", "label_column", "masks", "mask_column", "against"):
            if values[name] is None:
                del values[name]
        for name in ("mask_from", "mask_hole") if self.mask_from == "family" else ("mask",):
            del values[name]
        if not self.pool_pixels:
            del values["pool_pixels"]
        return json.loads(json.dumps(values))


def prepare(config: PrepareConfig) -> Manifest:
    """Make, or complete, the prepared set `config.out` and return its manifest.

    A bad image is left out with its reason (`quarantine.jsonl`, `report.html`). Raises `MissingInput` if there is no
    image or no usable one, `CorruptSource` if it cannot be listed, `WrongCount` if it is not the partition `expect`,
    `TooManyBadImages` beyond `max_bad_fraction`, `SharedImages` as `shared_images` says, `ConfigMismatch` if the folder
    holds a set made with other settings.
    """
    out = absolute(config.out)
    if config.against is not None and set_folder(absolute(config.against)) == out:
        raise ValueError(f"against must be another prepared set than out, got {redact(config.against)} for both")
    other = None if config.against is None else read_other_facts(config.against)
    collection = open_collection(config.source, config, config, label_column=config.label_column, cache=out)
    source, keys, masks = collection.source, collection.keys, collection.masks
    _claim_folder(out, config)
    _check_count(keys, source, out, config)
    tasks = _shard_tasks(keys, source, config, masks)
    receipts = _finished(out, tasks)
    todo = [task for task in tasks if task["index"] not in receipts]
    if receipts:
        logger.info("%d of %d shards are already there and are kept", len(receipts), len(tasks))
    if todo:
        remove(join(out, MANIFEST_NAME))
    progress = _Progress(len(keys), done=sum(receipt["images"] for receipt in receipts.values()))
    make_shard = partial(_make_shard, source=source, out=out, config=config, masks=masks)
    for receipt in _run(todo, make_shard):
        receipts[receipt["index"]] = receipt
        progress.add(receipt)
        _check_drops(receipts, len(keys), source, config)
    facts = read_facts(out, range(len(tasks)))
    copies = find_copies(facts, other, config)
    planned = {index: _with_copies(receipts[index], copies.dropped[index]) for index in range(len(tasks))}
    _check_drops(planned, len(keys), source, config, other)
    receipts = _without_copies(receipts, planned, tasks, make_shard, config)
    ordered = [receipts[task["index"]] for task in tasks]
    if config.mask_from != "family":
        counts = join_counts([receipt["masks"] for receipt in ordered])
        for warning in mask_warnings(counts, config.mask_from, config.mask_hole):
            logger.warning("%s", warning)
    report = write_report(out, ordered, facts, copies.kept, listed=len(keys), source=source, config=config, other=other)
    manifest = _manifest(ordered, len(keys), config)
    if manifest.records == 0:
        raise MissingInput(
            f"none of the {len(keys)} images in {redact(config.source)} can be used: {_by_reason(manifest.drops)}; "
            f"each one's reason is in {redact(out)}/quarantine.jsonl"
        )
    write_atomic(join(out, MANIFEST_NAME), manifest.to_json().encode())
    logger.info(
        "prepared set %s: %d records of %d images in %d shards, %d left out%s; digest %s",
        redact(out),
        manifest.records,
        manifest.images_used,
        len(manifest.shards),
        sum(manifest.drops.values()),
        f" ({_by_reason(manifest.drops)})" if manifest.drops else "",
        manifest.digest,
    )
    logger.info("what was found and left out, with pictures: %s", redact(report))
    return manifest


def _claim_folder(out: str, config: PrepareConfig) -> None:
    """Write `settings.json`, or compare with the one that is there."""
    uri = join(out, "settings.json")
    mine = {"schema_version": SCHEMA_VERSION, **config.settings()}
    if not exists(uri):
        write_atomic(uri, (json.dumps(mine, indent=2, sort_keys=True) + "\n").encode())
        return
    theirs = json.loads(read_bytes(uri))
    names = sorted(name for name in {*mine, *theirs} if mine.get(name) != theirs.get(name))
    if names:
        shown = "; ".join(f"{name} was {theirs.get(name)!r}, now {mine.get(name)!r}" for name in names)
        raise ConfigMismatch(
            f"{redact(out)} holds a set prepared with other settings ({shown}); choose another out or remove it",
            differences={name: (theirs.get(name), mine.get(name)) for name in names},
        )


def _check_count(keys: Sequence[str], source: Source, out: str, config: PrepareConfig) -> None:
    """Compare with the partition that was named, write what was found, and stop if it is something else."""
    if config.expect is None:
        return
    report = compare(config.expect, source, keys)
    values = {**dataclasses.asdict(report), "agrees": report.agrees}
    write_atomic(join(out, "source_report.json"), (json.dumps(values, indent=2) + "\n").encode())
    if report.agrees:
        logger.info("%s", report.message())
    elif config.allow_count_difference:
        logger.warning("%s; going on all the same", report.message())
    else:
        raise WrongCount(
            f"{redact(config.source)}: {report.message()}; the whole report is {redact(out)}/source_report.json, "
            "allow_count_difference goes on with what is there",
            report=values,
        )


def _shard_tasks(
    keys: Sequence[str], source: Source, config: PrepareConfig, masks: OwnMasks | None = None
) -> list[dict[str, Any]]:
    """Consecutive slices of the keys; `inputs` identifies what a shard is made of."""
    settings = json.dumps([SCHEMA_VERSION, config.settings()], sort_keys=True)
    tasks = []
    for index, start in enumerate(range(0, len(keys), config.images_per_shard)):
        part = list(keys[start : start + config.images_per_shard])
        labels = [source.label(key) for key in part]
        made_of = [settings, part] if set(labels) == {None} else [settings, part, labels]
        if masks is not None:
            made_of = [*made_of, masks.made_of(part)]
        inputs = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:16]
        tasks.append({"index": index, "keys": part, "inputs": inputs})
    return tasks


def _finished(out: str, tasks: Sequence[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """Receipts, by shard number, of the shards that are there and made of the same inputs."""
    there = set(list_files(out))

    def receipt_of(task: dict[str, Any]) -> dict[str, Any] | None:
        if not {_file(task["index"], "json"), facts_file(task["index"])} <= there:
            return None
        receipt = json.loads(read_bytes(join(out, _file(task["index"], "json"))))
        whole = receipt["rows"] == 0 or size(join(out, receipt["file"])) == receipt["size"]
        return receipt if whole and receipt["inputs"] == task["inputs"] else None

    with ThreadPoolExecutor(16) as pool:
        return {receipt["index"]: receipt for receipt in pool.map(receipt_of, tasks) if receipt}


def _run(todo: Sequence[dict[str, Any]], function: Callable[[dict[str, Any]], pa.Table]) -> Iterator[dict[str, Any]]:
    """Receipts of the shards that *function* writes, as Ray Data's tasks finish them."""
    if not todo:
        return
    start_ray()
    dataset = run_tasks(todo, function, num_cpus=1)
    for rows in iterate(dataset, batch_size=None, batch_format="numpy", prefetch_batches=0):
        for text in rows["receipt"]:
            yield json.loads(text)


def _make_shard(
    task: dict[str, Any], *, source: Source, out: str, config: PrepareConfig, masks: OwnMasks | None = None
) -> pa.Table:
    """Write one shard, then its receipt; running it twice writes the same bytes twice."""
    rows: list[dict[str, Any]] = []
    facts: list[dict[str, Any]] = []
    drops: list[dict[str, Any]] = []
    reader = MaskReader(masks, max_pixels=config.max_pixels)
    for key in task["keys"]:
        data = b""
        try:
            data = source.read(key)
            photograph = open_as(data, config)
            fact = examine(key, photograph, config)
            rows += make_records(key, data, config, label=source.label(key), photograph=photograph, masks=reader)
            facts.append(fact)
        except UNUSABLE as error:
            drops.append(drop_of(key, error, len(data)))
    write_atomic(join(out, facts_file(task["index"])), encode_facts(facts))
    receipt = {"index": task["index"], "inputs": task["inputs"], "images": len(task["keys"]), "drops": drops}
    if config.mask_from != "family":
        receipt["masks"] = dict(reader.counts)
    return _write_shard(pa.Table.from_pylist(rows, schema=RECORD_SCHEMA), receipt, out, config)


def _filter_shard(receipt: dict[str, Any], *, out: str, config: PrepareConfig) -> pa.Table:
    """Write a shard anew without the copies among its receipt's drops; again, running it twice is running it once."""
    names = RECORD_SCHEMA.names
    table = open_shard(out, receipt["file"]).read(columns=names) if receipt["rows"] else RECORD_SCHEMA.empty_table()
    left_out = pa.array([drop["key"] for drop in receipt["drops"]], pa.string())
    copied = pc.is_in(pc.struct_field(table["source"], "key"), value_set=left_out)
    kept = table.filter(pc.invert(copied)).combine_chunks().cast(RECORD_SCHEMA)
    return _write_shard(kept, receipt, out, config)


def _write_shard(table: pa.Table, receipt: dict[str, Any], out: str, config: PrepareConfig) -> pa.Table:
    """Write the shard, then its receipt, which is also returned; *table* is without the windows' pixels."""
    sink = pa.BufferOutputStream()
    rows = config.row_group_rows
    groups = with_patches(table, rows=rows, patch_size=config.patch_size) if config.pool_pixels else iter([table])
    schema = RECORD_SCHEMA.append(PATCHES_FIELD) if config.pool_pixels else RECORD_SCHEMA
    with pq.ParquetWriter(sink, schema, compression="zstd", use_dictionary=False) as writer:
        for group in groups:
            writer.write_table(group, row_group_size=rows)
    data = sink.getvalue().to_pybytes()
    file = _file(receipt["index"], "parquet")
    if len(table):
        write_atomic(join(out, file), data)
    else:
        remove(join(out, file))
    keys = pc.struct_field(table["source"], "key").to_pylist()
    receipt = {
        **receipt,
        "file": file,
        "rows": len(table),
        "size": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "first_key": keys[0] if keys else "",
        "last_key": keys[-1] if keys else "",
        "holes": summarise_holes(pc.list_flatten(table["hole_fraction"]).to_numpy()),
    }
    text = json.dumps(receipt, sort_keys=True)
    write_atomic(join(out, _file(receipt["index"], "json")), text.encode())
    return pa.table({"receipt": [text]})


def _with_copies(receipt: dict[str, Any], copies: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The receipt with these copies among its drops, in place of those that it has."""
    return {**receipt, "drops": [drop for drop in receipt["drops"] if drop["reason"] not in SET_WIDE] + list(copies)}


def _without_copies(
    receipts: dict[int, dict[str, Any]],
    planned: dict[int, dict[str, Any]],
    tasks: Sequence[dict[str, Any]],
    make_shard: Callable[[dict[str, Any]], pa.Table],
    config: PrepareConfig,
) -> dict[int, dict[str, Any]]:
    """Write anew the shards that do not hold what is *planned*; the receipts of all shards."""
    out = absolute(config.out)
    changed = [index for index, receipt in planned.items() if receipt["drops"] != receipts[index]["drops"]]
    if not changed:
        return receipts
    remove(join(out, MANIFEST_NAME))

    def left_out(receipt: dict[str, Any]) -> set[str]:
        return {drop["key"] for drop in receipt["drops"]}

    # An earlier run may have left out what now, with other images in the source, is the first of its kind.
    lacking = [index for index in changed if not left_out(receipts[index]) <= left_out(planned[index])]
    made = {receipt["index"]: receipt for receipt in _run([tasks[index] for index in lacking], make_shard)}
    receipts = {**receipts, **made}
    filtering = [
        {**receipts[index], "drops": planned[index]["drops"]}
        for index in changed
        if planned[index]["drops"] != receipts[index]["drops"]
    ]
    logger.info("leaving copies out of %d of %d shards", len(filtering), len(tasks))
    filter_shard = partial(_filter_shard, out=out, config=config)
    return {**receipts, **{receipt["index"]: receipt for receipt in _run(filtering, filter_shard)}}


def _file(index: int, ending: str) -> str:
    return f"shards/{index:05d}.{ending}"


def _manifest(receipts: Sequence[dict[str, Any]], listed: int, config: PrepareConfig) -> Manifest:
    names = [field.name for field in dataclasses.fields(Shard)]
    drops = _count_drops(receipts)
    return Manifest(
        settings=config.settings(),
        shards=[Shard(**{name: receipt[name] for name in names}) for receipt in receipts if receipt["rows"]],
        images_listed=listed,
        images_used=listed - sum(drops.values()),
        drops=drops,
        records=sum(receipt["rows"] for receipt in receipts),
        row_group_rows=config.row_group_rows,
    )


def _check_drops(
    receipts: dict[int, dict[str, Any]], listed: int, source: Source, config: PrepareConfig, other: Facts | None = None
) -> None:
    """Write the quarantine once it is whole, or as soon as it is too long, and then stop the job."""
    out = absolute(config.out)
    drops = _count_drops(list(receipts.values()))
    bad = sum(drops.values())
    too_many = bad > config.max_bad_fraction * listed
    ordered = [receipt for _, receipt in sorted(receipts.items())]
    if too_many or sum(receipt["images"] for receipt in ordered) == listed:
        lines = [json.dumps(drop) for receipt in ordered for drop in receipt["drops"]]
        write_atomic(join(out, "quarantine.jsonl"), "".join(line + "\n" for line in lines).encode())
    if too_many:
        facts = read_facts(out, [receipt["index"] for receipt in ordered])
        report = write_report(out, ordered, facts, [], listed=listed, source=source, config=config, other=other)
        raise TooManyBadImages(
            f"{bad} of {listed} images cannot be used, more than max_bad_fraction={config.max_bad_fraction:g} allows: "
            f"{_by_reason(drops)}; each one's reason is in {redact(out)}/quarantine.jsonl, pictures are in "
            f"{redact(report)}",
            reasons=drops,
        )


def _count_drops(receipts: Sequence[dict[str, Any]]) -> dict[str, int]:
    return dict(sorted(Counter(drop["reason"] for receipt in receipts for drop in receipt["drops"]).items()))


def _by_reason(drops: dict[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in drops.items())


class _Progress:
    """A line with rate and remaining time, at most every `PROGRESS_S` seconds."""

    def __init__(self, total: int, done: int) -> None:
        self.total, self.done, self.dropped = total, done, 0
        self.first = done
        self.start = self.last = time.monotonic()

    def add(self, receipt: dict[str, Any]) -> None:
        self.done += receipt["images"]
        self.dropped += len(receipt["drops"])
        now = time.monotonic()
        if now - self.last < PROGRESS_S and self.done < self.total:
            return
        self.last = now
        rate = (self.done - self.first) / max(now - self.start, 1e-9)
        logger.info(
            "%d/%d images, %.0f images/s, %d left out, %.0f s to go",
            self.done,
            self.total,
            rate,
            self.dropped,
            (self.total - self.done) / max(rate, 1e-9),
        )
