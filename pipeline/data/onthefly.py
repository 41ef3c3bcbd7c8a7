"""Training input straight from photographs: the records of a prepared set, made on demand.

The photographs are taken for the set that `prepare` would make of them if it left none out: the same shards and row
groups, which are never written. So `order` gives the same sequence, and a record is the same to the last bit, since
both come from `records.make_records`. Only the crop and the hole that a position asks for are made.

No earlier pass has left out what cannot be used. Such a position is filled by the next usable record of its shuffled
window, cyclically, which depends on seed and photographs alone, as all else does.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Any

import numpy as np
import pyarrow as pa
import ray

from pipeline.data.collection import UNUSABLE, ImagesConfig, drop_of, open_collection
from pipeline.data.contract import check_photograph
from pipeline.data.fetch import ROWS
from pipeline.data.fetch import shuffled as in_random_order
from pipeline.data.records import RecordConfig, make_records, open_as
from pipeline.data.schema import Manifest, Shard
from pipeline.data.sources.base import Source
from pipeline.data.user_masks import MaskReader, OwnMasks, join_counts, mask_warnings
from pipeline.errors import TooManyBadImages
from pipeline.runs.progress import by_reason
from pipeline.storage import redact
from tmad.config import MemoryConfig

PORTION_RECORDS = 32
"""Records of one task: a few tenths of a second of one processor."""
WINDOWS_AHEAD = 4
"""Portions that wait for the reader, finished or not, for each task that runs."""
LOOKED_AT_LEAST = 100
"""Images that are looked at before their unusable share can end the run."""

_ROWS = ROWS.append(pa.field("hole_fraction", pa.float32())).append(pa.field("drop", pa.string()))
"""What a task gives: the columns of `fetch.read_pieces`, and what `Tally` counts. `drop`, JSON: why the record that
belongs to the position cannot be used and another one stands here; else null."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Photographs:
    """What it takes to make any record; picklable, because the tasks get it."""

    source: Source
    keys: pa.LargeStringArray
    masks: OwnMasks | None
    config: ImagesConfig
    records: RecordConfig

    def record(self, number: int, variant: int, reader: MaskReader) -> dict[str, Any]:
        """The row (`_ROWS`) of record *number*, counted through the keys and the crops of each, with one of its holes.

        If it cannot be made, the entry of the quarantine, which has a `reason`. Raises `StorageFailed` in an outage.
        """
        place, crop = divmod(number, self.records.crops_per_image)
        key, data = self.keys[place].as_py(), b""
        try:
            data = self.source.read(key)
            photograph = open_as(data, self.records)
            check_photograph(photograph, self.config)
            (row,) = make_records(
                key,
                data,
                self.records,
                photograph=photograph,
                masks=reader,
                crops=range(crop, crop + 1),
                variants=range(variant, variant + 1),
            )
        except UNUSABLE as error:
            return drop_of(key, error, len(data))
        one = {"mask": row["masks"][0], "pool_yx": row["pool_yx"][0], "hole_fraction": row["hole_fraction"][0]}
        return {name: row[name] for name in ("image_id", "image", "height", "width")} | one

    def manifest(self) -> Manifest:
        """That of the set that preparation would make if it left nothing out; a shard's file is its first record.

        Its digest names keys, their masks' names, the sizes of their files and settings, not the bytes of the images,
        which nobody has read; nor their times, which are others where the same photographs have been copied to.
        """
        config, crops = self.config, self.records.crops_per_image
        sizes = [one.partition(" ")[0] for one in self.source.versions(self.keys.to_pylist())]
        shards = []
        for first in range(0, len(self.keys), config.images_per_shard):
            part = self.keys[first : first + config.images_per_shard].to_pylist()
            masks = self.masks.made_of(part) if self.masks else None
            made_of = json.dumps([part, sizes[first : first + config.images_per_shard], masks])
            digest = hashlib.sha256(made_of.encode()).hexdigest()
            shards.append(Shard(str(first * crops), len(part) * crops, 0, digest, part[0], part[-1]))
        settings = json.loads(json.dumps(asdict(config) | asdict(self.records)))
        del settings["max_bad_fraction"]
        images = len(self.keys)
        return Manifest(settings, shards, images, images, {}, images * crops, row_group_rows=config.row_group_rows)


@dataclass(frozen=True)
class LiveSet:
    """A set whose records are made while it is read, as it goes to the training workers."""

    manifest: Manifest
    config: ImagesConfig
    photographs: ray.ObjectRef[Photographs]
    """In Ray's memory: a listing of millions of keys goes to each machine once."""


