"""Metrics of an inpainted image against the truth (Tables III-V), under names that say region and formula.

A bare "l1", "PSNR" or "TV" means something else in every code base, so none stands here: `METRICS` gives each name's
unit, direction, formula and who reports it. The paper states no formulas. In its Table III l1 is 0.75 to 0.84 of the
root mean square that PSNR implies, so both are over one region; over the whole composite the ratio could not exceed the
root of the hole's share, 0.46 for its boxes. Hence `l1_hole_pct` and `psnr_hole` stand beside them, and `ssim_full`,
whose values match MMEditing's for the whole composite.

Images are (H, W, 3) uint8 RGB, masks (H, W), {0, 1} or bool, 1 = hole. Two rules keep a mean over a set meaningful:

- a metric without a defined value is `None` and is left out of the mean, and counted: every metric of the hole when
  the mask is empty, SSIM when a side is shorter than its window;
- PSNR ends at `PSNR_CAP_DB`, as in PICNet; a result equal to the truth would be infinite. `Summary` counts the images
  at the cap, since a few of them lift a mean.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Literal

import numpy as np

PSNR_CAP_DB = 100.0
"""Largest PSNR, reached when the result equals the truth."""
PATCH_SIZE = 32
"""Side of the paper's cells, pixels."""
SSIM_WINDOW = 11
"""Side of SSIM's Gaussian window (sigma 1.5), pixels."""

MetricFunction = Callable[[np.ndarray, np.ndarray, np.ndarray], float | None]
"""(result, truth, mask) -> value, or none where it has no defined value."""


@dataclass(frozen=True)
class Metric:
    """What a name in a table means."""

    unit: str
    """Empty for a plain number."""
    better: Literal["lower", "higher", "neither"]
    """Which way is an improvement. Neither: a value of the photographs' own is best, and lower than it no merit."""
    formula: str
    """One line; r result, t truth, both 0..255, and in brackets who reports it."""
    function: MetricFunction | None = None
    """None for a metric of a whole set (`tmad.swd`, `tmad.frechet`) and for one that needs a network of its own."""
    cap: float | None = None
    """The value at which it is cut off."""

    @property
    def direction(self) -> str:
        """`better` as tables say it."""
        return {"higher": "↑ higher is better", "lower": "↓ lower is better", "neither": "like the photographs"}[
            self.better
        ]


def l1_hole_pct(result: np.ndarray, truth: np.ndarray, mask: np.ndarray) -> float | None:
    """Mean absolute difference over the hole's pixels and channels, percent of 255."""
    if not mask.any():
        return None
    return 100 / 255 * float(_difference(result, truth)[mask > 0].mean())


def l1_full_pct(result: np.ndarray, truth: np.ndarray, mask: np.ndarray) -> float:
    """Mean absolute difference over all pixels and channels, percent of 255."""
    return 100 / 255 * float(_difference(result, truth).mean())


def l1_relative_pct(result: np.ndarray, truth: np.ndarray, mask: np.ndarray) -> float:
    """Sum of absolute differences over the sum of both images, percent; two black images give 0."""
    return _relative_pct(result.astype(np.float64), truth.astype(np.float64))


def l1_relative_grey_pct(result: np.ndarray, truth: np.ndarray, mask: np.ndarray) -> float:
    """`l1_relative_pct` of the luma 0.2125 R + 0.7154 G + 0.0721 B (scikit-image's grey)."""
    luma = np.array([0.2125, 0.7154, 0.0721])
    return _relative_pct(result @ luma, truth @ luma)


def psnr_hole(result: np.ndarray, truth: np.ndarray, mask: np.ndarray) -> float | None:
    """Peak signal-to-noise ratio over the hole's pixels and channels, at most `PSNR_CAP_DB`."""
    if not mask.any():
        return None
    return _psnr(_difference(result, truth)[mask > 0])


def psnr_full(result: np.ndarray, truth: np.ndarray, mask: np.ndarray) -> float:
    """Peak signal-to-noise ratio over all pixels and channels, at most `PSNR_CAP_DB`."""
    return _psnr(_difference(result, truth))


