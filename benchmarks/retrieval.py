"""Straight-through retrieval (Eq. 4-5): the shipped gather against the paper's formula and a one-hot product."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness import Options, Report, Table, interleave, mb, ms, peak_bytes, start
from tmad.retrieval import StraightThroughGather, gather_patches

DESCRIPTION = """
Time, memory and exactness of sampling candidates from the texture memory: forward and backward, 100 memory patches of
3x32x32 an image, 4 candidates a cell.

Examples:
  python benchmarks/retrieval.py
  python benchmarks/retrieval.py --cells 64 --batches 1 4
  python benchmarks/retrieval.py --quick
"""

SHIPPED = "gather forward, one product backward (shipped)"
LITERAL = "formula, one weighted sum a rank"
ONE_HOT = "formula, one product for all ranks"

Form = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class RetrievalOptions(Options):
    """Options of this benchmark."""

    batches: tuple[int, ...] = (1, 4, 16)
    """Images of a batch, one table each."""
    cells: int = 16
    """Cells of an image."""
    pool: int = 100
    """Memory patches of an image."""
    candidates: int = 4
    """Candidates of a cell."""
    patch_size: int = 32
    """Side of a patch."""


def gathered(weights: Tensor, pool: Tensor, index: Tensor) -> Tensor:
    """What `tmad.retrieval` does."""
    result: Tensor = StraightThroughGather.apply(weights, pool, index)
    return result


def literal(weights: Tensor, pool: Tensor, index: Tensor) -> Tensor:
    """Eq. 4-5 as written, rank by rank: ((onehot - S) as data + S) T."""
    ranks = []
    for rank in range(index.shape[-1]):
        chosen = F.one_hot(index[..., rank], pool.shape[1]).to(weights.dtype)
        sampled = (chosen - weights).detach() + weights
        ranks.append(torch.einsum("bnp,bpchw->bnchw", sampled.to(pool.dtype), pool))
    return torch.stack(ranks, dim=2)


def one_hot(weights: Tensor, pool: Tensor, index: Tensor) -> Tensor:
    """The same for all ranks in one product."""
    chosen = F.one_hot(index, pool.shape[1]).to(weights.dtype)
    sampled = (chosen - weights[:, :, None]).detach() + weights[:, :, None]
    return (
        (sampled.flatten(1, 2).to(pool.dtype) @ pool.flatten(2))
        .unflatten(1, index.shape[1:])
        .unflatten(-1, pool.shape[2:])
    )


FORMS: dict[str, Form] = {SHIPPED: gathered, LITERAL: literal, ONE_HOT: one_hot}


def main(argv: Sequence[str]) -> int:
    """Measure every batch size and write the report; returns the exit code."""
    options = start(RetrievalOptions, argv, prog="retrieval.py", description=DESCRIPTION)
    report = Report("retrieval", "Straight-through retrieval: forms, exactness, time and memory", options)
    for batch in (2,) if options.quick else options.batches:
        _measure(batch, report, options)
    report.write()
    return 0


def _measure(batch: int, report: Report, options: RetrievalOptions) -> None:
    cells, pool_size, k = (4, 10, 8) if options.quick else (options.cells, options.pool, options.patch_size)
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(batch, cells, pool_size, generator=generator)
    weights = scores.softmax(-1).requires_grad_()
    index = scores.topk(options.candidates, dim=-1).indices
    pixels = torch.randint(0, 256, (batch, pool_size, 3, k, k), generator=generator)
    pool = pixels / 127.5 - 1
    exact = gather_patches(pool, index)
    cotangent = torch.randn(exact.shape, generator=generator)
    poisoned = pool.index_fill(1, torch.tensor([0]), float("nan"))

    def forward(form: Form) -> Callable[[], Tensor]:
        def call() -> Tensor:
            with torch.inference_mode():
                return form(weights, pool, index)

        return call

    def both(form: Form) -> Callable[[], Tensor]:
        def call() -> Tensor:
            return torch.autograd.grad(form(weights, pool, index), weights, cotangent)[0]

        return call

    expected_grad = _gradient_in_double(weights, pool, index, cotangent)
    untouched = ~(gather_patches(poisoned, index).isnan())
    figures: dict[str, dict[str, Any]] = {}
    for name, form in FORMS.items():
        out, grad = forward(form)(), both(form)()
        with torch.no_grad():
            with torch.autocast("cpu", torch.bfloat16):
                half = form(weights, pool, index).float()
            reached = form(weights, poisoned, index).isnan() & untouched
        figures[name] = {
            "exact_share": float((out == exact).double().mean()),
            "difference": float((out - exact).abs().max()),
            "exact_share_bf16": float((half == exact).double().mean()),
            "gradient_difference": float((grad - expected_grad).abs().max() / expected_grad.abs().max()),
            "nan_share": float(reached.double().sum() / untouched.double().sum()),
            "both_peak": peak_bytes(both(form)),
        }
    ahead = interleave({name: forward(form) for name, form in FORMS.items()}, options)
    back = interleave({name: both(form) for name, form in FORMS.items()}, options)
    rows = [
        [
            name,
            ms(ahead[name].median_s),
            ms(back[name].median_s),
            f"{back[name].times(back[SHIPPED]):.2f}",
            mb(values["both_peak"]),
            f"{100 * values['exact_share']:.4g} %",
            f"{values['difference']:.0e}",
            f"{100 * values['exact_share_bf16']:.4g} %",
            f"{values['gradient_difference']:.0e}",
            f"{100 * values['nan_share']:.4g} %",
        ]
        for name, values in figures.items()
    ]
    header = ["form", "forward ms", "fwd+bwd ms", "× shipped", "fwd+bwd peak MB"]
    header += ["values exact", "max. diff.", "exact under bf16 autocast", "gradient", "reached by a NaN"]
    note = (
        "Values are compared with the memory's pixels; gradients with the formula in float64, relative to the largest. "
        "Last column: with one memory patch of each image NaN, the share of the values of the *other* candidates that "
        "turn into NaN."
    )
    title = f"{batch} images, {cells} cells, {pool_size} patches, {options.candidates} candidates"
    timings = {f"{name} | forward": ahead[name] for name in FORMS}
    timings |= {f"{name} | forward and backward": back[name] for name in FORMS}
    report.add(Table(title, header, rows, note), {"forms": figures}, timings)


def _gradient_in_double(weights: Tensor, pool: Tensor, index: Tensor, cotangent: Tensor) -> Tensor:
    double = weights.detach().double().requires_grad_()
    out = literal(double, pool.double(), index)
    return torch.autograd.grad(out, double, cotangent.double())[0]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
