"""Random generators keyed by what they are for, so that a sample never depends on worker, batch order or retry."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


def seed_of(*key: int | str) -> int:
    """A 63-bit seed from a key such as `(seed, "mask", image_id, variant)`.

    Stable across processes, machines and Python versions; every part is digested with its type and length, so
    `(0, 1)`, `(1, 0)` and `("0", "1")` differ. Raises `TypeError` for parts that are neither int nor str.
    """
    digest = hashlib.blake2b(digest_size=8)
    for part in key:
        if isinstance(part, bool) or not isinstance(part, (int, str)):
            raise TypeError(f"a key is made of int and str, got {type(part).__name__}: {part!r}")
        text = str(part).encode()
        digest.update(f"{type(part).__name__}:{len(text)}:".encode() + text)
    return int.from_bytes(digest.digest(), "big") >> 1


def numpy_generator(*key: int | str) -> np.random.Generator:
    """A NumPy generator seeded by `seed_of(*key)`."""
    return np.random.Generator(np.random.PCG64(seed_of(*key)))


def torch_generator(*key: int | str) -> torch.Generator:
    """A PyTorch CPU generator seeded by `seed_of(*key)`."""
    import torch

    return torch.Generator().manual_seed(seed_of(*key))