def ssim_full(result: np.ndarray, truth: np.ndarray, mask: np.ndarray) -> float | None:
    """Structural similarity, mean over channels and over the windows that lie inside the image.

    Gaussian 11x11, sigma 1.5, K 0.01 and 0.03, range 255, population variances: the definition of Wang et al. 2004,
    whose map is 5 pixels smaller on each side than the image. Libraries that average a padded map differ at the border.
    None if a side is below 11.
    """
    if min(mask.shape) < SSIM_WINDOW:
        return None
    return _mean_ssim(result.astype(np.float64), truth.astype(np.float64))


def ssim_full_zeropad(result: np.ndarray, truth: np.ndarray, mask: np.ndarray) -> float:
    """`ssim_full` with a window at every pixel and zeros beyond the border, equal on both sides, which raises it."""
    border = SSIM_WINDOW // 2
    padding = ((border, border), (border, border), (0, 0))
    return _mean_ssim(np.pad(result.astype(np.float64), padding), np.pad(truth.astype(np.float64), padding))


def tv_grad255(result: np.ndarray, truth: np.ndarray, mask: np.ndarray) -> float:
    """Mean length of the forward-difference gradient of the whole result, in grey levels; wraps around at the border.

    The truth plays no part: a blurred result has a lower value than a photograph.
    """
    image = result.astype(np.float64)
    return float(np.hypot(np.roll(image, -1, axis=1) - image, np.roll(image, -1, axis=0) - image).mean())


def tv_l1_hole_pct(result: np.ndarray, truth: np.ndarray, mask: np.ndarray) -> float | None:
    """Mean |dx| + mean |dy| of the result over the hole, percent, for images in [-1, 1].

    A difference counts where its left or upper pixel is hole. A direction without such a pixel adds nothing.
    """
    if not mask.any():
        return None
    image = result.astype(np.float64) / 127.5
    right = np.abs(np.diff(image, axis=1))[mask[:, :-1] > 0]
    down = np.abs(np.diff(image, axis=0))[mask[:-1] > 0]
    return 100 * sum(float(steps.mean()) for steps in (right, down) if steps.size)


def seam_ratio_hole(
    result: np.ndarray, truth: np.ndarray, mask: np.ndarray, *, patch_size: int = PATCH_SIZE
) -> float | None:
    """How much steeper the result is across the borders of cells than within them.

    Mean absolute difference of neighbouring pixels, both in the hole, that lie in two cells of *patch_size* pixels,
    over the same of neighbours in one cell. The truth plays no part: photographs have about 1, a grid of cells has
    more. None where the hole has no such pair, or no difference within cells.
    """
    image, hole = result.astype(np.float64), mask > 0
    sums, counts = np.zeros(2), np.zeros(2)
    for axis in (0, 1):
        steps = np.abs(np.diff(image, axis=axis)).mean(axis=2).swapaxes(0, axis)
        pairs = (hole.swapaxes(0, axis)[1:] & hole.swapaxes(0, axis)[:-1]).astype(np.float64)
        across = np.arange(1, len(steps) + 1) % patch_size == 0
        for kind, chosen in enumerate((across, ~across)):
            sums[kind] += (steps[chosen] * pairs[chosen]).sum()
            counts[kind] += pairs[chosen].sum()
    if not counts.all() or not sums[1]:
        return None
    across, within = sums / counts
    return float(across / within)


