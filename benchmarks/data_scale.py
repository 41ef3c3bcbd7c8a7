"""What grows with the collection: memory of jobs, requests to object storage, and what a large set would cost."""

from __future__ import annotations

import dataclasses
import itertools
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import ray
import s3fs

from benchmarks.data import Run, crop_encoded, go_through
from benchmarks.data_cost import LATE_S, Costs, cost_tables, measure_kinds
from benchmarks.harness import ROOT, Options, Report, Table, Timing, interleave, mb, start
from benchmarks.large_sources import Maker, as_parquet, as_tar, write_list, write_pictures
from benchmarks.object_store import ObjectStore, Traffic, running
from benchmarks.processes import Usage, processor_s, run_watched, share_token
from pipeline.cluster import start_ray
from pipeline.data.batches import training_batches
from pipeline.data.prepare import PrepareConfig, prepare
from pipeline.data.schema import read_manifest
from pipeline.storage import absolute, join, list_files, read_bytes, upload_folder, write_atomic
from tmad.batch import Batch

DESCRIPTION = """
Three questions. Memory: peaks of driver, largest Ray worker and object store of `jobs/prepare.py` and of the training
input, for 1, 4 and 16 times as many photographs, each job a process of its own. Object storage: images/s and requests
from and to an S3 server of this machine beside a bare loop with s3fs, at once and with answers that come late. Cost:
core-hours, requests, bytes and shards of large collections, from per-image figures measured here.

Examples:
  python benchmarks/data_scale.py --limit-s 300
  python benchmarks/data_scale.py --parts s3 --rounds 3
  python benchmarks/data_scale.py --quick
"""

CROP, PATCH, CELLS, BATCH = 256, 32, 16, 8
BARE = "bare loop, s3fs"
LATE = "S3, answers late"
S3_PASSES = 6
"""Times that the training input goes through its set."""

PACKED = 128
"""Photographs of a tar or a Parquet file: moto copies an object whole for each range that is asked of it."""

PHOTOGRAPHS, SETS = "photographs", "prepared-sets"
"""The buckets: what is read and what is made."""


@dataclass(frozen=True, kw_only=True)
class ScaleOptions(Options):
    """Options of this benchmark."""

    photographs: tuple[int, ...] = (250, 1000, 4000)
    """Photographs of 640 x 480 pixels in the collections whose memory is measured."""
    large_crops: int = 512
    """Side of larger crops, in pixels, that the training input is measured on too; 0 = none."""
    samples: int = 4096
    """Samples that the training input hands out in each of its runs; more than a small set holds."""
    pictures: tuple[int, ...] = (1000, 40_000)
    """Pictures of 64 pixels in the collections that show what the driver needs for an image."""
    keys: tuple[int, ...] = (10_000, 1_000_000)
    """Keys in lists that are planned; the job ends with the first shard, as all but one image are missing."""
    s3_photographs: int = 1024
    """Photographs of 640 x 480 pixels in the bucket."""
    parts: tuple[Literal["memory", "s3", "cost"], ...] = ("memory", "s3", "cost")
    """What is measured; cost is computed from the other two as well. Of less than all, the report's name says which."""
    kind_images: int = 1024
    """Images of each kind that the costs are computed from; of the largest kind a sixteenth."""


def quick(options: ScaleOptions) -> ScaleOptions:
    """The same with tiny collections."""
    return dataclasses.replace(
        options,
        photographs=(8,),
        large_crops=0,
        samples=8,
        pictures=(8,),
        keys=(1000,),
        s3_photographs=8,
        kind_images=16,
    )


