"""Over-fitting a handful of photographs: what the joint phase adds to the coarse result it starts from."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from PIL import Image

from benchmarks.harness import Options, Report, Table, start
from benchmarks.scenes import sample_of
from pipeline.demo.photographs import write_photographs
from pipeline.presets import demo
from pipeline.report.pictures import picture_grid
from tmad.batch import Batch, collate
from tmad.config import TrainingConfig
from tmad.images import crop_scaled, scaled_size, to_model, to_rgb, to_uint8
from tmad.masks import draw_mask
from tmad.metrics import MEASURES, Summary, measure
from tmad.model import TMAD
from tmad.rng import numpy_generator
from tmad.step import Phase, TrainingState
from tmad.swd import SlicedWasserstein

DESCRIPTION = """
Trains both phases on a few photographs with fixed holes, and measures the coarse result and the final one on the same
photographs. Not a speed: it shows that the joint phase learns what the coarse network cannot hold.

Examples:
  python benchmarks/overfit.py
  python benchmarks/overfit.py --joint-images 4000 --residual none
"""

PHOTOGRAPHS = ("astronaut.png", "coffee.png", "rocket.jpg", "brick.png")
SIDE = 128
SHOWN = ("psnr_hole", "l1_hole_pct", "ssim_full", "tv_grad255")
DISTANCES = ("swd_hole", "swd_hole_truthscaled")


@dataclass(frozen=True, kw_only=True)
class OverfitOptions(Options):
    """Options of this benchmark."""

    coarse_images: int = 800
    """Images of the coarse phase."""
    joint_images: int = 1_400
    """Images of the joint phase."""
    batch: int = 4
    """Images of a step: all photographs."""
    cells: int = 16
    """Cells of an image that a step trains."""
    family: str = "rectangle"
    """Family of the holes, one fixed hole a photograph."""
    residual: Literal["none", "coarse", "detail"] = "detail"
    """What PSNet's output is added to (`psnet.residual`)."""


