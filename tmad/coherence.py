"""Which windows of the memory are borrowed, so that those of neighbouring cells continue each other [D].

Where each cell chooses by itself (Eq. 4), flat structure finds one window for all cells, which shows as wallpaper, and
other structure finds windows whose patterns do not fit at their borders. Here a window gains if it continues that of a
neighbouring cell, and loses if a cell nearby uses it already.

Shapes: B images, N cells of an image, P memory patches, C candidates of a cell.
"""

from __future__ import annotations

import itertools

import numpy as np
import torch
from torch import Tensor

NEIGHBOURS = ((0, -1), (0, 1), (-1, 0), (1, 0), (-1, -1), (-1, 1), (1, -1), (1, 1))
"""Rows and columns from a cell to those around it; the first four share a side with it."""

_APART = 2
"""Cells between which no window is to stand twice, rows and columns alike."""

_NEAR = (
    *NEIGHBOURS,
    *(step for step in itertools.product(range(-_APART, _APART + 1), repeat=2) if max(map(abs, step)) > 1),
)
"""Rows and columns to all cells so near."""

SWEEPS = 4
"""How often each cell chooses."""

_LATER = 1e-4
"""Nats that a window costs for each before it: more than rounding, less than any difference that one sees."""


def choose(
    scores: Tensor, cells: np.ndarray, pool: np.ndarray, *, patch_size: int, num_candidates: int, bonus: float
) -> Tensor:
    """The windows (B, N, C) for all cells, the best first.

    *scores* (B, N, P), what S is the softmax of; *cells* (B, N, 2) and *pool* (B, P, 2), corners in pixels, arrays on
    the host, in which the same cell or window may stand twice. *bonus*, in nats of S: what it is worth that a window
    continues the one of a neighbour with a common side, and what it costs for each cell near by that has it too.
    Cells choose in turns, in which none is near to another, so the result does not depend on their order.
    """
    device, number = scores.device, scores.shape[-1]
    # Of windows alike, as in a white sky, the first; not the one that rounding prefers.
    scores = scores - _LATER * torch.arange(number, device=device)
    twice = torch.from_numpy(np.stack([_repeated(one) for one in pool])).to(device)
    scores = scores.masked_fill(twice[:, None], -torch.inf)
    following = torch.from_numpy(np.stack([_following(one, patch_size) for one in pool])).to(device)
    grid = cells // patch_size
    # Around the picture, and where no cell is, nothing is borrowed: window number P.
    chosen = torch.full((len(cells), *(grid.max(axis=(0, 1)) + 1 + 2 * _APART)), number, device=device)
    turns = [_turn(grid, place, device) for place in np.ndindex(_APART + 1, _APART + 1)]
    steps = torch.tensor(_NEAR, device=device)
    signs = torch.tensor([1.0] * 4 + [-1.0] * len(_NEAR)).to(scores)

    def preferred(image: Tensor, cell: Tensor, y: Tensor, x: Tensor) -> Tensor:
        around = chosen[image[:, None], y[:, None] + steps[:, 0], x[:, None] + steps[:, 1]]
        sides = torch.arange(4, device=device)
        next_to = following[image[:, None], sides, around[:, :4]]
        # Counted in whole numbers, whose sum has no order.
        count = scores.new_zeros(len(image), number + 1)
        count.scatter_add_(1, torch.cat([next_to, around], dim=1), signs.expand(len(image), -1))
        return scores[image, cell] + bonus * count[:, :-1]

    for _ in range(SWEEPS):
        for image, cell, y, x in turns:
            chosen[image, y, x] = preferred(image, cell, y, x).argmax(dim=1)
    index = torch.empty(*scores.shape[:2], num_candidates, dtype=torch.int64, device=device)
    for image, cell, y, x in turns:
        values = preferred(image, cell, y, x)
        values.scatter_(1, chosen[image, y, x][:, None], torch.inf)
        index[image, cell] = values.topk(num_candidates, dim=1).indices
    return index


def continued(index: Tensor, cells: np.ndarray, pool: np.ndarray, patch_size: int) -> Tensor:
    """Which neighbours' windows continue that of a cell: (B, N, C, 8) bool, in the order of `NEIGHBOURS`.

    *index* (B, N, C), the windows that were chosen; *cells* and *pool* as above.
    """
    device = index.device
    image = torch.arange(len(cells), device=device)[:, None]
    places = torch.from_numpy(pool).to(device)[image[..., None], index]
    offsets = places - torch.from_numpy(cells).to(device)[:, :, None]
    y, x = torch.from_numpy(cells // patch_size + 1).to(device).unbind(-1)
    size = cells.max(axis=(0, 1)) // patch_size + 3
    there = torch.full((len(cells), *size, *offsets.shape[2:]), torch.iinfo(torch.int64).min, device=device)
    there[image, y, x] = offsets
    around = torch.stack([there[image, y + dy, x + dx] for dy, dx in NEIGHBOURS], dim=3)
    return (around == offsets[:, :, :, None]).all(dim=-1)


def _turn(grid: np.ndarray, place: tuple[int, ...], device: torch.device) -> tuple[Tensor, ...]:
    """Images and cells of one turn, of those at this *place* in each square of cells, and their rows and columns in the
    grid with its border."""
    image, cell = np.nonzero((grid % (_APART + 1) == place).all(axis=-1))
    y, x = grid[image, cell].T + _APART
    return tuple(torch.from_numpy(one).to(device) for one in (image, cell, y, x))


def _repeated(pool: np.ndarray) -> np.ndarray:
    """Which windows are there before, (P,) bool."""
    repeated = np.ones(len(pool), bool)
    repeated[np.unique(pool, axis=0, return_index=True)[1]] = False
    return repeated


def _following(pool: np.ndarray, patch_size: int) -> np.ndarray:
    """(4, P + 1): for the neighbour at each of the first four of `NEIGHBOURS` that has this window, the one that
    continues it; P where there is none."""
    numbers = {place: number for number, place in reversed([*enumerate(map(tuple, pool.tolist()))])}
    return np.array(
        [
            [*(numbers.get((y - dy * patch_size, x - dx * patch_size), len(pool)) for y, x in pool.tolist()), len(pool)]
            for dy, dx in NEIGHBOURS[:4]
        ]
    )
