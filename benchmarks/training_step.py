"""The training step: images/s and peak memory of both phases, and the shares of discriminators, penalty and VGG-19."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor, nn

from benchmarks.harness import Options, Report, Table, interleave, mb, ms, peak_bytes, start
from benchmarks.scenes import training_batch
from tmad.config import (
    CoarseConfig,
    DiscriminatorsConfig,
    LossConfig,
    MemoryConfig,
    PSNetConfig,
    TMADConfig,
    TrainingConfig,
)
from tmad.perceptual import untrained_vgg19
from tmad.step import Phase, TrainingState

DESCRIPTION = """
Images/s and peak tensor memory of a training step at the default widths: both phases at each batch size, and at the
first batch size the joint step without VGG-19, without gradient penalty and without discriminators. VGG-19 has random
weights: time does not depend on them.

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
    return replace(config, model=model, discriminators=DiscriminatorsConfig(patch_base_width=4, global_base_width=4))


def without_parts(weights: LossConfig) -> dict[str, LossConfig]:
    """The joint step's losses with one part left out, by its name."""
    return {
        "without VGG-19": replace(weights, weight_perceptual=0),
        "without gradient penalty": replace(weights, gradient_penalty=0),
        "without discriminators and penalty": replace(weights, weight_gan_patch=0, weight_gan_global=0),
    }


def _measure(size: int, vgg: nn.Module, report: Report, options: TrainingStepOptions) -> None:
    config = configuration(options)
    cells = min(options.cells, (size // config.model.patch_size) ** 2)
    full = TrainingState(config, perceptual=vgg)

    def steps(state: TrainingState, phase: Phase, images: int) -> Callable[[], dict[str, Tensor]]:
        batch = training_batch(config.model, side=size, images=images, cells=cells)
        return lambda: state.step(batch, phase, global_batch=images, progress=0.0)

    title = f"{size} x {size}, {cells} cells an image"
    whole: dict[str, Step] = {}
    for images in options.batches:
        whole[f"coarse step, batch {images}"] = Step(images, steps(full, "coarse", images))
        whole[f"{JOINT}, batch {images}"] = Step(images, steps(full, "joint", images))
    note = "Peaks are beyond weights, Adam's moments and averaged weights."
    _compare(f"{title}: steps", whole, note, report, options)

    first = options.batches[0]
    parts = {JOINT: Step(first, steps(full, "joint", first))}
    for part, weights in without_parts(config.loss).items():
        state = TrainingState(replace(config, loss=weights), perceptual=vgg)
        parts[part] = Step(first, steps(state, "joint", first))
    _compare(f"{title}: what the parts of the joint step take at batch {first}", parts, "", report, options)


@dataclass(frozen=True)
class Step:
    """A step that can be repeated."""

    images: int
    run: Callable[[], dict[str, Tensor]]


def _compare(title: str, steps: dict[str, Step], note: str, report: Report, options: TrainingStepOptions) -> None:
    """Peaks, which also warm up, then times."""
    losses: dict[str, dict[str, Tensor]] = {}
    peaks = {name: peak_bytes(lambda name=name: losses.update({name: steps[name].run()})) for name in steps}  # type: ignore[misc]
    for name, values in losses.items():
        if not all(value.isfinite() for value in values.values()):
            raise ArithmeticError(f"{name}: a loss is not finite, the time would mean nothing")
    timings = interleave({name: step.run for name, step in steps.items()}, options, warm=True)
    rows = [
        [
            name,
            ms(timing.median_s),
            f"{100 * timing.spread:.0f} %",
            f"{steps[name].images / timing.median_s:.3g}",
            mb(peaks[name]),
            mb(peaks[name] / steps[name].images),
        ]
        for name, timing in timings.items()
    ]
    header = ["step", "ms", "spread", "images/s", "peak MB", "peak MB an image"]
    if JOINT in steps:
        header.append("share of what is left out")
        for row, timing in zip(rows, timings.values(), strict=True):
            row.append("" if row[0] == JOINT else f"{100 * (1 - timing.times(timings[JOINT])):.0f} %")
    report.add(Table(title, header, rows, note), {"peak_bytes": peaks}, timings)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
