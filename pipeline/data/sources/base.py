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
        """*keys*, in their order, as runs that `read_run` reads by one request each; none where requests for several
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

    def label(self, key: str) -> int | None:
        """The class that the collection gives the image, none if it gives none."""
        return None

    def labels(self, keys: pa.Array) -> pa.Array:
        """The classes of many images, int64, null where there is none."""
        return pa.nulls(len(keys), pa.int64())


class Index:
    """Keys with a few whole numbers each, sorted by key and found by bisection.

    It lies in Arrow memory: an index of millions of keys goes to the workers once a machine and is not copied there.
    """

    def __init__(self, table: pa.Table) -> None:
        """*table*: column `key` and columns of whole numbers, rows in any order; equal keys keep theirs."""
        self.table = table.take(pc.sort_indices(table["key"])).combine_chunks()

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def keys(self) -> list[str]:
        """All keys, by code point."""
        return list(self.table["key"].to_pylist())

    def find(self, key: str) -> dict[str, Any] | None:
        """The numbers of *key*, none if it is not there."""
        if not self.table.num_rows:
            return None
        keys = self.table["key"].chunk(0)
        row = bisect_left(keys, key, key=lambda one: one.as_py())
        if row == len(keys) or keys[row].as_py() != key:
            return None
        return {name: self.table[name][row].as_py() for name in self.table.column_names if name != "key"}

    def label(self, key: str) -> int | None:
        """The number of *key* in the column `label`, none if it has none or is not there."""
        if self.table["label"].null_count == len(self):
            return None
        place = self.find(key)
        return None if place is None else place["label"]

    def labels(self, keys: pa.Array) -> pa.Array:
        """The numbers of *keys* in the column `label`, int64, null for those that have none or are not there."""
        if self.table["label"].null_count == len(self):
            return pa.nulls(len(keys), pa.int64())
        rows = pc.index_in(keys, value_set=self.table["key"].combine_chunks())
        return self.table["label"].combine_chunks().take(rows)

    def repeated(self) -> np.ndarray:
        """Rows of the table whose key is also that of the row before."""
        keys = self.table["key"]
        same = pc.equal(keys.slice(1), keys.slice(0, max(len(keys) - 1, 0)))
        return np.flatnonzero(same.to_numpy()) + 1


class Indexed(Source):
    """What sources have in common whose images lie in files that an `Index` tells the places of."""

    uri: str
    files: tuple[str, ...]
    left_out: tuple[str, ...]

    @property
    def _index(self) -> Index:
        raise NotImplementedError

    @property
    def _uris(self) -> Sequence[str]:
        return [join(self.uri, file) for file in self.files] if self.files else [self.uri]

    def _place(self, key: str) -> dict[str, Any]:
        place = self._index.find(key)
        if place is None:
            raise MissingInput(f"there is no {key!r} in {redact(self.uri)}")
        return place

    def beside(self) -> dict[str, str]:
        """Files of the folder that are of another kind."""
        return dict.fromkeys(self.left_out, "not-read")

    def versions(self, keys: Sequence[str]) -> list[str]:
        """The version of the file that holds each, and its place there."""
        files = [version(uri) for uri in self._uris]
        table = self._index.table
        rows = pc.index_in(pa.array(keys, pa.large_string()), value_set=table["key"].combine_chunks())
        names = [name for name in table.column_names if name not in ("key", "file")]
        places = zip(*(table[name].take(rows).to_pylist() for name in ("file", *names)), strict=True)
        return ["" if file is None else f"{files[file]} {rest}" for file, *rest in places]

    def label(self, key: str) -> int | None:
        """The class that the collection gives the image."""
        return self._index.label(key)

    def labels(self, keys: pa.Array) -> pa.Array:
        """Those of `label`, all at once."""
        return self._index.labels(keys)


def make_index_table(keys: list[str], **numbers: list[int] | list[int | None]) -> pa.Table:
    """The table that an `Index` is made of."""
    columns = {name: pa.array(values, pa.int64()) for name, values in numbers.items()}
    return pa.table({"key": pa.array(keys, pa.large_string()), **columns})
