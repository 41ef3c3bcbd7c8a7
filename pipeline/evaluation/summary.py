"""Means with bootstrap intervals, of all images and of groups.

Poisson bootstrap (Hanley & MacGibbon 2006): in each draw every photograph counts as often as a Poisson number with mean
1 says, with all its crops and masks. The number is keyed by (seed, photograph), so it does not depend on the set's
division, and is the same for every method, metric and report: differences are paired. Sums are taken in the order of
the set.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.evaluation.config import EvaluateConfig
from tmad.metrics import METRICS
from tmad.rng import numpy_generator

HOLE_BINS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
"""Ends of the bins of hole fractions, as in the irregular masks of Liu et al. 2018; the last one is open."""
LABEL_METRICS = ("l1_hole_pct", "psnr_hole", "ssim_full")
"""Metrics in the table of categories, of which there may be many."""

Entries = dict[str, dict[str, dict[str, Any]]]
"""Method, metric -> `mean`, `low` and `high` of its interval (none for a single image), `images` with a value."""


def hole_bin(fraction: float) -> str:
    """The bin of a hole fraction, in words: lower end excluded, upper included."""
    low = 0.0
    for high in HOLE_BINS:
        if fraction <= high:
            return f"{low:.0%} to {high:.0%}"
        low = high
    return f"above {low:.0%}"


def photograph_weights(seed: int, key: str, resamples: int) -> np.ndarray:
    """How often the photograph *key* counts in each draw, (R,) float64."""
    return numpy_generator(seed, "bootstrap", key).poisson(1.0, resamples).astype(np.float64)


def rows_of(rows: pa.Table, method: str) -> pa.Table:
    """Those of one method, an image and mask each, in the order of the set."""
    return rows.filter(pc.field("method") == method)


def values_of(rows: pa.Table, methods: Sequence[str], metrics: Sequence[str]) -> np.ndarray:
    """(images, methods, metrics) float64, not a number where there is no value."""
    found = np.empty((rows.num_rows and rows_of(rows, methods[0]).num_rows, len(methods), len(metrics)))
    for number, method in enumerate(methods):
        of_method = rows_of(rows, method)
        for column, name in enumerate(metrics):
            found[:, number, column] = of_method[name].to_numpy()
    return found


def bootstrap(
    values: np.ndarray, keys: Iterable[str], methods: Sequence[str], metrics: Sequence[str], config: EvaluateConfig
) -> Entries:
    """Means and intervals of *values* (N, methods, metrics), not finite where there is none, by the photographs' N
    *keys*."""
    values = values.reshape(len(values), len(methods) * len(metrics))
    known = np.isfinite(values)
    values, counts = np.where(known, values, 0.0), known.sum(axis=0)
    sums = np.zeros(len(counts))
    drawn_sums, drawn_counts = np.zeros((2, config.resamples, len(counts)))
    for key, row, there in zip(keys, values, known, strict=True):
        weights = photograph_weights(config.seed, key, config.resamples)
        sums += row
        drawn_sums += np.multiply.outer(weights, row)
        drawn_counts += np.multiply.outer(weights, there)

    def entry(column: int) -> dict[str, Any]:
        count, drawn = int(counts[column]), drawn_counts[:, column] > 0
        mean, low, high = (float(sums[column] / count) if count else None), None, None
        if count > 1 and drawn.any():
            means = drawn_sums[drawn, column] / drawn_counts[drawn, column]
            low, high = (
                float(end) for end in np.quantile(means, [(1 - config.confidence) / 2, (1 + config.confidence) / 2])
            )
        return {"mean": mean, "low": low, "high": high, "images": count}

    columns = iter(range(len(counts)))
    return {method: {name: entry(next(columns)) for name in metrics} for method in methods}


def summarize(
    rows: pa.Table, methods: Sequence[str], metrics: Sequence[str], config: EvaluateConfig
) -> tuple[Entries, dict[str, Any]]:
    """Entries of all images, with those `at_cap` of a metric, and of groups: by hole fraction, by family of holes and
    by label. A kind with a single group is left out, except that of hole fractions.

    Groups are kind, name -> `images`, and entries as `methods`.
    """
    values = values_of(rows, methods, metrics)
    images = rows_of(rows, methods[0]) if methods else rows
    keys = np.array(images["key"].to_pylist(), dtype=object)
    overall = bootstrap(values, keys, methods, metrics, config)
    for row, method in enumerate(methods):
        for column, name in enumerate(metrics):
            if count := int((values[:, row, column] == METRICS[name].cap).sum()):
                overall[method][name]["at_cap"] = count
    few = [name for name in metrics if name in LABEL_METRICS] or list(metrics[:1])
    groups: dict[str, Any] = {}
    for kind, names, shown in (
        ("hole", list(map(hole_bin, images["hole_fraction"].to_pylist())), metrics),
        ("family", images["mask_family"].to_pylist(), metrics),
        ("label", [None if label is None else str(label) for label in images["label"].to_pylist()], few),
    ):
        found = sorted({*names} - {None}, key=_natural)
        if len(found) < 2 and kind != "hole":
            continue
        groups[kind] = {}
        for name in found:
            chosen = np.flatnonzero([one == name for one in names])
            columns = [list(metrics).index(one) for one in shown]
            entries = bootstrap(values[chosen][:, :, columns], keys[chosen], methods, shown, config)
            groups[kind][name] = {"images": len(chosen), "methods": entries}
    return overall, groups


def _natural(name: str) -> tuple[int, int, str]:
    """Bins and numbers by their number, words after them."""
    digits = name.removeprefix("above ").split("%")[0]
    if not digits.isdigit():
        return (1, 0, name)
    return (0, int(digits) + (name.startswith("above")), name)
