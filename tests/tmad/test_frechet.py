"""FID and KID: against closed forms, scipy and the formula written out, and where they are degenerate."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.linalg import sqrtm

from tmad.frechet import KID_SUBSET_SIZE, Moments, frechet_distance, kernel_distance


def moments(features: np.ndarray) -> Moments:
    collected = Moments(features.shape[1])
    collected.add(features)
    return collected


def drawn(seed: int, count: int = 60, size: int = 5, *, scale: float = 1.0, shift: float = 0.0) -> np.ndarray:
    mixing = np.random.default_rng(99).normal(size=(size, size))
    return (np.random.default_rng(seed).normal(size=(count, size)) @ mixing * scale + shift).astype(np.float32)


def test_moments_are_numpys() -> None:
    features = drawn(0, shift=30)
    collected = moments(features)
    assert collected.mean() == pytest.approx(features.astype(float).mean(axis=0))
    assert collected.covariance() == pytest.approx(np.cov(features.astype(float), rowvar=False), rel=1e-9)


def test_fid_is_the_formula_with_scipys_matrix_root() -> None:
    first, second = moments(drawn(0)), moments(drawn(1, scale=1.7, shift=0.4))
    root = sqrtm(first.covariance() @ second.covariance()).real
    expected = np.square(first.mean() - second.mean()).sum() + np.trace(
        first.covariance() + second.covariance() - 2 * root
    )
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-6)


def test_fid_of_gaussians_is_the_closed_form() -> None:
    rng = np.random.default_rng(0)
    means, deviations = np.array([[0.0, 1.0], [3.0, -1.0]]), np.array([[1.0, 2.0], [0.5, 3.0]])
    sides = [moments(rng.normal(means[side], deviations[side], (40_000, 2))) for side in (0, 1)]
    expected = np.square(means[0] - means[1]).sum() + np.square(deviations[0] - deviations[1]).sum()
    assert frechet_distance(*sides) == pytest.approx(expected, rel=0.02)


def test_fid_of_equal_sides_and_of_fewer_images_than_features() -> None:
    features = drawn(0, count=3, size=8)
    assert frechet_distance(moments(features), moments(features.copy())) == 0
    shifted = frechet_distance(moments(features), moments(features + 2))
    assert shifted == pytest.approx(8 * 4, rel=1e-5)
    assert frechet_distance(moments(features[:1]), moments(features)) is None


def test_kid_is_the_unbiased_estimate_written_out() -> None:
    x, y = drawn(0, 12).astype(float), drawn(1, 12, shift=0.5).astype(float)

    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return float(a @ b / 5 + 1) ** 3

    pairs = [(i, j) for i in range(12) for j in range(12) if i != j]
    expected = (
        np.mean([kernel(x[i], x[j]) for i, j in pairs])
        + np.mean([kernel(y[i], y[j]) for i, j in pairs])
        - 2 * np.mean([kernel(a, b) for a in x for b in y])
    )
    assert kernel_distance(x, y) == pytest.approx(expected)


def test_kid_of_many_images_is_a_mean_over_subsets_that_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tmad.frechet.KID_SUBSETS", 5)  # of a hundred, a tenth of a second each
    x, y = drawn(0, KID_SUBSET_SIZE + 200), drawn(1, KID_SUBSET_SIZE + 100)
    value = kernel_distance(x, y)
    assert value == kernel_distance(x, y)
    assert value == pytest.approx(0, abs=0.5)
    assert kernel_distance(x, y + 1) > 5
    assert kernel_distance(x[:1], y) is None
