"""Windows that continue their neighbours': what is chosen, against a twin written out, and what it does to a fill."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from tmad.coherence import _LATER, _NEAR, NEIGHBOURS, SWEEPS, choose, continued
from tmad.mosaic import NUM_BANDS, lay_out, with_details

K = 8


def grid_of(rows: int, columns: int, step: int = K) -> np.ndarray:
    """Corners (N, 2), row by row."""
    return np.stack(np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij"), -1).reshape(-1, 2) * step


def chosen(scores: Tensor, cells: np.ndarray, pool: np.ndarray, bonus: float, count: int = 3) -> np.ndarray:
    return choose(scores, cells[None], pool[None], patch_size=K, num_candidates=count, bonus=bonus)[0].numpy()


def twin(scores: np.ndarray, cells: np.ndarray, pool: np.ndarray, bonus: float, count: int) -> np.ndarray:
    """The same, cell by cell and window by window."""
    places, taken = {tuple(cell): n for n, cell in enumerate(cells // K)}, [-1] * len(cells)

    def value(n: int, p: int) -> float:
        total, (y, x) = scores[n, p] - _LATER * p, cells[n] // K
        for dy, dx in _NEAR:
            other = places.get((y + dy, x + dx), -1)
            if other < 0 or taken[other] < 0:
                continue
            window = pool[taken[other]]
            if abs(dy) + abs(dx) == 1 and (window - K * np.array([dy, dx]) == pool[p]).all():
                total += bonus
            if taken[other] == p:
                total -= bonus
        return total

    turns = [[n for n, (y, x) in enumerate(cells // K) if (y % 3, x % 3) == turn] for turn in np.ndindex(3, 3)]
    for _ in range(SWEEPS):
        for turn in turns:
            best = [max(range(len(pool)), key=lambda p, n=n: value(n, p)) for n in turn]
            for n, p in zip(turn, best, strict=True):
                taken[n] = p
    order = [sorted(range(len(pool)), key=lambda p, n=n: -value(n, p)) for n in range(len(cells))]
    return np.array([[taken[n], *[p for p in order[n] if p != taken[n]]][:count] for n in range(len(cells))])


@pytest.mark.parametrize("bonus", [0.0, 0.3, 3.0])
def test_the_choice_is_that_of_the_twin(bonus: float) -> None:
    rng = np.random.default_rng(0)
    cells, pool = grid_of(4, 5), rng.permutation(grid_of(6, 7, K // 2))
    scores = rng.normal(size=(len(cells), len(pool)))
    found = chosen(torch.from_numpy(scores), cells, pool, bonus)
    assert np.array_equal(found, twin(scores, cells, pool, bonus, 3))
    if not bonus:
        assert np.array_equal(found[:, 0], (scores - _LATER * np.arange(len(pool))).argmax(1))


def test_flat_structure_gets_no_wallpaper_but_a_stretch_of_the_memory() -> None:
    cells, pool = grid_of(6, 6), grid_of(12, 12, K // 2)
    # All cells like the same windows, one best.
    scores = torch.linspace(0, 0.5, len(pool), dtype=torch.float64).expand(len(cells), -1)
    assert len(np.unique(chosen(scores, cells, pool, 0.0)[:, 0])) == 1
    found = chosen(scores, cells, pool, 1.0)[:, 0].reshape(6, 6)
    for dy, dx in _NEAR:
        here = found[max(0, -dy) : 6 - max(0, dy), max(0, -dx) : 6 - max(0, dx)]
        there = found[max(0, dy) :, max(0, dx) :][: here.shape[0], : here.shape[1]]
        assert (here == there).mean() < 0.1
    right = (pool[found[:, 1:]] - pool[found[:, :-1]] == (0, K)).all(-1)
    down = (pool[found[1:]] - pool[found[:-1]] == (K, 0)).all(-1)
    assert (right.mean() + down.mean()) / 2 > 0.4


def test_neither_the_order_of_cells_nor_what_stands_twice_nor_company_changes_the_choice() -> None:
    rng = np.random.default_rng(1)
    cells, pool = grid_of(4, 4), grid_of(5, 5)
    scores = torch.from_numpy(rng.normal(size=(16, 25)))
    expected = chosen(scores, cells, pool, 0.5)
    order = rng.permutation(16)
    assert np.array_equal(chosen(scores[order], cells[order], pool, 0.5), expected[order])
    more_cells, more_pool = [*range(16), 0, 0], [*range(25), 0, 3]
    both = torch.stack([scores[more_cells][:, more_pool], torch.zeros(18, 27)])
    args = np.stack([cells[more_cells], cells[more_cells] + K]), np.stack([pool[more_pool]] * 2)
    found = choose(both, *args, patch_size=K, num_candidates=3, bonus=0.5)[0].numpy()
    assert np.array_equal(found[:16], expected)


def test_what_continues_what() -> None:
    # Three cells in a row and one below the first, two candidates each.
    cells = np.array([[0, 0], [0, K], [0, 2 * K], [K, 0]])
    pool = np.array([[4, 4], [4, 4 + K], [20, 20], [4 + K, 4]])
    index = torch.tensor([[[0, 2], [1, 0], [2, 0], [3, 3]]])
    found = continued(index, cells[None], pool[None], K)[0]
    expected = np.zeros((4, 2, 8), bool)
    for n, c, direction in (
        (0, 0, (0, 1)),
        (1, 0, (0, -1)),
        (0, 0, (1, 0)),
        (3, 0, (-1, 0)),
        (1, 0, (1, -1)),
        (3, 0, (-1, 1)),
    ):
        expected[n, c, NEIGHBOURS.index(direction)] = True
    assert np.array_equal(found.numpy(), expected)


def test_a_stretch_of_the_memory_keeps_its_detail_as_it_is() -> None:
    # Windows of one picture, moved by 12 pixels, agree wherever they overlap.
    size, overlap, moved = 6 * K, K // 2, 12
    source = torch.rand(1, 3, size + 32, size + 32, generator=torch.Generator().manual_seed(0))
    bands = with_details(source, K)
    cells = grid_of(6, 6)
    reach = slice(-overlap, K + overlap)
    cut = [bands[0][:, y + moved + reach.start :, x + moved + reach.start :][:, : 2 * K, : 2 * K] for y, x in cells]
    windows, numbers = torch.stack(cut)[None, :, None], torch.arange(len(cells))[None]
    coarse, mask = torch.zeros(1, 3, size, size), torch.ones(1, 1, size, size)
    index, pool = torch.arange(len(cells))[None, :, None], (cells + moved)[None]
    joined = continued(index, cells[None], pool, K)
    whole = bands[:, 3:, moved : moved + size, moved : moved + size].unflatten(1, (NUM_BANDS, 3))
    _, details = lay_out(windows, numbers, coarse, mask, patch_size=K, continued=joined)
    assert torch.allclose(details[:, 0], whole, atol=1e-6)
    _, apart = lay_out(windows, numbers, coarse, mask, patch_size=K)
    assert (apart[:, 0] - whole).abs().max() > 0.01
