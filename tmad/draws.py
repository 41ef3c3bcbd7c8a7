"""What is random about one image in a training step, drawn before its pixels are needed: mirroring, cells, weights.

NumPy alone, so that processes which only read need not load PyTorch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Draws:
    """One image's hole and memory as the step will see them, and its draws."""

    mirrored: bool
    """Whether left and right are exchanged; mask and memory are already, the image is still to be."""
    mask: np.ndarray
    """(H, W) uint8, {0, 1}, 1 = hole."""
    pool_yx: np.ndarray
    """(N_pool, 2) int16, corners of the memory windows."""
    cells: np.ndarray
    """(N_ps,) int32, raster indices of the cells to synthesize, a square block row by row."""
    mix: np.ndarray
    """(N_ps + 1,) float32 in [0, 1): interpolation weights of the gradient penalty, one a cell and one for the
    image."""


def draw(
    mask: np.ndarray,
    pool_yx: np.ndarray,
    *,
    patch_size: int,
    num_cells: int,
    rng: np.random.Generator,
    flip: bool = False,
) -> Draws:
    """Draw left-right mirroring (where *flip* allows it), cells and penalty weights. Deterministic in *rng*.

    *mask* (H, W) {0, 1}, sides multiples of patch_size; *pool_yx* (N_pool, 2).
    """
    mirrored = flip and bool(rng.random() < 0.5)
    if mirrored:
        mask = np.ascontiguousarray(mask[:, ::-1])
        pool_yx = mirrored_corners(pool_yx, mask.shape[1], patch_size)
    cells = draw_cells(hole_grid(mask, patch_size), num=num_cells, rng=rng)
    return Draws(mirrored, mask, pool_yx, cells, rng.random(len(cells) + 1, dtype=np.float32))


def mirrored_corners(corners: np.ndarray, width: int, patch_size: int) -> np.ndarray:
    """Window corners (..., 2), (y, x), of the same windows in the mirrored image."""
    corners = corners.copy()
    corners[..., 1] = width - patch_size - corners[..., 1]
    return corners


def hole_cells(mask: np.ndarray, patch_size: int) -> np.ndarray:
    """Raster indices, ascending int32, of the cells with at least one hole pixel (Sec. III-A, the patches p_s).

    *mask* (H, W), {0, 1}, 1 = hole. Raises `ValueError` if a side is no multiple of patch_size.
    """
    return np.flatnonzero(hole_grid(mask, patch_size)).astype(np.int32)


def hole_grid(mask: np.ndarray, patch_size: int) -> np.ndarray:
    """Whether a cell has at least one hole pixel: (H / patch_size, W / patch_size) bool. Raises as `hole_cells`."""
    if mask.shape[0] % patch_size or mask.shape[1] % patch_size:
        raise ValueError(f"both sides must be multiples of patch_size ({patch_size}), got {mask.shape}")
    rows, columns = mask.shape[0] // patch_size, mask.shape[1] // patch_size
    if patch_size % 8 == 0:
        # Eight pixels at a time.
        mask = np.ascontiguousarray(mask, np.uint8).view(np.uint64)
    bands = np.bitwise_or.reduce(mask.reshape(rows, patch_size, -1), axis=1)
    return bands.reshape(rows, columns, -1).any(2)


def draw_cells(grid: np.ndarray, *, num: int, rng: np.random.Generator) -> np.ndarray:
    """The cells of one image for a training step (Sec. IV, N_ps): a square block with at least one hole cell in it.

    [D] The paper draws N_ps cells one by one. A block costs no more and lets PSNet see, and its losses judge, what lies
    beside each cell. Its side is the root of *num*, rounded down, or that of the grid (as `hole_grid`) where it is
    shorter; it lies at random around a random hole cell, around any cell where none is one. Returns raster indices,
    row by row, int32. Deterministic in *rng*.
    """
    rows, columns = grid.shape
    side = min(math.isqrt(num), rows, columns)
    (choices,) = np.nonzero(grid.reshape(-1))
    row, column = divmod(int(rng.choice(choices if choices.size else grid.size)), columns)
    top = min(max(row - int(rng.integers(side)), 0), rows - side)
    left = min(max(column - int(rng.integers(side)), 0), columns - side)
    cells = (top + np.arange(side))[:, None] * columns + left + np.arange(side)
    return cells.reshape(-1).astype(np.int32)
