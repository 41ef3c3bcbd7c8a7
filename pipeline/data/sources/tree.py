"""A folder with images at any depth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from pipeline.errors import MissingInput
from pipeline.storage import is_remote, join, list_files, read_bytes, redact
from tmad.images import SUFFIXES


@dataclass(frozen=True)
class ImageTree:
    """A folder with images at any depth, by URI. The key is the path below it; hidden files are not looked at."""

    uri: str
    files: Sequence[str] | None = field(default=None, repr=False, compare=False)
    """What `list_files` found there, if it was asked already; stays with the process that asked."""

    def __reduce__(self) -> tuple[Any, ...]:
        return ImageTree, (self.uri,)

    def keys(self) -> list[str]:
        """Paths of the images below the folder."""
        files = list_files(self.uri) if self.files is None else self.files
        images = [key for key in files if key.lower().endswith(SUFFIXES)]
        if not images:
            raise MissingInput(
                f"there is no image in {redact(self.uri)}: of {len(files)} files none ends in one of "
                f"{', '.join(SUFFIXES)}"
            )
        return images

    def read(self, key: str) -> bytes:
        """The file below the folder."""
        return read_bytes(join(self.uri, key))

    def runs(self, keys: Sequence[str]) -> list[Sequence[str]] | None:
        """Each file by itself."""
        return [[key] for key in keys] if is_remote(self.uri) else None

    def read_run(self, keys: Sequence[str]) -> list[bytes]:
        """The one file."""
        return [self.read(key) for key in keys]

    def label(self, key: str) -> int | None:
        """None: folders are not taken for classes."""
        return None

    def labels(self, keys: pa.Array) -> pa.Array:
        """None of any."""
        return pa.nulls(len(keys), pa.int64())
