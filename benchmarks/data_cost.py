"""What large collections would cost: figures for one image, measured over S3, times the number of images."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import Table
from benchmarks.large_sources import Maker, as_tar
from benchmarks.object_store import ObjectStore
from pipeline.data.prepare import PrepareConfig, prepare
from pipeline.storage import upload_folder, write_atomic

SHARD = 512
"""Images of a shard, the default."""
ROW_GROUP = 64
"""Records of a row group, the default."""
LATE_S = 0.03
"""How long an answer of a store in the same region takes, about."""
READS = ("GET", "HEAD")
"""Kinds of requests that read one object; the others write, list or delete."""


@dataclass(frozen=True)
class Kind:
    """One kind of collection: how its images are made up here, and how many the real one has."""

    name: str
    images: int
    """Of the real collection."""
    stored: float
    """Bytes of the real collection."""
    size: tuple[int, int]
    """Width and height, in pixels, of those that are made up."""
    quality: int
    grain: float = 0.0
    in_tar: bool = True
    """A list and an archive, as downloaded; otherwise one object an image."""
    fewer: int = 1
    """Measured on so many times fewer images than others."""


KINDS = (
    Kind("Places365-Standard, large", 1_803_460, 105e9, (683, 512), 84),
    Kind("Places365-Standard, 256 pixels", 1_803_460, 25e9, (256, 256), 82),
    Kind("100 M photographs of 12 megapixels", 100_000_000, 400e12, (4000, 3000), 91, 7.0, False, 16),
)


@dataclass(frozen=True)
class PerImage:
    """One image of a kind, from the difference between a smaller and a larger collection."""

    kind: Kind
    mean_bytes: float
    """Of the files that were made up."""
    processor_s: float
    read_requests: float
    """GET and HEAD in the photographs' bucket."""
    read_share: float
    """Bytes that came out of the photographs' bucket, of those stored there."""
    written: float
    """Bytes that went into the set's bucket."""
    shard_reads: float
    """GET and HEAD in the set's bucket, for a shard."""
    shard_writes: float
    """All other requests in the set's bucket, for a shard."""


