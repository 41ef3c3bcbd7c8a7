"""The order of training images: one endless sequence, independent of the number of workers.

The sequence is epoch after epoch, and an epoch is every record once. Within it the row groups of all shards are put
into random order, consecutive ones are joined into windows of some thousand records, and the records of a window are
shuffled. So reading stays in large pieces, and neighbours in the source, which is sorted by key and hence often by
class, come far apart. All of it depends on (seed, epoch), the records' number in each shard and their size in pixels
alone: it is the same for a prepared set and for the photographs that it was prepared from. A global batch is the next
G positions; rank r of R takes the r-th of R equal parts of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.data.schema import Manifest
from tmad.rng import numpy_generator, seed_of

WINDOW_RECORDS = 4096
"""Records that are shuffled together, at most about."""
WINDOW_PIXELS = 128 * 2**20
"""The same in pixels: what one reading task holds, encoded; about 60 MiB of JPEG, up to 256 MiB of PNG. Bytes would
bound it closer, but the order must not depend on how well images compress."""
CHUNK_RECORDS = 1024
"""Windows of a small set are joined, over several epochs, until one reading task has this many records to give."""


@dataclass(frozen=True)
class Piece:
    """Positions *start* to *stop* of one shuffled window."""

    epoch: int
    seed: int
    """Seed of the shuffle inside the window."""
    groups: list[tuple[str, int, int]]
    """The window's row groups in order: file of the shard, number in it, rows."""
    start: int
    stop: int


def window_records(manifest: Manifest) -> int:
    """Records after which a window is full."""
    return int(np.clip(WINDOW_PIXELS // manifest.crop_size**2, manifest.row_group_rows, WINDOW_RECORDS))


def pieces(manifest: Manifest, *, seed: int, start: int, stop: int) -> Iterator[Piece]:
    """The windows that make up positions *start* to *stop* of the endless sequence, the outer ones cut to fit."""
    groups = [
        (shard.file, number, min(manifest.row_group_rows, shard.rows - first))
        for shard in manifest.shards
        for number, first in enumerate(range(0, shard.rows, manifest.row_group_rows))
    ]
    limit = window_records(manifest)
    for epoch in range(start // manifest.records, -(-stop // manifest.records)):
        position = epoch * manifest.records
        window: list[tuple[str, int, int]] = []
        number = 0
        order = numpy_generator(seed, "epoch", epoch).permutation(len(groups))
        for place, group in enumerate(order):
            window.append(groups[group])
            rows = sum(group[2] for group in window)
            if rows < limit and place < len(order) - 1:
                continue
            first, last = max(start - position, 0), min(stop - position, rows)
            if first < last:
                yield Piece(epoch, seed_of(seed, "window", epoch, number), window, first, last)
            position, number, window = position + rows, number + 1, []


def chunks(
    manifest: Manifest, *, seed: int, start: int, stop: int, records: int = CHUNK_RECORDS, cut: bool = False
) -> Iterator[dict[str, Any]]:
    """`pieces` joined into portions worth a task: `position` of the first row, and `pieces` as dictionaries.

    A portion has *records* rows or more; with *cut*, pieces are divided, so that it has just as many.
    """
    portion: list[dict[str, Any]] = []
    position, size = start, 0
    for piece in pieces(manifest, seed=seed, start=start, stop=stop):
        first = piece.start
        while first < piece.stop:
            last = min(piece.stop, first + records - size) if cut else piece.stop
            portion.append({**vars(piece), "start": first, "stop": last})
            size += last - first
            first = last
            if size >= records:
                yield {"position": position, "pieces": portion}
                position, size, portion = position + size, 0, []
    if portion:
        yield {"position": position, "pieces": portion}
