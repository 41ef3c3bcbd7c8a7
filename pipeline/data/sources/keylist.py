"""A text file of image names and their root folder, such as the official lists of Places365."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.data.sources.base import Index, Source, make_index_table
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
        keys = self._index.keys()
        if not keys:
            raise MissingInput(f"the list {redact(self.uri)} names no image")
        if not self.begins_in_root():
            tried = keys[:_TRIED]
            if not exists(self.root_uri) and isinstance(self.root, ImageTree):
                raise MissingInput(f"there is no folder {redact(self.root_uri)}, where {redact(self.uri)} begins")
            raise MissingInput(
                f"none of the first {len(tried)} images of {redact(self.uri)} is in {redact(self.root_uri)}: "
                f"looked for {', '.join(map(repr, tried))}; {self._there()}; set root to the place that the list's "
                f"paths begin at {self._advice(tried)}"
            )
        return keys

    def begins_in_root(self) -> bool:
        """Whether one of the first few images is in *root*."""
        return any(map(self._is_there, self._index.keys()[:_TRIED]))

    def _there(self) -> str:
        if isinstance(self.root, ImageTree):
            found = names_in(self.root_uri)
            return f"there is {', '.join(map(repr, found[:3]))}" if found else "there is nothing"
        return f"there is {self.root.keys()[0]!r}"

    def _advice(self, tried: Sequence[str]) -> str:
        if not is_remote(self.root_uri) and any(os.path.isfile("/" + key) for key in tried):
            return "(they are absolute: --root /)"
        return "(--root FOLDER; ARCHIVE.tar/FOLDER for one inside an archive)"

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

    def label(self, key: str) -> int | None:
        """The number on its line, else what *root* says."""
        own = self._index.label(key)
        return self.root.label(key) if own is None else own

    def labels(self, keys: pa.Array) -> pa.Array:
        """Those of `label`, all at once."""
        own = self._index.labels(keys)
        return pc.coalesce(own, self.root.labels(keys)) if own.null_count else own

    def compare_with_root(self) -> tuple[list[str], list[str]]:
        """Keys of the list that *root* does not hold, and keys of *root* that the list does not name."""
        mine, theirs = self._index.table["key"], pa.array(self.root.keys(), pa.large_string())
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
    def _index(self) -> Index:
        """Line and label of every key. Made where keys are listed and carried along to the workers."""
        # A name that is no UTF-8 gets a backslash, and is left out with the other odd ones when it is read.
        data = read_bytes(self.uri)
        if 4 * data.count(0) > len(data):  # a zero byte in one name makes that name odd, not the list
            raise CorruptSource(f"the list {redact(self.uri)} is no text in UTF-8: it has zero bytes, as UTF-16 has")
        text = data.decode("utf-8-sig", "backslashreplace")
        keys: list[str] = []
        lines: list[int] = []
        labels: list[int | None] = []
        for number, line in enumerate(map(str.strip, text.split("\n")), start=1):
            if not line or line.startswith("#"):
                continue
            match = _LINE.fullmatch(line)
            key = match.group(1) if match else line
            keys.append("/".join(part for part in key.split("/") if part not in ("", ".")) or line)
            lines.append(number)
            labels.append(int(match.group(2)) if match and match.group(2) else None)
        return self._without_repeated(Index(make_index_table(keys, line=lines, label=labels)))

    def _without_repeated(self, index: Index) -> Index:
        """Each image once. Raises `CorruptSource` for one of two classes, as nobody can say which is meant."""
        repeated = index.repeated()
        if not repeated.size:
            return index
        labels = index.table["label"]
        contrary = [row for row in map(int, repeated) if labels[row].as_py() != labels[row - 1].as_py()]
        shown = [
            f"{index.table['key'][row].as_py()!r} in lines {index.table['line'][row - 1]} and "
            f"{index.table['line'][row]}"
            for row in (contrary or list(map(int, repeated)))[:3]
        ]
        if contrary:
            raise CorruptSource(
                f"{redact(self.uri)} gives {len(contrary)} images two labels: {'; '.join(shown)}; an image has one"
            )
        logger.warning("%s names %d images twice; each is taken once: %s", redact(self.uri), len(repeated), shown[0])
        once = np.ones(len(index), bool)
        once[repeated] = False
        return Index(index.table.filter(pa.array(once)))