def measure_kinds(
    count: int, store: ObjectStore, folder: Path, maker: Maker, traced: Callable[..., Any]
) -> list[PerImage]:
    """Prepare a quarter of *count* images of every kind, then all of them, from bucket to bucket."""
    return [_measure(kind, max(8, count // kind.fewer), store, folder, maker, traced) for kind in KINDS]


def _measure(
    kind: Kind, count: int, store: ObjectStore, folder: Path, maker: Maker, traced: Callable[..., Any]
) -> PerImage:
    per_shard = max(2, count // 16)
    found = []
    place = kind.name.replace(" ", "-")
    for images in (count // 4, count):
        tree = folder / f"{place}-{images}"
        maker.photographs(tree, images, size=kind.size, quality=kind.quality, grain=kind.grain)
        source = f"s3://photographs/{place}-{images}"
        root = None
        if kind.in_tar:
            write_atomic(f"{source}/data.tar", as_tar(sorted(tree.iterdir()), "data"))
            names = "\n".join(f"/{file.name} 1" for file in sorted(tree.iterdir()))
            write_atomic(f"{source}/list.txt", names.encode())
            source, root = f"{source}/list.txt", f"{source}/data.tar/data"
        else:
            upload_folder(tree, source)
        out = f"s3://prepared-sets/{place}-{images}"
        config = PrepareConfig(source=source, root=root, out=out, images_per_shard=per_shard)
        stored = sum(file.stat().st_size for file in tree.iterdir())
        found.append((images, -(-images // per_shard), stored, traced(lambda config=config: prepare(config), store)))
    (images0, shards0, stored0, small), (images1, shards1, stored1, large) = found
    images, shards, stored = images1 - images0, shards1 - shards0, stored1 - stored0

    def requests(of: str, reads: bool) -> int:
        counts = [getattr(used, of).requests for used in (large, small)]
        first, second = (sum(n for kind, n in one.items() if (kind in READS) == reads) for one in counts)
        return first - second

    return PerImage(
        kind,
        mean_bytes=stored1 / images1,
        processor_s=(large.processor_s - small.processor_s) / images,
        read_requests=requests("read", True) / images,
        read_share=(large.read.read - small.read.read) / stored,
        written=(large.made.written - small.made.written) / images,
        shard_reads=requests("made", True) / shards,
        shard_writes=requests("made", False) / shards,
    )


@dataclass(frozen=True)
class Costs:
    """All that totals are computed from."""

    kinds: Sequence[PerImage]
    epoch: tuple[float, float, float]
    """Requests, bytes and processor seconds of the training input, for a row group."""
    driver_bytes: float
    """The driver's memory for an image."""


def cost_tables(costs: Costs) -> Iterator[tuple[Table, dict[str, Any]]]:
    """Figures for one image, and the totals."""
    header = ["kind", "KB a file", "processor, ms", "reads", "bytes read / stored", "KB written", "reads a shard",
              "writes a shard"]  # fmt: skip
    rows = [
        [
            one.kind.name,
            f"{one.mean_bytes / 1e3:,.0f}",
            f"{1e3 * one.processor_s:.1f}",
            f"{one.read_requests:.2f}",
            f"{one.read_share:.2f}",
            f"{one.written / 1e3:.1f}",
            f"{one.shard_reads:.1f}",
            f"{one.shard_writes:.1f}",
        ]
        for one in costs.kinds
    ]
    note = (
        "Preparation over S3, default settings: the difference between a quarter of the images and all of them, for an "
        "image; the report's pictures are in it, at most 48 reads a set. Reads are GET and HEAD. Files are made up: "
        + "; ".join(f"{one.kind.size[0]} x {one.kind.size[1]} of quality {one.kind.quality}" for one in costs.kinds)
        + "."
    )
    yield Table("One image", header, rows, note), {one.kind.name: dataclasses.asdict(one) for one in costs.kinds}
    totals = {one.kind.name: total(one, costs) for one in costs.kinds}
    header = ["", *totals]
    rows = [[name, *(_rounded(values[name]) for values in totals.values())] for name in next(iter(totals.values()))]
    note = (
        f"Computed: figures of one image times the number of images; {SHARD} images a shard, {ROW_GROUP} records a row "
        "group, one crop of 256 pixels and one hole an image. Bytes read: the collection's times the measured share. "
        "Core-hours are those of this processor. Waiting is what a task does beside them, at "
        f"{1000 * LATE_S:.0f} ms a request for an image: (core-hours + waiting) / tasks at a time is the job's length "
        "where processors and storage suffice. A pass is one epoch of the training input, without the training step."
    )
    yield Table("Whole collections", header, rows, note), totals


def total(one: PerImage, costs: Costs) -> dict[str, float]:
    """Of a whole collection, by name with unit."""
    images = one.kind.images
    shards, groups = math.ceil(images / SHARD), math.ceil(images / ROW_GROUP)
    requests, size, seconds = costs.epoch
    return {
        "images": images,
        "core-hours": one.processor_s * images / 3600,
        "hours of waiting": one.read_requests * LATE_S * images / 3600,
        "GET and HEAD": one.read_requests * images + one.shard_reads * shards,
        "PUT, LIST, DELETE": one.shard_writes * shards,
        "GB read": one.kind.stored * one.read_share / 1e9,
        "GB written": one.written * images / 1e9,
        "shards": shards,
        "driver, GB": costs.driver_bytes * images / 1e9,
        "a pass: GET and HEAD": requests * groups,
        "a pass: GB read": size * groups / 1e9,
        "a pass: core-hours": seconds * groups / 3600,
    }


def _rounded(value: float) -> str:
    """Three digits, with commas."""
    digits = max(0, 2 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{round(value, digits):,.{min(digits, 2)}f}" if value < 1000 else f"{float(f'{value:.3g}'):,.0f}"
