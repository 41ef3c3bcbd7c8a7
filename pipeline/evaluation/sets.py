"""Metrics of a whole set of results: sliced Wasserstein, FID and KID, from what the parts kept."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import ray

from pipeline.evaluation.parts import ONE_THREAD, Job, part_file, read_npz
from pipeline.storage import join
from tmad.frechet import Moments, frechet_distance, kernel_distance
from tmad.rng import numpy_generator
from tmad.swd import VARIANTS

DECIMALS = 6
"""Of the figures, as in `tmad.swd`."""
MAX_KID_IMAGES = 8192
"""KID draws its subsets from at most this many images, those of lowest random rank."""


def measure_sets(job: Job, num_parts: int, out: str) -> dict[str, dict[str, float | None]]:
    """Method, metric -> value, for the metrics of a set that can be had; a task of Ray for each method."""
    methods = job.measured_methods
    if not (job.texture_samples() or job.has_features):
        return {method: {} for method in methods}
    task = ray.remote(num_cpus=1, runtime_env=ONE_THREAD)(_measure_set)
    shared = ray.put(job)
    found = ray.get([task.remote(shared, method, num_parts, out) for method in methods])
    return {
        method: {name: value for name, value in values.items() if name in job.metrics}
        for method, values in zip(methods, found, strict=True)
    }


def _measure_set(job: Job, method: str, num_parts: int, out: str) -> dict[str, float | None]:
    values: dict[str, float | None] = {}
    textures = job.texture_samples()
    if textures is not None:
        for index in range(num_parts):
            textures.merge(read_npz(join(out, part_file(index, f"{method}.textures.npz"))))
        values |= {name: textures.values()[name] for name in VARIANTS}
    if job.has_features:
        values |= _feature_distances(job, method, num_parts, out)
    return values


def _feature_distances(job: Job, method: str, num_parts: int, out: str) -> dict[str, float | None]:
    moments: dict[str, Moments] = {}
    samples: dict[str, _Lowest] = {}
    for side in ("truth", method):
        for vectors in _features(side, num_parts, out):
            if side not in moments:
                moments[side] = Moments(vectors.shape[1])
                samples[side] = _Lowest(MAX_KID_IMAGES, job.config.seed)
            moments[side].add(vectors)
            samples[side].add(vectors)
    if not moments:
        return {"fid_full": None, "kid_full": None}
    distance = frechet_distance(moments["truth"], moments[method])
    kernel = kernel_distance(samples["truth"].kept(), samples[method].kept(), seed=job.config.seed)
    return {
        "fid_full": None if distance is None else round(distance, DECIMALS),
        "kid_full": None if kernel is None else round(1000 * kernel, DECIMALS),
    }


def _features(side: str, num_parts: int, out: str) -> Iterator[np.ndarray]:
    for index in range(num_parts):
        arrays: dict[str, Any] = read_npz(join(out, part_file(index, "features.npz")))
        if side in arrays:
            yield arrays[side]


class _Lowest:
    """The vectors of lowest random rank, in the order of the set; ranks are keyed by the image's number."""

    def __init__(self, size: int, seed: int) -> None:
        self._size, self._rng = size, numpy_generator(seed, "kid-sample")
        self._ranks: list[float] = []
        self._vectors: list[np.ndarray] = []

    def add(self, vectors: np.ndarray) -> None:
        for vector in vectors:
            self._ranks.append(float(self._rng.random()))
            self._vectors.append(vector)
        if len(self._ranks) >= 2 * self._size:
            self._prune()

    def _prune(self) -> None:
        order = np.sort(np.argsort(self._ranks, kind="stable")[: self._size])
        self._ranks = [self._ranks[place] for place in order]
        self._vectors = [self._vectors[place] for place in order]

    def kept(self) -> np.ndarray:
        self._prune()
        return np.stack(self._vectors)
