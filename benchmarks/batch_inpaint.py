"""Batch inpainting: the Ray job beside a bare loop, a small hole in a large photograph, memory by size."""

from __future__ import annotations

import io
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image

from benchmarks.harness import Options, Report, Table, interleave, start
from benchmarks.scenes import picture
from pipeline.inpaint.config import InpaintConfig
from pipeline.inpaint.run import inpaint_all
from pipeline.runs.cluster import start_ray
from tmad.checkpoint import save_model
from tmad.config import CoarseConfig, MemoryConfig, PSNetConfig, TMADConfig
from tmad.files import allow_pixels, fill_file, open_file
from tmad.holes import group_holes
from tmad.inpaint import Inpainter, Policy
from tmad.model import TMAD

RAY_NICENESS = 15
"""What Ray gives its workers by default."""

DESCRIPTION = """
Images/s of `jobs/inpaint.py` beside a bare loop of the same model over the same files in as many processes; seconds of
a 12-megapixel photograph with a hole of 1 % beside the same hole cut out by hand; and the most memory that one file
takes, by size and policy. Weights are random: time does not depend on them.

Examples:
  python benchmarks/batch_inpaint.py
  python benchmarks/batch_inpaint.py --images 400 --megapixels 12 50
  python benchmarks/batch_inpaint.py --quick
"""


@dataclass(frozen=True, kw_only=True)
class BatchOptions(Options):
    """Options of this benchmark."""

    images: int = 200
    """JPEG files of the first table."""
    side: int = 256
    """Their sides, pixels; a sixteenth of each is hole."""
    processes: int = 0
    """Copies of the model on both sides; 0 = as many as this process may use processors."""
    megapixels: tuple[int, ...] = (12, 50, 200)
    """Sizes of the last table."""


def main(argv: Sequence[str]) -> int:
    """Measure and write the report; returns the exit code."""
    options = start(BatchOptions, argv, prog="batch_inpaint.py", description=DESCRIPTION)
    report = Report("batch_inpaint", "Batch inpainting: speed and memory", options)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_model(TMAD(configuration(options)), folder / "model")
        _measure_hole(folder, report, options)
        _measure_memory(folder, report, options)
        _measure_job(folder, report, options)
    report.write()
    return 0


def configuration(options: BatchOptions) -> TMADConfig:
    """The defaults; with --quick a small network."""
    if not options.quick:
        return TMADConfig()
    return TMADConfig(
        patch_size=16,
        coarse=CoarseConfig(base_width=4, num_res_blocks=1),
        memory=MemoryConfig(pool_size=6),
        psnet=PSNetConfig(base_width=4, num_res_blocks=1, num_texture_res_blocks=1),
    )


