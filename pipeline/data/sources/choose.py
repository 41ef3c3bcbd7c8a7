"""Which source a URI is."""

from __future__ import annotations

import re

from pipeline.data.sources.base import Source
from pipeline.data.sources.keylist import KeyList
from pipeline.data.sources.parquet import ParquetTable
from pipeline.data.sources.tar import TarShards
from pipeline.data.sources.tree import ImageTree
from pipeline.errors import CorruptSource
from pipeline.storage import absolute, list_files, redact
from tmad.images import SUFFIXES

LIST_SUFFIXES = (".txt", ".lst", ".flist")
ARCHIVE_SUFFIXES = (".tgz", ".gz", ".bz2", ".xz", ".zst", ".zip", ".rar", ".7z")
"""Files from which no image can be read by itself."""

_IN_A_TAR = re.compile(r"(.+\.tar)/(.+)")


def open_source(
    uri: str,
    *,
    root: str | None = None,
    image_column: str | None = None,
    key_column: str | None = None,
    label_column: str | None = None,
    cache: str | None = None,
) -> Source:
    """The collection of images at *uri*.

    `*.tar` is an archive, `*.tar/FOLDER` what lies below a folder in it, `*.parquet` a table, `*.txt` (`.lst`,
    `.flist`) a list of keys below *root* (none = the list's folder). Anything else is a folder: a tree if there is an
    image in it, else the tar or the Parquet files in it. The columns are those of a table; *cache* is a file that may
    keep the places of the images in archives. Raises `ValueError` for a setting that has no effect on this kind of
    source, `MissingInput` if there is no such folder, `CorruptSource` for a compressed archive.
    """
    uri = absolute(uri)
    if uri.endswith(LIST_SUFFIXES):
        folder = absolute(root) if root else uri.rsplit("/", 1)[0]
        _refuse(uri, "a list of keys", image_column=image_column, key_column=key_column, label_column=label_column)
        return KeyList(uri, open_source(folder, cache=cache), folder)
    _refuse(uri, "not a list of keys", root=root)
    source = _open(uri, image_column, key_column, label_column, cache)
    if not isinstance(source, ParquetTable):
        _refuse(uri, "not a Parquet table", image_column=image_column, key_column=key_column, label_column=label_column)
    return source


def _open(
    uri: str, image_column: str | None, key_column: str | None, label_column: str | None, cache: str | None
) -> Source:
    if uri.endswith(".tar"):
        return TarShards(uri, cache=cache)
    if inside := _IN_A_TAR.fullmatch(uri):
        return TarShards(inside[1], below=inside[2], cache=cache)
    if uri.endswith(".parquet"):
        return ParquetTable(uri, (), image_column, key_column, label_column)
    if uri.lower().endswith(ARCHIVE_SUFFIXES):
        raise _compressed(uri)
    files = list_files(uri)
    tars, tables, archives = (
        tuple(file for file in files if file.lower().endswith(suffix))
        for suffix in (".tar", ".parquet", ARCHIVE_SUFFIXES)
    )
    if any(file.lower().endswith(SUFFIXES) for file in files):
        return ImageTree(uri, files)
    if tars:
        return TarShards(uri, tars, cache=cache)
    if tables:
        return ParquetTable(uri, tables, image_column, key_column, label_column)
    if archives:
        raise _compressed(f"{uri}/{archives[0]}")
    return ImageTree(uri, files)


def _compressed(uri: str) -> CorruptSource:
    return CorruptSource(
        f"{redact(uri)} is a compressed archive: no image in it can be read without all that comes before; "
        "a plain .tar, a folder of images or Parquet files are needed"
    )


def _refuse(uri: str, kind: str, **settings: str | None) -> None:
    given = [name for name, value in settings.items() if value is not None]
    if given:
        raise ValueError(f"{' and '.join(given)} cannot be used here: the source {redact(uri)} is {kind}")
