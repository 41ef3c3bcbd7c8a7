"""PGGAN's sliced Wasserstein distance between the patches of results and truths (Karras et al. 2018, App. C).

It compares how often each kind of texture occurs at each scale, not where it is, and needs no downloaded network. For
each level of a Laplacian pyramid, 7x7 patches of both sides are centred and scaled per channel over the whole set,
projected on random directions, and the sorted projections compared; the figure is the mean absolute difference x 1000,
then the mean over levels.

Three variants, since inpainted images come in pairs and most of their pixels are the truth's own:

- `swd_full`: patches of the whole image, each side centred and scaled by its own mean and deviation, as published;
- `swd_hole`: the same of the patches whose centre lies in the hole;
- `swd_hole_truthscaled`: both sides centred and scaled by the truth's. Scaled by its own deviation, a fill that lost
  contrast looks like one that lost none: photographs at half their contrast were 9 from themselves, and 337 with this
  scale. It is the one that tells a smooth fill from a textured one.

Result and truth are sampled at the same places, so that equal sets give exactly 0. Figures compare only for equal
images, masks and settings: a small sample has a larger distance.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

import numpy as np

from tmad.metrics import check_images
from tmad.rng import numpy_generator

PATCH_SIDE = 7
"""Side of a patch, pixels of its level."""
SMALLEST_LEVEL = 16
"""Levels are added while the image, halved, keeps this side."""
REPEATS, DIRECTIONS = 4, 128
"""Projections: the number of draws, and of directions in each."""
DECIMALS = 6
"""Of the figures: what lies beyond depends on how many threads multiplied."""
FLAT_STD = 1e-3
"""A channel whose values deviate less than this, in grey levels, is flat and is not scaled up."""

Region = Literal["full", "hole"]
Scale = Literal["own", "truth"]

VARIANTS: Mapping[str, tuple[Region, Scale]] = MappingProxyType(
    {"swd_full": ("full", "own"), "swd_hole": ("hole", "own"), "swd_hole_truthscaled": ("hole", "truth")}
)
"""Which patches, and by whose deviation they are scaled."""


class SlicedWasserstein:
    """Collects patches image by image; what it holds is bounded whatever the size of the set.

    Each patch draws a random rank from (seed, image_id), and the `max_patches` of lowest rank are kept for each level
    and region: a uniform sample of all patches which does not depend on the order of the images.
    """

    def __init__(
        self,
        *,
        side: int = 256,
        seed: int = 0,
        patches_per_image: int = 128,
        max_patches: int = 8192,
        num_images: int | None = None,
    ) -> None:
        """*side*: short side of the set's images, pixels: 256 gives five levels, 64 gives three.

        *patches_per_image*: of each level and region; 128 as published. *num_images* of the whole set, for parts of it
        that are collected apart and merged: patches that cannot be among the lowest ranks are dropped at once. Raises
        `ValueError` for a side below 16.
        """
        if side < SMALLEST_LEVEL:
            raise ValueError(f"the distance needs images of at least {SMALLEST_LEVEL} px, got side {side}")
        self.side, self.seed = side, seed
        self.patches_per_image, self.max_patches = patches_per_image, max_patches
        self.num_levels = (side // SMALLEST_LEVEL).bit_length()
        # Twice the share that is kept in the end: all levels with a patch in each image reach `max_patches`.
        drawn = patches_per_image * (num_images or 1)
        self._highest_rank = min(1.0, 2 * max_patches / drawn)
        self.num_images = 0
        self._used: dict[Region, int] = {"full": 0, "hole": 0}
        self._samples: dict[Region, list[_Sample]] = {
            region: [_Sample(max_patches) for _ in range(self.num_levels)] for region in self._used
        }

    def add(self, image_id: str, result: np.ndarray, truth: np.ndarray, mask: np.ndarray) -> None:
        """One image: result and truth (H, W, 3) uint8, mask (H, W), {0, 1}, 1 = hole.

        *image_id*: different for each image and mask of the set. An image so small that its coarsest level holds no
        patch is left out; a level in which no patch is centred in the hole gets none for the hole's variants. Raises
        `ValueError` as `tmad.metrics.measure` does.
        """
        check_images(result, truth, mask)
        self.num_images += 1
        if min(mask.shape) <= (PATCH_SIDE - 1) << (self.num_levels - 1):
            return
        rng = numpy_generator(self.seed, "swd", image_id)
        self._used["full"] += 1
        in_hole = False
        pyramids = [laplacian_pyramid(image, self.num_levels) for image in (result, truth)]
        for level, sides in enumerate(zip(*pyramids, strict=True)):
            # Pixel (y, x) of a level stands at (y, x) * 2**level of the image.
            hole = mask[:: 1 << level, :: 1 << level] > 0
            inside = np.zeros_like(hole)
            border = PATCH_SIDE // 2
            inside[border:-border, border:-border] = True
            regions: dict[Region, np.ndarray] = {"full": inside, "hole": inside & hole}
            for region, centres in regions.items():
                places = np.argwhere(centres)
                if places.size == 0:
                    continue
                in_hole |= region == "hole"
                chosen = places[rng.integers(len(places), size=self.patches_per_image)]
                ranks = rng.random(self.patches_per_image)
                low = ranks < self._highest_rank
                patches = np.stack([_cut(image, chosen[low]) for image in sides], axis=1)
                self._samples[region][level].add(ranks[low], patches)
        self._used["hole"] += in_hole

    def state(self) -> dict[str, np.ndarray]:
        """What was collected, as arrays by name, for `merge`."""
        arrays = {"images": np.array([self.num_images, self._used["full"], self._used["hole"]])}
        for region, samples in self._samples.items():
            for level, sample in enumerate(samples):
                arrays[f"{region}-{level}-ranks"], arrays[f"{region}-{level}-patches"] = sample.kept()
        return arrays

    def merge(self, state: Mapping[str, np.ndarray]) -> None:
        """Add what another one with the same settings collected of other images; the order of merging is no matter."""
        images, full, hole = state["images"].tolist()
        self.num_images += images
        self._used["full"] += full
        self._used["hole"] += hole
        for region, samples in self._samples.items():
            for level, sample in enumerate(samples):
                sample.add(state[f"{region}-{level}-ranks"], state[f"{region}-{level}-patches"])

    def levels(self, variant: str) -> list[float | None]:
        """The distance of each level x 1000, finest first, for a name of `VARIANTS`; none for a level without patch."""
        region, scale = VARIANTS[variant]
        sampled = (sample.kept()[1] for sample in self._samples[region])
        return [1000 * _distance(patches, scale, self.seed) if len(patches) else None for patches in sampled]

    def values(self) -> dict[str, float | None]:
        """Every variant by name, means over the levels that have patches; none if no level has."""
        found = {name: [value for value in self.levels(name) if value is not None] for name in VARIANTS}
        return {name: round(sum(values) / len(values), DECIMALS) if values else None for name, values in found.items()}

    def skipped(self) -> dict[str, int]:
        """Images that gave a variant no patch: too small, or without a patch centred in the hole."""
        return {name: self.num_images - self._used[region] for name, (region, _) in VARIANTS.items()}


class _Sample:
    """The patches of lowest rank among all that were added: ranks (n,), patches (n, 2, 49, 3) float32."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._ranks: list[np.ndarray] = []
        self._patches: list[np.ndarray] = []

    def add(self, ranks: np.ndarray, patches: np.ndarray) -> None:
        self._ranks.append(ranks)
        self._patches.append(patches)
        if sum(map(len, self._ranks)) >= 2 * self._size:
            self.kept()

    def kept(self) -> tuple[np.ndarray, np.ndarray]:
        """Ranks, ascending, and their patches; forgets the others."""
        if not self._ranks:
            return np.empty(0), np.empty((0, 2, PATCH_SIDE**2, 3), dtype=np.float32)
        ranks = np.concatenate(self._ranks)
        order = np.argsort(ranks, kind="stable")[: self._size]
        self._ranks, self._patches = [ranks[order]], [np.concatenate(self._patches)[order]]
        return self._ranks[0], self._patches[0]


