"""Tar files, read in place: the plain archives of Places365 and the shards of the WebDataset convention.

Nothing is unpacked. The headers are walked once, which gives the place of every image; an image is one ranged read
then, and neighbours are fetched together. A compressed archive has no such places and is refused.
"""

from __future__ import annotations

import json
import logging
import re
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import feather

from pipeline.data.sources.base import Indexed, index_of, sorted_by_key, without
from pipeline.errors import CorruptSource, MissingInput
from pipeline.storage import (
    exists,
    is_hidden,
    is_remote,
    open_file,
    read_bytes,
    read_range,
    redact,
    version,
    write_atomic,
)
from tmad.images import PICTURES, SUFFIXES

logger = logging.getLogger(__name__)

READ_AHEAD = 8 * 2**20
"""Bytes fetched from remote storage at a time while headers are walked. Members smaller than this pass by in the
stream, which is faster than a request for each of their headers; larger ones are skipped."""

RUN_BYTES = 4 * 2**20
"""Members that lie one after the other are fetched from remote storage in pieces of at most this size."""
_GAP_BYTES = 2**16

_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK": "zip"}
_WHOLE_NUMBER = re.compile(rb"-?\d{1,18}")
_WALKERS = 8


@dataclass(frozen=True)
class TarShards(Indexed):
    """The images in one tar file, or in all those of a folder.

    The key is the member's name without `./` and `/` before it. If a key occurs in two files, every key of the
    collection gets its file's name in front (`train-000.tar/0001.jpg`). Within a file the last member of a name counts,
    as when it is unpacked. Hidden members (a part of the name begins with a dot) are not looked at. A member
    `NAME.cls` with a whole number is the label of the images whose name up to the first dot is NAME.
    """

    uri: str
    """A tar file, or the folder of *files*."""
    files: tuple[str, ...] = ()
    """Tar files below the folder; empty if *uri* is the file."""
    below: str = ""
    """A folder in the archive: only what lies below it, with keys relative to it."""
    cache: str | None = None
    """File that keeps the places of the images, so that the archives are walked once and not at every start."""
    left_out: tuple[str, ...] = field(default=(), repr=False, compare=False)
    """Files of the folder that are of another kind."""

    def keys(self) -> list[str]:
        """Names of the images. The first call walks the archives, or reads what an earlier one kept."""
        if not len(self._index):
            where = f" below {self.below}/" if self.below else ""
            raise MissingInput(
                f"there is no image in {redact(self.uri)}: no member{where} ends in one of {', '.join(SUFFIXES)}"
            )
        return list(self._index["key"].to_pylist())

    def read(self, key: str) -> bytes:
        """The bytes of one member, by one ranged read."""
        place = self._place(key)
        return read_range(self._uris[place["file"]], place["offset"], place["size"])

    def runs(self, keys: Sequence[str]) -> list[Sequence[str]] | None:
        """Members that lie one after the other, up to `RUN_BYTES`."""
        if not is_remote(self.uri):
            return None
        runs: list[list[str]] = []
        places: list[dict[str, Any]] = []
        for key in keys:
            place = self._find(key)
            if places and place and _follows(places[0], places[-1], place):
                runs[-1].append(key)
                places.append(place)
            else:
                runs.append([key])
                places = [place] if place else []
        return list(runs)

    def read_run(self, keys: Sequence[str]) -> list[bytes]:
        """All of them by one ranged read."""
        places = [self._place(key) for key in keys]
        start, last = places[0]["offset"], places[-1]
        data = read_range(self._uris[last["file"]], start, last["offset"] + last["size"] - start)
        return [data[place["offset"] - start :][: place["size"]] for place in places]

    @cached_property
    def _index(self) -> pa.Table:
        """Where every image lies. Made where keys are listed and carried along to the workers."""
        with ThreadPoolExecutor(_WALKERS) as pool:
            files = zip(self.files or [""], pool.map(version, self._uris), strict=True)
            identity = [self.below, *map(list, files)]
            if self.cache and exists(self.cache):
                table = feather.read_table(pa.BufferReader(read_bytes(self.cache)))
                if json.loads(table.schema.metadata[b"made_of"]) == identity:
                    return table.combine_chunks()
            logger.info("finding the images in %d tar file(s) of %s", len(self._uris), redact(self.uri))
            tables = list(pool.map(self._list_file, range(len(self._uris))))
        table, repeated = sorted_by_key(pa.concat_tables(tables))
        if repeated.size:
            for number, (file, one) in enumerate(zip(self.files, tables, strict=True)):
                before, slash = (pa.scalar(text, pa.large_string()) for text in (file, "/"))
                named = pc.binary_join_element_wise(before, one["key"], slash)
                tables[number] = one.set_column(0, "key", named)
            table, _ = sorted_by_key(pa.concat_tables(tables))
        if self.cache:
            sink = pa.BufferOutputStream()
            feather.write_feather(table.replace_schema_metadata({"made_of": json.dumps(identity)}), sink)
            write_atomic(self.cache, sink.getvalue().to_pybytes())
        return table

    def _list_file(self, number: int) -> pa.Table:
        """Name, offset, size, label and file of every image of one archive, sorted by name."""
        uri = self._uris[number]
        table, repeated = sorted_by_key(_walk(uri, f"{self.below}/" if self.below else ""))
        if repeated.size:
            logger.info("%s holds %d images twice; the last of each name counts", redact(uri), repeated.size)
        table = without(table, repeated - 1)
        return table.append_column("file", pa.array(np.full(len(table), number), pa.int64()))


