"""A text file of image names and their root folder, such as the official lists of Places365."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.data.sources.base import Source, index_of, sorted_by_key, take, without
from pipeline.data.sources.tree import ImageTree
from pipeline.errors import CorruptSource, MissingInput
from pipeline.storage import UnsafeName, exists, is_remote, names_in, read_bytes, redact

logger = logging.getLogger(__name__)

_TRIED = 5
"""Keys that are looked for before the work begins."""
_LINE = re.compile(r"/*(.+?)(?:\s+(-?\d{1,18}))?")


@dataclass(frozen=True)
class KeyList(Source):
    """The images that a text file lists, one a line, read from *root*.

    A slash or `./` before the key is dropped (the training lists of Places365 have a slash, those for validation have
    none), a whole number after a blank is the label, empty lines and lines that begin with `#` are passed over.
    """

    uri: str
    """The text file."""
    root: Source
    """Where the images lie: their keys there are those of the list."""
    root_uri: str
    """The place of *root*, for messages."""

    def keys(self) -> list[str]:
        """The list's keys. Raises `MissingInput` if none of the first few is in *root*."""
        keys: list[str] = self._index["key"].to_pylist()
        if not keys:
            raise MissingInput(f"the list {redact(self.uri)} names no image")
        if not self.begins_in_root():
            tried, tree = keys[:_TRIED], isinstance(self.root, ImageTree)
            if tree and not exists(self.root_uri):
                raise MissingInput(f"there is no folder {redact(self.root_uri)}, where {redact(self.uri)} begins")
            there = names_in(self.root_uri)[:3] if tree else self.root.keys()[:1]
            advice = "(--root FOLDER; ARCHIVE.tar/FOLDER for one inside an archive)"
            if not is_remote(self.root_uri) and any(os.path.isfile("/" + key) for key in tried):
                advice = "(they are absolute: --root /)"
            raise MissingInput(
                f"none of the first {len(tried)} images of {redact(self.uri)} is in {redact(self.root_uri)}: "
                f"looked for {', '.join(map(repr, tried))}; there is {', '.join(map(repr, there)) or 'nothing'}; "
                f"set root to the place that the list's paths begin at {advice}"
            )
        return keys

    def begins_in_root(self) -> bool:
        """Whether one of the first few images is in *root*."""
        return any(map(self._is_there, self._index["key"].slice(0, _TRIED).to_pylist()))

    def read(self, key: str) -> bytes:
        """The image in *root*."""
        return self.root.read(key)

    def runs(self, keys: Sequence[str]) -> list[Sequence[str]] | None:
        """Those of *root*."""
        return self.root.runs(keys)

    def read_run(self, keys: Sequence[str]) -> list[bytes]:
        """As *root* reads them."""
        return self.root.read_run(keys)

    def versions(self, keys: Sequence[str]) -> list[str]:
        """Those of *root*."""
        return self.root.versions(keys)

    def labels(self, keys: pa.Array) -> pa.Array:
        """The numbers on their lines, else what *root* says."""
        (own,) = take(self._index, keys, "label")
        return pc.coalesce(own, self.root.labels(keys)) if own.null_count else own

    def compare_with_root(self) -> tuple[list[str], list[str]]:
        """Keys of the list that *root* does not hold, and keys of *root* that the list does not name."""
        mine, theirs = self._index["key"], pa.array(self.root.keys(), pa.large_string())
        missing = mine.filter(pc.invert(pc.is_in(mine, value_set=theirs)))
        unlisted = theirs.filter(pc.invert(pc.is_in(theirs, value_set=mine.combine_chunks())))
        return missing.to_pylist(), unlisted.to_pylist()

    def _is_there(self, key: str) -> bool:
        try:
            self.root.read(key)
        except (MissingInput, UnsafeName):
            return False
        return True

    @cached_property
    def _index(self) -> pa.Table:
        """Line and label of every key, sorted, each image once. Made where keys are listed and carried along to the
        workers. Raises `CorruptSource` for an image of two classes, as nobody can say which is meant."""
        # A name that is no UTF-8 gets a backslash, and is left out with the other odd ones when it is read.
        data = read_bytes(self.uri)
        if 4 * data.count(0) > len(data):  # a zero byte in one name makes that name odd, not the list
            raise CorruptSource(f"the list {redact(self.uri)} is no text in UTF-8: it has zero bytes, as UTF-16 has")
        keys: list[str] = []
        lines: list[int] = []
        labels: list[int | None] = []
        for number, line in enumerate(data.decode("utf-8-sig", "backslashreplace").split("\n"), start=1):
            if not (line := line.strip()) or line.startswith("#"):
                continue
            match = _LINE.fullmatch(line)
            key, label = match.groups() if match else (line, None)
            keys.append("/".join(part for part in key.split("/") if part not in ("", ".")) or line)
            lines.append(number)
            labels.append(int(label) if label else None)
        table, repeated = sorted_by_key(index_of(keys, line=lines, label=labels))
        names, numbers, classes = (table[name].take(repeated).to_pylist() for name in ("key", "line", "label"))
        firsts, others = (table[name].take(repeated - 1).to_pylist() for name in ("line", "label"))
        said = [
            f"{name!r} in lines {first} and {line}" for name, first, line in zip(names, firsts, numbers, strict=True)
        ]
        contrary = [one for one, mine, other in zip(said, classes, others, strict=True) if mine != other]
        if contrary:
            raise CorruptSource(
                f"{redact(self.uri)} gives {len(contrary)} images two labels: {'; '.join(contrary[:3])}; an image has "
                "one"
            )
        if said:
            logger.warning("%s names %d images twice; each is taken once: %s", redact(self.uri), len(said), said[0])
        return without(table, repeated)
