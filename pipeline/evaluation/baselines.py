"""Fills without learning, for comparison. Each takes an image whose hole is black, and never sees what was there.

A fill is (image (H, W, 3) uint8, mask (H, W) {0, 1}, generator) -> (H, W, 3) uint8, valid pixels unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec

import numpy as np

from tmad.patchmatch import patchmatch_fill

Fill = Callable[[np.ndarray, np.ndarray, np.random.Generator], np.ndarray]

OPENCV_RADIUS_PX = 3.0
"""Radius of OpenCV's neighbourhoods, as in its own examples."""


def _biharmonic(image: np.ndarray, mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The biharmonic equation solved over the hole (Damelin & Hoang 2018)."""
    from skimage.restoration import inpaint_biharmonic

    filled = inpaint_biharmonic(image, mask, channel_axis=-1)
    return np.where(mask[..., None] > 0, np.rint(np.clip(filled, 0, 1) * 255).astype(np.uint8), image)


def _opencv(image: np.ndarray, mask: np.ndarray, rng: np.random.Generator, *, method: str) -> np.ndarray:
    import cv2

    cv2.setNumThreads(1)
    image, mask = np.ascontiguousarray(image), np.ascontiguousarray(mask)
    filled = cv2.inpaint(image, mask, OPENCV_RADIUS_PX, getattr(cv2, method))
    return np.where(mask[..., None] > 0, filled, image)


FILLS: Mapping[str, Fill] = {
    "patchmatch": patchmatch_fill,
    "telea": partial(_opencv, method="INPAINT_TELEA"),  # fast marching from the border inwards (Telea 2004)
    "navier_stokes": partial(_opencv, method="INPAINT_NS"),  # lines of equal brightness (Bertalmio et al. 2001)
    "biharmonic": _biharmonic,
}
"""By the name of the method."""

_PACKAGES = {"telea": ("cv2", "OpenCV"), "navier_stokes": ("cv2", "OpenCV"), "biharmonic": ("skimage", "scikit-image")}


def why_not(method: str) -> str | None:
    """Why this fill cannot be run here; none if it can."""
    package, title = _PACKAGES.get(method, ("", ""))
    return f"{title} is not installed: pip install 'tmad[baselines]'" if package and not find_spec(package) else None
