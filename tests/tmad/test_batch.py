"""Samples and batches: everything random is drawn here, from a keyed generator, and flips keep things together."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.tmad.tiny import MODEL, make_batch, make_image, make_mask
from tmad.batch import Sample, collate, make_sample
from tmad.draws import hole_cells
from tmad.memory import select_pool
from tmad.rng import numpy_generator


def sample(key: int = 0, *, flip: bool = False, image: np.ndarray | None = None) -> Sample:
    mask = make_mask()
    pool = select_pool(mask, patch_size=16, stride=4, pool_size=12, rule="clean", rng=np.random.default_rng(0))
    image = make_image(0) if image is None else image
    return make_sample("a", image, mask, pool, patch_size=16, num_cells=9, rng=numpy_generator(key), flip=flip)


def keys_by_flip() -> tuple[int, int]:
    """A key whose sample is flipped and one whose sample is not."""
    plain = sample().image
    flips = [not np.array_equal(sample(key, flip=True).image, plain) for key in range(20)]
    return flips.index(True), flips.index(False)


def test_the_same_key_gives_the_same_sample_and_another_key_another() -> None:
    a, b, c = (sample(key, flip=True) for key in (3, 3, 4))
    for name in ("image", "mask", "pool_yx", "cells", "mix"):
        assert np.array_equal(getattr(a, name), getattr(b, name))
    assert not np.array_equal(a.mix, c.mix)


def test_a_sample_has_the_shapes_and_types_it_promises() -> None:
    s = sample()
    assert (s.image.shape, s.image.dtype) == ((64, 64, 3), np.uint8)
    assert (s.mask.shape, s.mask.dtype) == ((64, 64), np.uint8)
    assert (s.pool_yx.shape, s.pool_yx.dtype) == ((12, 2), np.int16)
    assert (s.cells.shape, s.cells.dtype) == ((9,), np.int32)
    assert (s.mix.shape, s.mix.dtype) == ((10,), np.float32)
    assert ((s.mix >= 0) & (s.mix < 1)).all()
    assert len(set(s.mix.tolist())) == 10
    assert np.array_equal(s.image, make_image(0))


def test_a_flip_turns_image_mask_and_memory_together() -> None:
    flipped_key, _ = keys_by_flip()
    flipped, plain = sample(flipped_key, flip=True), sample()
    assert np.array_equal(flipped.image, plain.image[:, ::-1])
    assert np.array_equal(flipped.mask, plain.mask[:, ::-1])
    assert flipped.pool_yx.dtype == np.int16
    for (y, x), (v, u) in zip(flipped.pool_yx, plain.pool_yx, strict=True):
        assert np.array_equal(flipped.image[y : y + 16, x : x + 16], plain.image[v : v + 16, u : u + 16][:, ::-1])
        assert not flipped.mask[y : y + 16, x : x + 16].any()
    assert set(flipped.cells) & set(hole_cells(flipped.mask, 16))


def test_half_of_the_samples_are_flipped_where_flips_are_allowed_and_none_elsewhere() -> None:
    plain = sample().image
    flips = sum(not np.array_equal(sample(key, flip=True).image, plain) for key in range(60))
    assert 18 <= flips <= 42
    assert all(np.array_equal(sample(key).image, plain) for key in range(10))


def test_image_and_mask_of_different_sizes_are_an_error_that_names_the_image() -> None:
    with pytest.raises(ValueError, match=r"a: image is \(32, 64\), its mask is \(64, 64\)"):
        sample(image=make_image(0)[:32])


def test_a_batch_holds_its_samples_side_by_side() -> None:
    samples = [sample(1), sample(2)]
    batch = collate(samples)
    assert len(batch) == 2
    assert batch.image_id == ["a", "a"]
    shapes = {name: tuple(getattr(batch, name).shape) for name in ("image", "mask", "pool_yx", "cells", "mix")}
    assert shapes == {
        "image": (2, 3, 64, 64), "mask": (2, 1, 64, 64), "pool_yx": (2, 12, 2), "cells": (2, 9), "mix": (2, 10),
    }  # fmt: skip
    assert (batch.image.dtype, batch.mask.dtype) == (torch.uint8, torch.uint8)
    assert (batch.pool_yx.dtype, batch.cells.dtype, batch.mix.dtype) == (torch.int64, torch.int64, torch.float32)
    for number, s in enumerate(samples):
        assert np.array_equal(batch.image[number].permute(1, 2, 0).numpy(), s.image)
        assert np.array_equal(batch.mask[number, 0].numpy(), s.mask)
        assert np.array_equal(batch.cells[number].numpy(), s.cells)


def test_flipped_samples_can_be_collated() -> None:
    flipped_key, plain_key = keys_by_flip()
    batch = collate([sample(flipped_key, flip=True), sample(plain_key, flip=True)])
    assert torch.equal(batch.image[0], batch.image[1].flip(-1))


def test_moving_a_batch_keeps_everything() -> None:
    batch = make_batch(config=MODEL)
    there = batch.to("cpu")
    assert there.image_id == batch.image_id
    assert all(torch.equal(getattr(there, n), getattr(batch, n)) for n in ("image", "mask", "pool_yx", "cells", "mix"))
