"""Photographs to shards by Ray Data: read, make records, write, as one operator with one task a shard.

Ray fuses the three, so neither files nor records leave the process that reads them; what comes back is the shard's
receipt. Files go through in blocks of about `BLOCK_BYTES`, however much a shard's photographs take together.

There is no `Datasink`: Ray Data hands back what writes return when the last of them has ended, but a preparation stops
as soon as too many images are unusable, and says how far it is.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
import ray.data
from ray.data.block import BlockMetadata

from pipeline.data.collection import UNUSABLE, drop_of
from pipeline.data.contract import FACTS_SCHEMA, examine, summarise_holes
from pipeline.data.duplicates import encode_facts, facts_file
from pipeline.data.plan import ShardPlan
from pipeline.data.prepare_config import PrepareConfig
from pipeline.data.receipts import shard_file
from pipeline.data.records import make_records, open_as
from pipeline.data.schema import PATCHES_FIELD, Record, open_shard
from pipeline.data.sources.base import Source
from pipeline.data.sources.prefetch import read_ahead
from pipeline.data.tasks import iterate, quiet, run_tasks
from pipeline.data.user_masks import MaskReader, OwnMasks
from pipeline.runs.cluster import start_ray
from pipeline.runs.lease import Lease

BLOCK_BYTES = 2**20
"""Small, so that the next files are on their way while these are decoded."""

FILES_SCHEMA = pa.schema(
    {
        "shard": pa.int32(),
        "key": pa.large_string(),
        "label": pa.int64(),
        "file": pa.large_binary(),
        "drop": pa.string(),
        "last": pa.bool_(),
    }
)
"""A photograph as it was read: its file, or in `drop`, as JSON, why there is none (`collection.drop_of`). `last`: there
is no other of its shard."""


class Photographs(ray.data.Datasource):
    """The photographs of some shards of a plan as Ray Data reads them: a read task a shard."""

    def __init__(self, source: Source, plan: ShardPlan, shards: Sequence[int]) -> None:
        super().__init__()
        # Once for all tasks: keys and the source's index may be those of millions of photographs.
        self._shared = ray.put((source, plan))
        self._shards = shards

    def estimate_inmemory_data_size(self) -> int | None:
        """Unknown: no file was looked at."""
        return None

    def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ray.data.ReadTask]:
        """One for each shard, whatever the *parallelism*."""
        metadata = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        return [ray.data.ReadTask(partial(_read, self._shared, shard), metadata) for shard in self._shards]


def _read(shared: ray.ObjectRef[tuple[Source, ShardPlan]], shard: int) -> Iterator[pa.Table]:
    source, plan = ray.get(shared)
    return read_files(source, shard, plan.keys(shard))


def read_files(source: Source, shard: int, keys: Sequence[str]) -> Iterator[pa.Table]:
    """The files of a shard (`FILES_SCHEMA`) in order, some at a time. Raises `StorageFailed` in an outage."""
    rows: list[dict[str, Any]] = []
    size = 0
    labels = source.labels(pa.array(keys, pa.large_string())).to_pylist()
    for number, ((key, read), label) in enumerate(zip(read_ahead(source, keys), labels, strict=True), 1):
        row: dict[str, Any] = {"shard": shard, "key": key, "last": number == len(keys)}
        try:
            row |= {"file": read(), "label": label}
            size += len(row["file"])
        except UNUSABLE as error:
            row["drop"] = json.dumps(drop_of(key, error, 0))
        rows.append(row)
        if size >= BLOCK_BYTES or row["last"]:
            yield pa.Table.from_pylist(rows, schema=FILES_SCHEMA)
            rows, size = [], 0


@dataclass(frozen=True)
class ShardMaker:
    """What it takes to make shards of files that were read; picklable, because Ray's tasks get it."""

    masks: OwnMasks | None
    lease: Lease
    config: PrepareConfig
    inputs: Mapping[int, str]
    """What each shard is made of, as `ShardPlan.inputs` tells it, for its receipt."""

    def make_records(self, files: pa.Table) -> pa.Table:
        """What becomes of each photograph: records and facts, or why it is left out; and what its masks looked like."""
        records, facts = (pa.list_(pa.struct(list(schema))) for schema in (self.config.record_schema, FACTS_SCHEMA))
        schema = {"shard": pa.int32(), "records": records, "facts": facts, "drop": pa.string(), "masks": pa.string()}
        rows = [self._outcome(row) for row in files.select(["key", "label", "file", "drop"]).to_pylist()]
        made = pa.Table.from_pylist(rows, schema=pa.schema(schema))
        return made.set_column(0, "shard", files["shard"]).append_column("last", files["last"])

    def _outcome(self, row: Mapping[str, Any]) -> dict[str, Any]:
        key, file, config = row["key"], row["file"], self.config
        if file is None:
            return {"records": [], "facts": [], "drop": row["drop"]}
        reader = MaskReader(self.masks, max_pixels=config.max_pixels)
        outcome: dict[str, Any] = {"records": [], "facts": []}
        try:
            photograph = open_as(file, config)
            facts = examine(key, photograph, config)
            records = make_records(key, file, config, label=row["label"], photograph=photograph, masks=reader)
            outcome = {"records": records, "facts": [facts]}
        except UNUSABLE as error:
            outcome["drop"] = json.dumps(drop_of(key, error, len(file)))
        return outcome | {"masks": json.dumps(reader.counts)}

    def writer(self) -> Callable[[pa.Table], pa.Table]:
        """A function that takes what `make_records` gave, block by block, and writes the shard with the last one."""
        parts: list[pa.Table] = []

        def write_shard(made: pa.Table) -> pa.Table:
            parts.append(made)
            if not made["last"][-1].as_py():
                return pa.table({"receipt": pa.array([], pa.string())})
            whole = pa.concat_tables(parts)
            parts.clear()
            return self.write(whole)

        return write_shard

    def write(self, made: pa.Table) -> pa.Table:
        """Write the shard of all that `make_records` gave for it; doing it twice writes the same bytes twice.

        A row with its receipt, which is written last.
        """
        index = made["shard"][0].as_py()
        self.lease.write(facts_file(index), encode_facts(_flat(made["facts"], FACTS_SCHEMA)))
        drops = [json.loads(drop) for drop in made["drop"].drop_null().to_pylist()]
        receipt = {"index": index, "inputs": self.inputs[index], "images": len(made), "drops": drops}
        if self.config.mask_from != "family":
            counts: Counter[str] = Counter()
            for some in made["masks"].drop_null().to_pylist():
                counts.update(json.loads(some))
            receipt["masks"] = dict(counts)
        return self._write(_flat(made["records"], self.config.record_schema), receipt)

    def leave_out_copies(self, receipt: dict[str, Any]) -> pa.Table:
        """Write a shard anew without the copies among its receipt's drops; as `write`."""
        schema = self.config.record_schema
        there = receipt["rows"] > 0
        table = open_shard(self.lease.folder, receipt["file"]).read(columns=schema.names) if there else None
        table = schema.empty_table() if table is None else table
        left_out = pa.array([drop["key"] for drop in receipt["drops"]], pa.string())
        copied = pc.is_in(pc.struct_field(table["source"], "key"), value_set=left_out)
        return self._write(table.filter(pc.invert(copied)).combine_chunks().cast(schema), receipt)

    def _write(self, table: pa.Table, receipt: dict[str, Any]) -> pa.Table:
        """*table* is without the windows' pixels."""
        config, lease = self.config, self.lease
        sink = pa.BufferOutputStream()
        rows = config.row_group_rows
        schema = config.record_schema.append(PATCHES_FIELD) if config.pool_pixels else config.record_schema
        with pq.ParquetWriter(sink, schema, compression="zstd", use_dictionary=False) as writer:
            for start in range(0, len(table), rows):
                group = table.slice(start, rows).combine_chunks()
                if config.pool_pixels:
                    patches = [_windows(Record(**row), config.patch_size) for row in group.to_pylist()]
                    group = pa.table([*group.columns, pa.array(patches, PATCHES_FIELD.type)], schema=schema)
                writer.write_table(group)
        data = sink.getvalue().to_pybytes()
        file = shard_file(receipt["index"], "parquet")
        if len(table):
            lease.write(file, data)
        else:
            lease.remove(file)
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
        lease.write(shard_file(receipt["index"], "json"), text.encode())
        return pa.table({"receipt": [text]})