def _measure_job(folder: Path, report: Report, options: BatchOptions) -> None:
    count = 8 if options.quick else options.images
    side = 64 if options.quick else options.side
    processes = options.processes or len(os.sched_getaffinity(0))
    hole = np.zeros((side, side), np.uint8)
    hole[side // 4 : side // 2, side // 4 : side // 2] = 255
    Image.fromarray(hole).save(folder / "one.png")
    (folder / "images").mkdir()
    for number in range(count):
        Image.fromarray(picture(side, f"batch-{number}")).save(folder / "images" / f"{number:05d}.jpg", quality=90)
    began = time.monotonic()
    start_ray()
    ray_s = time.monotonic() - began
    rows: list[list[str]] = []
    rates: dict[str, list[tuple[float, float, float]]] = {}
    figures: dict[str, Any] = {"ray_start_s": ray_s, "processes": processes}
    for number in range(options.rounds):
        for name, call in (("bare loop", _bare), ("Ray job", _job))[:: 1 if number % 2 else -1]:
            began = time.time()
            ends = sorted(call(folder, folder / f"{name}-{number}", count, processes))
            # The rate once both sides work: what came before the first result is start-up.
            rate = (len(ends) - processes) / max(ends[-1] - ends[processes - 1], 1e-9)
            rates.setdefault(name, []).append((rate, ends[processes - 1] - began, time.time() - began))
    for name, samples in rates.items():
        rate, first, whole = (float(np.median([sample[place] for sample in samples])) for place in range(3))
        share = float(np.median([one[0] / bare[0] for one, bare in zip(samples, rates["bare loop"], strict=True)]))
        rows.append([name, f"{rate:.3g}", f"{share:.2f}", f"{first:.1f}", f"{whole:.1f}"])
    header = ["", "images/s, steady", "× bare loop", "s to the first results", "s of the whole call"]
    note = (
        f"{count} JPEG files of {side} x {side}, a sixteenth hole, {processes} processes of one thread on both sides, "
        f"{options.rounds} rounds in turn. Steady: between the first result of each process and the last of all. Ray "
        f"itself started before that, in {ray_s:.0f} s."
    )
    figures["samples_rate_first_whole"] = rates
    report.add(Table("The job beside a bare loop", header, rows, note), figures, {})


_worker: dict[str, Any] = {}


def _start_bare(model: str) -> None:
    # As Ray does with its workers; on a busy machine it would compare priorities otherwise.
    os.nice(RAY_NICENESS)
    torch.set_num_threads(1)
    _worker["inpainter"] = Inpainter.load(model)


def _fill_bare(image: str, mask: str, out: str) -> float:
    hole = (np.asarray(Image.open(mask)) > 127).astype(np.uint8)
    filled = fill_file(_worker["inpainter"], open_file(Path(image).read_bytes()), hole, image_id=Path(image).name)
    Path(out).write_bytes(filled.data)
    return time.time()


def _bare(folder: Path, out: Path, count: int, processes: int) -> list[float]:
    """When each image was ready."""
    out.mkdir()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, _start_bare, (str(folder / "model"),)) as pool:
        futures = [
            pool.submit(_fill_bare, str(path), str(folder / "one.png"), str(out / path.name))
            for path in sorted((folder / "images").iterdir())
        ]
        return [future.result() for future in futures]


def _job(folder: Path, out: Path, count: int, processes: int) -> list[float]:
    """When each image was ready."""
    config = InpaintConfig(
        input=str(folder / "images"),
        mask_from="one",
        masks=str(folder / "one.png"),
        output=str(out),
        model=str(folder / "model"),
        num_actors=processes,
    )
    assert inpaint_all(config).done == count
    return list(pq.read_table(out / "ledger.parquet")["when"].to_pylist())


