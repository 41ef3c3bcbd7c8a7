"""Selects the source for a URI."""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pipeline.data.sources.base import Source
from pipeline.data.sources.keylist import KeyList
from pipeline.data.sources.parquet import ParquetTable
from pipeline.data.sources.tar import TarShards
from pipeline.data.sources.tree import ImageTree, is_image
from pipeline.errors import CorruptSource
from pipeline.storage import Listed, absolute, listing, names_in, redact

LIST_SUFFIXES = (".txt", ".lst", ".flist")
ARCHIVE_SUFFIXES = (".tgz", ".gz", ".bz2", ".xz", ".zst", ".zip", ".rar", ".7z")
"""Files from which no image can be read by itself."""

_SHOWN = 5

logger = logging.getLogger(__name__)

_IN_A_FILE = re.compile(r"\.(tar|parquet)(/|$)")
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
    `.flist`) a list of keys below *root* (default: the list's folder). Anything else is a folder: of the images
    and tar files in it those that hold more, else the Parquet files; what is not read is logged. The columns are
    those of a table; *cache* is a file that may keep the places of the images in archives. Raises `ValueError` for a
    setting that has no effect on this kind of source, `MissingInput` if there is no such folder, `CorruptSource` for
    compressed archives, and where these are most of a folder.
    """
    uri = absolute(uri)
    columns = {"image_column": image_column, "key_column": key_column, "label_column": label_column}
    if uri.endswith(LIST_SUFFIXES):
        folder = absolute(root) if root else uri.rsplit("/", 1)[0]
        _refuse(uri, "a list of keys", columns)
        # Files are asked for by their names: the folder, which may be a whole file system, is not walked.
        tree = KeyList(uri, ImageTree(folder), folder)
        if _IN_A_FILE.search(folder) or (
            not tree.begins_in_root() and any(name.lower().endswith((".tar", ".parquet")) for name in names_in(folder))
        ):
            return KeyList(uri, open_source(folder, cache=cache), folder)
        return tree
    _refuse(uri, "not a list of keys", {"root": root})
    source = _open(uri, columns, cache)
    if not isinstance(source, ParquetTable):
        _refuse(uri, "not a Parquet table", columns)
    return source


def _open(uri: str, columns: Mapping[str, Any], cache: str | None) -> Source:
    if uri.endswith(".tar"):
        return TarShards(uri, cache=cache)
    if inside := _IN_A_TAR.fullmatch(uri):
        return TarShards(inside[1], below=inside[2], cache=cache)
    if uri.endswith(".parquet"):
        return ParquetTable(uri, **columns)
    if uri.lower().endswith(ARCHIVE_SUFFIXES):
        raise _compressed(uri)
    files = {key: file for key, file in listing(uri).items() if not is_ledger(key)}
    images = tuple(key for key in files if is_image(key, files[key]))
    tars, tables, archives = (
        tuple(key for key in files if key.lower().endswith(suffix)) for suffix in (".tar", ".parquet", ARCHIVE_SUFFIXES)
    )

    def size(keys: Iterable[str]) -> int:
        return sum(files[key].size for key in keys)

    read = tars if tars and size(tars) > size(images) else images or tars or tables
    if not read and archives:
        raise _compressed(f"{uri}/{archives[0]}")
    if size(archives) > size(read):
        raise CorruptSource(
            f"most of {redact(uri)} would not be read: {len(archives)} compressed archives ({archives[0]!r}, ...) are "
            f"larger than the {len(read)} files that can be; unpack them, or keep them in another place"
        )
    chosen = set(read)
    rest = tuple(key for key in files if key not in chosen)
    _tell(uri, rest, files)
    if tars and read is tars:
        return TarShards(uri, tars, cache=cache, left_out=rest)
    if tables and read is tables:
        return ParquetTable(uri, tables, left_out=rest, **columns)
    return ImageTree(uri, files)


def is_ledger(key: str) -> bool:
    """Whether an inpainting job has left *key* in a folder, beside its results."""
    return key == "ledger.parquet" or (key.startswith("ledger/") and key.endswith(".parquet"))


def _tell(uri: str, rest: Sequence[str], files: Mapping[str, Listed]) -> None:
    """One line on what is passed over."""
    if not rest:
        return
    endings = [os.path.splitext(key)[1].lower() or "without an ending" for key in rest]
    kinds = Counter(
        "links to folders" if files[key].link else ending for key, ending in zip(rest, endings, strict=True)
    )
    shown = [f"{count} {kind}" for kind, count in kinds.most_common(_SHOWN)]
    more = ", ..." if len(shown) == _SHOWN else ""
    what = f"{len(rest)} files are not read as images: {', '.join(shown)}{more}; e.g. {rest[0]!r}"
    logger.warning("%s: %s", redact(uri), what)


def _compressed(uri: str) -> CorruptSource:
    return CorruptSource(
        f"{redact(uri)} is a compressed archive: no image in it can be read without all that comes before; "
        "a plain .tar, a folder of images or Parquet files are needed"
    )


def _refuse(uri: str, kind: str, settings: Mapping[str, str | None]) -> None:
    given = [name for name, value in settings.items() if value is not None]
    if given:
        raise ValueError(f"{' and '.join(given)} cannot be used here: the source {redact(uri)} is {kind}")