def _windows(record: Record, patch_size: int) -> list[bytes]:
    """The pixels of the record's windows, an entry a variant, as `schema.PATCHES_FIELD` says."""
    everywhere = np.lib.stride_tricks.sliding_window_view(record.pixels(), (patch_size, patch_size), axis=(0, 1))
    pools = [record.pool(variant) for variant in range(len(record.pool_yx))]
    return [everywhere[pool[:, 0], pool[:, 1]].transpose(0, 2, 3, 1).tobytes() for pool in pools]


def _flat(lists: pa.ChunkedArray, schema: pa.Schema) -> pa.Table:
    """The rows that are listed in a column of `make_records`."""
    rows = pa.chunked_array([pc.list_flatten(chunk) for chunk in lists.chunks]).combine_chunks()
    return pa.Table.from_arrays(rows.flatten(), schema=schema)


def make_shards(source: Source, plan: ShardPlan, shards: Sequence[int], maker: ShardMaker) -> Iterator[dict[str, Any]]:
    """Write the *shards* with these numbers; their receipts as they are finished."""
    if not shards:
        return
    start_ray()
    photographs = Photographs(source, plan, shards)
    dataset = ray.data.read_datasource(photographs, override_num_blocks=len(shards), num_cpus=1)
    for function in (maker.make_records, maker.writer()):
        dataset = dataset.map_batches(function, batch_size=None, batch_format="pyarrow", num_cpus=1)
    dataset = quiet(dataset)
    dataset.context.target_max_block_size = BLOCK_BYTES
    yield from _receipts(dataset)


def leave_out_copies(receipts: Sequence[dict[str, Any]], maker: ShardMaker) -> Iterator[dict[str, Any]]:
    """Write shards that are there anew, without the copies among the drops of these *receipts*; their new ones."""
    if receipts:
        start_ray()
        yield from _receipts(run_tasks(receipts, maker.leave_out_copies, num_cpus=1))


def _receipts(dataset: ray.data.Dataset) -> Iterator[dict[str, Any]]:
    for rows in iterate(dataset, batch_size=None, batch_format="numpy", prefetch_batches=0):
        yield from map(json.loads, rows["receipt"])