def main(argv: Sequence[str]) -> int:
    """Parse, measure, write the report; returns the exit code."""
    options = start(ScaleOptions, argv, prog="data_scale.py", description=DESCRIPTION)
    if options.quick:
        options = quick(options)
    share_token()
    if "cost" in options.parts and len(set(options.parts)) < 3:
        raise SystemExit("--parts cost needs memory and s3, from which it is computed")
    every = {"memory", "s3", "cost"} == set(options.parts)
    named = "data_scale" if every else "-".join(["data_scale", *options.parts])
    report = Report(named, "The data plane at scale: memory, object storage, cost", options, script="data_scale")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        maker = Maker(folder / "demo")
        driver_bytes = memory(report, options, folder, maker) if "memory" in options.parts else 0.0
        if "s3" in options.parts:
            with running(folder) as store:
                start_ray()
                store.make_bucket(PHOTOGRAPHS)
                store.make_bucket(SETS)
                epoch = object_storage(report, options, store, folder, maker)
                if "cost" in options.parts:
                    kinds = measure_kinds(options.kind_images, store, folder, maker, traced)
                    for table, figures in cost_tables(Costs(kinds, epoch, driver_bytes)):
                        report.add(table, figures, {})
                ray.shutdown()
    report.write()
    return 0


def memory(report: Report, options: ScaleOptions, folder: Path, maker: Maker) -> float:
    """Peaks of every job at every size; returns the bytes of the driver for an image more."""
    usages: dict[str, dict[int, Usage]] = {"preparation": {}, "training input": {}}
    tree = folder / "tree"
    maker.photographs(tree, max(options.photographs))
    files = sorted(tree.iterdir())
    for count in options.photographs:
        part, made = folder / f"tree{count}", folder / f"set{count}"
        part.mkdir()
        for file in files[:count]:
            os.link(file, part / file.name)
        usages["preparation"][count] = run_watched(job(part, made), log=folder / "log")
        usages["training input"][count] = reading(made, options.samples)
    if options.large_crops:
        large_set = folder / "large-crops"
        run_watched(job(part, large_set, "--crop-size", str(options.large_crops)), log=folder / "log")
        found = reading(large_set, options.samples)
        usages[f"training input, crops of {options.large_crops}"] = {max(options.photographs): found}
    small = ["--crop-size", "64", "--patch-size", "16"]
    usages |= {"small pictures": {}, "list": {}}
    for count in options.pictures:
        write_pictures(folder / f"pictures{count}", count)
        command = job(folder / f"pictures{count}", folder / f"pictures-set{count}", *small)
        usages["small pictures"][count] = run_watched(command, log=folder / "log")
    for count in options.keys:
        listed = write_list(folder / f"list{count}.txt", count, there=files[0].name)
        command = job(listed, folder / f"list-set{count}", "--root", str(tree), "--max-bad-fraction", "0")
        usages["list"][count] = run_watched(command, log=folder / "log", may_fail=True)
    if blind := [name for name, sizes in usages.items() if not all(usage.store_looks for usage in sizes.values())]:
        raise RuntimeError(f"Ray never answered for its store: {', '.join(blind)}")
    rows = [
        [
            f"{name}, {count:,}",
            *(mb(getattr(usage, column)) for column in list(MEMORY_COLUMNS)),
            f"{usage.processor_s:.0f}",
            f"{usage.wall_s:.0f}",
        ]
        for name, sizes in usages.items()
        for count, usage in sizes.items()
    ]
    slopes = {
        name: slope({count: usage.driver_own for count, usage in sizes.items()}) for name, sizes in usages.items()
    }
    note = (
        "MB of 10^6 bytes. Jobs as processes, default settings, nothing else in their Ray; a look about every "
        f"{1 / 4:g} s by /proc, RSS from the kernel's own mark (VmHWM), with all shared pages. Own: anonymous pages, "
        "without libraries and store. Store and spilled: the raylet's statistics. Training input: "
        f"{options.samples} samples, the driver being the process that reads. Small pictures: 64 pixels, to see what "
        f"the driver needs for an image. List: keys of which one is there; planned, then stopped. The driver's own "
        f"memory grows by {slopes['small pictures']:,.0f} bytes an image (small pictures), "
        f"{slopes['list']:,.0f} bytes a key (list)."
    )
    header = ["job, images", *MEMORY_COLUMNS.values(), "processor, s", "wall, s"]
    figures = {name: {str(n): vars(usage) for n, usage in sizes.items()} for name, sizes in usages.items()}
    report.add(Table("Memory", header, rows, note), {**figures, "driver_bytes": slopes}, {})
    return max(slopes["small pictures"], slopes["list"])


