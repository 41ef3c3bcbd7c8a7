"""The ledger: the outcome of every input, as Parquet.

Each task writes its rows as a file of their own, `ledger/*.parquet`, after its results; the end of a job, and the
beginning of the next one, joins them into `ledger.parquet`. So a job that is killed loses at most the rows of the
tasks under way, whose results the next one writes again, byte for byte.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.runs.lease import Lease
from pipeline.storage import join, read_bytes

LEDGER = "ledger.parquet"
PARTS = "ledger"

_READERS = 16

SCHEMA = pa.schema(
    [
        pa.field("input", pa.string(), nullable=False),
        *(pa.field(name, pa.string()) for name in ("mask", "output")),
        pa.field("status", pa.string(), nullable=False),
        *(pa.field(name, pa.string()) for name in ("reason", "detail")),
        *(pa.field(name, pa.float64()) for name in ("seconds", "hole_fraction")),
        *(pa.field(name, pa.int64()) for name in ("height", "width", "bytes")),
        *(pa.field(name, pa.string()) for name in ("model", "model_digest", "identity", "made_of")),
        pa.field("when", pa.float64(), nullable=False),
    ]
)


@dataclass(frozen=True)
class Row:
    """What became of one input."""

    input: str
    """Its key in the input."""
    status: Literal["done", "skipped", "failed"]
    when: float
    """Seconds since 1970."""
    mask: str | None = None
    """Where its hole came from."""
    output: str | None = None
    """Key of the result below the output; none if there is none."""
    reason: str | None = None
    """Short name to count by: `no-mask`, `no-hole`, `mask-size`, `truncated`, `unsafe-name`, ..."""
    detail: str | None = None
    """The whole message, and what to know about inputs that were done."""
    seconds: float | None = None
    """Time for reading, filling and writing this input."""
    hole_fraction: float | None = None
    height: int | None = None
    """Of the picture as it is shown."""
    width: int | None = None
    bytes: int | None = None
    """Of the result."""
    model: str | None = None
    """The model as it was named, an alias as the version that it stood for."""
    model_digest: str | None = None
    identity: str | None = None
    """What stands for the model and the settings that decide the result's bytes."""
    made_of: str | None = None
    """What stands for the image and its hole as they were: it changes when a file, a box or the place of masks does."""


def to_table(rows: Sequence[Row]) -> pa.Table:
    """Rows as a table."""
    return pa.Table.from_pylist([asdict(row) for row in rows], schema=SCHEMA)


def encode(table: pa.Table) -> bytes:
    """A table as the bytes of a Parquet file."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return bytes(sink.getvalue().to_pybytes())


def read_ledger(out: str, there: Mapping[str, int]) -> tuple[pa.Table, list[str]]:
    """The newest row of every input, sorted by input, and the files read; *there*: all files of the output."""
    files = [LEDGER] if LEDGER in there else []
    files += sorted(file for file in there if file.startswith(f"{PARTS}/") and file.endswith(".parquet"))
    with ThreadPoolExecutor(_READERS) as pool:
        tables = list(pool.map(lambda file: _read(join(out, file)), files))
    return newest([SCHEMA.empty_table(), *tables]), files


def newest(tables: Sequence[pa.Table]) -> pa.Table:
    """All rows, sorted by input; of several for one input the newest, of equally new ones the last."""
    table = pa.concat_tables(tables).combine_chunks()
    order = pc.sort_indices(table, sort_keys=[("input", "ascending"), ("when", "ascending")])
    table = table.take(order)
    inputs = table["input"]
    last = np.ones(len(table), bool)
    last[:-1] = pc.not_equal(inputs.slice(1), inputs.slice(0, max(len(table) - 1, 0))).to_numpy()
    return table.filter(pa.array(last)).combine_chunks()


def join_ledger(lease: Lease, there: Mapping[str, int]) -> pa.Table:
    """Join what tasks have written into one file; returns its rows."""
    table, files = read_ledger(lease.folder, there)
    parts = [file for file in files if file != LEDGER]
    if parts or LEDGER not in files:
        lease.write(LEDGER, encode(table))
        for file in parts:
            lease.remove(file)
    return table


def settled(
    table: pa.Table, there: Mapping[str, int], identity: str, made_of: Mapping[str, str], *, retry_failed: bool
) -> set[str]:
    """Inputs that need no more work: done with this model and these settings from what is there now (*made_of*), and
    with their result, if there is one, still there."""
    mine = table.filter(pc.equal(table["identity"], identity))
    columns = [mine[name].to_pylist() for name in ("input", "status", "output", "bytes", "made_of")]
    return {
        key
        for key, status, output, size, origin in zip(*columns, strict=True)
        if (output is None or there.get(output) == size)
        and origin == made_of.get(key)
        and not (status == "failed" and retry_failed)
    }


def results(table: pa.Table, there: Mapping[str, int]) -> dict[str, str]:
    """The results that are there as they were written, by their inputs."""
    columns = [table[name].to_pylist() for name in ("input", "output", "bytes")]
    return {key: output for key, output, size in zip(*columns, strict=True) if output and there.get(output) == size}


def left_behind(row: Row, output: str, size: int) -> Row:
    """The row of an input that comes to nothing now, where the result *output* of an earlier call is still there."""
    if row.status == "skipped":
        row = replace(row, status="failed", reason="stale-result")
    stale = f"{output} is of an earlier call, of an image or a mask that is no longer: remove it"
    return replace(row, output=output, bytes=size, detail=f"{row.detail}; {stale}")


def _read(uri: str) -> pa.Table:
    table = pq.read_table(pa.BufferReader(read_bytes(uri)))
    for name in set(SCHEMA.names) - set(table.column_names):  # of an earlier version
        table = table.append_column(name, pa.nulls(len(table), SCHEMA.field(name).type))
    return table.select(SCHEMA.names).cast(SCHEMA)
