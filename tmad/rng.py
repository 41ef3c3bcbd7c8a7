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
    parts = []
    for part in key:
        kind = type(part)
        if kind is not int and kind is not str:
            raise TypeError(f"a key is made of int and str, got {kind.__name__}: {part!r}")
        text = str(part).encode()
        parts.append(b"%s:%d:%s" % (kind.__name__.encode(), len(text), text))
    return int.from_bytes(hashlib.blake2b(b"".join(parts), digest_size=8).digest(), "big") >> 1


def numpy_generator(*key: int | str) -> np.random.Generator:
    """A NumPy generator seeded by `seed_of(*key)`."""
    return np.random.Generator(np.random.PCG64(seed_of(*key)))


def torch_generator(*key: int | str) -> torch.Generator:
    """A PyTorch CPU generator seeded by `seed_of(*key)`."""
    import torch

    return torch.Generator().manual_seed(seed_of(*key))
