"""The pixels of the memory's windows as a column of the shards, for readers that do not cut windows themselves."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from pipeline.data.schema import PATCHES_FIELD, Record

MAX_GROUP_BYTES = 2**30
"""A row group is put together in memory, and read at once by most readers."""


def check_group_bytes(*, rows: int, variants: int, pool_size: int, patch_size: int) -> None:
    """Raise `ValueError` if the column would take more than `MAX_GROUP_BYTES` in each row group."""
    a_record = variants * pool_size * 3 * patch_size**2
    if rows * a_record > MAX_GROUP_BYTES:
        raise ValueError(
            f"with pool_pixels, row_group_rows must be at most {max(1, MAX_GROUP_BYTES // a_record)}, got {rows}: "
            f"{a_record:,} bytes of windows a record make row groups of more than {MAX_GROUP_BYTES:,} bytes"
        )


def with_patches(table: pa.Table, *, rows: int, patch_size: int) -> Iterator[pa.Table]:
    """The records of *table*, *rows* at a time, with the column `schema.PATCHES_FIELD`."""
    schema = table.schema.append(PATCHES_FIELD)
    for start in range(0, len(table), rows):
        group = table.slice(start, rows).combine_chunks()
        patches = [windows(Record(**row), patch_size) for row in group.to_pylist()]
        yield pa.Table.from_arrays([*group.columns, pa.array(patches, PATCHES_FIELD.type)], schema=schema)


def windows(record: Record, patch_size: int) -> list[bytes]:
    """The pixels of the record's windows, an entry a variant, as `schema.PATCHES_FIELD` says."""
    size = (patch_size, patch_size)
    everywhere = np.lib.stride_tricks.sliding_window_view(record.pixels(), size, axis=(0, 1))
    pools = [record.pool(variant) for variant in range(len(record.pool_yx))]
    return [everywhere[pool[:, 0], pool[:, 1]].transpose(0, 2, 3, 1).tobytes() for pool in pools]