METRICS: Mapping[str, Metric] = MappingProxyType(
    {
        "l1_hole_pct": Metric(
            "%", "lower", "100/255 mean |r - t| over hole [the paper's Table III, by its figures; MMagic]", l1_hole_pct
        ),
        "l1_full_pct": Metric("%", "lower", "100/255 mean |r - t| [MAT; PICNet: the same times 2.55]", l1_full_pct),
        "l1_relative_pct": Metric("%", "lower", "100 sum |r - t| / sum (r + t) [AOT-GAN]", l1_relative_pct),
        "l1_relative_grey_pct": Metric(
            "%", "lower", "100 sum |r - t| / sum (r + t) of grey images [EdgeConnect]", l1_relative_grey_pct
        ),
        "psnr_hole": Metric(
            "dB",
            "higher",
            "10 log10(255² / mean (r - t)² over hole), at most 100 [the paper's Table III, by its figures]",
            psnr_hole,
            PSNR_CAP_DB,
        ),
        "psnr_full": Metric(
            "dB",
            "higher",
            "10 log10(255² / mean (r - t)²), at most 100 [MMEditing, PICNet, MAT, AOT-GAN]",
            psnr_full,
            PSNR_CAP_DB,
        ),
        "ssim_full": Metric(
            "",
            "higher",
            "SSIM, Gaussian 11x11 sigma 1.5, windows inside the image [the paper, by its figures; MMEditing, MAT]",
            ssim_full,
        ),
        "ssim_full_zeropad": Metric(
            "", "higher", "SSIM, Gaussian 11x11 sigma 1.5, zeros beyond the border [LaMa]", ssim_full_zeropad
        ),
        "tv_grad255": Metric(
            "grey levels", "neither", "mean sqrt(dx² + dy²) of r, wrapping around [PICNet]", tv_grad255
        ),
        "tv_l1_hole_pct": Metric(
            "%", "neither", "100/127.5 (mean |dx| + mean |dy|) of r over hole [MMEditing's loss]", tv_l1_hole_pct
        ),
        "seam_ratio_hole": Metric(
            "",
            "lower",
            "mean |difference| of neighbours in the hole across cell borders / within cells; photographs: about 1",
            seam_ratio_hole,
        ),
        "retrieval_top_l1": Metric(
            "grey levels", "lower", "mean |first candidate - true cell|: what retrieval hands to PSNet"
        ),
        "retrieval_best_l1": Metric(
            "grey levels", "lower", "mean |best patch of the memory - true cell|: what it could have"
        ),
        "retrieval_distinct": Metric(
            "", "higher", "different first candidates of an image / its hole cells (or memory patches, if fewer)"
        ),
        "retrieval_gain": Metric(
            "",
            "higher",
            "(untrained - r) / (untrained - best) of retrieval_top_l1: 0 = as without training, 1 = the memory's best",
        ),
        "lpips_full": Metric("", "lower", "distance of deep features, by the network that was given [LaMa, MAT]"),
        "swd_full": Metric(
            "1e-3", "lower", "sliced Wasserstein distance of 7x7 Laplacian-pyramid patches, mean of levels [PGGAN]"
        ),
        "swd_hole": Metric("1e-3", "lower", "swd_full of the patches centred in the hole"),
        "swd_hole_truthscaled": Metric(
            "1e-3", "lower", "swd_hole with both sides scaled by the truth's deviation: sees lost contrast"
        ),
        "fid_full": Metric(
            "",
            "lower",
            "Frechet distance of deep features of all r and all t, by the network that was given [LaMa, MAT]",
        ),
        "kid_full": Metric(
            "1e-3", "lower", "squared MMD, kernel (x y / d + 1)³, of the same features [Binkowski et al.]"
        ),
    }
)
"""Every metric by name, in the order of tables. Those without a function belong to a set of images."""


def measure(
    result: np.ndarray,
    truth: np.ndarray,
    mask: np.ndarray,
    names: Sequence[str] | None = None,
    *,
    patch_size: int = PATCH_SIZE,
) -> dict[str, float | None]:
    """The metrics of one image, by name.

    *names*: only these; default: every one in `METRICS` that has a function (SSIM takes nearly all of the time).
    *patch_size*: side of the cells whose seams are looked for. Raises
    `ValueError` for images that are not uint8 (H, W, 3) of one size, for a mask of another size or with values other
    than 0 and 1, or for an unknown name.
    """
    check_images(result, truth, mask)
    of_one_image = {name: entry.function for name, entry in METRICS.items() if entry.function}
    of_one_image["seam_ratio_hole"] = partial(seam_ratio_hole, patch_size=patch_size)
    chosen = of_one_image if names is None else names
    if unknown := [name for name in chosen if name not in of_one_image]:
        raise ValueError(f"no metric of one image is called {', '.join(unknown)}; there are {', '.join(of_one_image)}")
    return {name: of_one_image[name](result, truth, mask) for name in chosen}


