"""What Ray costs training: the job beside the same step in a plain loop, on one and two workers; a checkpoint."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from benchmarks.data import Samples
from benchmarks.harness import Options, Report, Table, start
from pipeline.config import DataConfig, RunConfig, ScheduleConfig, WorkersConfig
from pipeline.data.prepare import PrepareConfig, prepare
from pipeline.data.schema import read_records
from pipeline.demo.photographs import write_photographs
from pipeline.presets import smoke
from pipeline.runs.cluster import start_ray
from pipeline.tracking import read_json_lines
from pipeline.train.context import DistributedWorkers
from pipeline.train.launch import KEEP_FREED_PAGES, train
from tmad.batch import collate
from tmad.step import TrainingState

RAY_NICENESS = 15
"""What Ray gives its workers by default."""

CROP = 128
"""Pixels."""

DESCRIPTION = """
Images/s of `jobs/train_places.py` beside a plain loop of the same step over the same photographs: processes of one
thread that PyTorch starts and joins (gloo), DataLoader with one process for each, no checkpoints, no tracking, nothing
compared. On one and on two workers, with the same images on each: what the second one adds. Joint phase throughout.
And how long a checkpoint holds training up.

Examples:
  python benchmarks/training_job.py
  python benchmarks/training_job.py --rounds 3 --steps 20
  python benchmarks/training_job.py --quick
