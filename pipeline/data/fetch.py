"""The reading half of the training input: a task that turns a portion of the order into rows, still encoded.

Runs in Ray's workers and imports neither PyTorch nor `tmad`, so that the first batch does not wait for them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.data.schema import open_shard

_COLUMNS = ["image_id", "image", "height", "width", "masks", "pool_yx"]


def read_portion(
    portion: dict[str, Any], *, folder: str, start: int, batch: int, rank: int, world_size: int
) -> pa.Table:
    """The rows of this rank in a portion of the order, in order: image and mask of the epoch's variant, encoded.

    *portion*: `position` of its first row and `pieces` (as `order.Piece`). *batch* images of all ranks together make
    a step; the first step begins at *start*. Columns `image_id, image, height, width, mask, pool_yx, epoch`. Each row
    group is read once. Raises `CorruptSet` naming the shard.
    """
    tables: dict[tuple[str, int], pa.Table] = {}
    parts = []
    position = portion["position"]
    for piece in portion["pieces"]:
        places = position + np.arange(piece["stop"] - piece["start"])
        mine = (places - start) % batch // (batch // world_size) == rank
        position += places.size
        sizes = [rows for _, _, rows in piece["groups"]]
        order = shuffled(piece["seed"], sum(sizes))
        rows = order[piece["start"] : piece["stop"]][mine]
        # Only the row groups that hold a row of ours are read.
        owner = np.searchsorted(np.cumsum(sizes), rows, side="right")
        needed = np.unique(owner)
        if needed.size == 0:
            continue
        firsts = np.cumsum([0, *sizes])[:-1]
        joined = pa.concat_tables([_row_group(folder, tables, piece["groups"][number]) for number in needed])
        offsets = np.cumsum([0, *(sizes[number] for number in needed)])[:-1]
        index = rows - firsts[owner] + offsets[np.searchsorted(needed, owner)]
        parts.append(_variant(joined.take(pa.array(index)).combine_chunks(), piece["epoch"]))
    return pa.concat_tables(parts) if parts else _variant(_row_group(folder, tables, piece["groups"][0])[:0], 0)


def shuffled(seed: int, rows: int) -> np.ndarray:
    """The order of a window's rows: position in the shuffled window -> row, counted through its row groups."""
    return np.random.Generator(np.random.PCG64(seed)).permutation(rows)


def _row_group(folder: str, tables: dict[tuple[str, int], pa.Table], group: tuple[str, int, int]) -> pa.Table:
    file, number, _ = group
    if (file, number) not in tables:
        tables[file, number] = open_shard(folder, file).read_row_group(number, columns=_COLUMNS, use_threads=False)
    return tables[file, number]


def _variant(table: pa.Table, epoch: int) -> pa.Table:
    """Keep the mask and the memory that this epoch trains with."""
    if len(table):
        number = epoch % len(table["masks"][0])
        mask, pool = pc.list_element(table["masks"], number), pc.list_element(table["pool_yx"], number)
    else:
        mask, pool = pa.array([], pa.binary()), pa.array([], pa.list_(pa.int16()))
    kept = table.drop_columns(["masks", "pool_yx"])
    kept = kept.append_column("mask", mask).append_column("pool_yx", pool)
    return kept.append_column("epoch", pa.array(np.full(len(table), epoch, np.int64))).replace_schema_metadata(None)
