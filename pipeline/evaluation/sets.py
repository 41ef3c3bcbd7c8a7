"""Metrics of a whole set of results: sliced Wasserstein, FID and KID, from what the parts kept."""

from __future__ import annotations

import numpy as np
import ray

from pipeline.evaluation.parts import ONE_THREAD, Job, part_file, read_npz
from pipeline.runs.cluster import start_ray
from pipeline.storage import join
from tmad.frechet import Moments, frechet_distance, kernel_distance
from tmad.rng import numpy_generator
from tmad.swd import VARIANTS

DECIMALS = 6
"""Of the figures, as in `tmad.swd`."""
MAX_KID_IMAGES = 8192
"""KID draws its subsets from at most this many images, chosen at random."""


def measure_sets(job: Job, num_parts: int, num_images: int, out: str) -> dict[str, dict[str, float | None]]:
    """Method, metric -> value, for the metrics of a set that can be had; a task of Ray for each method."""
    methods = job.measured_methods
    if not (job.texture_samples() or job.has_features):
        return {method: {} for method in methods}
    start_ray()
    task = ray.remote(num_cpus=1, runtime_env=ONE_THREAD)(_measure_set)
    shared = ray.put(job)
    found = ray.get([task.remote(shared, method, num_parts, num_images, out) for method in methods])
    return {
        method: {name: value for name, value in values.items() if name in job.metrics}
        for method, values in zip(methods, found, strict=True)
    }


def _measure_set(job: Job, method: str, num_parts: int, num_images: int, out: str) -> dict[str, float | None]:
    values: dict[str, float | None] = {}
    if (textures := job.texture_samples()) is not None:
        for index in range(num_parts):
            textures.merge(read_npz(join(out, part_file(index, f"{method}.textures.npz"))))
        values |= {name: textures.values()[name] for name in VARIANTS}
    if not job.has_features:
        return values
    if not num_images:
        return values | {"fid_full": None, "kid_full": None}
    ranks = numpy_generator(job.config.seed, "kid-sample").random(num_images)
    chosen = np.sort(np.argsort(ranks, kind="stable")[:MAX_KID_IMAGES])
    (truths, some_truths), (fills, some_fills) = (_features(side, chosen, num_parts, out) for side in ("truth", method))
    distance = frechet_distance(truths, fills)
    kernel = kernel_distance(some_truths, some_fills, seed=job.config.seed)
    return values | {
        "fid_full": None if distance is None else round(distance, DECIMALS),
        "kid_full": None if kernel is None else round(1000 * kernel, DECIMALS),
    }


def _features(side: str, chosen: np.ndarray, num_parts: int, out: str) -> tuple[Moments, np.ndarray]:
    """Moments of all images of a side, and the features of those that are *chosen*; memory of these and of one part."""
    moments: Moments | None = None
    some, first = [], 0
    for index in range(num_parts):
        vectors = read_npz(join(out, part_file(index, "features.npz"))).get(side)
        if vectors is not None:
            moments = moments or Moments(vectors.shape[1])
            moments.add(vectors)
            some.append(vectors[chosen[(chosen >= first) & (chosen < first + len(vectors))] - first])
            first += len(vectors)
    assert moments is not None, "there is an image"
    return moments, np.concatenate(some)
