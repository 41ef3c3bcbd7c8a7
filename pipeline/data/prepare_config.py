"""What a preparation is asked for: where from, where to, and everything that decides what the set holds."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from pipeline.data.claim import EXPIRY_S
from pipeline.data.contract import ContractConfig
from pipeline.data.records import RecordConfig
from pipeline.data.schema import set_folder
from pipeline.data.sources.partitions import PartitionName
from pipeline.storage import absolute, redact
from tmad.config import STRICT, PositiveFloat, PositiveInt


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PrepareConfig(RecordConfig, ContractConfig):
    """Preparation of a data set: where from, where to, how it is cut into shards."""

    source: str
    """Path or fsspec URI: folder with images at any depth, tar file (ARCHIVE.tar/FOLDER: a folder in it) or folder of
    tar files, Parquet file or folder of those, or text list of keys."""
    out: str
    """Folder of the prepared set: a path or any fsspec URI."""
    images_per_shard: PositiveInt = 512
    """Source images of one shard: the unit of work and of resuming."""
    row_group_rows: PositiveInt = 64
    """Records read together by the training input."""
    max_bad_fraction: Annotated[float, Field(ge=0, le=1)] = 0.1
    """The job stops if more than this share of the images cannot be used."""
    root: str | None = None
    """Where the images of a list lie: folder, tar file, or folder in one; none = the list's folder."""
    image_column: str | None = None
    """Column of a Parquet source with the encoded images; none = image, image_bytes, bytes or jpg."""
    key_column: str | None = None
    """Column of a Parquet source with the images' keys; none = FILE#ROW."""
    label_column: str | None = None
    """Column of a Parquet source with whole numbers that are kept as labels; none = no labels."""
    expect: PartitionName | None = None
    """Official partition that the source should be: its number of images and, for a list, the presence of each are
    checked and reported in source_report.json."""
    allow_count_difference: bool = False
    """Go on, with a warning, where the source is not what expect says."""
    vanished: Literal["stop", "drop"] = "stop"
    """What becomes of images that the set was made of and that the source no longer has: the job stops, or their shards
    are made again without them."""
    claim_expiry_s: PositiveFloat = EXPIRY_S
    """Seconds without a sign of life after which another job may take the folder over from this one."""

    def settings(self) -> dict[str, Any]:
        """What decides the content of the set, for the manifest and for comparison with an earlier run."""
        values = dataclasses.asdict(self)
        for name in ("out", "max_bad_fraction", "expect", "allow_count_difference", "vanished", "claim_expiry_s"):
            del values[name]
        for name in ("source", "root", "masks"):
            values[name] = redact(absolute(values[name])) if values[name] else None
        values["against"] = redact(set_folder(absolute(self.against))) if self.against else None
        # Settings that not every set has stand only where they are given: the other sets keep their identity.
        for name in ("root", "image_column", "key_column", "label_column", "masks", "mask_column", "against"):
            if values[name] is None:
                del values[name]
        for name in ("mask_from", "mask_hole") if self.mask_from == "family" else ("mask",):
            del values[name]
        return json.loads(json.dumps(values))