MEMORY_COLUMNS = {
    "driver_rss": "driver, RSS",
    "driver_own": "own",
    "worker_rss": "largest worker, RSS",
    "worker_own": "own",
    "all_own": "all processes, own",
    "store_peak": "store",
    "spilled": "spilled",
}
"""Fields of `Usage` and what the table calls them."""


def job(source: Path, out: Path, *more: str) -> list[str]:
    """The command line of a preparation."""
    script = str(ROOT / "jobs" / "prepare.py")
    return [sys.executable, script, "--source", str(source), "--out", str(out), *more]


def reading(prepared: Path, samples: int) -> Usage:
    """The training input over *prepared* as a process."""
    code = f"from benchmarks.data_scale import read_set; read_set({str(prepared)!r}, {samples})"
    return run_watched([sys.executable, "-c", code], log=prepared.with_suffix(".log"), cwd=ROOT)


def slope(values: dict[int, float]) -> float:
    """Growth from the smallest to the largest count, for one more."""
    low, high = min(values), max(values)
    return (values[high] - values[low]) / max(high - low, 1)


def read_set(uri: str, samples: int) -> None:
    """The training input in a process of its own, every batch thrown away."""
    start_ray()
    for _ in batches(uri, samples):
        pass


def batches(uri: str, samples: int) -> Iterator[Batch]:
    """The training input of one worker with default settings."""
    return training_batches(uri, seed=0, batch_images=BATCH, total_images=samples, num_cells=CELLS, patch_size=PATCH)


