"""Texture memory (Sec. III-B): which windows of an image's intact area make up its pool.

The memory is held as coordinates; pixels are gathered where they are used (`patches.cut`).
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from tmad.holes import dilate


def window_hole_counts(mask: np.ndarray, *, patch_size: int, stride: int) -> np.ndarray:
    """Hole pixels in every patch_size x patch_size window of a grid with the given stride.

    *mask* (H, W), {0, 1}, 1 = hole; H, W >= patch_size. Returns (rows, columns) int32, window (i, j) having its
    top-left corner at (i * stride, j * stride). One summed-area table, O(H*W) whatever the stride.
    """
    if patch_size % stride == 0:
        # The same of the blocks' sums, whose table is smaller by the square of the stride.
        rows, columns = mask.shape[0] // stride, mask.shape[1] // stride
        bands = mask[: rows * stride, : columns * stride].reshape(rows, stride, -1).sum(axis=1, dtype=np.int16)
        mask = bands.reshape(rows, columns, stride).sum(axis=2, dtype=np.int32)
        patch_size, stride = patch_size // stride, 1
    table = np.zeros((mask.shape[0] + 1, mask.shape[1] + 1), dtype=np.int32)
    np.cumsum(mask, axis=0, dtype=np.int32, out=table[1:, 1:])
    np.cumsum(table[1:, 1:], axis=1, out=table[1:, 1:])
    top, left = table[:-patch_size:stride], slice(None, -patch_size, stride)
    bottom, right = table[patch_size::stride], slice(patch_size, None, stride)
    return bottom[:, right] - top[:, right] - bottom[:, left] + top[:, left]


def select_pool(
    mask: np.ndarray,
    *,
    patch_size: int,
    stride: int,
    pool_size: int,
    rule: Literal["clean", "fewest"],
    rng: np.random.Generator,
) -> np.ndarray:
    """Choose the texture memory of one image (Sec. III-B).

    *mask* (H, W), {0, 1}, 1 = hole. Returns the top-left corners (pool_size, 2), int16, rows before columns, every
    window inside the image. `clean`: windows without a hole pixel, drawn uniformly; `fewest`: the windows with the
    fewest hole pixels, ties drawn at random. Fewer clean windows than pool_size: `clean` falls back to `fewest`;
    fewer windows than pool_size at all: the whole set is repeated. Windows of nothing but hole are taken only when
    every window is one. Deterministic in *rng*.

    Raises `ValueError` if a side is shorter than patch_size, if a side exceeds int16, or if there is nothing but hole.
    """
    height, width = mask.shape
    if min(height, width) < patch_size:
        raise ValueError(f"the memory needs sides of at least patch_size ({patch_size}), got {height}x{width}")
    if max(height, width) > np.iinfo(np.int16).max:
        raise ValueError(f"memory coordinates are int16: sides up to {np.iinfo(np.int16).max}, got {height}x{width}")
    if mask.all():
        raise ValueError("the mask leaves nothing but hole: no texture to fill it from")
    counts = window_hole_counts(mask, patch_size=patch_size, stride=stride)
    flat = counts.ravel()
    (candidates,) = np.nonzero(flat == 0)
    if rule == "fewest" or candidates.size < pool_size:
        (candidates,) = np.nonzero(flat < patch_size * patch_size)
        if candidates.size == 0:
            candidates = np.arange(flat.size)
        shuffled = rng.permutation(candidates)
        chosen = shuffled[np.argsort(flat[shuffled], kind="stable")][:pool_size]
    else:
        chosen = rng.permutation(candidates)[:pool_size]
    chosen = np.resize(chosen, pool_size)
    rows, columns = np.divmod(chosen, counts.shape[1])
    return np.stack([rows * stride, columns * stride], axis=1).astype(np.int16)


def nearest_windows(mask: np.ndarray, *, patch_size: int, stride: int, most: int) -> np.ndarray:
    """Corners (N, 2), int16, of windows without a hole pixel on a grid of this *stride*: those nearest to the hole, at
    most *most* of them; *mask* as above. Of the last that are equally near, as many as fit, at even intervals."""
    dirty = (window_hole_counts(mask, patch_size=patch_size, stride=stride) > 0).astype(np.uint8)
    found: list[np.ndarray] = []
    while len(found) < most and not dirty.all():
        wider = dilate(dirty, 1) if dirty.any() else np.ones_like(dirty)
        ring = np.argwhere(wider > dirty)
        if len(found) + len(ring) > most:
            ring = ring[np.linspace(0, len(ring), most - len(found), endpoint=False).astype(np.int64)]
        found.extend(ring)
        dirty = wider
    return np.array(found, np.int16).reshape(-1, 2) * np.int16(stride)