"""


@dataclass(frozen=True, kw_only=True)
class JobOptions(Options):
    """Options of this benchmark."""

    steps: int = 24
    """Timed steps at the default widths, after as many that are not; of the smallest networks ten times as many."""
    batch: int = 2
    """Images of a step on each worker."""
    workers: tuple[int, ...] = (1, 2)
    """Numbers of workers."""


@dataclass(frozen=True)
class Run:
    """One run of either kind."""

    images_per_s: float
    """From the end of the steps that are not timed to the end: all that happens in between is in it."""
    start_s: float
    """From the call to the first step, as if that had taken as long as the others."""


def main(argv: Sequence[str]) -> int:
    """Measure and write the report; returns the exit code."""
    options = start(JobOptions, argv, prog="training_job.py", description=DESCRIPTION)
    if options.quick:
        options = replace(options, steps=2)
    report = Report("training_job", "The training job beside a plain loop", options)
    os.environ.update(KEEP_FREED_PAGES)  # of the plain loop's processes; the job's workers have it anyway
    start_ray()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_photographs(folder / "photographs")
        networks = {"smallest networks": (smoke(), 10 * options.steps)}
        if not options.quick:
            networks |= {"default widths": (RunConfig(), options.steps)}
        for widths, (config, steps) in networks.items():
            sets = _prepare(config, folder, widths)
            _compare(widths, _configuration(config, sets, folder, steps, options), steps, report, options)
            _measure_checkpoint(widths, _configuration(config, sets, folder, steps, options), report, options)
    report.write()
    return 0


def _prepare(config: RunConfig, folder: Path, widths: str) -> dict[str, str]:
    sets = {}
    for which in ("train", "val"):
        out = folder / f"{which} {widths}"
        prepare(
            PrepareConfig(
                source=str(folder / "photographs" / which),
                out=str(out),
                crop_size=CROP,
                patch_size=config.model.patch_size,
                memory=config.model.memory,
            )
        )
        sets[which] = str(out)
    return sets


def _configuration(
    config: RunConfig, sets: Mapping[str, str], folder: Path, steps: int, options: JobOptions
) -> RunConfig:
    """*steps*, and as many before them: Ray starts processes while the first are trained."""
    interval = max(1, steps // 6) * options.batch
    total = 2 * steps * options.batch
    schedule = ScheduleConfig(
        coarse_images=0,
        joint_images=total,
        batch_images=options.batch,
        patches_per_image=min(16, (CROP // config.model.patch_size) ** 2),
        log_every_images=interval,
        validate_every_images=total,
        validation_images=2,
        checkpoint_every_images=total,
    )
    return replace(
        config,
        runs=str(folder / "runs"),
        data=DataConfig(train=sets["train"], val=sets["val"]),
        schedule=schedule,
        workers=WorkersConfig(num_workers=1, cpus_per_worker=0.5, threads=1),
        perceptual=replace(config.perceptual, features="off"),
        tracking=replace(config.tracking, uri="none", register=False),
    )


def _on(config: RunConfig, workers: int) -> RunConfig:
    """The same work for each of *workers*."""
    schedule = config.schedule
    lengths = ("joint_images", "batch_images", "log_every_images", "validate_every_images", "checkpoint_every_images")
    longer: dict[str, Any] = {name: workers * getattr(schedule, name) for name in lengths}
    return replace(config, schedule=replace(schedule, **longer), workers=replace(config.workers, num_workers=workers))


def _compare(widths: str, config: RunConfig, steps: int, report: Report, options: JobOptions) -> None:
    runs: dict[str, list[Run]] = {}
    began = time.monotonic()
    rounds = 0
    while rounds < options.rounds and (not rounds or time.monotonic() - began < options.limit_s):
        for workers in options.workers:
            sized = _on(config, workers)
            plain, job = f"plain loop, {_processes(workers)}", f"job, {_processes(workers)}"
            calls = {plain: partial(_plain, sized), job: partial(_job, sized, rounds)}
            for name in list(calls)[:: 1 if rounds % 2 else -1]:
                runs.setdefault(name, []).append(calls[name]())
                print(f"round {rounds + 1}, {name}: {runs[name][-1].images_per_s:.3g} images/s", flush=True)
        rounds += 1
    rows = []
    for name, samples in sorted(runs.items(), key=lambda item: list(runs).index(item[0])):
        kind, processes = name.split(", ")
        rival = runs[f"plain loop, {processes}"]
        alone = runs[f"{kind}, {_processes(options.workers[0])}"]
        times_as_many = int(processes.split()[0]) / options.workers[0]
        rates = [run.images_per_s for run in samples]
        rows.append(
            [
                name,
                f"{median(rates):.3g}",
                f"{(max(rates) - min(rates)) / median(rates):.0%}",
                f"{_times(samples, rival):.3f}",
                f"{1e3 * _later_s(samples, rival, config.schedule.batch_images * int(processes.split()[0])):+.1f}",
                f"{_times(samples, alone) / times_as_many:.2f}",
                f"{median(run.start_s for run in samples):.1f}",
            ]
        )
    header = [
        "",
        "images/s",
        "spread",
        "× plain loop",
        "ms a step beyond it",
        "of linear scaling",
        "s to the first step",
    ]
    note = (
        f"Crops of {CROP} pixels, {options.batch} images a worker and step, {steps} timed steps after as many others, "
        f"one thread a worker, {len(os.sched_getaffinity(0))} processors, {rounds} rounds in turn. Readers of data run "
        "beside the workers "
        "on the same processors. Ray itself runs already."
    )
    figures = {name: [vars(run) for run in samples] for name, samples in runs.items()}
    report.add(Table(f"Training, {widths}", header, sorted(rows), note), {"runs": figures}, {})


def _times(samples: Sequence[Run], others: Sequence[Run]) -> float:
    """Median of the ratios within each round."""
    return median(one.images_per_s / other.images_per_s for one, other in zip(samples, others, strict=True))


def _later_s(samples: Sequence[Run], others: Sequence[Run], batch: int) -> float:
    """Seconds that a step takes longer, median of the rounds."""
    return median(
        batch / one.images_per_s - batch / other.images_per_s for one, other in zip(samples, others, strict=True)
    )


def _processes(number: int) -> str:
    return f"{number} worker" + ("s" if number > 1 else "")


def _job(config: RunConfig, number: int) -> Run:
    began = time.time()
    named = replace(config, name=f"{config.model.patch_size}-{config.workers.num_workers}-{number}")
    train(named)
    rows = read_json_lines(f"{config.runs}/{named.name}/metrics.jsonl")
    ends = [(row["step"], row["time_s"]) for row in rows if "rate/images_per_s" in row]
    return _run(began, ends)


def _run(began: float, ends: Sequence[tuple[int, float]]) -> Run:
    """From the number of images and the time at the end of each interval."""
    last, last_s = ends[-1]
    warm, warm_s = next((images, end_s) for images, end_s in ends if images >= last / 2)
    first, first_s = ends[0]
    rate = (last - warm) / (last_s - warm_s)
    return Run(rate, first_s - began - first / rate)


def _plain(config: RunConfig) -> Run:
    """What one would write without Ray."""
    began = time.time()
    context = multiprocessing.get_context("spawn")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = config.workers.num_workers
    queue = context.SimpleQueue()
    processes = [context.Process(target=_plain_worker, args=(config, rank, port, queue)) for rank in range(world)]
    for process in processes:
        process.start()
    ends = queue.get()
    for process in processes:
        process.join()
        if process.exitcode:
            raise RuntimeError(f"a process of the plain loop ended with {process.exitcode}")
    return _run(began, ends)


def _plain_worker(config: RunConfig, rank: int, port: int, queue: Any) -> None:
    # As Ray does with its workers; on a busy machine it would compare priorities otherwise.
    os.nice(RAY_NICENESS)
    torch.set_num_threads(1)
    world, schedule = config.workers.num_workers, config.schedule
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    share = schedule.batch_images // world
    assert config.data.training_set is not None
    records = list(read_records(config.data.training_set))
    samples = Samples(
        records,
        schedule.joint_images // world,
        patch_size=config.model.patch_size,
        cells=schedule.patches_per_image,
    )
    batches = DataLoader(samples, batch_size=share, num_workers=1, collate_fn=collate, multiprocessing_context="fork")
    state = TrainingState(config.training, seed=config.seed)
    ends, images = [], 0
    for batch in batches:
        state.step(
            batch,
            "joint",
            global_batch=schedule.batch_images,
            progress=images / schedule.joint_images,
            workers=DistributedWorkers(),
        )
        images += schedule.batch_images
        if images % schedule.log_every_images == 0:
            ends.append((images, time.time()))
    if rank == 0:
        queue.put(ends)
    dist.barrier()
    dist.destroy_process_group()


def _measure_checkpoint(widths: str, config: RunConfig, report: Report, options: JobOptions) -> None:
    """How long the loop waits for a checkpoint, in a folder of this machine."""
    every = config.schedule.log_every_images
    name = f"checkpoints-{config.model.patch_size}"
    schedule = replace(config.schedule, checkpoint_every_images=every)
    train(replace(config, name=name, schedule=schedule))
    folder = Path(config.runs) / name
    seconds = [
        row["system/checkpoint_s"] for row in read_json_lines(f"{folder}/metrics.jsonl") if "system/checkpoint_s" in row
    ]
    newest = max((folder / "checkpoints").glob("images_*"))
    size = sum(path.stat().st_size for path in newest.rglob("*") if path.is_file())
    row = [f"{size / 1e6:.0f} MB", f"{median(seconds):.2f}", f"{max(seconds):.2f}", str(len(seconds))]
    header = ["size", "s, median", "s, most", "checkpoints"]
    note = "From the end of a step to the next one's start, all workers together: written, checked, in Ray's books."
    report.add(Table(f"A checkpoint, {widths}", header, [row], note), {"seconds": seconds, "bytes": size}, {})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
