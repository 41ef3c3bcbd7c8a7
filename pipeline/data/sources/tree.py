"""A folder with images at any depth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.data.sources.base import Source
from pipeline.errors import MissingInput
from pipeline.storage import Listed, UnsafeName, is_remote, join, listing, read_bytes, redact, version
from tmad.images import PICTURES, SUFFIXES


@dataclass(frozen=True)
class ImageTree(Source):
    """A folder with images at any depth, by URI. The key is the path below it; hidden files are not looked at.

    Pictures in formats that are not decoded are among the images: whoever reads them says so. Folders are not taken
    for classes.
    """

    uri: str
    files: Mapping[str, Listed] | None = field(default=None, repr=False, compare=False)
    """What `listing` found there, if it was asked already; stays with the process that asked."""

    def __reduce__(self) -> tuple[Any, ...]:
        return ImageTree, (self.uri,)

    def keys(self) -> list[str]:
        """Paths of the images below the folder."""
        files = self._listing()
        images = [key for key in files if is_image(key, files[key])]
        if not images:
            raise MissingInput(
                f"there is no image in {redact(self.uri)}: of {len(files)} files none ends in one of "
                f"{', '.join(SUFFIXES)}"
            )
        return images

    def beside(self) -> dict[str, str]:
        """Files that are no images by their names, and links to folders."""
        left = {key: file for key, file in self._listing().items() if not is_image(key, file)}
        return {
            key: "link" if file.link else "not-a-file" if file.special else "not-an-image" for key, file in left.items()
        }

    def versions(self, keys: Sequence[str]) -> list[str]:
        """By the listing, or one by one where there was none."""
        if self.files is None and is_remote(self.uri):
            object.__setattr__(self, "files", listing(self.uri))
        if self.files is not None:
            return [self.files[key].version if key in self.files else "" for key in keys]
        return [self._version(key) for key in keys]

    def _version(self, key: str) -> str:
        try:
            return version(join(self.uri, key))
        except UnsafeName:
            return ""

    def _listing(self) -> Mapping[str, Listed]:
        return listing(self.uri) if self.files is None else self.files

    def read(self, key: str) -> bytes:
        """The file below the folder."""
        return read_bytes(join(self.uri, key))

    def runs(self, keys: Sequence[str]) -> list[Sequence[str]] | None:
        """Each file by itself."""
        return [[key] for key in keys] if is_remote(self.uri) else None


def is_image(key: str, file: Listed) -> bool:
    """Whether *key* is a file with a picture's ending, of one that can be decoded or not."""
    return key.lower().endswith(PICTURES) and not file.link and not file.special
