"""The data plane against bare loops: preparation from each kind of source, the training input, bytes on disk."""

from __future__ import annotations

import io
import itertools
import multiprocessing
import os
import shutil
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pyarrow as pa
import pyarrow.parquet as pq
import simplejpeg
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from benchmarks.harness import Options, Report, Table, Timing, interleave, start
from pipeline.data.batches import training_batches
from pipeline.data.collection import ImagesConfig
from pipeline.data.onthefly import LiveSet, open_photographs, share
from pipeline.data.photograph import open_photograph
from pipeline.data.prepare import PrepareConfig, prepare
from pipeline.data.schema import Record, read_records
from pipeline.demo.photographs import write_photographs
from pipeline.runs.cluster import start_ray
from tmad.batch import Sample, collate, make_sample
from tmad.config import MemoryConfig
from tmad.images import crop_scaled, decode_image, decode_rgb, scaled_size, to_rgb
from tmad.rng import numpy_generator

DESCRIPTION = """
Images/s of `jobs/prepare.py` from a tree, a tar file and a Parquet file beside a bare loop over the same files that
decodes, crops and encodes and does nothing else; of the training input beside a bare loop that decodes, and beside
PyTorch's DataLoader doing the same work; and what holes and memory cost on disk. As many processes on all sides as
there are processors. Ray runs already when the clock starts.

Examples:
  python benchmarks/data.py
  python benchmarks/data.py --keep-pages --rounds 3 --limit-s 600
  python benchmarks/data.py --quick
"""

CROP = 256
PATCH = 32
BATCH = 8
CELLS = 16
FAST_STEP = 800
"""Images/s that a joint step is meant to take on one GPU; benchmarks/gpu.py measures what it does."""
BARE = "bare loop, Pillow"
OWN = "the same, our functions"


@dataclass(frozen=True, kw_only=True)
class DataOptions(Options):
    """Options of this benchmark."""

    images: int = 7200
    """Photographs of 640 x 480 pixels, cut from the demo's at places of their own, as JPEG files."""
    images_per_shard: int = 240
    """Photographs of one task; the job's own default is about twice that."""
    epochs: int = 4
    """Times that the training input goes through them in one call; the slow forms once."""


def main(argv: Sequence[str]) -> int:
    """Parse, measure, write the report; returns the exit code."""
    options = start(DataOptions, argv, prog="data.py", description=DESCRIPTION)
    images, per_shard = (12, 4) if options.quick else (options.images, options.images_per_shard)
    report = Report("data", "The data plane: images/s against bare loops", options)
    start_ray()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sources = write_sources(folder / "sources", images)
        config = partial(prepare_config, images_per_shard=per_shard)
        preparation(report, options, folder, sources, config)
        for variants in (1, 4):
            prepare(config(sources["tree"], folder / f"set{variants}", masks_per_image=variants))
        training_input(report, options, folder / "set4", sources["tree"], images)
        on_disk(report, folder)
    report.write()
    return 0


