"""Exact and near duplicates, within a set or across two sets, found by sorting.

Of copies the first in the order of the set stays: that of the source, with what came later at the end. 24 bytes
an image are compared (digest and perceptual hash), and nothing is decoded again.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.data.contract import FACTS_SCHEMA, NO_HASH, ContractConfig
from pipeline.data.schema import read_manifest, set_folder
from pipeline.errors import CorruptSet, MissingInput, SharedImages
from pipeline.storage import absolute, join, read_bytes, redact

SET_WIDE = ("duplicate", "near-duplicate", "in-other-set")
"""Reasons to leave an image out that depend on other images."""
HASH_BITS = 64


@dataclass(frozen=True)
class Facts:
    """The facts of a set's images (`contract.FACTS_SCHEMA`), a shard after the other: the order of the source."""

    table: pa.Table
    shards: Sequence[int]
    """Numbers of the shards."""
    shard_starts: np.ndarray
    """Position of each shard's first image, and the number of images at the end."""

    @cached_property
    def hashes(self) -> np.ndarray:
        """(N,), uint64."""
        return self.table["hash"].to_numpy()

    @cached_property
    def digests(self) -> np.ndarray:
        """(N, 2), uint64: the two halves of each digest."""
        chunks = [chunk for chunk in self.table["digest"].chunks if len(chunk)]
        words = [np.frombuffer(chunk.buffers()[1], np.uint64, 2 * len(chunk), 16 * chunk.offset) for chunk in chunks]
        return np.concatenate(words).reshape(-1, 2) if words else np.empty((0, 2), np.uint64)

    def key(self, position: int) -> str:
        """Key of the image at *position*."""
        return str(self.table["key"][position].as_py())

    def shard_of(self, position: int) -> int:
        """Place in `shards` of the shard that the image at *position* belongs to."""
        return int(np.searchsorted(self.shard_starts, position, side="right")) - 1


@dataclass(frozen=True)
class Copies:
    """What the comparison found."""

    dropped: list[list[dict[str, Any]]]
    """For each shard the lines of quarantine.jsonl, with `copy_of`: the key of the image that stays."""
    kept: list[dict[str, Any]]
    """Copies that stay in the set because the settings say so, as lines of the same kind."""


def facts_file(index: int) -> str:
    """Where the facts of shard number *index* lie in the folder of its set."""
    return f"facts/{index:05d}.parquet"


