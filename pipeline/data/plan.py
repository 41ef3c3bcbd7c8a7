"""The assignment of images to shards, fixed before the first shard is written.

Images stay in their shards when the source grows: new ones, in the order of the source, fill new shards after the last,
and a last shard that is not full stays so. The plan is a file of the set, `plan.parquet`, so a job that was stopped
finds it as it was, whatever shards it had finished.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.data.prepare_config import PrepareConfig
from pipeline.data.schema import SCHEMA_VERSION
from pipeline.data.sources.base import Source
from pipeline.data.user_masks import OwnMasks
from pipeline.errors import CorruptSet, MissingInput, VanishedImages
from pipeline.storage import join, read_bytes, redact

PLAN_NAME = "plan.parquet"
PLAN_SCHEMA = pa.schema(
    [pa.field("key", pa.large_string(), nullable=False), pa.field("shard", pa.int32(), nullable=False)]
)
_SHOWN = 3


@dataclass(frozen=True)
class ShardPlan:
    """The images of a set and their shards, in the order of the set. A number is missing if its images are gone."""

    table: pa.Table
    """Rows of `PLAN_SCHEMA`, each column in one chunk."""

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def shards(self) -> list[int]:
        """Numbers of the shards."""
        return [index for index, _ in self._parts()]

    def inputs(self, source: Source, config: PrepareConfig, masks: OwnMasks | None = None) -> dict[int, str]:
        """For each shard what identifies the things that it is made of, 16 hex: settings, keys, labels, and the files
        of images and masks as they are now, told from listings."""
        settings = json.dumps([SCHEMA_VERSION, config.settings()], sort_keys=True)
        labels = source.labels(self.table["key"].chunk(0))
        keys = self.table["key"].to_pylist()
        versions = [source.versions(keys), *([masks.versions(keys)] if masks is not None else [])]
        found = {}
        for index, rows in self._parts():
            part = self.table["key"].chunk(0)[rows].to_pylist()
            made_of: list[Any] = [settings, part, *(some[rows] for some in versions)]
            if (here := labels[rows]).null_count < len(part):
                made_of.append(here.to_pylist())
            found[index] = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:16]
        return found

    def keys(self, index: int) -> list[str]:
        """Those of the images of one shard."""
        numbers = self.table["shard"].to_numpy()
        first, end = np.searchsorted(numbers, [index, index + 1])
        return list(self.table["key"].chunk(0)[first:end].to_pylist())

    def encode(self) -> bytes:
        """The content of `plan.parquet`."""
        sink = pa.BufferOutputStream()
        pq.write_table(self.table, sink, compression="zstd", use_dictionary=["shard"])
        return bytes(sink.getvalue().to_pybytes())

    def _parts(self) -> Iterator[tuple[int, slice]]:
        """Number and rows of each shard."""
        numbers = self.table["shard"].to_numpy()
        edges = [*np.flatnonzero(np.diff(numbers, prepend=-1)).tolist(), len(numbers)]
        for start, end in itertools.pairwise(edges):
            yield int(numbers[start]), slice(start, end)


def read_plan(out: str) -> ShardPlan | None:
    """The plan of the set in the folder *out*, none if there is none yet. Raises `CorruptSet`."""
    uri = join(out, PLAN_NAME)
    try:
        table = pq.read_table(pa.BufferReader(read_bytes(uri)), schema=PLAN_SCHEMA)
    except MissingInput:
        return None
    except pa.ArrowException as error:
        raise CorruptSet(
            f"{redact(uri)} cannot be read: {error}; remove it and prepare again, shards whose images are still those "
            "of the source in its order are kept"
        ) from None
    return ShardPlan(table.combine_chunks())


def extend_plan(old: ShardPlan | None, keys: Sequence[str], config: PrepareConfig) -> ShardPlan:
    """The plan for the images *keys* of the source, in its order: the *old* one with new shards for new images.

    Raises `VanishedImages` if images of the old plan are not in the source and `vanished` is "stop"; otherwise they
    leave the plan, and their shards have to be made again.
    """
    kept = PLAN_SCHEMA.empty_table() if old is None else old.table
    listed = pa.array(keys, pa.large_string())
    stays = pc.is_in(kept["key"], value_set=listed)
    if old is not None and not pc.all(stays, min_count=0).as_py():
        gone = kept["key"].filter(pc.invert(stays))
        if config.vanished == "stop":
            shown = ", ".join(map(repr, gone.slice(0, _SHOWN).to_pylist()))
            raise VanishedImages(
                f"{len(gone)} of the {len(kept)} images of {redact(config.out)} are no longer in "
                f"{redact(config.source)}: {shown}{', ...' if len(gone) > _SHOWN else ''}; bring them back, or have "
                "their shards made again without them by vanished=drop",
                keys=gone.slice(0, 1000).to_pylist(),
            )
        kept = kept.filter(stays)
    new = listed.filter(pc.invert(pc.is_in(listed, value_set=kept["key"].combine_chunks())))
    if old is not None and len(kept) == len(old) and not len(new):
        return old
    last = pc.max(kept["shard"]).as_py()
    numbers = np.arange(len(new)) // config.images_per_shard + (0 if last is None else last + 1)
    added = pa.table({"key": new, "shard": pa.array(numbers, pa.int32())}, schema=PLAN_SCHEMA)
    return ShardPlan(pa.concat_tables([kept, added]).combine_chunks())