def main(argv: Sequence[str]) -> int:
    """Parse, train, measure, write the report; returns the exit code."""
    options = start(OverfitOptions, argv, prog="overfit.py", description=DESCRIPTION)
    if options.quick:
        options = replace(options, coarse_images=8, joint_images=8)
    report = Report("overfit", "Over-fitting four photographs: joint phase against coarse result", options)
    config = configuration(options)
    truths, masks = scene(options)
    state = TrainingState(config)
    evaluation = batch_of(config, truths, masks, options, cells=(SIDE // config.model.patch_size) ** 2, epoch=-1)
    rows, figures, pictures = [], {}, {}
    for phase, images in (("coarse", options.coarse_images), ("joint", options.joint_images)):
        train(state, config, truths, masks, options, phase, images)  # type: ignore[arg-type]
        for kind, results in run(state.ema_model, evaluation).items():
            if phase == "coarse" and kind == "result":
                continue
            name = f"{kind}, after the {phase} phase"
            figures[name] = measured(results, truths, masks)
            rows.append([name, *(f"{figures[name][key]:.2f}" for key in (*SHOWN, *DISTANCES))])
            pictures[name] = results
    header = ["", *(f"{key} ({arrow(key)})" for key in SHOWN), *(f"{key} (lower)" for key in DISTANCES)]
    note = (
        f"{len(truths)} photographs ({', '.join(PHOTOGRAPHS)}), one {SIDE}-pixel crop and one fixed hole each; "
        f"{options.coarse_images:,} images coarse, {options.joint_images:,} jointly, batch {options.batch}, the "
        f"settings of the preset demo, residual output {options.residual}."
    )
    report.add(Table("Measured on the photographs trained on", header, rows, note), figures, {})
    page = report.write()
    grid = [
        (
            name,
            {"hole": np.where(masks[n][..., None] > 0, np.uint8(255), truths[n])}
            | {kind: results[n] for kind, results in pictures.items()}
            | {"truth": truths[n]},
        )
        for n, name in enumerate(PHOTOGRAPHS)
    ]
    Image.fromarray(picture_grid(grid)).save(page.with_suffix(".jpg"), quality=90)
    return 0


def configuration(options: OverfitOptions) -> TrainingConfig:
    """The demo's training settings."""
    config = demo().training
    return replace(config, model=replace(config.model, psnet=replace(config.model.psnet, residual=options.residual)))


def scene(options: OverfitOptions) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Crops (SIDE, SIDE, 3) uint8 and their holes (SIDE, SIDE) {0, 1}."""
    truths, masks = [], []
    with tempfile.TemporaryDirectory() as folder:
        write_photographs(Path(folder))
        for name in PHOTOGRAPHS:
            with Image.open(Path(folder) / "train" / name) as photograph:
                rgb = to_rgb(photograph)
            scaled = scaled_size(rgb.shape[0], rgb.shape[1], SIDE * 3 // 2)
            truths.append(crop_scaled(rgb, scaled=scaled, top=SIDE // 4, left=SIDE // 4, size=SIDE))
            masks.append(draw_mask(options.family, SIDE, SIDE, numpy_generator("overfit", "mask", name)))
    return truths, masks


def batch_of(
    config: TrainingConfig,
    truths: Sequence[np.ndarray],
    masks: Sequence[np.ndarray],
    options: OverfitOptions,
    *,
    cells: int,
    epoch: int,
) -> Batch:
    """All photographs with their fixed memory; the cells are drawn anew each *epoch*."""
    samples = [
        sample_of(
            config.model,
            name,
            truth,
            mask,
            cells=cells,
            pool_rng=numpy_generator("overfit", "pool", name),
            rng=numpy_generator("overfit", "sample", name, epoch),
        )
        for name, truth, mask in zip(PHOTOGRAPHS, truths, masks, strict=True)
    ]
    return collate(samples)


def train(
    state: TrainingState,
    config: TrainingConfig,
    truths: Sequence[np.ndarray],
    masks: Sequence[np.ndarray],
    options: OverfitOptions,
    phase: Phase,
    images: int,
) -> None:
    """One phase, a line every tenth of it."""
    steps, began = images // options.batch, time.monotonic()
    for step in range(steps):
        batch = batch_of(config, truths, masks, options, cells=options.cells, epoch=step)
        terms = state.step(batch, phase, global_batch=options.batch, progress=step / steps)
        if (step + 1) % max(1, steps // 10) == 0:
            rate = (step + 1) * options.batch / (time.monotonic() - began)
            left = (steps - step - 1) * options.batch / rate
            losses = ", ".join(f"{name[5:]} {value:.3f}" for name, value in terms.items() if name.startswith("loss/"))
            print(f"{phase} {step + 1}/{steps}: {losses}; {rate:.1f} images/s, {left:.0f} s to go", flush=True)


@torch.inference_mode()
def run(model: TMAD, batch: Batch) -> dict[str, list[np.ndarray]]:
    """Coarse and final results, (SIDE, SIDE, 3) uint8 each."""
    out = model(to_model(batch.image), batch.mask.float(), batch.pool_yx, batch.cells)
    kinds = {"coarse": out.coarse, "result": out.output}
    return {kind: list(to_uint8(images).permute(0, 2, 3, 1).numpy()) for kind, images in kinds.items()}


def measured(
    results: Sequence[np.ndarray], truths: Sequence[np.ndarray], masks: Sequence[np.ndarray]
) -> dict[str, float | None]:
    """Means of the measures over the photographs, and the sliced Wasserstein distances of the set."""
    summary, distance = Summary(), SlicedWasserstein(side=SIDE, patches_per_image=1024)
    for name, result, truth, mask in zip(PHOTOGRAPHS, results, truths, masks, strict=True):
        summary.add(measure(result, truth, mask))
        distance.add(name, result, truth, mask)
    return {**summary.means(), **distance.values()}


def arrow(name: str) -> str:
    """`lower` or `higher`, whichever is better."""
    return MEASURES[name].better


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
