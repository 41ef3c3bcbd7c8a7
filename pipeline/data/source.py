"""Where photographs come from: a listing of stable keys, and the bytes of each.

A key names an image for ever: holes, crops and order are drawn from it, so it must not depend on where the source
lies or in which order it is listed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from pipeline.errors import MissingInput
from pipeline.storage import absolute, join, list_files, read_bytes, redact
from tmad.images import SUFFIXES


class Source(Protocol):
    """What preparation needs of a collection of images; picklable, because workers read from it."""

    def keys(self) -> list[str]:
        """Keys of all images, sorted by code point. Raises `MissingInput` if there are none."""
        ...

    def read(self, key: str) -> bytes:
        """The file of one image. Raises `MissingInput` or `StorageFailed`."""
        ...


@dataclass(frozen=True)
class ImageTree:
    """A folder with images at any depth, by URI. The key is the path below it; hidden files are not looked at."""

    uri: str

    def keys(self) -> list[str]:
        files = list_files(self.uri)
        images = [key for key in files if key.lower().endswith(SUFFIXES)]
        if not images:
            raise MissingInput(
                f"there is no image in {redact(self.uri)}: of {len(files)} files none ends in one of "
                f"{', '.join(SUFFIXES)}"
            )
        return images

    def read(self, key: str) -> bytes:
        return read_bytes(join(self.uri, key))


def open_source(uri: str) -> Source:
    """The collection of images at *uri*."""
    return ImageTree(absolute(uri))
