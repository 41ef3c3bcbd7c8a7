"""Means with bootstrap intervals, of all images and of groups, in one pass over the rows.

Poisson bootstrap (Hanley & MacGibbon 2006): in each draw every photograph counts as often as a Poisson number with mean
1 says, with all its crops and masks. The number is keyed by (seed, photograph), so it needs no memory of the set, does
not depend on its division, and is the same for every method, metric and report: differences are paired.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from tmad.metrics import METRICS
from tmad.rng import numpy_generator

HOLE_BINS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
"""Ends of the bins of hole fractions, as in the irregular masks of Liu et al. 2018; the last one is open."""
LABEL_METRICS = ("l1_hole_pct", "psnr_hole", "ssim_full")
"""Metrics in the table of categories, of which there may be many."""


def hole_bin(fraction: float) -> str:
    """The bin of a hole fraction, in words: lower end excluded, upper included."""
    low = 0.0
    for high in HOLE_BINS:
        if fraction <= high:
            return f"{low:.0%} to {high:.0%}"
        low = high
    return f"above {low:.0%}"


class Intervals:
    """Weighted sums of K values an image, for the mean and for each of R bootstrap draws."""

    def __init__(self, columns: int, resamples: int) -> None:
        self.images = 0
        self._sums, self._counts = np.zeros(columns), np.zeros(columns)
        self._drawn_sums, self._drawn_counts = np.zeros((resamples, columns)), np.zeros((resamples, columns))

    def add(self, values: np.ndarray, weights: np.ndarray) -> None:
        """One image: *values* (K,), not a number where there is none, and *weights* (R,) of its photograph."""
        there = np.isfinite(values)
        values = np.where(there, values, 0.0)
        self.images += 1
        self._sums += values
        self._counts += there
        self._drawn_sums += np.multiply.outer(weights, values)
        self._drawn_counts += np.multiply.outer(weights, there)

    def entry(self, column: int, confidence: float) -> dict[str, Any]:
        """Mean of a column over the images that have a value, its interval (none for a single image), and their
        number."""
        count = int(self._counts[column])
        if count == 0:
            return {"mean": None, "low": None, "high": None, "images": 0}
        drawn = self._drawn_counts[:, column]
        with np.errstate(invalid="ignore", divide="ignore"):
            means = (self._drawn_sums[:, column] / drawn)[drawn > 0]
        low = high = None
        if count > 1 and len(means):
            low, high = (float(end) for end in np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2]))
        return {"mean": float(self._sums[column] / count), "low": low, "high": high, "images": count}


def photograph_weights(seed: int, key: str, resamples: int) -> np.ndarray:
    """How often the photograph *key* counts in each draw, (R,) float64."""
    return numpy_generator(seed, "bootstrap", key).poisson(1.0, resamples).astype(np.float64)


class Table:
    """Means of every method and metric over all images, by hole fraction, by family of holes and by label."""

    def __init__(self, methods: Sequence[str], metrics: Sequence[str], *, resamples: int, seed: int) -> None:
        self.methods, self.metrics = list(methods), list(metrics)
        self._columns = {name: number for number, name in enumerate(_pairs(self.methods, self.metrics))}
        self._few = [name for name in self.metrics if name in LABEL_METRICS] or self.metrics[:1]
        self._label_columns = [self._columns[name] for name in _pairs(self.methods, self._few)]
        self._resamples, self._seed = resamples, seed
        self._all = Intervals(len(self._columns), resamples)
        self._groups: dict[str, dict[str, Intervals]] = {"hole": {}, "family": {}, "label": {}}
        self._at_cap: dict[tuple[str, str], int] = {}
        self._weights: tuple[str, np.ndarray] = ("", np.zeros(0))
        self.hole_sum = 0.0

    @property
    def images(self) -> int:
        """Images and masks that were added."""
        return self._all.images

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """The rows of one image and mask, one a method."""
        facts = rows[0]
        values = np.full(len(self._columns), np.nan)
        for row in rows:
            for name in self.metrics:
                value = row[name]
                if value is not None:
                    values[self._columns[row["method"], name]] = value
                    if value == METRICS[name].cap:
                        place = (row["method"], name)
                        self._at_cap[place] = self._at_cap.get(place, 0) + 1
        if facts["key"] != self._weights[0]:
            self._weights = (facts["key"], photograph_weights(self._seed, facts["key"], self._resamples))
        weights = self._weights[1]
        self._all.add(values, weights)
        self.hole_sum += facts["hole_fraction"]
        self._group("hole", hole_bin(facts["hole_fraction"]), values, weights)
        self._group("family", facts["mask_family"], values, weights)
        if facts["label"] is not None:
            self._group("label", str(facts["label"]), values[self._label_columns], weights)

    def _group(self, kind: str, name: str, values: np.ndarray, weights: np.ndarray) -> None:
        if name not in self._groups[kind]:
            self._groups[kind][name] = Intervals(len(values), self._resamples)
        self._groups[kind][name].add(values, weights)

    def overall(self, confidence: float) -> dict[str, dict[str, Any]]:
        """Method, metric -> mean, interval, images with a value, images at the metric's cap."""
        found = _entries(self._all, self.methods, self.metrics, confidence)
        for (method, name), count in self._at_cap.items():
            found[method][name]["at_cap"] = count
        return found

    def groups(self, confidence: float) -> dict[str, dict[str, Any]]:
        """Kind of group, name -> images, and method, metric -> entry; kinds with a single group are left out, except
        that of hole fractions."""
        result: dict[str, dict[str, Any]] = {}
        for kind, groups in self._groups.items():
            if len(groups) < 2 and kind != "hole":
                continue
            metrics = self._few if kind == "label" else self.metrics
            result[kind] = {
                name: {
                    "images": groups[name].images,
                    "methods": _entries(groups[name], self.methods, metrics, confidence),
                }
                for name in sorted(groups, key=_natural)
            }
        return result


def rows_of_images(rows: Iterable[Mapping[str, Any]]) -> Iterable[list[Mapping[str, Any]]]:
    """Consecutive rows of one image and mask, together."""
    pending: list[Mapping[str, Any]] = []
    for row in rows:
        if pending and (row["image_id"], row["variant"]) != (pending[0]["image_id"], pending[0]["variant"]):
            yield pending
            pending = []
        pending.append(row)
    if pending:
        yield pending


def _pairs(methods: Sequence[str], metrics: Sequence[str]) -> list[tuple[str, str]]:
    return [(method, metric) for method in methods for metric in metrics]


def _entries(
    intervals: Intervals, methods: Sequence[str], metrics: Sequence[str], confidence: float
) -> dict[str, dict[str, Any]]:
    entries = iter(range(len(methods) * len(metrics)))
    return {method: {name: intervals.entry(next(entries), confidence) for name in metrics} for method in methods}


def _natural(name: str) -> tuple[int, int, str]:
    """Bins and numbers by their number, words after them."""
    digits = name.removeprefix("above ").split("%")[0]
    if not digits.isdigit():
        return (1, 0, name)
    return (0, int(digits) + (name.startswith("above")), name)
