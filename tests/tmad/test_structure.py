"""Structure of large holes from reduced pictures: what the network is asked, and what comes back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from tmad.holes import dilate
from tmad.patches import Part
from tmad.structure import REACH, SMALLEST, halvings, predict


def square(side: int, hole: int) -> np.ndarray:
    """A mask with a square hole in its middle."""
    mask, first = np.zeros((side, side), np.uint8), (side - hole) // 2
    mask[first : first + hole, first : first + hole] = 1
    return mask


@pytest.mark.parametrize(
    ("hole", "number"), [(1, 0), (2 * REACH, 0), (2 * REACH + 1, 1), (4 * REACH, 1), (8 * REACH, 2)]
)
def test_a_picture_is_halved_until_the_hole_is_within_reach(hole: int, number: int) -> None:
    assert halvings(square(512, hole)) == number


def test_nothing_is_halved_below_the_smallest_side() -> None:
    assert halvings(square(2 * SMALLEST - 1, 2 * SMALLEST - 3)) == 0
    assert halvings(np.ones((3 * SMALLEST, 9 * SMALLEST), np.uint8)) == 1


class Means:
    """A network that gives the mean of what is known, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[tuple[int, ...], np.ndarray, Part | None]] = []

    def __call__(self, image: Tensor, mask: Tensor, inner: Part | None) -> Tensor:
        self.asked.append((tuple(image.shape), mask[0, 0].numpy().astype(np.uint8), inner))
        known = (1 - mask).expand_as(image)
        mean = (image * known).sum((2, 3), keepdim=True) / known.sum((2, 3), keepdim=True)
        return mean.expand_as(image)[..., *(inner or (slice(None), slice(None)))]


@pytest.mark.parametrize("side", [256, 264, 296])
def test_at_no_scale_is_the_network_asked_beyond_its_reach(side: int) -> None:
    mask = square(side, 190)
    image, network = torch.rand(1, 3, side, side) * 2 - 1, Means()
    inner = slice(24, side - 24), slice(32, side - 32)
    number = halvings(mask)
    result = predict(network, image, torch.from_numpy(mask)[None, None].float(), inner, number=number, multiple=8)
    assert result.shape == (1, 3, side - 48, side - 64)
    assert len(network.asked) == number + 1 > 1
    for shape, hole, _ in network.asked:
        assert shape[2] % 8 == shape[3] % 8 == 0
        assert hole.any()
        assert dilate(1 - hole, REACH).all()
    assert [inner for *_, inner in network.asked] == [*([None] * number), inner]


def test_the_middle_of_a_large_hole_is_what_the_reduced_picture_says_and_its_border_what_the_full_one_says() -> None:
    mask = torch.from_numpy(square(256, 160))[None, None].float()
    image = torch.full((1, 3, 256, 256), 0.25)
    image = torch.where(mask > 0, torch.nan_to_num(torch.tensor(torch.inf)), image)  # what is in the hole is never read

    def network(picture: Tensor, hole: Tensor, inner: Part | None) -> Tensor:
        assert (torch.where(hole > 0, 0, picture).abs() <= 1).all()
        return torch.full_like(picture, 0.5 if picture.shape[-1] == 256 else -0.5)

    result = predict(network, image, mask, None, number=1, multiple=8)
    assert torch.allclose(result[0, :, 128, 128], torch.tensor(-0.5), atol=1e-6)
    assert torch.allclose(result[0, :, 128, 50:60], torch.tensor(0.5), atol=1e-6)
    # It passes over from one to the other.
    steps = result[0, 0, 128, 48:128].diff()
    assert (steps <= 1e-6).all()
    assert steps.min() > -0.2
