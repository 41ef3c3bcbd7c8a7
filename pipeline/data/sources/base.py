"""The interface of a collection of images: stable keys, the bytes of each, labels where available.

A key names an image for ever: holes, crops and order are drawn from it, so it must not depend on where the source
lies or in which order it is listed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import MissingInput
from pipeline.storage import join, redact, version


class Source(ABC):
    """A collection of images; picklable, because workers read from it."""

    @abstractmethod
    def keys(self) -> list[str]:
        """Keys of all images in an order that depends on the content alone: by code point, or as storage is read
        without jumping. Raises `MissingInput` if there are none, `CorruptSource` if it cannot be listed."""

    @abstractmethod
    def read(self, key: str) -> bytes:
        """The file of one image. Raises `MissingInput` or `StorageFailed`."""

    def runs(self, keys: Sequence[str]) -> list[Sequence[str]] | None:
        """*keys*, in their order, as runs that `read_run` reads by one request each; `None` where requests for several
        at once gain nothing: on local disks, or where reading one brings the next."""
        return None

    def read_run(self, keys: Sequence[str]) -> list[bytes]:
        """The files of one of `runs`. Raises as `read` does."""
        return [self.read(key) for key in keys]

    def beside(self) -> Mapping[str, str]:
        """What else lies where the images do and is not read: keys, and a short reason for each."""
        return {}

    @abstractmethod
    def versions(self, keys: Sequence[str]) -> list[str]:
        """A text for each of *keys* that changes when its file is replaced, without reading it; empty for one that is
        not there."""

    def labels(self, keys: pa.Array) -> pa.Array:
        """The class that the collection gives each image, int64, null where it gives none."""
        return pa.nulls(len(keys), pa.int64())


class Indexed(Source):
    """Images in files, with a table of their places: columns `key`, `label` and whole numbers, sorted by key.

    An Arrow table of millions of keys goes to the workers once a machine and is not copied there.
    """

    uri: str
    files: tuple[str, ...]
    left_out: tuple[str, ...]

    @property
    def _index(self) -> pa.Table:
        raise NotImplementedError

    @property
    def _uris(self) -> Sequence[str]:
        return [join(self.uri, file) for file in self.files] if self.files else [self.uri]

    def _find(self, key: str) -> dict[str, Any] | None:
        keys = whole(self._index["key"])
        row = bisect_left(keys, key, key=lambda one: one.as_py())
        found = row < len(keys) and keys[row].as_py() == key
        return self._index.slice(row, 1).to_pylist()[0] if found else None

    def _place(self, key: str) -> dict[str, Any]:
        if (place := self._find(key)) is None:
            raise MissingInput(f"there is no {key!r} in {redact(self.uri)}")
        return place

    def beside(self) -> dict[str, str]:
        """Files of the folder that are of another kind."""
        return dict.fromkeys(self.left_out, "not-read")

    def versions(self, keys: Sequence[str]) -> list[str]:
        """The version of the file that holds each, and its place there."""
        files = [version(uri) for uri in self._uris]
        names = [name for name in self._index.column_names if name not in ("key", "file")]
        places = zip(*(column.to_pylist() for column in take(self._index, keys, "file", *names)), strict=True)
        return ["" if file is None else f"{files[file]} {rest}" for file, *rest in places]

    def labels(self, keys: pa.Array) -> pa.Array:
        """Those in the table."""
        (labels,) = take(self._index, keys, "label")
        return labels


def index_of(keys: list[str], **numbers: list[int] | list[int | None]) -> pa.Table:
    """A table of *keys* with whole numbers for each, in the order given."""
    columns = {name: pa.array(values, pa.int64()) for name, values in numbers.items()}
    return pa.table({"key": pa.array(keys, pa.large_string()), **columns})


def sorted_by_key(table: pa.Table) -> tuple[pa.Table, np.ndarray]:
    """*table* sorted by its column `key`, equal keys in their order; and the rows whose key is also that of the row
    before."""
    table = table.take(pc.sort_indices(table["key"])).combine_chunks()
    keys = table["key"]
    same = pc.equal(keys.slice(1), keys.slice(0, max(len(keys) - 1, 0)))
    return table, np.flatnonzero(same.to_numpy()) + 1


def without(table: pa.Table, rows: np.ndarray) -> pa.Table:
    """*table* without these *rows*."""
    return table.take(np.delete(np.arange(len(table)), rows)).combine_chunks() if rows.size else table


def take(table: pa.Table, keys: Sequence[str] | pa.Array, *names: str) -> list[pa.Array]:
    """The columns *names* of *table* at the rows of *keys*, null where there is none."""
    keys = keys if isinstance(keys, pa.Array) else pa.array(keys, pa.large_string())
    rows = pc.index_in(keys, value_set=whole(table["key"]))
    return [whole(table[name]).take(rows) for name in names]


def whole(column: pa.ChunkedArray) -> pa.Array:
    """`column.combine_chunks()`, but nothing is copied where there is one chunk."""
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