def encode_facts(table: pa.Table) -> bytes:
    """Rows of `contract.FACTS_SCHEMA` as the bytes of a Parquet file."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", use_dictionary=False)
    return bytes(sink.getvalue().to_pybytes())


def read_facts(folder: str, indices: Sequence[int], *, without: Sequence[str] = ()) -> Facts:
    """Facts of the shards with these numbers, except for the keys *without*. Raises `MissingInput` or `CorruptSet`."""
    left_out = pa.array(without, pa.string())

    def read(index: int) -> pa.Table:
        uri = join(folder, facts_file(index))
        try:
            table = pq.read_table(pa.BufferReader(read_bytes(uri)), schema=FACTS_SCHEMA)
        except pa.ArrowException as error:
            raise CorruptSet(f"{redact(uri)} cannot be read: {error}; remove it and prepare again") from None
        return table.filter(pc.invert(pc.is_in(table["key"], value_set=left_out))) if without else table

    with ThreadPoolExecutor(16) as pool:
        tables = list(pool.map(read, indices))
    starts = np.cumsum([0, *(len(table) for table in tables)])
    return Facts(pa.concat_tables(tables) if tables else FACTS_SCHEMA.empty_table(), indices, starts)


def read_other_facts(uri: str) -> Facts:
    """Facts of the images that the finished prepared set at *uri* holds. Raises `MissingInput` if it has none, and what
    `read_manifest` raises."""
    folder = set_folder(absolute(uri))
    indices = [int(shard.file.rsplit("/", 1)[-1].split(".")[0]) for shard in read_manifest(folder).shards]
    try:
        lines = read_bytes(join(folder, "quarantine.jsonl")).splitlines()
        return read_facts(folder, indices, without=[json.loads(line)["key"] for line in lines])
    except MissingInput as error:
        raise MissingInput(
            f"the set {redact(folder)} cannot be compared with: {error.message}; it was prepared by an older version, "
            "prepare it again into another folder"
        ) from None


def find_copies(facts: Facts, other: Facts | None, config: ContractConfig) -> Copies:
    """Which images of *facts* are copies, of one in *other* or of an earlier one, and what becomes of them.

    An image is compared only with images that stay: what looks like a copy that is left out is not left out for that.
    Raises `SharedImages` if there is one of *other* and `shared_images` is "stop".
    """
    digests, hashes = facts.digests, facts.hashes
    found: list[tuple[int, str, str, str]] = []
    alone = np.ones(len(hashes), bool)

    def note(positions: np.ndarray, originals: np.ndarray, owner: Facts, reason: str, exactly: bool) -> None:
        for position, original in zip(positions.tolist(), originals.tolist(), strict=True):
            key = owner.key(original)
            name = f"{key} of the other set" if owner is other else key
            bits = int(np.bitwise_count(hashes[position] ^ owner.hashes[original]))
            alike = f"looks like {name} ({bits} of {HASH_BITS} bits differ)"
            found.append((position, reason, f"the same bytes as {name}" if exactly else alike, key))
        alone[positions] = False

    if other is not None:
        shared, originals = equal_in(digests, other.digests)
        note(shared, originals, other, "in-other-set", exactly=True)
        left = np.flatnonzero(alone)
        shared, originals = similar_in(hashes[left], other.hashes, config.near_distance)
        note(left[shared], originals, other, "in-other-set", exactly=False)
        if found and config.shared_images == "stop":
            shown = "; ".join(f"{facts.key(position)}: {detail}" for position, _, detail, _ in sorted(found)[:3])
            raise SharedImages(
                f"{len(found)} images are also in {redact(str(config.against))} ({shown}); take them out of one of the "
                "two collections, or leave them out of this set with shared_images=drop",
                keys=[facts.key(position) for position, *_ in sorted(found)],
            )
    left = np.flatnonzero(alone)
    first = first_equal(digests[left])
    again = np.flatnonzero(first != np.arange(left.size))
    note(left[again], left[first[again]], facts, "duplicate", exactly=True)
    left = np.flatnonzero(alone)
    first = first_similar(hashes[left], config.near_distance)
    again = np.flatnonzero(first != np.arange(left.size))
    note(left[again], left[first[again]], facts, "near-duplicate", exactly=False)

    stays = {"duplicate": config.exact_duplicates == "keep", "near-duplicate": config.near_duplicates == "keep"}
    copies = Copies(dropped=[[] for _ in facts.shard_starts[1:]], kept=[])
    sizes = facts.table["bytes"]
    for position, reason, detail, copy_of in sorted(found):
        line = {"key": facts.key(position), "reason": reason, "detail": detail, "bytes": sizes[position].as_py()}
        (copies.kept if stays.get(reason) else copies.dropped[facts.shard_of(position)]).append(
            {**line, "copy_of": copy_of}
        )
    return copies


def first_equal(digests: np.ndarray) -> np.ndarray:
    """For each of *digests* (N, 2), uint64, the position of the first equal one: its own if there is none before."""
    order = np.lexsort((digests[:, 1], digests[:, 0]))  # stable, so that equal ones stay in order
    ordered = digests[order]
    starts = np.ones(len(order), bool)
    starts[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    first = np.empty(len(order), np.int64)
    first[order] = order[np.flatnonzero(starts)[np.cumsum(starts) - 1]] if len(order) else order
    return first


def equal_in(digests: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions in *digests* (N, 2) of what *others* (M, 2) hold too, and the position of each in *others*."""
    first = first_equal(np.concatenate([others, digests]))[len(others) :]
    positions = np.flatnonzero(first < len(others))
    return positions, first[positions]


