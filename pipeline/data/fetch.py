"""Reads training input: a task that turns a portion of the order into rows, still encoded, with all
that is random about them.

Runs in Ray's workers and does not import PyTorch, so that the first batch does not wait for it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.data.schema import open_shard, pack_mask, unpack_mask
from pipeline.data.sources.base import whole
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

    @cache
    def row_group(file: str, number: int) -> pa.Table:
        return open_shard(folder, file).read_row_group(number, columns=_COLUMNS, use_threads=False)

    parts = []
    for piece in portion["pieces"]:
        sizes = [rows for _, _, rows in piece["groups"]]
        ends = np.cumsum(sizes)
        rows = shuffled(piece["seed"], sum(sizes))[piece["start"] : piece["stop"]]
        # Only the row groups that hold a row of ours are read.
        needed = np.unique(np.searchsorted(ends, rows, side="right"))
        joined = pa.concat_tables([row_group(*piece["groups"][group][:2]) for group in needed])
        numbers = np.concatenate([np.arange(ends[group] - sizes[group], ends[group]) for group in needed])
        parts.append(_variant(joined.take(pa.array(np.searchsorted(numbers, rows))), piece["epoch"]))
    return pa.concat_tables(parts)


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
    columns = {
        "mask": _lists(np.frombuffer(b"".join(masks), np.uint8).reshape(len(masks), -1)),
        "pool_yx": _lists(np.stack([one.pool_yx.reshape(-1) for one in drawn])),
        "mirrored": pa.array([one.mirrored for one in drawn]),
        "cells": _lists(np.stack([one.cells for one in drawn])),
        "mix": _lists(np.stack([one.mix for one in drawn])),
    }
    kept = table.drop_columns(["mask", "pool_yx"])
    return pa.table({**{name: kept[name] for name in kept.column_names}, **columns})


def draw_after(portion: dict[str, Any], *, read: Callable[[dict[str, Any]], pa.Table], **draws: Any) -> pa.Table:
    """`with_draws` of the rows that *read* makes of a portion."""
    return with_draws(read(portion), **draws)


def matrix(column: pa.ChunkedArray) -> np.ndarray:
    """A column of lists of one length as an array, one row each; not to be written to."""
    lists = whole(column)
    if isinstance(lists, pa.FixedSizeListArray):
        size = lists.type.list_size
        return lists.values.to_numpy()[lists.offset * size : (lists.offset + len(lists)) * size].reshape(-1, size)
    return lists.flatten().to_numpy().reshape(len(lists), -1)


def _lists(rows: np.ndarray) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), rows.shape[1])


def shuffled(seed: int, rows: int) -> np.ndarray:
    """The order of a window's rows: position in the shuffled window -> row, counted through its row groups."""
    return np.random.Generator(np.random.PCG64(seed)).permutation(rows)


def _variant(table: pa.Table, epoch: int) -> pa.Table:
    """Keep the mask and the memory that this epoch trains with."""
    table = table.combine_chunks()
    number = epoch % len(table["masks"][0])
    kept = {name: table[name] for name in ("image_id", "image", "height", "width")}
    kept["mask"], kept["pool_yx"] = (pc.list_element(table[name], number) for name in ("masks", "pool_yx"))
    return pa.table({**kept, "epoch": np.full(len(table), epoch, np.int64)})
