"""A collection of photographs as preparation and training open it: source, keys, and the masks that belong to it."""

from __future__ import annotations

from dataclasses import dataclass as plain_dataclass
from dataclasses import fields, replace
from typing import Annotated, Any

from pydantic import Field
from pydantic.dataclasses import dataclass

from pipeline.data.contract import PhotographConfig
from pipeline.data.records import CropConfig, RecordConfig
from pipeline.data.sources.base import Source
from pipeline.data.sources.choose import open_source
from pipeline.data.user_masks import OwnMasks, open_masks
from pipeline.errors import MissingInput, StorageFailed
from pipeline.storage import UnsafeName, absolute, join
from tmad.config import STRICT, MemoryConfig, PositiveInt
from tmad.images import UnreadableImage

OUTAGES = ("bucket", "credentials", "endpoint", "connection", "timeout", "server", "full")
"""Failures of storage that are no property of an image: they end the job; run again, it continues where it
stopped. Dropping images for them would make the set depend on the network."""

UNUSABLE = (UnreadableImage, MissingInput, StorageFailed, UnsafeName)
"""What is raised for an image that cannot be used, and what `drop_of` takes."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CollectionConfig:
    """How a collection is read, how it is divided, and how much of it may be unusable."""

    root: str | None = None
    """Where the images of a list are: folder, tar file, or folder in one; default: the list's folder."""
    image_column: str | None = None
    """Column of a Parquet source with the encoded images; default: image, image_bytes, bytes or jpg."""
    key_column: str | None = None
    """Column of a Parquet source with the images' keys; default: FILE#ROW."""
    images_per_shard: PositiveInt = 512
    """Source images of one shard: the unit of work and of resuming; it also decides the order of training."""
    row_group_rows: PositiveInt = 64
    """Records that stay together in the order of training, and are read together from a prepared set."""
    max_bad_fraction: Annotated[float, Field(ge=0, le=1)] = 0.1
    """The job stops if more than this share of the images cannot be used."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ImagesConfig(CropConfig, PhotographConfig, CollectionConfig):
    """Photographs that training makes its records of as it goes. The settings are those of jobs/prepare.py, and so are
    the results; patches and memory are the model's."""

    source: str | None = None
    """Train straight from these photographs: path or URI as for jobs/prepare.py; default: from the prepared set
    data.train."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.source is None:
            plain = type(self).__dataclass_fields__
            given = [name for name, field in plain.items() if getattr(self, name) != field.default]
            if given:
                raise ValueError(
                    f"{', '.join(given)} cannot be set without source: photographs are made into records while "
                    "training only if source names them; a prepared set (data.train) has its own settings"
                )

    def with_absolute_places(self) -> ImagesConfig:
        """The same for any process, whatever its working directory."""
        source, root, masks = (place and absolute(place) for place in (self.source, self.root, self.masks))
        return replace(self, source=source, root=root, masks=masks)

    def records(self, *, patch_size: int, memory: MemoryConfig) -> RecordConfig:
        """The records that a model with these patches and this memory trains on.

        Raises `ValueError` if the crops do not fit them.
        """
        own = {field.name: getattr(self, field.name) for field in fields(CropConfig)}
        return RecordConfig(**own, patch_size=patch_size, memory=memory)


@plain_dataclass(frozen=True)
class Collection:
    """An open collection."""

    source: Source
    keys: list[str]
    masks: OwnMasks | None
    """Those of the user, where `mask_from` names any that have to be opened."""


def open_collection(
    uri: str,
    collection: CollectionConfig,
    crops: CropConfig,
    *,
    label_column: str | None = None,
    cache: str | None = None,
) -> Collection:
    """List the photographs at *uri*, and their masks; *cache* is a folder for where they lie in tar files.

    Raises what `open_source`, `Source.keys` and `open_masks` raise.
    """
    source = open_source(
        uri,
        root=collection.root,
        image_column=collection.image_column,
        key_column=collection.key_column,
        label_column=label_column,
        cache=join(cache, "source_index.arrow") if cache else None,
    )
    keys = source.keys()
    masks = open_masks(
        crops.mask_from,
        source=uri,
        images=source,
        keys=keys,
        masks=crops.masks,
        mask_column=crops.mask_column,
        rule=crops.mask_rule,
        scaled=crops.scale_masks,
        masks_per_image=crops.masks_per_image,
        cache=join(cache, "mask_index.arrow") if cache else None,
    )
    return Collection(source, keys, masks)


def drop_of(key: str, error: Exception, num_bytes: int) -> dict[str, Any]:
    """Why the image *key*, a file of *num_bytes* (0 if it was not read), cannot be used, given one of `UNUSABLE`.

    Raises *error* again if it is an outage of storage.
    """
    if isinstance(error, UnreadableImage):
        return {"key": key, "reason": error.reason, "detail": error.detail, "bytes": num_bytes}
    if isinstance(error, StorageFailed | MissingInput) and error.details.get("kind") in OUTAGES:
        raise error
    reasons = {MissingInput: "missing", UnsafeName: "unsafe-name"}
    reason = reasons.get(type(error), "unreadable")
    return {"key": key, "reason": reason, "detail": str(error), "bytes": 0}
