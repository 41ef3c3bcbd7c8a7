"""Distances between the features of two sets of images: FID (Heusel et al. 2017) and KID (Binkowski et al. 2018).

Features come from a network that somebody else trained, and mean nothing without its name: the two Inceptions in use
give different figures. Sums are taken image by image in a fixed order, so that the figures do not depend on how a set
was divided.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from tmad.rng import numpy_generator

KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
"""As published: the mean over this many pairs of random subsets."""


class Moments:
    """Mean and covariance of feature vectors (D,), collected one at a time."""

    def __init__(self, size: int) -> None:
        """*size*: D."""
        self.count = 0
        self._sum, self._products = np.zeros(size), np.zeros((size, size))

    def add(self, features: Iterable[np.ndarray]) -> None:
        """Add vectors (D,), one an image."""
        for one in features:
            vector = one.astype(np.float64)
            self._sum += vector
            self._products += np.multiply.outer(vector, vector)
            self.count += 1

    def mean(self) -> np.ndarray:
        """(D,) float64."""
        return self._sum / self.count

    def covariance(self) -> np.ndarray:
        """(D, D) float64, divided by the number of vectors less one, as published."""
        return (self._products - np.multiply.outer(self._sum, self._sum) / self.count) / (self.count - 1)


def frechet_distance(first: Moments, second: Moments) -> float | None:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), FID where the features are Inception's; none for fewer than two
    vectors on a side.

    The trace of the root is that of (C1^(1/2) C2 C1^(1/2))^(1/2), whose matrix is symmetric: no complex roots, also for
    fewer images than features. Two equal sides give 0.
    """
    if min(first.count, second.count) < 2:
        return None
    covariances = first.covariance(), second.covariance()
    difference = first.mean() - second.mean()
    if not difference.any() and np.array_equal(*covariances):
        return 0.0
    values, vectors = np.linalg.eigh(covariances[0])
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    product = root @ covariances[1] @ root
    roots = np.sqrt(np.clip(np.linalg.eigvalsh((product + product.T) / 2), 0, None))
    distance = difference @ difference + np.trace(covariances[0]) + np.trace(covariances[1]) - 2 * roots.sum()
    return max(0.0, float(distance))


def kernel_distance(first: np.ndarray, second: np.ndarray, *, seed: int = 0) -> float | None:
    """The unbiased squared maximum mean discrepancy of features (N, D) and (M, D), KID where they are Inception's.

    Kernel (x y / D + 1)^3, mean over `KID_SUBSETS` random subsets of `KID_SUBSET_SIZE` (of all, where there are fewer).
    It may be slightly below 0. None for fewer than two vectors on a side.
    """
    size = min(KID_SUBSET_SIZE, len(first), len(second))
    if size < 2:
        return None
    rng = numpy_generator(seed, "kid")
    everything = size == len(first) == len(second)
    distances = []
    for _ in range(1 if everything else KID_SUBSETS):
        x, y = (
            np.asarray(side[np.sort(rng.choice(len(side), size, replace=False))], np.float64)
            for side in (first, second)
        )
        within = (_kernel(one, one) for one in (x, y))
        own = sum((matrix.sum() - np.trace(matrix)) / (size * (size - 1)) for matrix in within)
        distances.append(float(own - 2 * _kernel(x, y).mean()))
    return sum(distances) / len(distances)


def _kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    kernel: np.ndarray = (x @ y.T / x.shape[1] + 1) ** 3
    return kernel