def _scene(megapixels: float, share: float, aspect: float = 4 / 3) -> tuple[np.ndarray, np.ndarray]:
    """A picture of this many megapixels, and a square hole over *share* of it."""
    height = round((megapixels * 1e6 / aspect) ** 0.5)
    width = round(height * aspect)
    tile = picture(512, "large")
    repeats = (-(-height // 512), -(-width // 512), 1)
    side = round((share * height * width) ** 0.5)
    hole = np.zeros((height, width), np.uint8)
    top, left = (height - side) // 2, (width - side) // 2
    hole[top : top + side, left : left + side] = 1
    return np.ascontiguousarray(np.tile(tile, repeats)[:height, :width]), hole


def _measure_hole(folder: Path, report: Report, options: BatchOptions) -> None:
    """A small hole in a large photograph beside the same hole, with its context, cut out by hand."""
    megapixels = 0.3 if options.quick else 12
    image, hole = _scene(megapixels, 0.01)
    inpainter = Inpainter.load(folder / "model")
    box = group_holes(hole, multiple=inpainter.model.config.size_multiple, context=inpainter.context)[0]
    cut_image, cut_hole = np.ascontiguousarray(image[box.slices]), np.ascontiguousarray(hole[box.slices])
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=92)
    data = buffer.getvalue()
    calls: dict[str, Callable[[], object]] = {
        "cut out by hand, array to array": lambda: inpainter(cut_image, cut_hole),
        "the whole photograph, array to array": lambda: inpainter(image, hole),
        "the whole photograph, JPEG to JPEG": lambda: fill_file(inpainter, open_file(data), hole),
    }
    timings = interleave(calls, options)
    by_hand = timings["cut out by hand, array to array"]
    rows = [
        [
            name,
            f"{timing.median_s:.3g}",
            f"{timing.times(by_hand):.2f}",
            f"{median(timing.cpu_s):.3g}",
            f"{median(timing.cpu_s) / median(by_hand.cpu_s):.2f}",
            f"{100 * timing.spread:.0f} %",
        ]
        for name, timing in timings.items()
    ]
    note = f"{image.shape[1]} x {image.shape[0]} pixels, hole {hole.mean():.1%}; cut out: {box.width} x {box.height}."
    title = f"A hole of 1 % in {megapixels:g} megapixels"
    report.add(Table(title, ["call", "s", "× by hand", "processor s", "× by hand", "spread"], rows, note), {}, timings)


def _measure_memory(folder: Path, report: Report, options: BatchOptions) -> None:
    """The most memory of a process that fills one JPEG file, by size, policy and hole."""
    cases: list[tuple[float, Policy, float]] = []
    for size in (0.2,) if options.quick else options.megapixels:
        cases += [(size, "crop", 0.0025), (size, "resize", 0.0025), (size, "crop", 0.01)]
    rows, figures = [], {}
    context = multiprocessing.get_context("spawn")
    for size, policy, share in cases:
        with ProcessPoolExecutor(1, context) as pool:
            scene = pool.submit(_write_scene, str(folder / "scene.jpg"), size, share).result()
        with ProcessPoolExecutor(1, context) as pool:
            peak, before, seconds = pool.submit(
                _fill_measured, str(folder / "model"), str(folder / "scene.jpg"), scene, policy, share
            ).result()
        figures[f"{size:g} {policy} {share}"] = {"peak_bytes": peak, "before_bytes": before, "seconds": seconds}
        rows.append(
            [
                f"{size:g} megapixels, {policy}, hole {100 * share:g} %",
                f"{(peak - before) / 2**20:.0f}",
                f"{seconds:.1f}",
            ]
        )
        print(rows[-1], flush=True)
    note = "Above the process with PyTorch and the model loaded; JPEG to JPEG, one thread, one image at a time."
    report.add(Table("Memory of one file", ["", "peak MiB", "s"], rows, note), figures, {})


def _write_scene(path: str, megapixels: float, share: float) -> tuple[int, int, int, int]:
    """Height, width, and top-left corner of the hole."""
    image, hole = _scene(megapixels, share)
    Image.fromarray(image).save(path, "JPEG", quality=92)
    return (*hole.shape, int(np.flatnonzero(hole.any(1))[0]), int(np.flatnonzero(hole.any(0))[0]))


def _fill_measured(
    model: str, path: str, scene: tuple[int, int, int, int], policy: Policy, share: float
) -> tuple[int, int, float]:
    torch.set_num_threads(1)
    allow_pixels(10**9)
    height, width, top, left = scene
    inpainter = Inpainter.load(model, policy=policy)
    small = np.zeros((64, 64), np.uint8)
    small[8:16, 8:16] = 1
    inpainter(picture(64, "warm"), small)
    before = _peak_bytes()
    began = time.monotonic()
    hole = np.zeros((height, width), np.uint8)
    side = round((share * height * width) ** 0.5)
    hole[top : top + side, left : left + side] = 1
    fill_file(inpainter, open_file(Path(path).read_bytes(), max_pixels=10**9), hole)
    seconds = time.monotonic() - began
    return _peak_bytes(), before, seconds


def _peak_bytes() -> int:
    """The most memory that this process has had, as Linux says; `getrusage` counts its parent's, too."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM")))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
