"""Selects the source for a URI."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

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
    if uri.endswith(LIST_SUFFIXES):
        folder = absolute(root) if root else uri.rsplit("/", 1)[0]
        _refuse(uri, "a list of keys", image_column=image_column, key_column=key_column, label_column=label_column)
        if _IN_A_FILE.search(folder):
            return KeyList(uri, open_source(folder, cache=cache), folder)
        # Files are asked for by their names: the folder, which may be a whole file system, is not walked.
        tree = KeyList(uri, ImageTree(folder), folder)
        if tree.begins_in_root() or not any(name.lower().endswith((".tar", ".parquet")) for name in names_in(folder)):
            return tree
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
    files = {key: file for key, file in listing(uri).items() if not is_ledger(key)}
    images = [key for key in files if is_image(key, files[key])]
    tars, tables, archives = (
        tuple(key for key in files if key.lower().endswith(suffix)) for suffix in (".tar", ".parquet", ARCHIVE_SUFFIXES)
    )

    def size(keys: Iterable[str]) -> int:
        return sum(files[key].size for key in keys)

    read: Sequence[str] = tars if tars and size(tars) > size(images) else images or tars or tables
    if not read and archives:
        raise _compressed(f"{uri}/{archives[0]}")
    if size(archives) > size(read):
        raise CorruptSource(
            f"most of {redact(uri)} would not be read: {len(archives)} compressed archives ({archives[0]!r}, ...) are "
            f"larger than the {len(read)} files that can be; unpack them, or keep them in another place"
        )
    rest = tuple(key for key in files if key not in set(read))
    _tell(uri, rest, files)
    if tars and read is tars:
        return TarShards(uri, tars, cache=cache, left_out=rest)
    if read is tables and tables:
        return ParquetTable(uri, tables, image_column, key_column, label_column, left_out=rest)
    return ImageTree(uri, files)


def is_ledger(key: str) -> bool:
    """Whether an inpainting job has left *key* in a folder, beside its results."""
    return key == "ledger.parquet" or (key.startswith("ledger/") and key.endswith(".parquet"))


def _tell(uri: str, rest: Sequence[str], files: Mapping[str, Listed]) -> None:
    """One line on what is passed over."""
    if rest:
        endings = Counter(
            "links to folders" if files[key].link else _ending(key.rsplit("/", 1)[-1]) for key in rest
        ).most_common(_SHOWN)
        logger.warning(
            "%s: %d files are not read as images: %s%s; e.g. %r",
            redact(uri),
            len(rest),
            ", ".join(f"{count} {ending}" for ending, count in endings),
            ", ..." if len(endings) == _SHOWN else "",
            rest[0],
        )


def _ending(name: str) -> str:
    return "." + name.rsplit(".", 1)[1].lower() if "." in name else "without an ending"


def _compressed(uri: str) -> CorruptSource:
    return CorruptSource(
        f"{redact(uri)} is a compressed archive: no image in it can be read without all that comes before; "
        "a plain .tar, a folder of images or Parquet files are needed"
    )


def _refuse(uri: str, kind: str, **settings: str | None) -> None:
    given = [name for name, value in settings.items() if value is not None]
    if given:
        raise ValueError(f"{' and '.join(given)} cannot be used here: the source {redact(uri)} is {kind}")