def object_storage(
    report: Report, options: ScaleOptions, store: ObjectStore, folder: Path, maker: Maker
) -> tuple[float, float, float]:
    """Preparation and training input from a bucket; returns requests, bytes and processor seconds of the training
    input for a row group."""
    images = options.s3_photographs
    tree = folder / "s3-tree"
    maker.photographs(tree, images)
    upload_folder(tree, f"s3://{PHOTOGRAPHS}/tree")
    files = sorted(tree.iterdir())
    for first in range(0, images, PACKED):
        some = files[first : first + PACKED]
        write_atomic(f"s3://{PHOTOGRAPHS}/tar/{first:06d}.tar", as_tar(some))
        write_atomic(f"s3://{PHOTOGRAPHS}/parquet/{first:06d}.parquet", as_parquet(some))
    numbers = itertools.count()

    def prepared(source: str, **more: object) -> str:
        out = f"s3://{SETS}/{next(numbers)}"
        prepare(PrepareConfig(source=f"s3://{PHOTOGRAPHS}/{source}", out=out, images_per_shard=64, **more))  # type: ignore[arg-type]
        return out

    workers = int(ray.cluster_resources()["CPU"])
    paths = [f"{PHOTOGRAPHS}/tree/{file.name}" for file in files]
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        calls: dict[str, Callable[[], object]] = {
            BARE: lambda: list(pool.map(bare, paths, chunksize=8)),
            "tree": lambda: prepared("tree"),
            "tar": lambda: prepared("tar"),
            "Parquet": lambda: prepared("parquet", key_column="name"),
        }
        costs = {name: traced(call, store) for name, call in calls.items()}
        costs = {name: traced(call, store) for name, call in calls.items()}  # everything has been started now
        timings = interleave(calls, options, warm=True)
        store.reset(late_s=LATE_S)
        late = interleave(calls, options, warm=True)
        store.reset()
    note = (
        f"{images} photographs of 640 x 480 pixels in a bucket of moto's server to a set in another, over HTTP on "
        f"loopback; {workers} processes on both sides, as many as Ray has logical processors, on "
        f"{len(os.sched_getaffinity(0))} real ones, which the server shares. The bare loop fetches with s3fs, decodes, "
        f"crops and encodes. {PACKED} photographs in each tar and Parquet file. Requests: "
        "of the photographs' bucket for an image, of the set's bucket for a shard of 64. "
        "Processor: milliseconds of all processes but the server, for an image."
    )
    header = ["form", "images/s", "of the bare loop", "spread", "requests an image", "a shard", "processor, ms"]
    shards = -(-images // 64)
    rows = [
        [*rated, f"{used.read.all_requests / images:.2f}", f"{used.made.all_requests / shards:.1f}",
         f"{1000 * used.processor_s / images:.1f}"]
        for rated, used in zip(rates(timings, images, BARE), costs.values(), strict=True)
    ]  # fmt: skip
    traffic = {name: dataclasses.asdict(used) for name, used in costs.items()}
    report.add(Table("Preparation over S3", header, rows, note), {"traffic": traffic}, timings)
    late_note = f"The same, every answer {1000 * LATE_S:.0f} ms later, as from a store that is not on this machine."
    rows = list(rates(late, images, BARE))
    report.add(Table("Preparation over S3, answers late", header[:4], rows, late_note), {}, late)
    return training_over_s3(report, options, store, folder, prepared("tree"))


def training_over_s3(
    report: Report, options: ScaleOptions, store: ObjectStore, folder: Path, made: str
) -> tuple[float, float, float]:
    """The same set from the bucket and from disk; requests, bytes and processor seconds for a row group."""
    manifest = read_manifest(made)
    local = str(folder / "local")
    copy_set(made, local)

    samples = manifest.records * (1 if options.quick else S3_PASSES)
    runs: dict[str, list[Run]] = {"disk": [], "S3": [], LATE: []}

    def read(form: str) -> Callable[[], None]:
        uri = local if form == "disk" else made
        return partial(go_through, lambda: map(len, batches(uri, samples)), runs[form], samples)

    used = traced(lambda: sum(map(len, batches(made, manifest.records))), store)
    groups = sum(-(-shard.rows // manifest.row_group_rows) for shard in manifest.shards)
    timings = interleave({form: read(form) for form in ("disk", "S3")}, options, warm=True)
    store.reset(late_s=LATE_S)
    timings |= interleave({LATE: read(LATE)}, options, warm=True)
    store.reset()
    rows = []
    for form, some in runs.items():
        rate, first_s = (median(getattr(run, name) for run in some) for name in ("rate", "first_s"))
        # Late answers were timed by themselves, so their rounds are no pairs.
        beside = rate / median(run.rate for run in runs["disk"])
        rows.append([form, f"{rate:.0f}", f"{beside:.2f}", f"{first_s:.2f}"])
    requests = ", ".join(f"{count} {kind}" for kind, count in sorted(used.made.requests.items()))
    note = (
        f"{samples} samples out of {manifest.records} records in {groups} row groups; images/s over the last "
        f"three quarters. One pass from S3: {requests}; {used.made.all_requests / groups:.1f} requests a row group."
    )
    header = ["form", "images/s", "of disk", "s to the first"]
    report.add(Table("Training input over S3", header, rows, note), {"traffic": dataclasses.asdict(used)}, timings)
    return used.made.all_requests / groups, used.made.read / groups, used.processor_s / groups


def copy_set(made: str, local: str) -> None:
    """The set's manifest and shards, from the bucket to disk."""
    for key in list_files(made):
        write_atomic(join(absolute(local), key), read_bytes(join(made, key)))


@dataclass(frozen=True)
class Traced:
    """What one call cost."""

    read: Traffic
    """Of the photographs' bucket."""
    made: Traffic
    """Of the sets' bucket."""
    processor_s: float
    """Of all processes but the server."""
    result: object = dataclasses.field(default=None, repr=False)


def traced(call: Callable[[], object], store: ObjectStore) -> Traced:
    """Run *call* once and count."""
    store.reset()
    seconds = processor_s(call, without=store.pid)
    return Traced(store.traffic(PHOTOGRAPHS), store.traffic(SETS), seconds)


def bare(path: str) -> int:
    """Fetch one object, decode, crop and encode with the functions of preparation; the crop's length in bytes."""
    return crop_encoded(s3fs.S3FileSystem(use_listings_cache=False).cat_file(path))


def rates(timings: dict[str, Timing], images: int, first: str) -> Sequence[list[str]]:
    """Images/s of each form, and beside *first*."""
    return [
        [
            name,
            f"{images / timing.median_s:.0f}",
            f"{1 / timing.times(timings[first]):.2f}",
            f"{timing.spread:.0%}",
        ]
        for name, timing in timings.items()
    ]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
