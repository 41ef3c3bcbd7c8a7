"""Filling one image: seconds and memory by size, hole and chunk."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from torch import Tensor, nn

from benchmarks.harness import Options, Report, Table, convolution_limit, interleave, mb, peak_bytes, start
from benchmarks.scenes import centred_hole, picture
from tmad.config import CoarseConfig, MemoryConfig, PSNetConfig, TMADConfig
from tmad.draws import hole_cells
from tmad.inpaint import Inpainter, InpaintResult
from tmad.model import TMAD

DESCRIPTION = """
Seconds and peak tensor memory of `tmad.inpaint.Inpainter` on one image with a hole over a quarter of its area, from
array to array, by size of the chunks and of the hole. Weights are random: time does not depend on them.

Examples:
  python benchmarks/inference.py
  python benchmarks/inference.py --sizes 512 --chunks 8 32
  python benchmarks/inference.py --quick
"""


@dataclass(frozen=True, kw_only=True)
class InferenceOptions(Options):
    """Options of this benchmark."""

    sizes: tuple[int, ...] = (256, 512)
    """Sides of the images, pixels; a table each."""
    chunks: tuple[int, ...] = (4, 16)
    """Cells that go through retrieval and PSNet at once, beside all of them."""


def main(argv: Sequence[str]) -> int:
    """Measure every size and write the report; returns the exit code."""
    options = start(InferenceOptions, argv, prog="inference.py", description=DESCRIPTION)
    report = Report("inference", "Inference: seconds and memory", options)
    if options.quick:
        options = replace(options, sizes=(64,), chunks=(1, 2))
    model = TMAD(configuration(options)).eval()
    limit = convolution_limit()
    for size in options.sizes:
        _measure_holes(size, model, limit, report, options)
    report.write()
    return 0


def configuration(options: InferenceOptions) -> TMADConfig:
    """The defaults; with --quick a small network."""
    if not options.quick:
        return TMADConfig()
    return TMADConfig(
        patch_size=16,
        coarse=CoarseConfig(base_width=4, num_res_blocks=1),
        memory=MemoryConfig(pool_size=6),
        psnet=PSNetConfig(base_width=4, num_res_blocks=1, num_texture_res_blocks=1),
    )


def _measure_holes(size: int, model: TMAD, limit: float, report: Report, options: InferenceOptions) -> None:
    """Holes over a quarter and a sixteenth of the image and of one pixel; the largest in chunks of several sizes."""
    image = picture(size, "inference")
    large, small = centred_hole(size, size // 2), centred_hole(size, size // 4)

    inpainter = Inpainter(model, keep_candidates=False)

    def fill(mask: np.ndarray, chunk: int) -> Callable[[], InpaintResult]:
        def call() -> InpaintResult:
            inpainter.cells_per_chunk = chunk
            return inpainter(image, mask)

        return call

    cells = len(hole_cells(large, model.config.patch_size))
    quarter, sixteenth = f"hole {size // 2} x {size // 2}", f"hole {size // 4} x {size // 4}"
    chunked = {f"{quarter}, chunks of {chunk}": fill(large, chunk) for chunk in options.chunks if chunk < cells}
    whole = f"{quarter}, its {cells} cells at once"
    chunked[whole] = fill(large, cells)
    calls = {
        **chunked,
        f"{sixteenth}, its cells at once": fill(small, cells),
        "hole of one pixel: little but the coarse network": fill(centred_hole(size, 1), cells),
    }
    macs = {name: _macs(inpainter.model, call) for name, call in calls.items()}
    peaks = {name: peak_bytes(call) for name, call in calls.items()}
    reference = _pixels(calls[whole])
    apart = max(int((_pixels(call) != reference).sum()) for call in chunked.values())
    timings = interleave(calls, options)
    rows = [
        [
            name,
            f"{timing.median_s:.3g}",
            f"{timing.times(timings[whole]):.2f}",
            f"{100 * timing.spread:.0f} %",
            mb(peaks[name]),
            f"{macs[name] / 1e9:.3g}",
            f"{100 * 2 * macs[name] / 1e9 / timing.median_s / limit:.0f} %",
        ]
        for name, timing in timings.items()
    ]
    header = ["call", "s", "× all at once", "spread", "peak MB", "GMAC", "of the convolution limit"]
    note = (
        f"Convolution limit of this machine: {limit:.0f} GFLOP/s. GMAC counts the networks' convolutions, "
        "not CARAFE's reassembly. Values that differ between chunks of different sizes: "
        f"{apart} of {reference.size}."
    )
    figures = {"peak_bytes": peaks, "macs": macs, "convolution_limit_gflops": limit, "values_apart": apart}
    report.add(Table(f"{size} x {size}: holes and chunks", header, rows, note), figures, timings)


def _pixels(call: Callable[[], InpaintResult]) -> np.ndarray:
    """The filled image as int64, so that differences do not wrap around."""
    return np.asarray(call().output).astype(np.int64)


def _macs(model: TMAD, call: Callable[[], object]) -> int:
    """Multiply-adds of the convolutions of *model* during *call*."""
    counts: list[int] = []

    def count(layer: nn.Module, _: object, out: Tensor) -> None:
        assert isinstance(layer, nn.Conv2d)
        counts.append(out.numel() * layer.in_channels * layer.kernel_size[0] * layer.kernel_size[1])

    hooks = [layer.register_forward_hook(count) for layer in model.modules() if isinstance(layer, nn.Conv2d)]
    call()
    for hook in hooks:
        hook.remove()
    return sum(counts)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
