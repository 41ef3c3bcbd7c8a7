"""Reads training input: a task that turns a portion of the order into rows, still encoded, with all
that is random about them.

Runs in Ray's workers and does not import PyTorch, so that the first batch does not wait for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.data.schema import open_shard, pack_mask, unpack_mask
from pipeline.errors import CorruptSet
from tmad.draws import draw
from tmad.rng import numpy_generator

_COLUMNS = ["image_id", "image", "height", "width", "masks", "pool_yx"]


ROWS = pa.schema(
    {
        "image_id": pa.string(),
        "image": pa.binary(),
        "height": pa.int32(),
        "width": pa.int32(),
        "mask": pa.binary(),
        "pool_yx": pa.list_(pa.int16()),
        "epoch": pa.int64(),
    }
)
"""What is needed of a record, with the hole and the memory of one epoch; encoded as in the set."""


def read_pieces(portion: dict[str, Any], *, folder: str) -> pa.Table:
    """The rows (`ROWS`) of a portion of the order (`order.chunks`), in order; each row group is read once.

    Raises `CorruptSet` naming the shard.
    """
    tables: dict[tuple[str, int], pa.Table] = {}
    parts = []
    for piece in portion["pieces"]:
        sizes = [rows for _, _, rows in piece["groups"]]
        rows = shuffled(piece["seed"], sum(sizes))[piece["start"] : piece["stop"]]
        # Only the row groups that hold a row of ours are read.
        owner = np.searchsorted(np.cumsum(sizes), rows, side="right")
        needed = np.unique(owner)
        firsts = np.cumsum([0, *sizes])[:-1]
        joined = pa.concat_tables([_row_group(folder, tables, piece["groups"][number]) for number in needed])
        offsets = np.cumsum([0, *(sizes[number] for number in needed)])[:-1]
        index = rows - firsts[owner] + offsets[np.searchsorted(needed, owner)]
        taken = joined.drop_columns(["image"]).take(pa.array(index)).combine_chunks()
        parts.append(_variant(taken.append_column("image", _gathered(joined["image"], index)), piece["epoch"]))
    return pa.concat_tables(parts)


def _gathered(column: pa.ChunkedArray, index: np.ndarray) -> pa.Array:
    """`column.take(index)` of binary values in a third of the time: Arrow joins all chunks first."""
    views, owners, firsts, lasts = [], [], [], []
    for number, chunk in enumerate(column.chunks):
        _, offsets, data = chunk.buffers()
        bounds = np.frombuffer(offsets, np.int32)[chunk.offset : chunk.offset + len(chunk) + 1]
        views.append(memoryview(data))
        owners.append(np.full(len(chunk), number))
        firsts.append(bounds[:-1])
        lasts.append(bounds[1:])
    owner, first, last = (np.concatenate(parts)[index] for parts in (owners, firsts, lasts))
    places = zip(owner.tolist(), first.tolist(), last.tolist(), strict=True)
    joined = b"".join([views[number][start:stop] for number, start, stop in places])
    ends = np.concatenate([[0], np.cumsum(last - first, dtype=np.int64)]).astype(np.int32)
    return pa.Array.from_buffers(pa.binary(), index.size, [None, pa.py_buffer(ends), pa.py_buffer(joined)])


def with_draws(table: pa.Table, *, seed: int, patch_size: int, num_cells: int, flip: bool) -> pa.Table:
    """The same rows with what `draws.draw` gives for (*seed*, image, epoch): columns `mirrored, cells, mix` are added,
    `mask` and `pool_yx` are those of the mirrored image where it is to be mirrored.

    Rows are images of one size. `mask`, `pool_yx`, `cells` and `mix` have the same length in each.
    Raises `CorruptSet` naming a record whose mask is of another size.
    """
    if not len(table):
        return table
    height, width = (table[name][0].as_py() for name in ("height", "width"))
    pools = matrix(table["pool_yx"]).reshape(len(table), -1, 2)
    masks, drawn = [], []
    rows = (table[name].to_pylist() for name in ("image_id", "mask", "epoch"))
    for image_id, bits, epoch, pool in zip(*rows, pools, strict=True):
        if len(bits) != (size := -(-height * width // 8)):
            raise CorruptSet(
                f"record {image_id} of the prepared set has a mask of {len(bits)} bytes, "
                f"{height} x {width} pixels need {size}; prepare it again"
            )
        rng = numpy_generator(seed, "sample", image_id, epoch)
        mask = unpack_mask(bits, height, width)
        one = draw(mask, pool, patch_size=patch_size, num_cells=num_cells, rng=rng, flip=flip)
        masks.append(pack_mask(one.mask) if one.mirrored else bits)
        drawn.append(one)
    table = table.drop_columns(["mask", "pool_yx"])
    columns = {
        "mask": _lists(np.frombuffer(b"".join(masks), np.uint8).reshape(len(masks), -1)),
        "pool_yx": _lists(np.stack([one.pool_yx.reshape(-1) for one in drawn])),
        "mirrored": pa.array([one.mirrored for one in drawn]),
        "cells": _lists(np.stack([one.cells for one in drawn])),
        "mix": _lists(np.stack([one.mix for one in drawn])),
    }
    for name, column in columns.items():
        table = table.append_column(name, column)
    return table


def draw_after(portion: dict[str, Any], *, read: Callable[[dict[str, Any]], pa.Table], **draws: Any) -> pa.Table:
    """`with_draws` of the rows that *read* makes of a portion."""
    return with_draws(read(portion), **draws)


def matrix(column: pa.ChunkedArray) -> np.ndarray:
    """A column of lists of one length as an array, one row each; not to be written to."""
    lists = _whole(column)
    if isinstance(lists, pa.FixedSizeListArray):
        size = lists.type.list_size
        return lists.values.to_numpy()[lists.offset * size : (lists.offset + len(lists)) * size].reshape(-1, size)
    return lists.flatten().to_numpy().reshape(len(lists), -1)


def _whole(column: pa.ChunkedArray) -> pa.Array:
    """`column.combine_chunks()`, but nothing is copied where there is one chunk."""
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _lists(rows: np.ndarray) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), rows.shape[1])


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
    number = epoch % len(table["masks"][0])
    mask, pool = pc.list_element(table["masks"], number), pc.list_element(table["pool_yx"], number)
    kept = table.drop_columns(["masks", "pool_yx"])
    kept = kept.append_column("mask", mask).append_column("pool_yx", pool)
    kept = kept.append_column("epoch", pa.array(np.full(len(table), epoch, np.int64))).replace_schema_metadata(None)
    return kept.select(ROWS.names)
