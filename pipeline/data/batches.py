"""Batches for training (endless order, cut to the run's length) and for evaluation (as stored).

Training reads a prepared set, or photographs whose records are made on the way (`onthefly`), by tasks of Ray.
What travels through Ray is encoded bytes, bits, coordinates and draws; decoding happens here, in a few threads of the
process that trains, some batches ahead of the step. It is all that happens here: threads of one process decode side by
side, but take turns at everything that Python does (docs/log.md).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from pipeline.data.coarse_results import CoarseResults
from pipeline.data.fetch import ROWS, draw_after, matrix, read_pieces, with_draws
from pipeline.data.onthefly import PORTION_RECORDS, WINDOWS_AHEAD, LiveSet, Tally, make_windows
from pipeline.data.order import chunks
from pipeline.data.reader import ordered_tables
from pipeline.data.schema import Manifest, read_manifest, read_records, set_folder
from pipeline.data.sources import prefetch
from pipeline.errors import ConfigMismatch, CorruptSet
from pipeline.storage import absolute
from tmad.batch import Batch, mirror
from tmad.images import UnreadableImage, decode_rgb

_READS_AT_ONCE = 2
_READS_AHEAD = 3
"""Portions of a prepared set, each a task of some thousand records, that are read before they are asked for, at least;
as many as there are workers where these are more."""


def training_batches(
    train: str | LiveSet,
    *,
    seed: int,
    batch_images: int,
    total_images: int,
    num_cells: int,
    patch_size: int,
    rank: int = 0,
    world_size: int = 1,
    start_images: int = 0,
    flip: bool = True,
    decode_threads: int = 2,
    prefetch_batches: int = 4,
    record_tasks: int = 2,
    tally: Tally | None = None,
    reader: Any = None,
    coarse: CoarseResults | None = None,
    pool_size: int | None = None,
    pinned: bool = False,
) -> Iterator[Batch]:
    """This rank's part of every global batch of *batch_images*, from *start_images* until *total_images* are reached.

    *train*: the prepared set at this URI, or a live one, whose records *record_tasks* tasks make at once; *tally*
    counts its unusable images. Both give the same batches if preparation leaves none of the photographs out. *reader*
    (`reader.start_reader`), the same for all ranks, has everything read once for all of them; without it each one reads
    for itself. The sequence of images, and the flips, masks, cells and penalty weights of each, depend on (*seed*, the
    set) alone: ranks of any number together see the same, and a run that starts at *start_images* sees what an unbroken
    one would have seen from there. ceil((total_images - start_images) /
    batch_images) batches, all of them full, the same number on every rank. Masks: variant epoch mod K.

    *num_cells* is N_ps; precomputed *coarse* results go into the batches; *pool_size* takes only the first windows of
    each image's memory (default: all): they are what a smaller memory would be; *pinned*: batches are handed over
    in memory that a GPU reads by itself. Raises `ValueError`
    if *batch_images* does not divide by *world_size*, `ConfigMismatch` if the set was prepared for another
    *patch_size*, and what `read_manifest` raises; `CorruptSet` while iterating, and for a live set what `Tally.add`
    raises.
    """
    mine = _share(batch_images, rank, world_size)
    steps = max(0, -(-(total_images - start_images) // batch_images))
    draws: dict[str, Any] = {"seed": seed, "patch_size": patch_size, "num_cells": num_cells, "flip": flip}
    place: dict[str, Any] = {"seed": seed, "start": start_images, "stop": start_images + steps * batch_images}
    readers = world_size if reader else 1
    if isinstance(train, LiveSet):
        _check_patch_size(train.manifest, f"of photographs {train.config.source}", patch_size)
        portions = chunks(train.manifest, records=PORTION_RECORDS, cut=True, **place)
        read = partial(draw_after, read=partial(make_windows, photographs=train.photographs), **draws)
        at_once = record_tasks * readers
        ahead = at_once * WINDOWS_AHEAD
    else:
        manifest, folder = _open_set(train, patch_size)
        portions = chunks(manifest, **place)
        read = partial(draw_after, read=partial(read_pieces, folder=folder), **draws)
        at_once, ahead = max(_READS_AT_ONCE, readers), max(_READS_AHEAD, readers)
    tables = ordered_tables(
        portions, read, rank=rank, start=start_images, batch=batch_images, world_size=world_size,
        at_once=at_once, ahead=ahead, reader=reader, seed=seed,
    )  # fmt: skip
    if isinstance(train, LiveSet):
        tables = (tally or Tally(train.config)).counted(tables)
    return _decoded(_regrouped(tables, mine), decode_threads, prefetch_batches, coarse, pool_size, pinned)


def evaluation_batches(
    manifest_uri: str,
    *,
    batch_images: int,
    rank: int = 0,
    world_size: int = 1,
    limit: int | None = None,
    patch_size: int | None = None,
    decode_threads: int = 2,
    prefetch_batches: int = 2,
    coarse: CoarseResults | None = None,
    pool_size: int | None = None,
) -> Iterator[Batch]:
    """This rank's part of the first *limit* records in their stored order, the first mask of each, nothing flipped.

    Batches hold at most *batch_images* / *world_size* images; the last ones may be shorter or missing on some ranks,
    so ranks must not wait for one another between batches. `cells` names every cell of the grid, hole cells first.
    Needs no Ray. Raises what `training_batches` raises; *patch_size* defaults to the set's own.
    """
    manifest, folder = _open_set(manifest_uri, patch_size)
    mine = _share(batch_images, rank, world_size)
    num_cells = (manifest.crop_size // manifest.patch_size) ** 2
    rows = (
        {
            "image_id": record.image_id,
            "image": record.image,
            "height": record.height,
            "width": record.width,
            "mask": record.masks[0],
            "pool_yx": record.pool_yx[0],
            "epoch": 0,
        }
        for number, record in enumerate(read_records(folder, limit))
        if number % batch_images // mine == rank
    )
    drawn = partial(with_draws, seed=0, patch_size=manifest.patch_size, num_cells=num_cells, flip=False)
    tables = (drawn(pa.Table.from_pylist(group, schema=ROWS)) for group in _grouped(rows, mine))
    return _decoded(tables, decode_threads, prefetch_batches, coarse, pool_size, False)


def _open_set(manifest_uri: str, patch_size: int | None) -> tuple[Manifest, str]:
    folder = absolute(set_folder(manifest_uri))
    manifest = read_manifest(folder)
    _check_patch_size(manifest, folder, patch_size)
    return manifest, folder


def _check_patch_size(manifest: Manifest, what: str, patch_size: int | None) -> None:
    if patch_size not in (None, manifest.patch_size):
        raise ConfigMismatch(
            f"the set {what} was prepared for patch_size {manifest.patch_size}, the model has {patch_size}; "
            "prepare it again or change model.patch_size",
            differences={"patch_size": (manifest.patch_size, patch_size)},
        )


def _share(batch_images: int, rank: int, world_size: int) -> int:
    """Images of one rank in a global batch."""
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must lie in [0, world_size = {world_size}), got {rank}")
    if batch_images < world_size or batch_images % world_size:
        raise ValueError(
            f"batch_images counts all workers together and must be a multiple of their number ({world_size}), "
            f"got {batch_images}"
        )
    return batch_images // world_size


def _grouped(items: Iterable[dict[str, Any]], size: int) -> Iterator[list[dict[str, Any]]]:
    iterator = iter(items)
    while group := list(itertools.islice(iterator, size)):
        yield group


def _regrouped(tables: Iterable[pa.Table], size: int) -> Iterator[pa.Table]:
    """The same rows in tables of *size* rows; the last one may be shorter."""
    rest = None
    for table in tables:
        if len(table):
            rest = pa.concat_tables([rest, table]) if rest else table
            while rest and len(rest) >= size:
                yield rest.slice(0, size)
                rest = rest.slice(size)
    if rest:
        yield rest


def _decoded(
    tables: Iterable[pa.Table],
    threads: int,
    ahead: int,
    coarse: CoarseResults | None,
    pool_size: int | None,
    pinned: bool,
) -> Iterator[Batch]:
    """Decode *ahead* batches before they are asked for, each in one thread: threads that share a batch wait for the
    interpreter lock more than they decode."""
    pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
    try:
        for batch in prefetch.ahead((pool.submit(_batch, table, coarse, pool_size, pinned) for table in tables), ahead):
            yield batch.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _batch(table: pa.Table, coarse: CoarseResults | None, pool_size: int | None, pinned: bool) -> Batch:
    """The batch of rows that `fetch.with_draws` gave, with precomputed *coarse* results, if given, and the first
    *pool_size* windows of each memory."""
    size = len(table)
    height, width = (table[name][0].as_py() for name in ("height", "width"))
    # Images are decoded to where the batch will have them.
    images = np.empty((size, height, width, 3), np.uint8)
    filled = np.empty_like(images) if coarse else None
    names = ("image_id", "image", "mirrored")
    rows = zip(*(table[name].to_pylist() for name in names), strict=True)
    for place, (image_id, data, mirrored) in enumerate(rows):
        out = images[place]
        try:
            decode_rgb(data, out=out)
        except (UnreadableImage, ValueError) as error:
            raise CorruptSet(
                f"record {image_id} of the prepared set cannot be decoded ({error}); prepare it again"
            ) from None
        if mirrored:
            out[...] = mirror(out)
        if coarse and filled is not None:
            result = coarse.read(image_id, height, width)
            filled[place] = mirror(result) if mirrored else result
    pools = matrix(table["pool_yx"]).reshape(size, -1, 2)[:, :pool_size]
    masks = np.unpackbits(matrix(table["mask"]), axis=1, count=height * width)
    batch = Batch(
        image_id=table["image_id"].to_pylist(),
        image=torch.from_numpy(images).permute(0, 3, 1, 2),
        mask=torch.from_numpy(masks.reshape(size, 1, height, width)),
        pool_yx=torch.from_numpy(pools.astype(np.int64)),
        cells=torch.from_numpy(matrix(table["cells"]).astype(np.int64)),
        mix=torch.from_numpy(matrix(table["mix"]).copy()),
        filled=None if filled is None else torch.from_numpy(filled).permute(0, 3, 1, 2),
    )
    return batch.pinned() if pinned else batch