def laplacian_pyramid(image: np.ndarray, num_levels: int) -> list[np.ndarray]:
    """Band-pass levels (H / 2^i, W / 2^i, 3) float32 of an image, finest first; the last is what remains, low-pass."""
    level = image.astype(np.float32)
    pyramid = []
    for _ in range(num_levels - 1):
        smaller = _binomial(level)[::2, ::2]
        spread = np.zeros_like(level)
        spread[::2, ::2] = smaller
        pyramid.append(level - 4 * _binomial(spread))
        level = smaller
    return [*pyramid, level]


def _binomial(image: np.ndarray) -> np.ndarray:
    """5x5 binomial filter (1, 4, 6, 4, 1)/16 along rows and columns, mirrored at the border."""
    for _ in range(2):
        size = image.shape[0]
        padded = np.pad(image, ((2, 2), (0, 0), (0, 0)), mode="reflect")
        outer = padded[:size] + padded[4 : size + 4]
        inner = padded[1 : size + 1] + padded[3 : size + 3]
        image = ((outer + 4 * inner + 6 * padded[2 : size + 2]) / 16).swapaxes(0, 1)
    return image


def _cut(image: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """The patches (N, 49, 3) around centres (N, 2)."""
    steps = np.arange(PATCH_SIDE) - PATCH_SIDE // 2
    rows, columns = centres[:, 0, None] + steps, centres[:, 1, None] + steps
    return image[rows[:, :, None], columns[:, None, :]].reshape(len(centres), PATCH_SIDE**2, 3)


def _distance(patches: np.ndarray, scale: Scale, seed: int) -> float:
    """Mean absolute difference of the sorted projections of results patches[:, 0] and truths patches[:, 1]."""
    moments = [_moments(patches[:, side]) for side in (0, 1)]
    if scale == "truth":
        moments[0] = moments[1]
    sides = []
    for side, (mean, std) in enumerate(moments):
        normalised = (patches[:, side] - mean) / std
        sides.append(normalised.reshape(len(patches), -1).T)
    rng = numpy_generator(seed, "swd", "directions")
    distances = []
    for _ in range(REPEATS):
        directions = rng.standard_normal((DIRECTIONS, len(sides[0])))
        directions = directions / np.linalg.norm(directions, axis=1, keepdims=True)
        result, truth = (np.sort(directions @ side, axis=1) for side in sides)
        distances.append(float(np.abs(result - truth).mean()))
    return sum(distances) / REPEATS


def _moments(patches: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation (3,) of each channel over all patches and their pixels; deviation 1 where it is flat."""
    std = patches.std(axis=(0, 1), dtype=np.float64)
    return patches.mean(axis=(0, 1), dtype=np.float64), np.where(std < FLAT_STD, 1.0, std)
