"""Receipts: the content and the omissions of each finished shard, and the totals of all.

A receipt, `shards/00000.json`, is written after its shard: a shard without one is unfinished, and so is one of another
size than its receipt says.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pipeline.data.duplicates import SET_WIDE, facts_file
from pipeline.data.prepare_config import PrepareConfig
from pipeline.data.schema import Manifest, Shard
from pipeline.storage import join, read_bytes

KINDS = ("json", "parquet")
"""Endings of a shard's two files: the receipt, the shard."""


def shard_file(index: int, ending: str) -> str:
    """Where shard number *index* (`parquet`) and its receipt (`json`) lie in the folder of the set."""
    return f"shards/{index:05d}.{ending}"


def read_receipts(out: str, inputs: Mapping[int, str], there: Mapping[str, int]) -> dict[int, dict[str, Any]]:
    """Receipts, by shard number, of the shards that are whole and made of the same *inputs*.

    *there*: the files of the set and their bytes.
    """

    def receipt_of(index: int) -> dict[str, Any] | None:
        if not {shard_file(index, "json"), facts_file(index)} <= there.keys():
            return None
        receipt: dict[str, Any] = json.loads(read_bytes(join(out, shard_file(index, "json"))))
        whole = there.get(receipt["file"]) == (receipt["size"] if receipt["rows"] else None)
        return receipt if whole and receipt["inputs"] == inputs[index] else None

    with ThreadPoolExecutor(16) as pool:
        return {receipt["index"]: receipt for receipt in pool.map(receipt_of, inputs) if receipt}


def unplanned_files(there: Iterable[str], indices: Iterable[int]) -> list[str]:
    """Those files of the set that belong to none of the shards with these numbers."""
    planned = {file for index in indices for file in (*(shard_file(index, kind) for kind in KINDS), facts_file(index))}
    return sorted(file for file in there if file.startswith(("shards/", "facts/")) and file not in planned)


def with_copies(receipt: dict[str, Any], copies: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The receipt with these copies among its drops, in place of those that it has."""
    return {**receipt, "drops": [drop for drop in receipt["drops"] if drop["reason"] not in SET_WIDE] + list(copies)}


def make_manifest(receipts: Sequence[dict[str, Any]], listed: int, config: PrepareConfig) -> Manifest:
    """The manifest of the set whose shards have these receipts, in order; *listed*: images in the source."""
    names = [field.name for field in dataclasses.fields(Shard)]
    drops = count_drops(receipts)
    return Manifest(
        settings=config.settings(),
        shards=[Shard(**{name: receipt[name] for name in names}) for receipt in receipts if receipt["rows"]],
        images_listed=listed,
        images_used=listed - sum(drops.values()),
        drops=drops,
        records=sum(receipt["rows"] for receipt in receipts),
        row_group_rows=config.row_group_rows,
    )


def count_drops(receipts: Iterable[dict[str, Any]]) -> dict[str, int]:
    """Images left out, by reason."""
    return dict(sorted(Counter(drop["reason"] for receipt in receipts for drop in receipt["drops"]).items()))
