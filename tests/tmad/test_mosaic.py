"""Mosaics against loops over cells and pixels: what is kept where windows overlap, where nothing was borrowed."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tmad.mosaic import CHANNELS, NUM_BANDS, lay_out, overlap_add, ramp, with_details

K, ROWS, COLUMNS = 8, 3, 4
POWER = math.log2(1.5)
SIZE = ROWS * K, COLUMNS * K


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(overlap: int, cells: list[list[int]], candidates: int = 2) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Windows for *cells*, the cells, a coarse result, and a mask with ones and zeros in every cell."""
    side = K + 2 * overlap
    windows = rand(len(cells), len(cells[0]), candidates, CHANNELS, side, side)
    mask = (rand(len(cells), 1, *SIZE, seed=2) > -0.5).double()
    return windows, torch.tensor(cells), rand(len(cells), 3, *SIZE, seed=1), mask


def ramp_twin(overlap: int) -> list[float]:
    """A window's weight along one side: a raised cosine from its end to as far behind its cell's border."""
    side = K + 2 * overlap
    weights = []
    for i in range(side):
        from_end = min(i, side - 1 - i) + 0.5
        rising = from_end < 2 * overlap
        weights.append((1 - math.cos(math.pi * from_end / (2 * overlap))) / 2 if rising else 1.0)
    return weights