def _follows(first: dict[str, Any], last: dict[str, Any], place: dict[str, Any]) -> bool:
    """Whether one read from *first* to *place* brings little else than the members between them."""
    gap = place["offset"] - last["offset"] - last["size"]
    whole = place["offset"] + place["size"] - first["offset"]
    return bool(place["file"] == first["file"] and 0 <= gap <= _GAP_BYTES and whole <= RUN_BYTES)


def _walk(uri: str, folder: str) -> pa.Table:
    """Name, offset, size and label of every image below *folder* in the archive, in its order."""
    keys: list[str] = []
    offsets: list[int] = []
    sizes: list[int] = []
    classes: dict[str, int] = {}
    links = unread = 0
    with open_file(uri, read_ahead=READ_AHEAD) as file:
        for name, member in _members(uri, file):
            if not name.startswith(folder) or any(map(is_hidden, name.split("/"))):
                continue
            key = name.removeprefix(folder)
            if name.lower().endswith(PICTURES):
                if member.isfile() and not member.issparse():
                    keys.append(key)
                    offsets.append(member.offset_data)
                    sizes.append(member.size)
                elif not member.isdir():
                    links += 1
            elif name.endswith(".cls") and member.isfile():
                file.seek(member.offset_data)
                text = file.read(min(member.size, 32)).strip()
                if _WHOLE_NUMBER.fullmatch(text):
                    classes[_sample(key)] = int(text)
                else:
                    unread += 1
    if links:
        logger.warning("%s: %d images are links or sparse members; they are left out", redact(uri), links)
    if unread:
        logger.warning("%s: %d members .cls hold no whole number; there is no label then", redact(uri), unread)
    labels = [classes.get(_sample(key)) for key in keys]
    return index_of(keys, offset=offsets, size=sizes, label=labels)


def _members(uri: str, file: IO[bytes]) -> Iterator[tuple[str, tarfile.TarInfo]]:
    """Every member with its name, `./` and `/` before it removed. Raises `CorruptSource` saying where it broke off."""
    name = ""
    place = "at its beginning"
    try:
        with tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="backslashreplace") as archive:
            while member := archive.next():
                # Otherwise the archive remembers every member that it has met.
                archive.members.clear()  # type: ignore[attr-defined]
                name = member.name.removeprefix("./").lstrip("/")
                place = f"at the member {name!r}, before byte {archive.offset}"
                yield name, member
            place = f"after the member {name!r}, at byte {archive.offset}"
            # `tarfile` ends quietly where it can read no header; a whole archive ends with a block of zeros.
            file.seek(archive.offset)
            block = file.read(tarfile.BLOCKSIZE)
    except tarfile.TarError as error:
        if not name:
            _refuse_compressed(uri, file)
        raise CorruptSource(f"{redact(uri)} is no tar file, cut off or damaged {place}: {error}") from None
    if not block:
        logger.warning("%s ends %s without the mark of an end; was it cut off there?", redact(uri), place)
    elif any(block):
        raise CorruptSource(f"{redact(uri)} is cut off or damaged {place}: no header stands there")


def _sample(key: str) -> str:
    """What the files of one WebDataset sample have in common: the path up to the first dot of the file's name."""
    folder, slash, name = key.rpartition("/")
    return folder + slash + name.split(".", 1)[0]


def _refuse_compressed(uri: str, file: IO[bytes]) -> None:
    """Say so if what is no tar file is a compressed one."""
    file.seek(0)
    start = file.read(6)
    for mark, kind in _COMPRESSED.items():
        if start.startswith(mark):
            raise CorruptSource(
                f"{redact(uri)} is compressed ({kind}), so no image in it can be read without all that comes before; "
                "a plain .tar is needed, and as images are compressed themselves it is hardly larger"
            ) from None