def open_photographs(
    config: ImagesConfig, *, patch_size: int, memory: MemoryConfig, cache: str | None = None
) -> Photographs:
    """List the photographs at `config.source` for a model with these patches; *cache* as for `open_collection`.

    Raises `ValueError` if crops and patches do not fit together, and what `open_collection` raises.
    """
    assert config.source is not None, "photographs need a source"
    records = config.records(patch_size=patch_size, memory=memory)
    opened = open_collection(config.source, config, config, cache=cache)
    return Photographs(opened.source, pa.array(opened.keys, pa.large_string()), opened.masks, config, records)


def share(photographs: Photographs, manifest: Manifest) -> LiveSet:
    """The photographs where all workers of the running Ray reach them, for as long as this process lives."""
    return LiveSet(manifest, photographs.config, ray.put(photographs))


@dataclass
class Tally:
    """What one worker saw of images that cannot be used, since it started."""

    config: ImagesConfig
    looked: int = 0
    """Positions of the order."""
    reasons: Counter[str] = field(default_factory=Counter)
    """Those of them that another image fills, by reason."""
    _told: set[str] = field(default_factory=set)
    _mostly_hole: int = 0

    @property
    def replaced(self) -> int:
        """Positions that another image fills."""
        return self.reasons.total()

    def counted(self, tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
        """The same tables, each counted, without what was counted. Raises as `add`."""
        for table in tables:
            self.add(table)
            yield table.drop_columns(["hole_fraction", "drop"])

    def add(self, table: pa.Table) -> None:
        """Count the rows of a task, and name each unusable image once.

        Raises `TooManyBadImages` beyond `max_bad_fraction`, once `LOOKED_AT_LEAST` positions were seen.
        """
        self.looked += len(table)
        for text in table["drop"].drop_null().to_pylist():
            drop = json.loads(text)
            self.reasons[drop["reason"]] += 1
            if drop["key"] not in self._told:
                self._told.add(drop["key"])
                logger.warning(
                    "%s cannot be used, another image takes its place: %s (%s)",
                    drop["key"],
                    drop["reason"],
                    redact(drop["detail"]),
                )
        self._look_at_masks(table)
        if self.looked >= LOOKED_AT_LEAST and self.replaced > self.config.max_bad_fraction * self.looked:
            raise TooManyBadImages(
                f"{self.replaced} of {self.looked} images looked at cannot be used, more than "
                f"data.images.max_bad_fraction={self.config.max_bad_fraction:g} allows: {by_reason(self.reasons)}; "
                "the log names each one with its reason",
                reasons=dict(self.reasons),
            )

    def _look_at_masks(self, table: pa.Table) -> None:
        """Say once, of the user's own masks, if they look the other way round."""
        self._mostly_hole += int((table["hole_fraction"].to_numpy() > 0.5).sum())
        enough = self.looked - len(table) < LOOKED_AT_LEAST <= self.looked
        if enough and self.config.mask_from != "family":
            counts = join_counts([{"masks": self.looked, "mostly_hole": self._mostly_hole}])
            for warning in mask_warnings(counts, self.config.mask_from, self.config.mask_hole):
                logger.warning("%s", warning)


def make_windows(portion: dict[str, Any], *, photographs: ray.ObjectRef[Photographs]) -> pa.Table:
    """The rows (`_ROWS`) of a portion of the order (`order.chunks`), made here and now.

    Raises `TooManyBadImages` if a whole window is unusable, `StorageFailed` in an outage.
    """
    images = ray.get(photographs)
    reader = MaskReader(images.masks, max_pixels=images.records.max_pixels)

    @cache
    def made(record: int, variant: int) -> dict[str, Any]:
        return images.record(record, variant, reader)

    wanted = []
    for window in portion["pieces"]:
        firsts = [int(file) + number * images.config.row_group_rows for file, number, _ in window["groups"]]
        rows = [np.arange(first, first + group[2]) for first, group in zip(firsts, window["groups"], strict=True)]
        records = np.concatenate(rows)
        records = records[in_random_order(window["seed"], len(records))].tolist()
        variant = window["epoch"] % images.records.masks_per_image
        wanted += [(window["epoch"], variant, records, place) for place in range(window["start"], window["stop"])]
    # In the order of the source, which a Parquet table is read in.
    for record, variant in sorted({(records[place], variant) for _, variant, records, place in wanted}):
        made(record, variant)
    table = []
    for epoch, variant, records, place in wanted:
        drops: Counter[str] = Counter()
        own = made(records[place], variant)
        for record in records[place:] + records[:place]:
            row = made(record, variant)
            if "reason" not in row:
                break
            drops[row["reason"]] += 1
        else:
            raise TooManyBadImages(
                f"none of the {len(records)} images that are shuffled together can be used: {by_reason(drops)}; "
                f"the first of them is {own['key']}: {redact(own['detail'])}",
                reasons=dict(drops),
            )
        table.append({**row, "epoch": epoch, "drop": json.dumps(own) if "reason" in own else None})
    return pa.Table.from_pylist(table, schema=_ROWS)
