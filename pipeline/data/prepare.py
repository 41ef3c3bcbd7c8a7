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
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field
from pydantic.dataclasses import dataclass

from pipeline.cluster import start_ray
from pipeline.data.contract import ContractConfig, examine, summarise_holes
from pipeline.data.contract_report import write_report
from pipeline.data.copies import Facts, encode_facts, facts_file, find_copies, read_facts, read_other_facts
from pipeline.data.own_masks import MaskReader, OwnMasks, join_counts, mask_warnings, open_masks
from pipeline.data.plan import shard_tasks
from pipeline.data.receipts import by_reason, count_drops, make_manifest, read_receipts, shard_file, with_copies
from pipeline.data.records import RecordConfig, make_records, open_photograph
from pipeline.data.schema import MANIFEST_NAME, RECORD_SCHEMA, SCHEMA_VERSION, Manifest, open_shard, set_folder
from pipeline.data.sources.base import Source
from pipeline.data.sources.choose import open_source
from pipeline.data.sources.partitions import PartitionName, compare
from pipeline.data.tasks import iterate, run_tasks
from pipeline.errors import ConfigMismatch, MissingInput, StorageFailed, TooManyBadImages, WrongCount
from pipeline.storage import absolute, exists, join, read_bytes, redact, remove, write_atomic
from tmad.config import STRICT, PositiveInt
from tmad.images import UnreadableImage

logger = logging.getLogger(__name__)

PROGRESS_S = 5.0
"""Seconds between two progress lines."""

OUTAGES = ("bucket", "credentials", "endpoint", "connection", "timeout", "server")
"""Failures of storage that are no property of an image: they end the job, which goes on where it was when it is run
again. Dropping images for them would make the set depend on the network."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PrepareConfig(RecordConfig, ContractConfig):
    """Preparation of a data set: where from, where to, how it is cut into shards."""

    source: str
    """Path or fsspec URI: folder with images at any depth, tar file (ARCHIVE.tar/FOLDER: a folder in it) or folder of
    tar files, Parquet file or folder of those, or text list of keys."""
    out: str
    """Folder of the prepared set: a path or any fsspec URI."""
    images_per_shard: PositiveInt = 512
    """Source images of one shard: the unit of work and of resuming."""
    row_group_rows: PositiveInt = 64
    """Records read together by the training input."""
    max_bad_fraction: Annotated[float, Field(ge=0, le=1)] = 0.1
    """The job stops if more than this share of the images cannot be used."""
    root: str | None = None
    """Where the images of a list lie: folder, tar file, or folder in one; none = the list's folder."""
    image_column: str | None = None
    """Column of a Parquet source with the encoded images; none = image, image_bytes, bytes or jpg."""
    key_column: str | None = None
    """Column of a Parquet source with the images' keys; none = FILE#ROW."""
    label_column: str | None = None
    """Column of a Parquet source with whole numbers that are kept as labels; none = no labels."""
    expect: PartitionName | None = None
    """Official partition that the source should be: its number of images and, for a list, the presence of each are
    checked and reported in source_report.json."""
    allow_count_difference: bool = False
    """Go on, with a warning, where the source is not what expect says."""

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
    source = open_source(
        config.source,
        root=config.root,
        image_column=config.image_column,
        key_column=config.key_column,
        label_column=config.label_column,
        cache=join(out, "source_index.arrow"),
    )
    keys = source.keys()
    masks = open_masks(
        config.mask_from,
        source=config.source,
        images=source,
        keys=keys,
        masks=config.masks,
        mask_column=config.mask_column,
        mask_hole=config.mask_hole,
        masks_per_image=config.masks_per_image,
        cache=join(out, "mask_index.arrow"),
    )
    _claim_folder(out, config)
    _check_count(keys, source, out, config)
    tasks = shard_tasks(keys, source, config, masks)
    receipts = read_receipts(out, tasks)
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
    planned = {index: with_copies(receipts[index], copies.dropped[index]) for index in range(len(tasks))}
    _check_drops(planned, len(keys), source, config, other)
    receipts = _without_copies(receipts, planned, tasks, make_shard, config)
    ordered = [receipts[task["index"]] for task in tasks]
    if config.mask_from != "family":
        counts = join_counts([receipt["masks"] for receipt in ordered])
        for warning in mask_warnings(counts, config.mask_from, config.mask_hole):
            logger.warning("%s", warning)
    report = write_report(out, ordered, facts, copies.kept, listed=len(keys), source=source, config=config, other=other)
    manifest = make_manifest(ordered, len(keys), config)
    if manifest.records == 0:
        raise MissingInput(
            f"none of the {len(keys)} images in {redact(config.source)} can be used: {by_reason(manifest.drops)}; "
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
        f" ({by_reason(manifest.drops)})" if manifest.drops else "",
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
            opened = open_photograph(data, config)
            fact = examine(key, data, opened[1], config)
            rows += make_records(key, data, config, label=source.label(key), opened=opened, masks=reader)
            facts.append(fact)
        except UnreadableImage as error:
            drops.append({"key": key, "reason": error.reason, "detail": error.detail, "bytes": len(data)})
        except (MissingInput, StorageFailed) as error:
            if error.details.get("kind") in OUTAGES:
                raise
            reason = "missing" if isinstance(error, MissingInput) else "unreadable"
            drops.append({"key": key, "reason": reason, "detail": error.message, "bytes": 0})
    write_atomic(join(out, facts_file(task["index"])), encode_facts(facts))
    receipt = {"index": task["index"], "inputs": task["inputs"], "images": len(task["keys"]), "drops": drops}
    if config.mask_from != "family":
        receipt["masks"] = dict(reader.counts)
    return _write_shard(pa.Table.from_pylist(rows, schema=RECORD_SCHEMA), receipt, out, config)


def _filter_shard(receipt: dict[str, Any], *, out: str, config: PrepareConfig) -> pa.Table:
    """Write a shard anew without the copies among its receipt's drops; again, running it twice is running it once."""
    table = open_shard(out, receipt["file"]).read() if receipt["rows"] else RECORD_SCHEMA.empty_table()
    left_out = pa.array([drop["key"] for drop in receipt["drops"]], pa.string())
    copied = pc.is_in(pc.struct_field(table["source"], "key"), value_set=left_out)
    kept = table.filter(pc.invert(copied)).combine_chunks().cast(RECORD_SCHEMA)
    return _write_shard(kept, receipt, out, config)


def _write_shard(table: pa.Table, receipt: dict[str, Any], out: str, config: PrepareConfig) -> pa.Table:
    """Write the shard, then its receipt, which is also returned."""
    sink = pa.BufferOutputStream()
    pq.write_table(
        table,
        sink,
        row_group_size=config.row_group_rows,
        compression="zstd",
        use_dictionary=False,
    )
    data = sink.getvalue().to_pybytes()
    file = shard_file(receipt["index"], "parquet")
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
    write_atomic(join(out, shard_file(receipt["index"], "json")), text.encode())
    return pa.table({"receipt": [text]})


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


def _check_drops(
    receipts: dict[int, dict[str, Any]], listed: int, source: Source, config: PrepareConfig, other: Facts | None = None
) -> None:
    """Write the quarantine once it is whole, or as soon as it is too long, and then stop the job."""
    out = absolute(config.out)
    drops = count_drops(list(receipts.values()))
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
            f"{by_reason(drops)}; each one's reason is in {redact(out)}/quarantine.jsonl, pictures are in "
            f"{redact(report)}",
            reasons=drops,
        )


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