def write_sources(folder: Path, images: int) -> dict[str, Path]:
    """The same photographs as a tree, a tar file and a Parquet file."""
    tree = folder / "tree"
    tree.mkdir(parents=True)
    write_photographs(folder / "photographs")
    originals = [Image.open(file).convert("RGB") for file in sorted(folder.glob("photographs/train/*"))]
    rows: list[dict[str, Any]] = []
    seen: set[tuple[int, int, int]] = set()
    rng = numpy_generator("photographs")
    while len(rows) < images:
        number = len(rows)
        original = originals[number % len(originals)]
        left, top = (int(rng.integers(0, side // 4)) for side in original.size)
        # A copy would be left out, at a cost that a set without copies does not have.
        if (place := (number % len(originals), left, top)) in seen:
            continue
        seen.add(place)
        buffer = io.BytesIO()
        cut = original.crop((left, top, left + original.width * 3 // 4, top + original.height * 3 // 4))
        cut.resize((640, 480)).save(buffer, "JPEG", quality=92)
        name, data = f"{number:06d}.jpg", buffer.getvalue()
        rows.append({"name": name, "image": data})
        (tree / name).write_bytes(data)
    with tarfile.open(folder / "photographs.tar", "w") as archive:
        archive.add(tree, arcname=".")
    pq.write_table(pa.Table.from_pylist(rows), folder / "photographs.parquet", row_group_size=100)
    return {"tree": tree, "tar": folder / "photographs.tar", "Parquet": folder / "photographs.parquet"}


def prepare_config(source: Path, out: Path, *, images_per_shard: int, masks_per_image: int = 1) -> PrepareConfig:
    """Crops of 256 pixels with one hole each, unless told otherwise."""
    return PrepareConfig(
        source=str(source),
        out=str(out),
        crop_size=CROP,
        patch_size=PATCH,
        images_per_shard=images_per_shard,
        masks_per_image=masks_per_image,
        key_column="name" if source.suffix == ".parquet" else None,
    )


def preparation(
    report: Report,
    options: DataOptions,
    folder: Path,
    sources: dict[str, Path],
    config: Callable[..., PrepareConfig],
) -> None:
    """The whole job from each source, sets removed between the calls."""
    files = sorted(sources["tree"].iterdir())
    out = folder / "out"

    def job(source: Path) -> None:
        prepare(config(source, out))
        shutil.rmtree(out)

    with ProcessPoolExecutor(processors(), multiprocessing.get_context("spawn")) as pool:
        # Processes start and import before the clock does, on both sides.
        list(pool.map(own_loop, files[:8]))
        job(sources["tree"])
        calls: dict[str, Callable[[], object]] = {
            BARE: lambda: list(pool.map(pillow_loop, files, chunksize=16)),
            OWN: lambda: list(pool.map(own_loop, files, chunksize=16)),
        }
        calls |= {kind: partial(job, source) for kind, source in sources.items()}
        timings = interleave(calls, options, warm=True)
    note = (
        f"{len(files)} photographs of 640 x 480 pixels to crops of {CROP} pixels as JPEG of quality 95. The job also "
        "draws hole and memory, hashes, and writes Parquet, checksums and manifest."
    )
    report.add(table(f"Preparation, {processors()} processes", timings, len(files), note), {}, timings)


def pillow_loop(file: Path) -> int:
    """The least that preparation can do with a photograph, written with Pillow; returns the crop's length in bytes."""
    image = Image.open(file).convert("RGB")
    side = min(image.size)
    buffer = io.BytesIO()
    image.resize((CROP, CROP), Image.Resampling.LANCZOS, box=(0, 0, side, side)).save(buffer, "jpeg", quality=95)
    return buffer.tell()


def own_loop(file: Path) -> int:
    """The same with the functions that preparation uses."""
    return crop_encoded(file.read_bytes())


def crop_encoded(data: bytes) -> int:
    """Decode, crop and encode the file *data*; returns the crop's length in bytes."""
    photograph = open_photograph(data, short_side=CROP)
    scaled = scaled_size(photograph.height, photograph.width, CROP)
    return len(simplejpeg.encode_jpeg(crop_scaled(photograph.rgb, scaled=scaled, top=0, left=0, size=CROP), 95))


def training_input(report: Report, options: DataOptions, prepared: Path, photographs: Path, images: int) -> None:
    """Batches of one worker; every form decodes in as many threads or processes as there are processors."""
    records = list(read_records(str(prepared)))
    total = images * (1 if options.quick else options.epochs)
    slow_total = images

    opened = open_photographs(
        ImagesConfig(source=str(photographs), crop_size=CROP, masks_per_image=4),
        patch_size=PATCH,
        memory=MemoryConfig(),
    )
    live = share(opened, opened.manifest())

    def ours(train: str | LiveSet, total: int) -> Iterator[int]:
        batches = training_batches(
            train,
            seed=0,
            batch_images=BATCH,
            total_images=total,
            num_cells=CELLS,
            patch_size=PATCH,
            decode_threads=processors(),
            record_tasks=processors(),
        )
        return map(len, batches)

    # Not `fork`: this process has the threads of Ray and Arrow, and a copy of one in the middle of `malloc` aborts.
    batches_of_loader = DataLoader(
        Samples(records, slow_total),
        batch_size=BATCH,
        num_workers=processors(),
        collate_fn=collate,
        multiprocessing_context="spawn",
        persistent_workers=True,
    )

    def loader() -> Iterator[int]:
        return map(len, batches_of_loader)

    with ThreadPoolExecutor(processors()) as pool:

        def decode(function: Callable[[bytes], object]) -> Iterator[int]:
            files = (record.image for record in itertools.islice(itertools.cycle(records), total))
            return (1 for _ in pool.map(function, files))

        forms: dict[str, Callable[[], Iterator[int]]] = {
            BARE: lambda: decode(lambda data: to_rgb(decode_image(data))),
            OWN: lambda: decode(decode_rgb),
            "training input": partial(ours, str(prepared), total),
            "from photographs": partial(ours, live, slow_total),
            "DataLoader": loader,
        }
        runs: dict[str, list[Run]] = {name: [] for name in forms}
        totals = dict.fromkeys(forms, total) | {"from photographs": slow_total, "DataLoader": slow_total}
        calls = {name: partial(go_through, form, runs[name], totals[name]) for name, form in forms.items()}
        timings = interleave(calls, options, warm=True)
    rows = []
    for name, some in runs.items():
        rates, starts = [run.rate for run in some], [run.first_s for run in some]
        beside = median(run.rate / bare.rate for run, bare in zip(some, runs[BARE], strict=True))
        spread = f"{(max(rates) - min(rates)) / median(rates):.0%}"
        core = median(rates) / processors()
        rows.append(
            [name, f"{median(rates):.0f}", f"{core:.0f}", f"{FAST_STEP / core:.1f}", f"{beside:.2f}", spread,
             f"{median(starts):.2f}"]
        )  # fmt: skip
    header = [
        *("form", "images/s", "images/s a core", f"cores for a step of {FAST_STEP} images/s"),
        *("of the bare loop", "spread", "s to the first"),
    ]
    note = (
        f"{total} samples ({slow_total} from photographs and by DataLoader) of {CROP} pixels in batches of {BATCH}; "
        "images/s over the last three quarters, when all processes have started. The bare loop only decodes. "
        "DataLoader makes the same samples from records held in memory, by processes that run before the first call; "
        "ours reads shards and starts its tasks. From photographs, ours also does what preparation does, for one hole."
    )
    title = f"Training input, {processors()} threads or processes"
    figures = {"runs": {name: [vars(run) for run in some] for name, some in runs.items()}}
    report.add(Table(title, header, rows, note), figures, timings)


@dataclass(frozen=True)
class Run:
    """One way through all samples."""

    first_s: float
    """Until the first came."""
    rate: float
    """Images/s over the last three quarters, when all processes have started."""


def go_through(form: Callable[[], Iterator[int]], runs: list[Run], total: int) -> None:
    """Go through all that *form* gives, numbers of images, *total* in all, and note how that went."""
    began = time.perf_counter()
    counts = form()
    images = next(counts)
    first_s = time.perf_counter() - began
    while images < total / 4:
        images += next(counts)
    warm, there = time.perf_counter(), images
    images += sum(counts)
    runs.append(Run(first_s, (images - there) / (time.perf_counter() - warm)))


class Samples(Dataset[Sample]):
    """What a training sample is made of, for DataLoader."""

    def __init__(self, records: Sequence[Record], total: int, *, patch_size: int = PATCH, cells: int = CELLS) -> None:
        self.records, self.total, self.patch_size, self.cells = records, total, patch_size, cells

    def __len__(self) -> int:
        return self.total

    def __getitem__(self, number: int) -> Sample:
        epoch, place = divmod(number, len(self.records))
        record = self.records[place]
        variant = epoch % len(record.masks)
        return make_sample(
            record.image_id,
            record.pixels(),
            record.mask(variant),
            record.pool(variant),
            patch_size=self.patch_size,
            num_cells=self.cells,
            rng=numpy_generator(0, "sample", record.image_id, epoch),
            flip=True,
        )


def on_disk(report: Report, folder: Path) -> None:
    """Bytes of the prepared sets beyond the encoded crops."""
    rows, figures = [], {}
    for variants in (1, 4):
        prepared = folder / f"set{variants}"
        records = list(read_records(str(prepared)))
        crops = sum(len(record.image) for record in records)
        shards = sum(file.stat().st_size for file in prepared.glob("shards/*.parquet"))
        everything = sum(file.stat().st_size for file in prepared.rglob("*") if file.is_file())
        per_variant = (shards - crops) / len(records) / variants
        figures[str(variants)] = {"crops": crops, "shards": shards, "set": everything, "records": len(records)}
        rows.append(
            [
                str(variants),
                f"{crops / len(records):,.0f}",
                f"{per_variant:,.0f}",
                f"{(everything - shards) / len(records):,.0f}",
            ]
        )
    header = ["holes an image", "crop, bytes", "hole and memory, bytes a variant", "receipts, manifest, bytes an image"]
    pool = 100 * 3 * PATCH * PATCH
    report.add(Table("On disk", header, rows, f"The pool's pixels would be {pool:,} bytes a variant."), figures, {})


def table(title: str, timings: dict[str, Timing], images: int, note: str) -> Table:
    """Images/s of each form, and beside the bare loop."""
    rows = [
        [name, f"{images / timing.median_s:.0f}", f"{1 / timing.times(timings[BARE]):.2f}", f"{timing.spread:.0%}"]
        for name, timing in timings.items()
    ]
    return Table(title, ["form", "images/s", "of the bare loop", "spread"], rows, note)


def processors() -> int:
    """Logical processors that this process may use."""
    return len(os.sched_getaffinity(0))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
