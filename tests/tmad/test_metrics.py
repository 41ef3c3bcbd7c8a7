"""Metrics against their formulas written out, at the edges, and as means over a set."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
from skimage.color import rgb2gray
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from tmad.metrics import METRICS, PSNR_CAP_DB, Summary, measure

OF_ONE_IMAGE = [name for name, entry in METRICS.items() if entry.function]
OF_THE_HOLE = [name for name in OF_ONE_IMAGE if "hole" in name]


def pair(height: int = 13, width: int = 17, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A result, a truth and a mask; the result differs from the truth outside the hole too."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    result = np.clip(truth + rng.integers(-60, 60, truth.shape), 0, 255).astype(np.uint8)
    mask = np.zeros((height, width), dtype=np.uint8)
    mask[3:9, 4:] = 1
    return result, truth, mask


def values(result: np.ndarray, truth: np.ndarray, where: np.ndarray) -> Iterator[tuple[int, int]]:
    """Each channel of each pixel in *where*, of both images."""
    for y, x in np.argwhere(where):
        for channel in range(3):
            yield int(result[y, x, channel]), int(truth[y, x, channel])


@pytest.mark.parametrize("region", ["hole", "full"])
def test_l1_and_psnr_are_their_formulas_over_their_region(region: str) -> None:
    result, truth, mask = pair()
    pixels = list(values(result, truth, mask if region == "hole" else np.ones_like(mask)))
    got = measure(result, truth, mask)
    assert got[f"l1_{region}_pct"] == pytest.approx(100 * sum(abs(r - t) for r, t in pixels) / (255 * len(pixels)))
    mean_square = sum((r - t) ** 2 for r, t in pixels) / len(pixels)
    assert got[f"psnr_{region}"] == pytest.approx(20 * math.log10(255 / math.sqrt(mean_square)))


def test_psnr_full_is_scikit_images() -> None:
    result, truth, mask = pair()
    assert measure(result, truth, mask)["psnr_full"] == pytest.approx(peak_signal_noise_ratio(truth, result))


def test_the_relative_l1_divides_by_the_sum_of_both_images() -> None:
    result, truth, mask = pair()
    pixels = list(values(result, truth, np.ones_like(mask)))
    got = measure(result, truth, mask)
    assert got["l1_relative_pct"] == pytest.approx(
        100 * sum(abs(r - t) for r, t in pixels) / sum(r + t for r, t in pixels)
    )
    grey_r, grey_t = rgb2gray(result), rgb2gray(truth)
    assert got["l1_relative_grey_pct"] == pytest.approx(
        100 * np.abs(grey_r - grey_t).sum() / (grey_r + grey_t).sum(), rel=1e-6
    )


def test_tv_grad255_is_the_gradient_length_with_wrap_around() -> None:
    result, truth, mask = pair(4, 5)
    image = result.astype(int)
    lengths = [
        math.sqrt((image[y, x, c] - image[y, (x + 1) % 5, c]) ** 2 + (image[y, x, c] - image[(y + 1) % 4, x, c]) ** 2)
        for y in range(4)
        for x in range(5)
        for c in range(3)
    ]
    mask[:] = 0
    assert measure(result, truth, mask)["tv_grad255"] == pytest.approx(sum(lengths) / len(lengths))


def test_tv_l1_hole_counts_differences_that_start_in_the_hole() -> None:
    result, truth, mask = pair()
    image = 2 * (result / 255) - 1
    height, width = mask.shape
    means = []
    for dy, dx in ((0, 1), (1, 0)):
        steps = [
            abs(image[y + dy, x + dx, c] - image[y, x, c])
            for y in range(height - dy)
            for x in range(width - dx)
            for c in range(3)
            if mask[y, x]
        ]
        means.append(sum(steps) / len(steps))
    assert measure(result, truth, mask)["tv_l1_hole_pct"] == pytest.approx(100 * sum(means))


def test_tv_l1_hole_of_a_single_corner_pixel_is_zero() -> None:
    result, truth, mask = pair()
    mask[:] = 0
    mask[-1, -1] = 1
    assert measure(result, truth, mask)["tv_l1_hole_pct"] == 0


@pytest.mark.parametrize("size", [(13, 17), (11, 11), (40, 64)])
def test_ssim_full_is_scikit_images_gaussian_ssim(size: tuple[int, int]) -> None:
    result, truth, mask = pair(*size)
    expected = structural_similarity(
        truth, result, channel_axis=2, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255
    )
    assert measure(result, truth, mask)["ssim_full"] == pytest.approx(expected, abs=1e-12)


def test_ssim_is_its_formula_with_zeros_beyond_the_border() -> None:
    result, truth, mask = pair(12, 9)
    kernel = np.array(
        [[math.exp(-(y * y + x * x) / (2 * 1.5**2)) for x in range(-5, 6)] for y in range(-5, 6)], dtype=np.float64
    )
    kernel /= kernel.sum()
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    scores = []
    for channel in range(3):
        r, t = (np.pad(image[..., channel].astype(float), 5) for image in (result, truth))
        for y in range(12):
            for x in range(9):
                window_r, window_t = r[y : y + 11, x : x + 11], t[y : y + 11, x : x + 11]
                mean_r, mean_t = (kernel * window_r).sum(), (kernel * window_t).sum()
                var_r = (kernel * (window_r - mean_r) ** 2).sum()
                var_t = (kernel * (window_t - mean_t) ** 2).sum()
                both = (kernel * (window_r - mean_r) * (window_t - mean_t)).sum()
                luminance = (2 * mean_r * mean_t + c1) / (mean_r**2 + mean_t**2 + c1)
                scores.append(luminance * (2 * both + c2) / (var_r + var_t + c2))
    assert measure(result, truth, mask)["ssim_full_zeropad"] == pytest.approx(np.mean(scores), abs=1e-12)


def test_ssim_of_two_equal_flat_images_is_exactly_one() -> None:
    _, _, mask = pair(32, 32)
    flat = np.full((32, 32, 3), 251, dtype=np.uint8)
    assert measure(flat, flat, mask)["ssim_full"] == 1


def test_an_empty_hole_has_no_measures_of_the_hole_and_all_of_the_image() -> None:
    result, truth, mask = pair()
    got = measure(result, truth, np.zeros_like(mask))
    assert {name for name, value in got.items() if value is None} == set(OF_THE_HOLE)


def test_an_image_smaller_than_the_window_has_no_ssim() -> None:
    result, truth, mask = pair(10, 40)
    got = measure(result, truth, mask)
    assert {name for name, value in got.items() if value is None} == {"ssim_full"}


@pytest.mark.parametrize("colour", [0, 200])
def test_equal_images_are_perfect_and_finite(colour: int) -> None:
    _, _, mask = pair()
    image = np.full((13, 17, 3), colour, dtype=np.uint8)
    got = measure(image, image, mask)
    assert [got[name] for name in OF_ONE_IMAGE if name.startswith("l1")] == [0] * 4
    assert got["psnr_hole"] == got["psnr_full"] == PSNR_CAP_DB
    assert got["ssim_full"] == got["ssim_full_zeropad"] == pytest.approx(1, abs=1e-12)


def test_a_single_grey_level_on_a_large_image_is_cut_off_at_the_cap() -> None:
    truth = np.zeros((640, 640, 3), dtype=np.uint8)
    result = truth.copy()
    result[0, 0, 0] = 1
    mask = np.ones((640, 640), dtype=bool)
    assert measure(result, truth, mask, ["psnr_full"]) == {"psnr_full": PSNR_CAP_DB}


def test_a_bool_mask_gives_the_same_as_zeros_and_ones() -> None:
    result, truth, mask = pair()
    assert measure(result, truth, mask.astype(bool)) == measure(result, truth, mask)


def test_only_the_named_measures_are_computed() -> None:
    result, truth, mask = pair()
    assert list(measure(result, truth, mask, ("psnr_hole", "l1_full_pct"))) == ["psnr_hole", "l1_full_pct"]


@pytest.mark.parametrize("name", ["psnr", "swd_hole"])
def test_a_name_that_is_no_measure_of_one_image_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"no metric of one image is called {name}; there are l1_hole_pct, "):
        measure(*pair(), [name])


def test_inputs_of_the_wrong_kind_are_refused_with_what_was_given() -> None:
    result, truth, mask = pair()
    with pytest.raises(ValueError, match=r"result must be uint8 \(H, W, 3\), got float64 \(13, 17, 3\)"):
        measure(result / 255, truth, mask)
    with pytest.raises(ValueError, match=r"truth must be uint8 \(H, W, 3\), got uint8 \(13, 17\)"):
        measure(result, truth[..., 0], mask)
    with pytest.raises(ValueError, match=r"of one size, got \(13, 17, 3\), \(13, 17, 3\) and \(13, 16\)"):
        measure(result, truth, mask[:, 1:])
    with pytest.raises(ValueError, match=r"only 0 and 1 .* up to 255"):
        measure(result, truth, mask * 255)


def test_every_name_says_region_and_every_entry_is_complete() -> None:
    for name, entry in METRICS.items():
        assert any(word in name for word in ("hole", "full", "relative", "grad255", "retrieval")), name
        assert entry.better in ("lower", "higher", "neither")
        assert entry.formula
        assert "\n" not in entry.formula


def test_the_stated_direction_is_that_of_a_result_with_less_noise() -> None:
    _, truth, mask = pair(48, 48)
    truth[:] = np.linspace(40, 200, 48, dtype=np.uint8)[:, None]
    rng = np.random.default_rng(0)
    worse, better = (
        np.clip(truth + rng.normal(0, deviation, truth.shape), 0, 255).astype(np.uint8) for deviation in (30, 5)
    )
    bad, good = measure(worse, truth, mask), measure(better, truth, mask)
    # More noise hides a grid of cells, and has more total variation than the photograph.
    for name in [name for name in OF_ONE_IMAGE if METRICS[name].better != "neither" and name != "seam_ratio_hole"]:
        sign = 1 if METRICS[name].better == "higher" else -1
        assert sign * good[name] > sign * bad[name], name


def test_total_variation_which_a_flat_grey_wins_is_neither_better_high_nor_low() -> None:
    _, truth, mask = pair(48, 48)
    grey = np.where(mask[..., None] > 0, np.uint8(128), truth)
    flat, real = measure(grey, truth, mask), measure(truth, truth, mask)
    for name in ("tv_grad255", "tv_l1_hole_pct"):
        assert flat[name] < real[name]
        assert METRICS[name].better == "neither"
        assert "photographs" in METRICS[name].direction


def seam_twin(image: np.ndarray, mask: np.ndarray, side: int) -> float:
    """Pair by pair."""
    found: dict[bool, list[float]] = {True: [], False: []}
    for y in range(len(mask)):
        for x in range(len(mask[0])):
            for v, u in ((y + 1, x), (y, x + 1)):
                if v < len(mask) and u < len(mask[0]) and mask[y, x] and mask[v, u]:
                    across = (y // side, x // side) != (v // side, u // side)
                    found[across].append(np.abs(image[y, x].astype(float) - image[v, u]).mean())
    return float(np.mean(found[True]) / np.mean(found[False]))


def test_the_seam_ratio_is_that_of_pairs_counted_one_by_one_and_a_grid_of_cells_raises_it() -> None:
    rng = np.random.default_rng(0)
    noise = rng.integers(90, 110, (40, 48, 3)).astype(np.uint8)
    mask = np.zeros((40, 48), np.uint8)
    mask[5:35, 3:40] = 1
    cells = np.kron(rng.integers(0, 60, (5, 6, 1)), np.ones((8, 8, 1))).astype(np.uint8)
    for image in (noise, noise + cells):
        got = measure(image, image, mask, ["seam_ratio_hole"], patch_size=8)["seam_ratio_hole"]
        assert got == pytest.approx(seam_twin(image, mask, 8))
    plain, grid = (
        measure(image, image, mask, ["seam_ratio_hole"], patch_size=8)["seam_ratio_hole"]
        for image in (noise, noise + cells)
    )
    assert plain == pytest.approx(1, abs=0.1)
    assert grid > 2
    assert measure(noise, noise, mask, ["seam_ratio_hole"], patch_size=64) == {"seam_ratio_hole": None}


def test_a_summary_means_over_the_images_that_have_a_value_and_counts_the_others() -> None:
    summary = Summary()
    summary.add({"psnr_hole": 20.0, "l1_full_pct": 3.0})
    summary.add({"psnr_hole": None, "l1_full_pct": 5.0})
    summary.add({"psnr_hole": 40.0, "l1_full_pct": 1.0})
    assert summary.num_images == 3
    assert summary.means() == {"psnr_hole": 30.0, "l1_full_pct": 3.0}
    assert summary.skipped() == {"psnr_hole": 1, "l1_full_pct": 0}


def test_a_summary_keeps_a_name_that_never_had_a_value() -> None:
    summary = Summary()
    result, truth, mask = pair()
    summary.add(measure(result, truth, np.zeros_like(mask)))
    assert summary.means()["psnr_hole"] is None
    assert list(summary.means()) == OF_ONE_IMAGE


def test_a_summary_counts_the_images_at_the_cap_and_stays_finite() -> None:
    summary = Summary()
    result, truth, mask = pair()
    for image in (truth, truth, result):
        summary.add(measure(image, truth, mask, ["psnr_hole", "psnr_full", "l1_hole_pct"]))
    assert summary.at_cap() == {"psnr_hole": 2, "psnr_full": 2}
    assert math.isfinite(summary.means()["psnr_full"])
