"""CARAFE's reassembly: what `tmad.carafe` ships against other ways to write it: agreement, time, memory."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from benchmarks import carafe_forms as forms
from benchmarks.harness import Options, Report, Table, interleave, mb, ms, peak_bytes, saved_bytes, start
from tmad.carafe import reassemble

DESCRIPTION = """
Time and memory of CARAFE's reassembly (x2, kernel 5) at the places where the default model has it, and at
128 channels 64 -> 128, all forms given the same features and weights.

Examples:
  python benchmarks/carafe.py
  python benchmarks/carafe.py --keep-pages --no-compiled
  python benchmarks/carafe.py --quick
"""

KERNEL = 5
SHIPPED, REFERENCE, COMPILED = "shipped Function", "unfold after up-sampling", "shifts, channels-last, compiled"

Form = Callable[[Tensor, Tensor, int], Tensor]
EAGER: dict[str, Form] = {
    SHIPPED: reassemble,
    REFERENCE: forms.unfolded_large,
    "unfold before up-sampling, einsum": forms.unfolded_small,
    "shifts, plain autograd": forms.shifts,
    "shifts, channels-last, plain autograd": forms.shifts_channels_last,
}
CHANNELS_LAST = ("shifts, channels-last, plain autograd", COMPILED)
"""Forms that get and give channels-last tensors, as a network run in that layout would pass them on."""


@dataclass(frozen=True)
class Place:
    """Where up-sampling happens: B maps of C channels, side x side."""

    what: str
    maps: int
    channels: int
    side: int
    compiled: bool = False
    """Time the compiled form here too; compiling takes longer than everything else."""


PLACES = (
    Place("128 channels, 64 to 128", 1, 128, 64, compiled=True),
    Place("coarse network at 256: 128 channels, 32 to 64", 1, 128, 32),
    Place("coarse network at 256: 64 channels, 64 to 128", 1, 64, 64),
    Place("coarse network at 256: 32 channels, 128 to 256", 1, 32, 128, compiled=True),
    Place("PSNet, 16 cells: 128 channels, 8 to 16", 16, 128, 8),
    Place("PSNet, 16 cells: 64 channels, 16 to 32", 16, 64, 16),
)
QUICK_PLACES = (Place("2 maps of 4 channels, 8 to 16", 2, 4, 8), Place("4 channels, 11 to 22", 1, 4, 11))


@dataclass(frozen=True, kw_only=True)
class CarafeOptions(Options):
    """Options of this benchmark."""

    compiled: bool = True
    """Time the compiled form at two of the places, where a C++ compiler is found; not with --quick."""


def main(argv: Sequence[str]) -> int:
    """Measure every place and write the report; returns the exit code."""
    options = start(CarafeOptions, argv, prog="carafe.py", description=DESCRIPTION)
    report = Report("carafe", "CARAFE reassembly: forms, time and memory", options)
    for place in QUICK_PLACES if options.quick else PLACES:
        _measure(place, report, options)
    report.write()
    return 0


def _measure(place: Place, report: Report, options: CarafeOptions) -> None:
    generator = torch.Generator().manual_seed(0)
    shape = (place.maps, place.channels, place.side, place.side)
    features = torch.randn(shape, generator=generator)
    logits = torch.randn(place.maps, 4, KERNEL**2, place.side, place.side, generator=generator)
    weights = logits.softmax(dim=2)
    cotangent = torch.randn((*shape[:2], 2 * place.side, 2 * place.side), generator=generator)

    variants, note = dict(EAGER), ""
    if place.compiled and options.compiled and not options.quick:
        variants[COMPILED] = torch.compile(forms.shifts_channels_last, dynamic=False)
    inputs = {
        name: (_laid_out(features, name).requires_grad_(), _laid_out(weights, name).requires_grad_())
        for name in variants
    }
    cotangents = {name: _laid_out(cotangent, name) for name in variants}

    def graph(name: str) -> Callable[[], Tensor]:
        return lambda: variants[name](*inputs[name], KERNEL)

    def forward(name: str) -> Callable[[], Tensor]:
        return torch.inference_mode()(graph(name))

    def both(name: str) -> Callable[[], tuple[Tensor, ...]]:
        return lambda: torch.autograd.grad(graph(name)(), inputs[name], cotangents[name])

    if COMPILED in variants:
        try:
            forward(COMPILED)()
            both(COMPILED)()
        except Exception as error:
            del variants[COMPILED]
            note = f" The compiled form did not run here: {type(error).__name__}."

    output_bytes = cotangent.numel() * cotangent.element_size()
    expected, expected_grads = forward(REFERENCE)(), both(REFERENCE)()
    memory = {
        name: {
            "forward_peak": peak_bytes(forward(name)),
            "both_peak": peak_bytes(both(name)),
            "saved": saved_bytes(graph(name)),
            "difference": _difference([forward(name)()], [expected]),
            "gradient_difference": _difference(both(name)(), expected_grads),
        }
        for name in variants
    }
    floor = interleave({"nearest": lambda: forms.nearest(features, weights, KERNEL)}, options)["nearest"]
    ahead = interleave({name: forward(name) for name in variants}, options)
    back = interleave({name: both(name) for name in variants}, options)
    rows = [
        [
            name,
            ms(ahead[name].median_s),
            f"{ahead[name].times(ahead[SHIPPED]):.2f}",
            ms(back[name].median_s),
            f"{back[name].times(back[SHIPPED]):.2f}",
            mb(memory[name]["forward_peak"]),
            mb(memory[name]["both_peak"]),
            mb(memory[name]["saved"]),
            f"{memory[name]['difference']:.0e}",
            f"{memory[name]['gradient_difference']:.0e}",
        ]
        for name in variants
    ]
    header = ["form", "forward ms", "× shipped", "fwd+bwd ms", "× shipped", "fwd peak MB", "fwd+bwd peak MB"]
    header += ["kept for bwd MB", "max. diff.", "gradients"]
    note = (
        f"Output {mb(output_bytes)} MB; nearest neighbour, the floor: {ms(floor.median_s)} ms. "
        f"Differences are relative to the largest value of “{REFERENCE}”.{note}"
    )
    timings = {f"{name} | forward": ahead[name] for name in variants}
    timings |= {f"{name} | forward and backward": back[name] for name in variants}
    figures = {"output_bytes": output_bytes, "memory": memory}
    report.add(Table(place.what, header, rows, note), figures, {**timings, "nearest | forward": floor})


def _laid_out(tensor: Tensor, name: str) -> Tensor:
    """Channels-last for the maps of forms that want it; weights have five axes and stay as they are."""
    if name in CHANNELS_LAST and tensor.dim() == 4:
        return tensor.clone(memory_format=torch.channels_last)
    return tensor.clone()


def _difference(results: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Largest difference over the largest expected value, the worst of all tensors."""
    pairs = zip(results, expected, strict=True)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