def first_similar(hashes: np.ndarray, distance: int) -> np.ndarray:
    """For each of *hashes* (N,), uint64, the position of the first one within *distance* bits that is no copy itself:
    its own if there is none. `NO_HASH` is like nothing."""
    values, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    one, two = similar_values(values, distance)
    swap = first[one] > first[two]
    earlier, later = np.where(swap, two, one), np.where(swap, one, two)
    original = np.arange(values.size)
    by_place = np.lexsort((first[earlier], first[later]))
    for a, b in zip(earlier[by_place].tolist(), later[by_place].tolist(), strict=True):
        if original[a] == a and original[b] == b:
            original[b] = a
    return np.where(hashes == NO_HASH, np.arange(hashes.size), first[original[inverse]])


def similar_in(hashes: np.ndarray, others: np.ndarray, distance: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions in *hashes* (N,), uint64, of those within *distance* bits of one of *others* (M,), and the position of
    the first such one in *others*."""
    values, inverse = np.unique(np.concatenate([others, hashes]), return_inverse=True)
    nowhere = others.size
    place = np.full(values.size, nowhere)
    np.minimum.at(place, inverse[: others.size], np.arange(others.size))
    nearest = place.copy()
    one, two = similar_values(values, distance)
    np.minimum.at(nearest, one, place[two])
    np.minimum.at(nearest, two, place[one])
    nearest = np.where(hashes == NO_HASH, nowhere, nearest[inverse[others.size :]])
    positions = np.flatnonzero(nearest < nowhere)
    return positions, nearest[positions]


def similar_values(values: np.ndarray, distance: int) -> tuple[np.ndarray, np.ndarray]:
    """All pairs of different *values* (N,), uint64, that differ in at most *distance* bits: two arrays of positions.

    The 64 bits are cut into `distance + m` blocks. Two values that differ in at most *distance* bits agree in m blocks
    at least, so sorting by every choice of m blocks brings them together (Norouzi et al., "Fast Search in Hamming
    Space with Multi-Index Hashing", CVPR 2012). m grows with the logarithm of N, so that those that meet by chance stay
    about as many as the values. `NO_HASH` is in no pair.
    """
    positions = np.flatnonzero(values != NO_HASH)
    if distance == 0 or positions.size < 2:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    agreeing = 1
    while (
        HASH_BITS * agreeing < np.log2(positions.size) * (distance + agreeing) and distance + agreeing < HASH_BITS // 4
    ):
        agreeing += 1
    edges = np.linspace(0, HASH_BITS, distance + agreeing + 1).astype(int)
    blocks = [sum(1 << bit for bit in range(low, high)) for low, high in itertools.pairwise(edges.tolist())]
    pairs = [
        _meeting(values, positions, np.uint64(sum(chosen)), distance)
        for chosen in itertools.combinations(blocks, agreeing)
    ]
    both = np.unique(np.concatenate(pairs), axis=0)
    return both[:, 0], both[:, 1]


def _meeting(values: np.ndarray, positions: np.ndarray, mask: np.uint64, distance: int) -> np.ndarray:
    """(K, 2): pairs of *positions*, the smaller first, whose values agree under *mask* and differ little elsewhere."""
    masked = values[positions] & mask
    order = np.argsort(masked, kind="stable")
    masked, ordered = masked[order], positions[order]
    pairs = [np.empty((0, 2), np.int64)]
    # Places whose value equals the one `step` places on; what is not equal there is not equal further on.
    places = np.arange(masked.size)
    for step in itertools.count(1):
        places = places[: np.searchsorted(places, masked.size - step)]
        places = places[masked[places] == masked[places + step]]
        if places.size == 0:
            break
        one, two = ordered[places], ordered[places + step]
        close = np.bitwise_count(values[one] ^ values[two]) <= distance
        pairs.append(np.stack([np.minimum(one, two)[close], np.maximum(one, two)[close]], axis=1))
    return np.concatenate(pairs)
