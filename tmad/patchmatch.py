"""A fill out of the picture's own patches, without learning.

PatchMatch (Barnes et al. 2009) in a coarse-to-fine loop of search and vote (Wexler et al. 2007), in NumPy.

At each level of a pyramid, every patch that touches the hole looks for the most similar patch without hole: neighbours
hand on their finds, and random places around the best one are tried. Then each hole pixel becomes the mean of what the
patches over it say.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

PATCH_SIDE = 7
"""Side of a patch, pixels of its level."""
SMALLEST_SIDE = 32
"""Levels are added while the halved image keeps this side."""
STRIDE = 2
"""Distance of the patches that are looked for, pixels: a hole pixel is the mean of a dozen finds."""
ROUNDS = 3
"""Rounds of search and vote at a level."""
STEPS = (4, 2)
"""Distances over which neighbours hand on their finds, multiples of the stride."""

_NEIGHBOURS = ((0, 1), (1, 0), (0, -1), (-1, 0))


def patchmatch_fill(image: np.ndarray, mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """*image* (H, W, 3) uint8 whose hole pixels are never read, *mask* (H, W), 1 = hole -> (H, W, 3) uint8.

    Valid pixels stay as they are. Deterministic in *rng*. A picture without any whole patch outside the hole gets the
    mean colour of its valid pixels. Raises `ValueError` if there is no valid pixel.
    """
    hole = mask > 0
    if hole.all():
        raise ValueError("the mask leaves nothing but hole: no texture to fill it from")
    if not hole.any():
        return image.copy()
    known = np.where(hole[..., None], image[~hole].mean(axis=0), image.astype(np.float64))
    levels = _pyramid(known, hole)
    filled: np.ndarray | None = None
    field: np.ndarray | None = None
    for level_image, level_hole in reversed(levels):
        if filled is None:
            start = _smooth(level_image, level_hole)
        else:
            start = np.where(level_hole[..., None], _resize(filled, level_hole.shape), level_image)
        filled, field = _fill_level(start, level_hole, field, rng)
    assert filled is not None
    return np.where(hole[..., None], np.rint(np.clip(filled, 0, 255)).astype(np.uint8), image)


def _pyramid(image: np.ndarray, hole: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """The image and halves of it, finest first; a pixel is known where one of its four is, and is their mean."""
    levels = [(image, hole)]
    while min(hole.shape) // 2 >= SMALLEST_SIDE:
        height, width = (side // 2 * 2 for side in hole.shape)
        weights = (~hole[:height, :width]).reshape(height // 2, 2, width // 2, 2).astype(np.float64)
        cells = image[:height, :width].reshape(height // 2, 2, width // 2, 2, 3)
        count = weights.sum(axis=(1, 3))
        total = (cells * weights[..., None]).sum(axis=(1, 3))
        hole = count == 0
        image = np.where(hole[..., None], cells.mean(axis=(1, 3)), total / np.maximum(count, 1)[..., None])
        if hole.all():
            break
        levels.append((image, hole))
    return levels


def _smooth(image: np.ndarray, hole: np.ndarray) -> np.ndarray:
    """The hole filled from its border inwards by means of known neighbours."""
    image, known = image.copy(), ~hole
    while not known.all():
        total, count = np.zeros_like(image), np.zeros(hole.shape)
        for dy, dx in _NEIGHBOURS:
            count += _shifted(known.astype(np.float64), dy, dx)
            total += _shifted(image * known[..., None], dy, dx)
        ring = ~known & (count > 0)
        image[ring] = total[ring] / count[ring, None]
        known = known | ring
    return image


def _shifted(array: np.ndarray, dy: int, dx: int) -> np.ndarray:
    """result[y, x] = array[y + dy, x + dx], zero outside."""
    padded = np.pad(array, ((1, 1), (1, 1), *((0, 0),) * (array.ndim - 2)))
    height, width = array.shape[:2]
    return padded[1 + dy : 1 + dy + height, 1 + dx : 1 + dx + width]


def _resize(image: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    channels = [
        Image.fromarray(image[..., channel].astype(np.float32)).resize((shape[1], shape[0]), Image.Resampling.BILINEAR)
        for channel in range(3)
    ]
    return np.stack([np.asarray(channel) for channel in channels], axis=-1).astype(np.float64)


def _fill_level(
    image: np.ndarray, hole: np.ndarray, coarser: np.ndarray | None, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray | None]:
    """Filled image, and the corners that were found for the patches at every `STRIDE` rows and columns, (h, w, 2)."""
    height, width = hole.shape
    if min(height, width) < PATCH_SIDE:
        return _smooth(image, hole), None
    windows = np.lib.stride_tricks.sliding_window_view(hole, (PATCH_SIDE, PATCH_SIDE))
    touches: np.ndarray = np.asarray(windows.any(axis=(2, 3)))
    sources = np.argwhere(~touches)
    if len(sources) == 0:
        return image, None
    grid = [(np.arange(side) % STRIDE == 0) | (np.arange(side) == side - 1) for side in touches.shape]
    targets = np.argwhere(touches & grid[0][:, None] & grid[1])
    place = np.full(touches.shape, -1)
    place[tuple(targets.T)] = np.arange(len(targets))
    found = sources[rng.integers(len(sources), size=len(targets))]
    if coarser is not None:
        top, left = (np.minimum(targets[:, axis] // 2, STRIDE * (coarser.shape[axis] - 1)) for axis in (0, 1))
        guess = 2 * coarser[top // STRIDE, left // STRIDE] + targets - 2 * (targets // 2 // STRIDE * STRIDE)
        inside = (guess < touches.shape).all(axis=1)
        guess = np.minimum(guess, np.array(touches.shape) - 1)
        usable = inside & ~touches[tuple(guess.T)]
        found = np.where(usable[:, None], guess, found)
    steps = np.arange(PATCH_SIDE)
    offsets = (steps[:, None] * width + steps).ravel()
    for _ in range(ROUNDS):
        flat = image.reshape(-1, 3).astype(np.float32)
        wanted = flat[(targets @ (width, 1))[:, None] + offsets]
        found = _search(flat, wanted, targets, found, touches, place, width, offsets, rng)
        image = _vote(image, hole, targets, found, offsets)
    field = np.stack(np.meshgrid(*(np.arange(0, side, STRIDE) for side in touches.shape), indexing="ij"), axis=-1)
    on_grid = (targets % STRIDE == 0).all(axis=1)
    field[tuple(targets[on_grid].T // STRIDE)] = found[on_grid]
    return image, field


def _search(
    flat: np.ndarray,
    wanted: np.ndarray,
    targets: np.ndarray,
    found: np.ndarray,
    touches: np.ndarray,
    place: np.ndarray,
    width: int,
    offsets: np.ndarray,
    rng: np.random.Generator,
) -> np.ndarray:
    """Better corners (N, 2) for the patches *wanted* (N, 49, 3) at *targets*, starting from *found*."""
    limits = np.array(touches.shape) - 1
    everyone = np.arange(len(targets))

    def distance(rows: np.ndarray, corners: np.ndarray) -> np.ndarray:
        difference = flat[(corners @ (width, 1))[:, None] + offsets] - wanted[rows]
        return np.einsum("npc,npc->n", difference, difference)

    def offer(rows: np.ndarray, corners: np.ndarray) -> None:
        allowed = ~touches[tuple(corners.T)] & (corners != found[rows]).any(axis=1)
        rows, corners = rows[allowed], corners[allowed]
        values = distance(rows, corners)
        better = values < best[rows]
        found[rows[better]], best[rows[better]] = corners[better], values[better]

    found = found.copy()
    best = distance(everyone, found)
    for step in STEPS:
        for dy, dx in _NEIGHBOURS:
            beside = targets + np.array([dy * step, dx * step])
            there = ((beside >= 0) & (beside <= limits)).all(axis=1)
            rows = everyone[there]
            neighbours = place[tuple(beside[there].T)]
            rows, neighbours = rows[neighbours >= 0], neighbours[neighbours >= 0]
            corners = found[neighbours] - (dy * step, dx * step)
            inside = ((corners >= 0) & (corners <= limits)).all(axis=1)
            offer(rows[inside], corners[inside])
    radius = max(touches.shape)
    while radius >= 1:
        corners = found + rng.integers(-radius, radius, size=found.shape, endpoint=True)
        offer(everyone, np.clip(corners, 0, limits))
        radius //= 3
    return found


def _vote(
    image: np.ndarray, hole: np.ndarray, targets: np.ndarray, found: np.ndarray, offsets: np.ndarray
) -> np.ndarray:
    """The image with each hole pixel the mean of what the patches over it found."""
    width = hole.shape[1]
    flat = image.reshape(-1, 3)
    into, out_of = (((corners @ (width, 1))[:, None] + offsets).ravel() for corners in (targets, found))
    counts = np.bincount(into, minlength=len(flat))
    sums = [np.bincount(into, weights=flat[out_of, channel], minlength=len(flat)) for channel in range(3)]
    means = np.stack(sums, axis=-1) / np.maximum(counts, 1)[:, None]
    return np.where(hole[..., None], means.reshape(image.shape), image)