def lay_out_twin(windows: Tensor, cells: Tensor, coarse: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Each pixel of each window added where it falls, then divided by what its weights came to."""
    batch, _, candidates, _, side, _ = windows.shape
    overlap = (side - K) // 2
    along = ramp_twin(overlap)
    mosaics = coarse[:, None].repeat(1, candidates, 1, 1, 1)
    details = torch.zeros(batch, candidates, NUM_BANDS, 3, *SIZE, dtype=windows.dtype)
    for b in range(batch):
        total = [[0.0] * SIZE[1] for _ in range(SIZE[0])]
        colours = torch.zeros(candidates, 3, *SIZE, dtype=windows.dtype)
        added = torch.zeros(candidates, CHANNELS - 3, *SIZE, dtype=windows.dtype)
        for n, cell in enumerate(cells[b].tolist()):
            top, left = cell // COLUMNS * K - overlap, cell % COLUMNS * K - overlap
            for i in range(side):
                for j in range(side):
                    y, x = top + i, left + j
                    if 0 <= y < SIZE[0] and 0 <= x < SIZE[1]:
                        weight = along[i] * along[j]
                        total[y][x] += weight
                        colours[:, :, y, x] += weight * windows[b, n, :, :3, i, j]
                        added[:, :, y, x] += weight**POWER * windows[b, n, :, 3:, i, j]
        for y in range(SIZE[0]):
            for x in range(SIZE[1]):
                if total[y][x] > 0:
                    values = added[:, :, y, x] / total[y][x] ** POWER
                    details[b, :, :, :, y, x] = values.reshape(candidates, NUM_BANDS, 3)
                    if mask[b, 0, y, x] > 0:
                        mosaics[b, :, :, y, x] = colours[:, :, y, x] / total[y][x]
    return mosaics, details


CELLS = [[0, 1, 5, 6, 11], [4, 8, 2, 3, 7]]
"""Neighbours beside, below and across a corner of each other, at every border, and cells without a neighbour."""


@pytest.mark.parametrize("overlap", [0, 1, 3, K // 2])
def test_laying_out_equals_adding_window_by_window_and_pixel_by_pixel(overlap: int) -> None:
    windows, cells, coarse, mask = inputs(overlap, CELLS)
    # The weights themselves are float32.
    expected = lay_out_twin(windows, cells, coarse, mask)
    for got, wanted in zip(lay_out(windows, cells, coarse, mask, patch_size=K), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("overlap", [0, 2, K // 2])
def test_an_area_that_holds_all_cells_changes_nothing_in_it_and_nothing_is_blended_beyond(overlap: int) -> None:
    cells, area = [[1, 2, 6], [5, 2, 1]], (slice(0, 2 * K), slice(K, 3 * K))
    windows, cells, coarse, mask = inputs(overlap, cells)
    mosaics, details = lay_out(windows, cells, coarse, mask, patch_size=K, area=area)
    whole = lay_out(windows, cells, coarse, mask, patch_size=K)
    for got, wanted in zip((mosaics, details), whole, strict=True):
        assert torch.equal(got[..., *area], wanted[..., *area])
    beyond = torch.ones(SIZE, dtype=torch.bool)
    beyond[*area] = False
    assert torch.equal(mosaics[..., beyond], coarse[:, None].expand_as(mosaics)[..., beyond])
    assert (details[..., beyond] == 0).all()


@pytest.mark.parametrize("overlap", [0, 2, K // 2])
def test_overlap_add_equals_a_loop_over_cells_and_leaves_out_what_lies_beyond_the_border(overlap: int) -> None:
    side = K + 2 * overlap
    windows, cells = rand(2, 5, 3, side, side), torch.tensor(CELLS)
    expected = torch.zeros(2, 3, SIZE[0] + 2 * overlap, SIZE[1] + 2 * overlap, dtype=windows.dtype)
    for b in range(2):
        for n, cell in enumerate(CELLS[b]):
            y, x = cell // COLUMNS * K, cell % COLUMNS * K
            expected[b, :, y : y + side, x : x + side] += windows[b, n]
    expected = expected[..., overlap : overlap + SIZE[0], overlap : overlap + SIZE[1]]
    torch.testing.assert_close(overlap_add(windows, cells, patch_size=K, size=SIZE), expected)


def test_without_overlap_mosaics_are_the_patches_to_the_last_bit() -> None:
    windows, cells, coarse, mask = inputs(0, CELLS)
    mosaics, details = lay_out(windows, cells, coarse, torch.ones_like(mask), patch_size=K)
    for b in range(2):
        for n, cell in enumerate(CELLS[b]):
            here = (
                ...,
                slice(cell // COLUMNS * K, cell // COLUMNS * K + K),
                slice(cell % COLUMNS * K, cell % COLUMNS * K + K),
            )
            assert torch.equal(mosaics[b][here], windows[b, n, :, :3])
            assert torch.equal(details[b][here].flatten(1, 2), windows[b, n, :, 3:])


def test_where_no_other_window_reaches_a_wide_one_is_itself_to_the_last_bit() -> None:
    windows, cells, coarse, mask = inputs(2, [[0, 2, 9]])
    mosaics, details = lay_out(windows, cells, coarse, torch.ones_like(mask), patch_size=K)
    # Cell 2 begins at column 16; its windows and those of its neighbours are blended over two pixels on either side.
    assert torch.equal(mosaics[0, ..., 2:6, 18:22], windows[0, 1, :, :3, 4:8, 4:8])
    assert torch.equal(details[0, ..., 2:6, 18:22].flatten(1, 2), windows[0, 1, :, 3:, 4:8, 4:8])


@pytest.mark.parametrize(("patch_size", "overlap"), [(8, 2), (8, 4), (32, 16), (64, 32)])
def test_a_window_without_neighbours_is_not_dimmed_at_its_corners(patch_size: int, overlap: int) -> None:
    side, size = patch_size + 2 * overlap, (3 * patch_size, 3 * patch_size)
    windows = rand(1, 1, 1, CHANNELS, side, side).float()
    mosaics, details = lay_out(
        windows, torch.tensor([[4]]), torch.zeros(1, 3, *size), torch.ones(1, 1, *size), patch_size=patch_size
    )
    here = slice(patch_size - overlap, 2 * patch_size + overlap)
    torch.testing.assert_close(mosaics[0, 0, :, here, here], windows[0, 0, 0, :3])
    torch.testing.assert_close(details[0, 0, ..., here, here].flatten(0, 1), windows[0, 0, 0, 3:])


@pytest.mark.parametrize("overlap", range(K // 2 + 1))
def test_the_weights_of_neighbours_add_up_to_one_and_equal_a_raised_cosine(overlap: int) -> None:
    weights = ramp(K, overlap)
    along = torch.tensor(ramp_twin(overlap))
    torch.testing.assert_close(weights, along[:, None] * along)
    every = torch.arange(ROWS * COLUMNS)[None]
    side = K + 2 * overlap
    total = overlap_add(weights.expand(1, ROWS * COLUMNS, 1, side, side), every, patch_size=K, size=SIZE)
    inside = total[..., overlap : SIZE[0] - overlap, overlap : SIZE[1] - overlap]
    torch.testing.assert_close(inside, torch.ones_like(inside))


@pytest.mark.parametrize("overlap", [0, 2, K // 2])
def test_windows_of_one_picture_give_that_picture_back(overlap: int) -> None:
    # The mean is kept: where all windows say the same, so does the mosaic.
    picture = rand(1, 3, SIZE[0] + 2 * overlap, SIZE[1] + 2 * overlap)
    cells = torch.arange(ROWS * COLUMNS)[None]
    side = K + 2 * overlap
    windows = torch.zeros(1, ROWS * COLUMNS, 1, CHANNELS, side, side, dtype=picture.dtype)
    for n in range(ROWS * COLUMNS):
        y, x = n // COLUMNS * K, n % COLUMNS * K
        windows[0, n, 0, :3] = picture[0, :, y : y + side, x : x + side]
    coarse = torch.zeros(1, 3, *SIZE, dtype=picture.dtype)
    mosaics, _ = lay_out(windows, cells, coarse, torch.ones(1, 1, *SIZE), patch_size=K)
    expected = picture[..., overlap : overlap + SIZE[0], overlap : overlap + SIZE[1]]
    torch.testing.assert_close(mosaics[:, 0], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("overlap", [0, 2, K // 2])
def test_laplacian_details_have_the_same_mean_absolute_value_between_cells_as_within(overlap: int) -> None:
    side, size = K + 2 * overlap, (20 * K, 20 * K)
    windows = rand(1, 400, 4, CHANNELS, side, side)
    uniform = torch.special.ndtr(windows) - 0.5
    laplacian = -uniform.sign() * torch.log1p(-2 * uniform.abs())
    coarse = torch.zeros(1, 3, *size, dtype=windows.dtype)
    _, details = lay_out(laplacian, torch.arange(400)[None], coarse, torch.ones(1, 1, *size), patch_size=K)
    # A plain mean has 0.75 of it halfway between two cells, square roots of the weights 1.06.
    by_column = details.unflatten(-1, (20, K)).abs().mean((0, 1, 2, 3, 4, 5))
    torch.testing.assert_close(by_column, torch.ones_like(by_column), rtol=0.03, atol=0)


def test_colours_are_the_coarse_result_outside_the_hole_and_where_nothing_was_borrowed() -> None:
    windows, cells, coarse, mask = inputs(2, [[5]])
    mosaics, details = lay_out(windows, cells, coarse, mask, patch_size=K)
    reached = torch.zeros(SIZE, dtype=torch.bool)
    reached[K - 2 : 2 * K + 2, K - 2 : 2 * K + 2] = True
    kept = ~(reached & (mask[0, 0] > 0))
    for c in range(2):
        assert torch.equal(mosaics[0, c][:, kept], coarse[0][:, kept])
        assert not (mosaics[0, c] == coarse[0]).all(0)[~kept].any()
    assert not details[..., ~reached].any()
    assert (details[..., reached] != 0).all()


def test_candidates_are_laid_out_each_by_itself_and_in_any_order_of_cells() -> None:
    windows, cells, coarse, mask = inputs(2, CELLS)
    both = lay_out(windows, cells, coarse, mask, patch_size=K)
    order = torch.tensor([3, 0, 4, 1, 2])
    shuffled = lay_out(windows[:, order], cells[:, order], coarse, mask, patch_size=K)
    for c in range(2):
        alone = lay_out(windows[:, :, c : c + 1], cells, coarse, mask, patch_size=K)
        for one, all_of_them, other in zip(alone, both, shuffled, strict=True):
            torch.testing.assert_close(one[:, 0], all_of_them[:, c])
            assert torch.equal(other, all_of_them)


def test_a_cell_named_twice_counts_once() -> None:
    # A batch completes its cells by repeating the draw where an image has fewer.
    windows, cells, coarse, mask = inputs(2, [[5, 6]])
    twice = lay_out(windows[:, [0, 1, 0]], cells[:, [0, 1, 0]], coarse, mask, patch_size=K)
    for got, expected in zip(twice, lay_out(windows, cells, coarse, mask, patch_size=K), strict=True):
        assert torch.equal(got, expected)


def test_laying_out_is_differentiable_in_windows_and_coarse_result() -> None:
    windows, cells, coarse, mask = inputs(1, [[5]], candidates=1)
    upstream = rand(1, 1, 3, *SIZE, seed=3), rand(1, 1, NUM_BANDS, 3, *SIZE, seed=4)

    def scalar(windows: Tensor, coarse: Tensor) -> Tensor:
        parts = lay_out(windows, cells, coarse, mask, patch_size=K)
        return sum((part * grad).sum() for part, grad in zip(parts, upstream, strict=True))

    variables = windows.requires_grad_(), coarse.requires_grad_()
    for variable, gradient in zip(variables, torch.autograd.grad(scalar(*variables), variables), strict=True):
        direction = rand(*variable.shape, seed=5)
        moved = [
            scalar(*(v + sign * direction if v is variable else v for v in variables)).detach() for sign in (0.5, -0.5)
        ]
        # Linear in both: a difference of any width is the derivative.
        torch.testing.assert_close(moved[0] - moved[1], (gradient * direction).sum())


def blurred_twin(image: Tensor, radius: int) -> Tensor:
    """Mean of the pixels at most *radius* away in each direction, as far as the picture (C, H, W) goes."""
    out = torch.empty_like(image)
    for y in range(image.shape[1]):
        for x in range(image.shape[2]):
            near = image[:, max(0, y - radius) : y + radius + 1, max(0, x - radius) : x + radius + 1]
            out[:, y, x] = near.mean(dim=(1, 2))
    return out


@pytest.mark.parametrize(("patch_size", "radii"), [(8, (1, 2)), (12, (1, 3)), (16, (2, 4)), (32, (4, 8))])
def test_the_bands_are_what_blurs_over_a_quarter_and_a_half_of_the_patch_take_away(
    patch_size: int, radii: tuple[int, int]
) -> None:
    image = rand(1, 3, 2 * patch_size, patch_size)
    fine, rough = (blurred_twin(image[0], radius) for radius in radii)
    expected = torch.cat([image[0], image[0] - fine, fine - rough])
    assert len(expected) == CHANNELS
    torch.testing.assert_close(with_details(image, patch_size)[0], expected)


def test_bands_and_low_pass_add_up_to_the_image_and_a_constant_has_no_detail() -> None:
    image = rand(2, 3, 32, 48)
    colours, *bands = with_details(image, 16).split(3, dim=1)
    assert torch.equal(colours, image)
    low = torch.stack([blurred_twin(one, 4) for one in image])
    torch.testing.assert_close(sum(bands) + low, image)
    flat = with_details(torch.full((1, 3, 32, 48), 0.3, dtype=torch.float64), 16)
    assert flat[:, 3:].abs().max() < 1e-15