def check_images(result: np.ndarray, truth: np.ndarray, mask: np.ndarray) -> None:
    """Raise `ValueError` unless result and truth are (H, W, 3) uint8 and mask (H, W) holds only 0 and 1."""
    for name, image in (("result", result), ("truth", truth)):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"{name} must be uint8 (H, W, 3), got {image.dtype} {image.shape}")
    if result.shape != truth.shape or mask.shape != truth.shape[:2]:
        raise ValueError(
            f"result, truth and mask must be of one size, got {result.shape}, {truth.shape} and {mask.shape}"
        )
    if not np.isin(mask, (0, 1)).all():
        raise ValueError(f"the mask must hold only 0 and 1 (hole), got values up to {mask.max()}")


class Summary:
    """Means of the metrics over a set, image by image; holds sums and counts only."""

    def __init__(self) -> None:
        self.num_images = 0
        self._sums: dict[str, float] = {}
        self._counts: Counter[str] = Counter()
        self._at_cap: Counter[str] = Counter()

    def add(self, values: Mapping[str, float | None]) -> None:
        """One image's metrics, as `measure` gives them."""
        self.num_images += 1
        for name, value in values.items():
            self._counts[name] += value is not None
            if value is None:
                continue
            self._sums[name] = self._sums.get(name, 0.0) + value
            self._at_cap[name] += name in METRICS and value == METRICS[name].cap

    def means(self) -> dict[str, float | None]:
        """Mean of each metric over the images where it had a value; none where it never had one."""
        return {name: self._sums[name] / count if count else None for name, count in self._counts.items()}

    def skipped(self) -> dict[str, int]:
        """Images that each metric had no value for."""
        return {name: self.num_images - count for name, count in self._counts.items()}

    def at_cap(self) -> dict[str, int]:
        """Images at the cap, for each metric that has one."""
        return {name: self._at_cap[name] for name in self._counts if name in METRICS and METRICS[name].cap}


def _difference(result: np.ndarray, truth: np.ndarray) -> np.ndarray:
    return np.abs(result.astype(np.float64) - truth)


def _relative_pct(result: np.ndarray, truth: np.ndarray) -> float:
    total = float((result + truth).sum())
    return 100 * float(np.abs(result - truth).sum()) / total if total else 0.0


def _psnr(difference: np.ndarray) -> float:
    # Written out: no library takes a region, and their infinity spoils the mean of a set.
    mean_square = float(np.square(difference).mean())
    if mean_square == 0:
        return PSNR_CAP_DB
    return min(PSNR_CAP_DB, 10 * math.log10(255**2 / mean_square))


def _mean_ssim(result: np.ndarray, truth: np.ndarray) -> float:
    # Written out in float64: torchmetrics averages a reflect-padded map, takes half a second an image in float64, and
    # in float32 gives 0.9996 for two equal flat images.
    moments = _blur(np.stack([result, truth, result * result, truth * truth, result * truth]))
    mean_r, mean_t = moments[:2]
    var_r, var_t, covariance = moments[2] - mean_r**2, moments[3] - mean_t**2, moments[4] - mean_r * mean_t
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    luminance = (2 * mean_r * mean_t + c1) / (mean_r**2 + mean_t**2 + c1)
    return float((luminance * (2 * covariance + c2) / (var_r + var_t + c2)).mean())


def _blur(images: np.ndarray) -> np.ndarray:
    """SSIM's Gaussian over rows and columns of (N, H, W, 3), at the places where the whole window is inside."""
    kernel = np.exp(-np.square(np.arange(SSIM_WINDOW) - SSIM_WINDOW // 2) / (2 * 1.5**2))
    kernel /= kernel.sum()
    for _ in range(2):
        size = images.shape[1] - SSIM_WINDOW + 1
        blurred = np.zeros((images.shape[0], size, *images.shape[2:]))
        for shift, weight in enumerate(kernel):
            blurred += weight * images[:, shift : shift + size]
        images = blurred.swapaxes(1, 2)
    return images
