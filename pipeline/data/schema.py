"""The prepared set: what a record holds, what the manifest says, how both are read without Ray.

Layout of the folder: `shards/00000.parquet` and its receipt `shards/00000.json` for every shard, `settings.json` of the
preparation, `facts/00000.parquet` (`contract.FACTS_SCHEMA`) for comparing images, `quarantine.jsonl` (inputs that were
left out, with their reasons), `report.json` and `report.html`, and `manifest.json`, written last: a set without it is
unfinished and is refused. An evaluation set has `evaluation_set.jsonl` too, a line for each image and mask.
`plan.parquet` says which image belongs to which shard, and while a job is at work `lease.json` says whose. Beside them
may lie `source_report.json` (the source beside the partition that it should be) and `source_index.arrow` and
`mask_index.arrow` (where images and masks lie in tar files), which are no part of the set.

A record is one crop: its encoded file, its masks as bits (1 = hole), and for each mask the corners (y, x) of the
windows of the texture memory (Sec. III-B). Nothing in it is a decoded pixel.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import CorruptSet, MissingInput, UnfinishedSet, WrongVersion
from pipeline.storage import absolute, exists, is_remote, join, open_remote, read_bytes, redact

SCHEMA_VERSION = 1
MANIFEST_NAME = "manifest.json"


def _list(kind: pa.DataType) -> pa.DataType:
    """A list type with the name that Parquet gives its items, so that a schema read back equals the one written."""
    return pa.list_(pa.field("element", kind))


RECORD_SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        pa.field("image", pa.binary(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("masks", _list(pa.binary()), nullable=False),
        pa.field("pool_yx", _list(_list(pa.int16())), nullable=False),
        pa.field("hole_fraction", _list(pa.float32()), nullable=False),
        pa.field("label", pa.int64()),
        pa.field(
            "source",
            pa.struct([pa.field("key", pa.string()), pa.field("size", pa.int64()), pa.field("sha256", pa.string())]),
            nullable=False,
        ),
    ],
    metadata={b"tmad.schema_version": str(SCHEMA_VERSION).encode()},
)
"""One row: `image_id` is `<key of the source>#<number of the crop>`; `image` JPEG, PNG or WebP; `masks` one entry a
variant, row-major bits of (height, width), the first pixel in the highest bit; `pool_yx` one entry a variant,
y0, x0, y1, x1, ...; `source.key` is relative to the manifest's `source`."""

EVALUATION_FIELDS = (
    pa.field(
        "crop",
        pa.struct([pa.field(name, pa.int32()) for name in ("scaled_height", "scaled_width", "top", "left")]),
        nullable=False,
    ),
    pa.field("mask_family", _list(pa.string()), nullable=False),
    pa.field("mask_seed", _list(pa.int64()), nullable=False),
)
"""Three more columns in evaluation sets (`split` val): the size to which the photograph was scaled and the corner of
its crop; and for each mask its family and the seed of the generator that drew it. The user's masks have `mask_from` for
a family, and a seed only where they were drawn from a list."""

PATCHES_FIELD = pa.field("pool_patches", _list(pa.binary()), nullable=False)
"""One more column, the last, in sets prepared with `pool_pixels`, for readers outside this project: one entry a
variant, the pixels of the memory's windows, (P, k, k, 3), uint8, row-major, in the order of `pool_yx`. They are cut
from the stored crop as decoded from its bytes. That is P * k * k * 3 bytes a record and variant, 307,200 by default, so
20 MB in a row group of 64. Nothing here reads them unless asked to: training cuts its windows by the coordinates."""


def record_schema(*, evaluation: bool) -> pa.Schema:
    """`RECORD_SCHEMA`, for evaluation sets with `EVALUATION_FIELDS`."""
    schema = RECORD_SCHEMA
    for field in EVALUATION_FIELDS if evaluation else ():
        schema = schema.append(field)
    return schema


def pack_mask(mask: np.ndarray) -> bytes:
    """Mask (H, W) of {0, 1} as ceil(H * W / 8) bytes."""
    return np.packbits(mask.reshape(-1) != 0).tobytes()


