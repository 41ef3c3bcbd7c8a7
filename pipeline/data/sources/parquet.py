"""Parquet tables with a column of image files, as Hugging Face and many pipelines write them."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.data.sources.base import Indexed, sorted_by_key, without
from pipeline.errors import CorruptSource, MissingInput
from pipeline.storage import open_file, redact

IMAGE_COLUMNS = ("image", "image_bytes", "bytes", "jpg")
"""Where images are looked for if no column is named."""

_READERS = 8

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ParquetTable(Indexed):
    """The images in one Parquet file, or in all those of a folder; a part of a struct is named `column.part`.

    The key is the value of *key_column*, without it `FILE#ROW` (rows from 0). A row group is read at once and kept
    until a key of another one is asked for, so keys come in the order of files and rows.
    """

    uri: str
    """A Parquet file, or the folder of *files*."""
    files: tuple[str, ...] = ()
    """Parquet files below the folder; empty if *uri* is the file."""
    image_column: str | None = None
    """Column of encoded images: bytes, or Hugging Face's struct of bytes and path; default: the first of
    `IMAGE_COLUMNS` that is there."""
    key_column: str | None = None
    """Column of keys."""
    label_column: str | None = None
    """Column of labels, whole numbers."""
    image_setting: str = "image_column"
    """The setting that names *image_column*, for messages."""
    left_out: tuple[str, ...] = field(default=(), repr=False, compare=False)
    """Files of the folder that are of another kind."""
    _held: list[tuple[tuple[int, int], pa.ChunkedArray]] = field(
        default_factory=list, init=False, repr=False, compare=False
    )

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_held": []}

    def keys(self) -> list[str]:
        """Keys of the rows, in the order of files and rows."""
        if not len(self._index):
            none = "no row has a key" if self._listed[1] else "no row"
            raise MissingInput(f"there is no image in {redact(self.uri)}: {none} in {len(self._uris)} Parquet file(s)")
        by_place = [(name, "ascending") for name in ("file", "group", "row")]
        return list(self._index.sort_by(by_place)["key"].to_pylist())

    def read(self, key: str) -> bytes:
        """The bytes of one row; those of no image are empty."""
        place = self._place(key)
        group = place["file"], place["group"]
        if not self._held or self._held[0][0] != group:
            with _opened(self._uris[place["file"]]) as parquet:
                column = self._image_column(self._uris[place["file"]], parquet.schema_arrow)
                self._held[:] = [(group, _read(parquet, column, place["group"]))]
        return self._held[0][1][place["row"]].as_py() or b""

    def beside(self) -> dict[str, str]:
        """Files of the folder that are of another kind; rows without a key, or with the key of an earlier row."""
        return {**super().beside(), **self._listed[1]}

    @property
    def _index(self) -> pa.Table:
        return self._listed[0]

    @cached_property
    def _listed(self) -> tuple[pa.Table, dict[str, str]]:
        """Where every image lies, and the rows that have no key of their own, as `FILE#ROW`. Made where keys are listed
        and carried along to the workers."""
        with ThreadPoolExecutor(_READERS) as pool:
            rows = pa.concat_tables(pool.map(self._list_file, range(len(self._uris)))).combine_chunks()
        nameless = pc.is_null(rows["key"])
        table, again = sorted_by_key(rows.filter(pc.invert(nameless)))
        odd = dict.fromkeys(self._row_names(rows.filter(nameless)), "no-key")
        odd |= dict.fromkeys(self._row_names(table.take(again)), "same-key")
        if odd:
            logger.warning(
                "%s: %d rows have no key of their own in column %r and are left out, %s first",
                *(redact(self.uri), len(odd), self.key_column, next(iter(odd))),
            )
        return without(table, again).drop_columns(["at"]), odd

    def _row_names(self, table: pa.Table) -> list[str]:
        return [f"{self._name(row['file'])}#{row['at']}" for row in table.select(["file", "at"]).to_pylist()]

    def _name(self, number: int) -> str:
        return self.files[number] if self.files else self.uri.rsplit("/", 1)[-1]

    def _list_file(self, number: int) -> pa.Table:
        uri = self._uris[number]
        with _opened(uri) as parquet:
            self._image_column(uri, parquet.schema_arrow)
            rows = [parquet.metadata.row_group(group).num_rows for group in range(parquet.num_row_groups)]
            total = sum(rows)
            if self.key_column:
                keys = self._cast(uri, parquet, self.key_column, pa.large_string())
            else:
                keys = pa.array([f"{self._name(number)}#{row}" for row in range(total)], pa.large_string())
            labels = self._cast(uri, parquet, self.label_column, pa.int64()) if self.label_column else None
        numbers = {
            "at": np.arange(total),
            "file": np.full(total, number),
            "group": np.repeat(np.arange(len(rows)), rows),
            "row": np.concatenate([np.arange(count) for count in rows] or [np.arange(0)]),
        }
        columns = {name: pa.array(values, pa.int64()) for name, values in numbers.items()}
        return pa.table({"key": keys, **columns, "label": pa.nulls(total, pa.int64()) if labels is None else labels})

    def _image_column(self, uri: str, schema: pa.Schema) -> str:
        """The column of encoded images, as `image` or `image.bytes`."""
        name = self.image_column or next((name for name in IMAGE_COLUMNS if name in schema.names), IMAGE_COLUMNS[0])
        kind = _type_of(uri, schema, name, self.image_setting)
        if pa.types.is_struct(kind) and "bytes" in [one.name for one in kind]:
            name, kind = f"{name}.bytes", kind.field("bytes").type
        if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
            raise CorruptSource(
                f"column {name!r} of {redact(uri)} holds {kind}, encoded images (binary) are needed; "
                f"set {self.image_setting}; {_columns(schema)}"
            )
        return name

    def _cast(self, uri: str, parquet: pq.ParquetFile, name: str, kind: pa.DataType) -> pa.ChunkedArray:
        setting = "key_column" if name == self.key_column else "label_column"
        found = _type_of(uri, parquet.schema_arrow, name, setting)
        try:
            return _read(parquet, name).cast(kind)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            where = f"column {name!r} of {redact(uri)} ({found})"
            raise CorruptSource(f"{where} cannot be the {setting}: {error}") from None


@contextmanager
def _opened(uri: str) -> Iterator[pq.ParquetFile]:
    with open_file(uri) as file:
        try:
            parquet = pq.ParquetFile(file, pre_buffer=True)
        except pa.ArrowInvalid as error:
            raise CorruptSource(f"{redact(uri)} is no Parquet file or was cut off: {error}") from None
        yield parquet


def _read(parquet: pq.ParquetFile, name: str, group: int | None = None) -> pa.ChunkedArray:
    """One column (or part of a struct) of a row group; default: of all."""
    options = {"columns": [name], "use_threads": False}
    table = parquet.read(**options) if group is None else parquet.read_row_group(group, **options)
    column = table.column(0)
    for part in name.split(".")[1:]:
        column = pc.struct_field(column, part)
    return column


def _type_of(uri: str, schema: pa.Schema, name: str, setting: str) -> pa.DataType:
    first, *parts = name.split(".")
    kind = schema.field(first).type if first in schema.names else None
    for part in parts:
        if kind is not None:
            inside = pa.types.is_struct(kind) and kind.get_field_index(part) >= 0
            kind = kind.field(part).type if inside else None
    if kind is None:
        raise CorruptSource(f"{redact(uri)} has no column {name!r}; set {setting}; {_columns(schema)}")
    return kind


def _columns(schema: pa.Schema) -> str:
    return "its columns are " + ", ".join(f"{one.name} ({one.type})" for one in schema)
