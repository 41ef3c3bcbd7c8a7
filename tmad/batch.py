"""What one training step eats: a sample of one image, and the batch of several.

All randomness of a sample is drawn before the step (`draws`), from a generator keyed by (seed, image, epoch); the step
itself draws nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tmad.draws import draw


@dataclass(frozen=True)
class Sample:
    """One image with its hole, memory and draws."""

    image_id: str
    image: np.ndarray
    """(H, W, 3) uint8."""
    mask: np.ndarray
    """(H, W) uint8, {0, 1}, 1 = hole."""
    pool_yx: np.ndarray
    """(N_pool, 2) int16, corners of the memory windows."""
    cells: np.ndarray
    """(N_ps,) int32, raster indices of the cells to synthesize, a square block row by row."""
    mix: np.ndarray
    """(N_ps + 1,) float32 in [0, 1): interpolation weights of the gradient penalty, one a cell and one for the
    image."""
    filled: np.ndarray | None = None
    """(H, W, 3) uint8: another method's result in place of the coarse network's (Table V)."""


@dataclass(frozen=True)
class Batch:
    """Samples side by side, as tensors."""

    image_id: list[str]
    image: Tensor
    """(B, 3, H, W) uint8, colours beside each other in memory (channels_last), as they were decoded."""
    mask: Tensor
    """(B, 1, H, W) uint8, {0, 1}, 1 = hole."""
    pool_yx: Tensor
    """(B, N_pool, 2) int64."""
    cells: Tensor
    """(B, N_ps) int64."""
    mix: Tensor
    """(B, N_ps + 1) float32."""
    filled: Tensor | None = None
    """(B, 3, H, W) uint8: another method's results, if the coarse network is not to be asked."""

    def __len__(self) -> int:
        return len(self.image_id)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on *device*; from pinned memory nobody waits for them to be there."""
        return self._each(lambda value: value.to(device, non_blocking=True))

    def pinned(self) -> Batch:
        """The same batch in memory that a GPU reads by itself."""
        return self._each(Tensor.pin_memory)

    def _each(self, moved: Callable[[Tensor], Tensor]) -> Batch:
        tensors: dict[str, Any] = {
            name: moved(value) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **tensors)


def make_sample(
    image_id: str,
    image: np.ndarray,
    mask: np.ndarray,
    pool_yx: np.ndarray,
    *,
    patch_size: int,
    num_cells: int,
    rng: np.random.Generator,
    flip: bool = False,
    filled: np.ndarray | None = None,
) -> Sample:
    """Draw what is random about one image, as `draws.draw` does, and mirror it with its mask and memory.

    *image* (H, W, 3) uint8, sides multiples of patch_size; *mask* (H, W) {0, 1}; *pool_yx* (N_pool, 2); *filled* (H, W,
    3) uint8, another method's result. Raises `ValueError` if image and mask differ in size.
    """
    if image.shape[:2] != mask.shape:
        raise ValueError(f"{image_id}: image is {image.shape[:2]}, its mask is {mask.shape}")
    draws = draw(mask, pool_yx, patch_size=patch_size, num_cells=num_cells, rng=rng, flip=flip)
    return Sample(
        image_id=image_id,
        image=mirror(image) if draws.mirrored else image,
        mask=np.ascontiguousarray(draws.mask),
        pool_yx=draws.pool_yx,
        cells=draws.cells,
        mix=draws.mix,
        filled=mirror(filled) if filled is not None and draws.mirrored else filled,
    )


def mirror(image: np.ndarray) -> np.ndarray:
    """Exchange left and right of *image* (H, W, 3), uint8."""
    # PyTorch does it fifteen times faster than NumPy where a pixel's colours lie beside each other.
    return torch.from_numpy(image).permute(2, 0, 1)[None].flip(-1)[0].permute(1, 2, 0).numpy()


def collate(samples: Sequence[Sample]) -> Batch:
    """Stack samples of one size into a batch; all of them have another method's result, or none has."""
    results = [sample.filled for sample in samples if sample.filled is not None]
    return Batch(
        image_id=[sample.image_id for sample in samples],
        image=torch.from_numpy(np.stack([sample.image for sample in samples])).permute(0, 3, 1, 2),
        mask=torch.from_numpy(np.stack([sample.mask for sample in samples]))[:, None],
        pool_yx=torch.from_numpy(np.stack([sample.pool_yx for sample in samples]).astype(np.int64)),
        cells=torch.from_numpy(np.stack([sample.cells for sample in samples]).astype(np.int64)),
        mix=torch.from_numpy(np.stack([sample.mix for sample in samples])),
        filled=torch.from_numpy(np.stack(results)).permute(0, 3, 1, 2) if results else None,
    )
