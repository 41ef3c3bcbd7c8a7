"""Geometry of patches against literal loops: cutting, tiling, hole cells, the draw of cells."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.tmad.tiny import make_mask
from tmad.draws import draw_cells, hole_cells, hole_grid
from tmad.patches import all_cells, cell_corners, cut, tile


def tile_twin(image: Tensor, patches: Tensor, cells: Tensor) -> Tensor:
    """Each patch copied onto its cell, one after the other."""
    result, k = image.clone(), patches.shape[-1]
    columns = image.shape[-1] // k
    for b in range(len(cells)):
        for n, cell in enumerate(cells[b].tolist()):
            y, x = cell // columns * k, cell % columns * k
            result[b, :, y : y + k, x : x + k] = patches[b, n]
    return result


def images(batch: int = 2, height: int = 12, width: int = 16) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(0))


def test_cutting_copies_each_window_to_the_last_bit() -> None:
    image, corners = images(), torch.tensor([[[0, 0], [3, 5], [8, 12]], [[1, 2], [7, 0], [1, 2]]])
    patches = cut(image, corners, 4)
    for b in range(2):
        for n, (y, x) in enumerate(corners[b].tolist()):
            assert torch.equal(patches[b, n], image[b, :, y : y + 4, x : x + 4])


def test_the_gradient_of_cutting_adds_up_where_windows_overlap() -> None:
    image = images().double().requires_grad_()
    corners = torch.tensor([[[0, 0], [2, 1]], [[5, 5], [5, 5]]])
    assert torch.autograd.gradcheck(lambda x: cut(x, corners, 3), image)


def test_cells_are_numbered_row_by_row() -> None:
    corners = cell_corners(torch.tensor([0, 3, 4, 11]), patch_size=4, width=16)
    assert corners.tolist() == [[0, 0], [0, 12], [4, 0], [8, 12]]


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 5), st.integers(0, 2**32))
def test_tiling_the_cut_cells_gives_the_image_back(rows: int, columns: int, k: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(2, 3, rows * k, columns * k, generator=generator)
    cells = torch.stack([torch.randperm(rows * columns, generator=generator) for _ in range(2)])
    patches = cut(image, cell_corners(cells, patch_size=k, width=columns * k), k)
    assert torch.equal(tile(torch.zeros_like(image), patches, cells), image)
    assert torch.equal(all_cells(image, k).gather(1, cells[..., None, None, None].expand_as(patches)), patches)


def test_tiling_equals_copying_patch_by_patch_and_keeps_the_rest() -> None:
    image, cells = images(), torch.tensor([[5, 0, 11], [2, 7, 3]])
    patches = torch.randn(2, 3, 3, 4, 4)
    before = image.clone()
    assert torch.equal(tile(image, patches, cells), tile_twin(image, patches, cells))
    assert torch.equal(image, before)


def test_tiling_sends_the_gradient_to_the_patch_on_its_cell_and_to_the_image_elsewhere() -> None:
    image = images(1).requires_grad_()
    patches = torch.randn(1, 1, 3, 4, 4, requires_grad=True)
    tile(image, patches, torch.tensor([[5]])).sum().backward()
    assert torch.equal(patches.grad, torch.ones_like(patches))
    expected = torch.ones_like(image)
    expected[..., 4:8, 4:8] = 0
    assert torch.equal(image.grad, expected)


def test_a_patch_named_twice_is_simply_there() -> None:
    patches = torch.randn(1, 1, 3, 4, 4).expand(1, 2, 3, 4, 4)
    cells = torch.tensor([[6, 6]])
    assert torch.equal(tile(images(1), patches, cells), tile_twin(images(1), patches, cells))


@settings(max_examples=40)
@given(st.binary(min_size=144, max_size=144), st.integers(1, 4))
def test_hole_cells_are_those_with_at_least_one_hole_pixel(bits: bytes, k: int) -> None:
    mask = (np.frombuffer(bits, np.uint8).reshape(12, 12) > 250).astype(np.uint8)
    expected = [
        row * (12 // k) + column
        for row in range(12 // k)
        for column in range(12 // k)
        if mask[row * k : row * k + k, column * k : column * k + k].any()
    ]
    cells = hole_cells(mask, k)
    assert cells.tolist() == expected
    assert cells.dtype == np.int32


def test_a_side_that_is_no_multiple_of_the_patch_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"multiples of patch_size \(8\), got \(64, 60\)"):
        hole_cells(np.zeros((64, 60), np.uint8), 8)


def draw(mask: np.ndarray, num: int, seed: int = 0) -> list[int]:
    cells = draw_cells(hole_grid(mask, 16), num=num, rng=np.random.default_rng(seed))
    assert cells.dtype == np.int32
    return cells.tolist()


@pytest.mark.parametrize(("num", "side"), [(1, 1), (4, 2), (8, 2), (9, 3), (16, 4), (100, 4)])
def test_the_cells_are_a_square_block_row_by_row_with_a_hole_cell_in_it(num: int, side: int) -> None:
    mask = make_mask()
    holes, seen = set(hole_cells(mask, 16).tolist()), set()
    for seed in range(60):
        cells = draw(mask, num, seed)
        top, left = divmod(cells[0], 4)
        assert cells == [(top + row) * 4 + left + column for row in range(side) for column in range(side)]
        assert max(top, left) + side <= 4
        assert holes & set(cells)
        seen |= set(cells)
    assert seen >= holes


def test_a_mask_without_a_hole_gives_a_block_anywhere() -> None:
    assert len({tuple(draw(np.zeros((64, 64), np.uint8), 4, seed)) for seed in range(60)}) == 9


def test_the_block_is_no_larger_than_a_narrow_grid() -> None:
    mask = np.zeros((32, 96), np.uint8)
    mask[:, 40:50] = 1
    assert len(draw(mask, 25)) == 4


def test_the_draw_is_a_function_of_mask_and_generator() -> None:
    assert draw(make_mask(), 4, 1) == draw(make_mask(), 4, 1)
    assert len({tuple(draw(make_mask(), 4, seed)) for seed in range(20)}) > 3