def unpack_mask(bits: bytes, height: int, width: int) -> np.ndarray:
    """Inverse of `pack_mask`: (height, width), uint8, {0, 1}."""
    return np.unpackbits(np.frombuffer(bits, np.uint8), count=height * width).reshape(height, width)


@dataclass(frozen=True)
class Record:
    """One row of a prepared set; pixels, masks and coordinates are decoded where they are asked for."""

    image_id: str
    image: bytes
    height: int
    width: int
    masks: list[bytes]
    pool_yx: list[list[int]]
    hole_fraction: list[float]
    label: int | None
    source: dict[str, Any]
    pool_patches: list[bytes] | None = None
    """Where they were prepared and asked for."""
    crop: dict[str, int] | None = None
    """This and the next two: in evaluation sets, see `EVALUATION_FIELDS`."""
    mask_family: list[str] | None = None
    mask_seed: list[int | None] | None = None

    def pixels(self) -> np.ndarray:
        """(H, W, 3), uint8."""
        # Imported late: the tasks that only move bytes start without PyTorch, seconds earlier.
        from tmad.images import decode_rgb

        return decode_rgb(self.image)

    def mask(self, variant: int = 0) -> np.ndarray:
        """(H, W), uint8, 1 = hole."""
        return unpack_mask(self.masks[variant], self.height, self.width)

    def pool(self, variant: int = 0) -> np.ndarray:
        """(P, 2), int16, top-left corners (y, x) of the memory's windows under that mask."""
        return np.asarray(self.pool_yx[variant], np.int16).reshape(-1, 2)

    def patches(self, variant: int = 0) -> np.ndarray:
        """(P, k, k, 3), uint8, the pixels of these windows as the set holds them; read-only.

        Raises `ValueError` if they were not read.
        """
        if self.pool_patches is None:
            raise ValueError(
                f"{self.image_id} comes without the pixels of its windows: prepare with pool_pixels, and read with "
                "read_records(..., patches=True)"
            )
        flat = np.frombuffer(self.pool_patches[variant], np.uint8)
        count = len(self.pool_yx[variant]) // 2
        side = math.isqrt(flat.size // (3 * count))
        return flat.reshape(count, side, side, 3)


@dataclass(frozen=True)
class Shard:
    """One Parquet file of the set; *file* is relative to the set's folder, keys are those of the source images."""

    file: str
    rows: int
    size: int
    sha256: str
    first_key: str
    last_key: str


@dataclass(frozen=True)
class Manifest:
    """What a finished set is. `settings` are those of the preparation, without credentials."""

    settings: dict[str, Any]
    shards: list[Shard]
    images_listed: int
    """Image files found below the source."""
    images_used: int
    """Those that gave records; the rest are in quarantine.jsonl."""
    drops: dict[str, int]
    """Inputs left out, by reason."""
    records: int
    row_group_rows: int
    """Rows in each row group of every shard, except the last of a shard: the unit of reading."""
    schema_version: int = SCHEMA_VERSION

    @cached_property
    def digest(self) -> str:
        """Identity of the set's content, 16 hex: training, evaluation and MLflow name it. It does not depend on where
        the source, the set or the one it was held against lies."""
        places = ("source", "root", "masks", "against")
        settings = {name: value for name, value in self.settings.items() if name not in places}
        content = [self.schema_version, settings, [[shard.rows, shard.sha256] for shard in self.shards]]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def num_variants(self) -> int:
        """Masks of each record."""
        return int(self.settings["masks_per_image"])

    @property
    def is_evaluation_set(self) -> bool:
        """Whether its records say how each crop and mask came about (`EVALUATION_FIELDS`)."""
        return self.settings.get("split") == "val"

    @property
    def columns(self) -> list[str]:
        """Those of every record, without the windows' pixels."""
        return record_schema(evaluation=self.is_evaluation_set).names

    @property
    def crop_size(self) -> int:
        """Side of every record's image, in pixels."""
        return int(self.settings["crop_size"])

    @property
    def patch_size(self) -> int:
        """k_p of the windows that `pool_yx` points at."""
        return int(self.settings["patch_size"])

    def to_json(self) -> str:
        """The content of manifest.json."""
        return json.dumps({"digest": self.digest, **dataclasses.asdict(self)}, indent=2, sort_keys=True) + "\n"

    @staticmethod
    def from_json(text: str) -> Manifest:
        """Raises `WrongVersion` for another schema version, `CorruptSet` for anything that is no manifest."""
        try:
            values = json.loads(text)
            version = values["schema_version"]
        except (ValueError, KeyError, TypeError) as error:
            raise CorruptSet(f"{MANIFEST_NAME} is not the manifest of a prepared set: {error}") from error
        if version != SCHEMA_VERSION:
            raise WrongVersion(
                f"the prepared set has schema version {version}, this code reads {SCHEMA_VERSION}; "
                "prepare it again with jobs/prepare.py"
            )
        digest = values.pop("digest", None)
        try:
            manifest = Manifest(**{**values, "shards": [Shard(**shard) for shard in values["shards"]]})
        except (KeyError, TypeError) as error:
            raise CorruptSet(f"{MANIFEST_NAME} lacks or repeats something: {error}") from error
        if digest != manifest.digest:
            raise CorruptSet(f"{MANIFEST_NAME} was changed after it was written: digest {digest} != {manifest.digest}")
        return manifest


def read_manifest(uri: str) -> Manifest:
    """The manifest of the prepared set in the folder *uri* (or of that very file).

    Raises `MissingInput` if there is no such folder, `UnfinishedSet` if its preparation was not completed,
    `WrongVersion` or `CorruptSet` if it cannot be used.
    """
    folder = set_folder(uri)
    try:
        text = read_bytes(join(folder, MANIFEST_NAME)).decode()
    except MissingInput:
        if exists(join(folder, "settings.json")):
            raise UnfinishedSet(
                f"the prepared set {redact(folder)} is unfinished: it has shards but no {MANIFEST_NAME}; "
                "run jobs/prepare.py again with the same settings, finished shards are kept"
            ) from None
        what = "is not a prepared set" if exists(folder) else "does not exist"
        raise MissingInput(
            f"{redact(folder)} {what}: no {MANIFEST_NAME} there; make one with jobs/prepare.py"
        ) from None
    return Manifest.from_json(text)


def set_folder(uri: str) -> str:
    """The folder of a prepared set, given that folder or the manifest in it."""
    return uri.rstrip("/").removesuffix("/" + MANIFEST_NAME)


def read_records(uri: str, limit: int | None = None, *, patches: bool = False) -> Iterator[Record]:
    """Records of the prepared set in their stored order, at most *limit*; without Ray, one row group at a time.

    *patches*: with the pixels of the memory's windows, where the set has them. Raises what `read_manifest` raises, and
    `CorruptSet` naming the shard that cannot be read.
    """
    manifest = read_manifest(uri)
    columns = [*manifest.columns, *([PATCHES_FIELD.name] if patches else [])]
    rows = stored_rows(set_folder(uri), manifest, columns)
    yield from (Record(**row) for row in itertools.islice(rows, limit))


def stored_rows(folder: str, manifest: Manifest, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """These columns of every record of the set in *folder*, in their stored order; one row group at a time."""
    for shard in manifest.shards:
        file = open_shard(folder, shard.file)
        for group in range(file.num_row_groups):
            yield from file.read_row_group(group, columns=list(columns)).to_pylist()


def open_shard(folder: str, file: str) -> pq.ParquetFile:
    """The Parquet file *file* of the set in *folder*; only what is read of it is fetched.

    Raises `CorruptSet` naming the shard if it is missing or no Parquet, `WrongVersion` if it is of another schema,
    `StorageFailed` if storage does not hand it out.
    """
    uri = join(folder, file)
    try:
        remote = is_remote(uri)
        opened = pq.ParquetFile(open_remote(uri) if remote else absolute(uri), pre_buffer=remote)
    except (OSError, pa.ArrowException, MissingInput) as error:
        raise CorruptSet(
            f"the shard {redact(uri)} cannot be read: {redact(str(error))}; remove {MANIFEST_NAME} and prepare again"
        ) from None
    version = (opened.schema_arrow.metadata or {}).get(b"tmad.schema_version", b"none").decode()
    if version != str(SCHEMA_VERSION):
        raise WrongVersion(f"the shard {redact(uri)} has schema version {version}, this code reads {SCHEMA_VERSION}")
    return opened
