"""Settings of a preparation: source, destination, and everything that determines the set's content."""

from __future__ import annotations

import dataclasses
import json
from typing import Any, Literal

import pyarrow as pa
from pydantic.dataclasses import dataclass

from pipeline.data.collection import CollectionConfig
from pipeline.data.contract import ContractConfig
from pipeline.data.records import RecordConfig
from pipeline.data.schema import record_schema, set_folder
from pipeline.data.sources.partitions import PartitionName
from pipeline.runs.lease import EXPIRY_S
from pipeline.storage import absolute, redact
from tmad.config import STRICT, PositiveFloat, check_choice
from tmad.masks import MASKS
from tmad.rng import seed_of

MAX_GROUP_BYTES = 2**30
"""A row group is put together in memory, and read at once by most readers."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PrepareConfig(RecordConfig, ContractConfig, CollectionConfig):
    """Preparation of a data set: where from, where to, how it is cut into shards."""

    source: str
    """Path or fsspec URI: folder with images at any depth, tar file (ARCHIVE.tar/FOLDER: a folder in it) or folder of
    tar files, Parquet file or folder of those, or text list of keys."""
    out: str
    """Folder of the prepared set: a path or any fsspec URI."""
    label_column: str | None = None
    """Column of a Parquet source with whole numbers that are kept as labels; default: no labels."""
    split: Literal["train", "val"] = "train"
    """What the set is for. val: an evaluation set, whose records also say how crop and holes came about, and which has
    a list of them all, evaluation_set.jsonl."""
    families: tuple[str, ...] = ()
    """Families of holes, by name in `tmad.masks.MASKS`, that a crop's holes are drawn by in turn, where one (`mask`) is
    not enough; masks_per_image must be a multiple of their number."""
    pool_pixels: bool = False
    """Keep the pixels of the memory's windows beside their coordinates, for readers outside this project: about 300 kB
    more a hole, none of which training reads."""
    expect: PartitionName | None = None
    """Official partition that the source should be: its number of images and, for a list, the presence of each are
    checked and reported in source_report.json."""
    allow_count_difference: bool = False
    """Continue, with a warning, when the source is not what `expect` says."""
    vanished: Literal["stop", "drop"] = "stop"
    """What becomes of images that the set was made of and that the source no longer has: the job stops, or their shards
    are made again without them."""
    lease_expiry_s: PositiveFloat = EXPIRY_S
    """Seconds without a sign of life after which another job may take the folder over from this one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if unknown := sorted(set(self.families) - set(MASKS)):
            raise ValueError(f"families must be of {', '.join(sorted(MASKS))}, got {', '.join(unknown)}")
        check_choice(self, "mask_from", needs={}, uses={"families": ("family",)})
        if self.families and self.masks_per_image % len(self.families):
            raise ValueError(
                f"masks_per_image must be a multiple of the {len(self.families)} families, so that every crop gets "
                f"holes of each, got {self.masks_per_image}"
            )
        record_bytes = self.masks_per_image * self.memory.pool_size * 3 * self.patch_size**2
        if self.pool_pixels and self.row_group_rows * record_bytes > MAX_GROUP_BYTES:
            raise ValueError(
                f"with pool_pixels, row_group_rows must be at most {max(1, MAX_GROUP_BYTES // record_bytes)}, got "
                f"{self.row_group_rows}: {record_bytes:,} bytes of windows a record make row groups of more than "
                f"{MAX_GROUP_BYTES:,} bytes"
            )

    @property
    def record_schema(self) -> pa.Schema:
        """Columns of the set's shards, without the windows' pixels."""
        return record_schema(evaluation=self.split == "val")

    def family(self, variant: int, image_id: str) -> str:
        """The family of a crop's hole number *variant*. In a training set each crop begins with another one, as an
        epoch trains with the same number of all crops."""
        if not self.families:
            return self.mask
        first = seed_of("family", image_id) if self.split == "train" else 0
        return self.families[(first + variant) % len(self.families)]

    def settings(self) -> dict[str, Any]:
        """What decides the content of the set, for the manifest and for comparison with an earlier run."""
        values = dataclasses.asdict(self)
        for name in ("source", "root", "masks"):
            values[name] = redact(absolute(values[name])) if values[name] else None
        values["against"] = redact(set_folder(absolute(self.against))) if self.against else None
        left_out = {"out", "max_bad_fraction", "expect", "allow_count_difference", "vanished", "lease_expiry_s"}
        # Settings that not every set has stand only where they are given: the other sets keep their identity.
        for name in (
            *("root", "image_column", "key_column", "label_column", "masks", "mask_column", "against"),
            *("mask_value", "mask_threshold", "scale_masks", "pool_pixels", "split", "families"),
        ):
            if values[name] == type(self).__dataclass_fields__[name].default:
                left_out.add(name)
        left_out |= {"mask_from", "mask_hole"} if self.mask_from == "family" else {"mask"}
        if self.families:
            left_out.add("mask")
        return json.loads(json.dumps({name: value for name, value in values.items() if name not in left_out}))
