"""The training step: images/s and peak memory of both phases, and what critics, penalty and VGG-19 take of it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor, nn

from benchmarks.harness import Options, Report, Table, Timing, interleave, mb, ms, peak_bytes, start
from benchmarks.scenes import training_batch
from tmad.config import CoarseConfig, CriticsConfig, LossConfig, MemoryConfig, PSNetConfig, TMADConfig, TrainingConfig
from tmad.perceptual import untrained_vgg19
from tmad.step import Phase, TrainingState

DESCRIPTION = """
Images/s and peak tensor memory of a training step at the default widths: both phases at each batch size, and at the
first batch size the joint step without VGG-19, without gradient penalty and without critics. VGG-19 has random weights:
time does not depend on them.

Examples:
  python benchmarks/training_step.py
  python benchmarks/training_step.py --sizes 256 --batches 4 --limit-s 600
  python benchmarks/training_step.py --sizes 256 --cells 25
  python benchmarks/training_step.py --quick
"""

JOINT = "joint step"


@dataclass(frozen=True, kw_only=True)
class TrainingStepOptions(Options):
    """Options of this benchmark."""

    sizes: tuple[int, ...] = (128, 256)
    """Sides of the images, pixels; one table each."""
    batches: tuple[int, ...] = (1, 2, 4)
    """Images of a step; the first is the one at which the parts are left out in turn."""
    cells: int = 64
    """Cells synthesized in each image, never more than the image has."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the networks' convolutions."""


def main(argv: Sequence[str]) -> int:
    """Measure every size and write the report; returns the exit code."""
    options = start(TrainingStepOptions, argv, prog="training_step.py", description=DESCRIPTION)
    report = Report("training_step", "Training step: images/s and memory", options)
    if options.quick:
        options = replace(options, sizes=(64,), batches=(1, 2), cells=4)
    vgg = untrained_vgg19(torch.Generator().manual_seed(0))
    for size in options.sizes:
        _measure(size, vgg, report, options)
    report.write()
    return 0


def configuration(options: TrainingStepOptions) -> TrainingConfig:
    """The defaults; with --quick the smallest networks that have every part."""
    config = TrainingConfig(precision=options.precision)
    if not options.quick:
        return config
    model = TMADConfig(
        patch_size=16,
        coarse=CoarseConfig(base_width=4, num_res_blocks=1),
        memory=MemoryConfig(pool_size=6),
        psnet=PSNetConfig(base_width=4, num_res_blocks=1, num_texture_res_blocks=1),
    )
    return replace(config, model=model, critics=CriticsConfig(patch_base_width=4, global_base_width=4))


def without_parts(weights: LossConfig) -> dict[str, LossConfig]:
    """The joint step's losses with one part left out, by its name."""
    return {
        "without VGG-19": replace(weights, weight_perceptual=0),
        "without gradient penalty": replace(weights, gradient_penalty=0),
        "without critics and penalty": replace(weights, weight_gan_patch=0, weight_gan_global=0),
    }


def _measure(size: int, vgg: nn.Module, report: Report, options: TrainingStepOptions) -> None:
    config = configuration(options)
    cells = min(options.cells, (size // config.model.patch_size) ** 2)
    full = TrainingState(config, perceptual=vgg)

    def steps(state: TrainingState, phase: Phase, images: int) -> Callable[[], dict[str, Tensor]]:
        batch = training_batch(config.model, side=size, images=images, cells=cells)
        return lambda: state.step(batch, phase, global_batch=images, progress=0.0)

    calls: dict[str, Callable[[], dict[str, Tensor]]] = {}
    images_of: dict[str, int] = {}
    for images in options.batches:
        calls[f"coarse step, batch {images}"] = steps(full, "coarse", images)
        calls[f"{JOINT}, batch {images}"] = steps(full, "joint", images)
        images_of |= dict.fromkeys(list(calls)[-2:], images)
    first = options.batches[0]
    for part, weights in without_parts(config.loss).items():
        name = f"{JOINT} {part}, batch {first}"
        state = TrainingState(replace(config, loss=weights), perceptual=vgg)
        calls[name] = steps(state, "joint", first)
        images_of[name] = first

    losses: dict[str, dict[str, Tensor]] = {}
    peaks = {name: peak_bytes(lambda name=name: losses.update({name: calls[name]()})) for name in calls}  # type: ignore[misc]
    for name, values in losses.items():
        if not all(value.isfinite() for value in values.values()):
            raise ArithmeticError(f"{name}: a loss is not finite, the time would mean nothing")
    timings = interleave(calls, options, warm=True)
    rows = [
        [
            name,
            ms(timing.median_s),
            f"{100 * timing.spread:.0f} %",
            f"{images_of[name] / timing.median_s:.3g}",
            mb(peaks[name]),
            mb(peaks[name] / images_of[name]),
        ]
        for name, timing in timings.items()
    ]
    header = ["step", "ms", "spread", "images/s", "peak MB", "peak MB an image"]
    note = f"{_shares(timings, first)} Peaks are beyond weights, Adam's moments and averaged weights."
    figures = {"peak_bytes": peaks, "images": images_of, "cells": cells}
    report.add(Table(f"{size} x {size}, {cells} cells an image", header, rows, note), figures, timings)


def _shares(timings: dict[str, Timing], images: int) -> str:
    """What each part takes of the joint step: 1 - time without it / time with it."""
    whole = timings[f"{JOINT}, batch {images}"]
    saved = {
        part.removeprefix("without "): 1 - timings[f"{JOINT} {part}, batch {images}"].times(whole)
        for part in without_parts(LossConfig())
    }
    listed = ", ".join(f"{part} {100 * share:.0f} %" for part, share in saved.items())
    return f"Share of the joint step at batch {images}, by leaving it out: {listed}."


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
