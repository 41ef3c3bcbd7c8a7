"""Precomputed coarse results that replace the coarse network's (Table V): one file per image, matched by stem.

The result of the image `a/b.jpg` is `a/b` with any ending, of the size of the set's crops. It fills the hole of the one
mask that each image has; what it shows outside is not looked at.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np

from pipeline import storage
from pipeline.data.user_masks import stem_of
from pipeline.errors import CorruptSource, MissingInput
from tmad.images import SUFFIXES, UnreadableImage, decode_rgb


class CoarseResults:
    """The pictures in the folder *uri*; listed when the first one is asked for."""

    def __init__(self, uri: str) -> None:
        self.uri = uri

    @cached_property
    def keys(self) -> dict[str, str]:
        """Key of each picture by what it is the result of. Raises `CorruptSource` if an image has two."""
        found: dict[str, str] = {}
        for key in storage.list_files(self.uri, tuple(SUFFIXES)):
            if (other := found.setdefault(stem_of(key), key)) != key:
                raise CorruptSource(f"{storage.redact(self.uri)} has two results of one image: {other} and {key}")
        return found

    def read(self, image_id: str, height: int, width: int) -> np.ndarray:
        """The result of the record *image_id*, `<key of the image>#<number of the crop>`, (height, width, 3), uint8.

        Raises `MissingInput` if there is none, `CorruptSource` for a picture that cannot be decoded or has another
        size.
        """
        name = stem_of(image_id.rpartition("#")[0])
        if (key := self.keys.get(name)) is None:
            where = storage.redact(self.uri)
            raise MissingInput(f"no result of {image_id}: looked for {name} with any ending in {where}")
        place = storage.join(self.uri, key)
        try:
            picture = decode_rgb(storage.read_bytes(place))
        except UnreadableImage as error:
            raise CorruptSource(f"the result {storage.redact(place)} cannot be decoded: {error}") from None
        if picture.shape[:2] != (height, width):
            found = f"{picture.shape[1]}x{picture.shape[0]}"
            raise CorruptSource(
                f"the result {storage.redact(place)} has {found} pixels, the record {image_id} {width}x{height}: "
                "results are of the crops; prepare images that have their size already"
            )
        return picture
