"""The generator as a whole: what it reads, what it leaves alone, and its parts put together by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.tmad.tiny import MODEL, make_batch, with_noise
from tmad.config import TMADConfig
from tmad.images import to_model
from tmad.model import TMAD, TMADOutput
from tmad.mosaic import CHANNELS, lay_out, with_details


@pytest.fixture(scope="module")
def model() -> TMAD:
    return with_noise(TMAD(MODEL, seed=1)).eval()


@pytest.fixture(scope="module")
def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch = make_batch(num_cells=4)
    return to_model(batch.image), batch.mask.float(), batch.pool_yx, batch.cells


@pytest.fixture(scope="module")
def out(model: TMAD, inputs: tuple[Tensor, ...]) -> TMADOutput:
    with torch.no_grad():
        result: TMADOutput = model(*inputs)
    return result


def in_cells(cells: Tensor, k: int = 16, side: int = 64) -> Tensor:
    """(B, 1, side, side), true in the named cells."""
    where = torch.zeros(len(cells), 1, side, side, dtype=torch.bool)
    for b in range(len(cells)):
        for cell in cells[b].tolist():
            y, x = cell // (side // k) * k, cell % (side // k) * k
            where[b, 0, y : y + k, x : x + k] = True
    return where


def test_every_output_has_the_shape_it_promises(out: TMADOutput) -> None:
    shapes = {name: tuple(value.shape) for name, value in vars(out).items()}
    assert shapes == {
        "coarse_raw": (2, 3, 64, 64),
        "coarse": (2, 3, 64, 64),
        "pool": (2, 12, 3, 16, 16),
        "candidates": (2, 4, 2, 3, 16, 16),
        "candidate_index": (2, 4, 2),
        "weights": (2, 4, 12),
        "patches": (2, 4, 3, 16, 16),
        "output": (2, 3, 64, 64),
    }


def test_outside_the_hole_the_result_is_the_image_to_the_last_bit(out: TMADOutput, inputs: tuple[Tensor, ...]) -> None:
    image, valid = inputs[0], (inputs[1] == 0).expand(-1, 3, -1, -1)
    for result in (out.output, out.coarse):
        assert torch.equal(result[valid], image[valid])


@pytest.mark.parametrize("hidden", [1.0, float("nan")])
def test_pixels_in_the_hole_are_never_read(
    hidden: float, model: TMAD, out: TMADOutput, inputs: tuple[Tensor, ...]
) -> None:
    image, mask, pool_yx, cells = inputs
    with torch.no_grad():
        other = model(torch.where(mask > 0, torch.tensor(hidden), image), mask, pool_yx, cells)
    for name, value in vars(out).items():
        assert torch.equal(value, getattr(other, name)), name


def test_pixels_outside_the_hole_are_read(model: TMAD, out: TMADOutput, inputs: tuple[Tensor, ...]) -> None:
    image, mask, pool_yx, cells = inputs
    with torch.no_grad():
        other = model(image.flip(-1), mask, pool_yx, cells)
    assert not torch.equal(other.coarse_raw, out.coarse_raw)
    assert not torch.equal(other.pool, out.pool)


def test_a_hole_cell_that_was_not_drawn_keeps_the_coarse_result(out: TMADOutput, inputs: tuple[Tensor, ...]) -> None:
    hole, drawn = inputs[1] > 0, in_cells(inputs[3])
    kept, filled = (hole & ~drawn).expand(-1, 3, -1, -1), (hole & drawn).expand(-1, 3, -1, -1)
    assert kept.any()
    assert torch.equal(out.output[kept], out.coarse[kept])
    assert (out.output[filled] != out.coarse[filled]).float().mean() > 0.99


def test_the_synthesized_cells_stand_on_their_places(out: TMADOutput, inputs: tuple[Tensor, ...]) -> None:
    hole = inputs[1] > 0
    for b in range(2):
        for n, cell in enumerate(inputs[3][b].tolist()):
            y, x = cell // 4 * 16, cell % 4 * 16
            inside = hole[b, :, y : y + 16, x : x + 16].expand(3, -1, -1)
            assert torch.equal(out.output[b, :, y : y + 16, x : x + 16][inside], out.patches[b, n][inside])


def test_the_memory_holds_the_image_and_coarse_pixels_where_a_window_is_partly_masked(model: TMAD) -> None:
    batch = make_batch()
    image, mask = to_model(batch.image), batch.mask.float()
    corners = torch.tensor([[[0, 0], [16, 20]], [[10, 10], [48, 48]]])
    with torch.no_grad():
        result = model(image, mask, corners, batch.cells)
    assert mask[0, :, 16:32, 20:36].any()
    assert not mask[0, :, 16:32, 20:36].all()
    for b in range(2):
        for p, (y, x) in enumerate(corners[b].tolist()):
            here = (..., slice(y, y + 16), slice(x, x + 16))
            expected = torch.where(mask[b][here] > 0, result.coarse_raw[b][here], image[b][here])
            assert torch.equal(result.pool[b, p], expected)


def test_the_generator_is_its_parts_put_together_by_hand(
    model: TMAD, out: TMADOutput, inputs: tuple[Tensor, ...]
) -> None:
    image, mask, pool_yx, cells = inputs
    with torch.no_grad():
        masked = image * (1 - mask)
        raw = model.coarse(masked, mask)
        coarse = raw * mask + image * (1 - mask)
        torch.testing.assert_close(out.coarse_raw, raw)
        torch.testing.assert_close(out.coarse, coarse)
        output = coarse.clone()
        o = 8  # half of 16
        wide = F.pad(with_details(coarse, 16), (o, o, o, o), mode="reflect")
        for b in range(2):
            pool = torch.stack([coarse[b, :, y : y + 16, x : x + 16] for y, x in pool_yx[b].tolist()])
            chosen = []
            for n, cell in enumerate(cells[b].tolist()):
                y, x = cell // 4 * 16, cell % 4 * 16
                patch = coarse[b, :, y : y + 16, x : x + 16]
                found = model.retrieval(patch[None, None], pool[None], pool[None])
                # Scores are some hundreds, of which a float32 keeps 1e-5.
                torch.testing.assert_close(out.weights[b, n], found.weights[0, 0], atol=1e-4, rtol=1e-3)
                assert out.candidate_index[b, n].tolist() == found.index[0, 0].tolist()
                assert torch.equal(out.candidates[b, n], pool[found.index[0, 0]])
                corners = [pool_yx[b, p].tolist() for p in found.index[0, 0].tolist()]
                chosen.append(torch.stack([wide[b, :, y : y + 16 + 2 * o, x : x + 16 + 2 * o] for y, x in corners]))
            here = coarse[b : b + 1], mask[b : b + 1]
            parts = lay_out(torch.stack(chosen)[None], cells[b : b + 1], *here, patch_size=16)
            made = model.psnet(*here, *parts)[0]
            for n, cell in enumerate(cells[b].tolist()):
                y, x = cell // 4 * 16, cell % 4 * 16
                torch.testing.assert_close(out.patches[b, n], made[:, y : y + 16, x : x + 16])
                output[b, :, y : y + 16, x : x + 16] = made[:, y : y + 16, x : x + 16]
        torch.testing.assert_close(out.output, output * mask + image * (1 - mask))


def test_a_window_of_the_memory_is_a_patch_with_what_lies_around_it_reflected_at_the_border(model: TMAD) -> None:
    coarse = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    memory = model.read_memory(coarse, torch.tensor([[[0, 0], [20, 30], [48, 48]]]))
    assert memory.shape == (1, 3, CHANNELS, 32, 32)
    assert torch.equal(memory[0, 1], with_details(coarse, 16)[0, :, 12:44, 22:54])
    assert torch.equal(memory[0, 0, :, 8:, 8:], with_details(coarse, 16)[0, :, :24, :24])
    assert torch.equal(memory[0, 0, :, 0], memory[0, 0, :, 16])
    assert torch.equal(memory[0, 2, :, :, 31], memory[0, 2, :, :, 15])
    assert torch.equal(model.patches(memory)[0, 2], coarse[0, :, 48:, 48:])
    assert not model.read_memory(coarse.requires_grad_(), torch.zeros(1, 1, 2, dtype=torch.int64)).requires_grad


def test_the_picture_in_parts_is_the_picture_whole(model: TMAD) -> None:
    def rand(*shape: int, seed: int) -> Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))

    coarse, mask = rand(1, 3, 32, 224, seed=0), (rand(1, 1, 32, 224, seed=1) > 0).float()
    cells, candidates = torch.arange(28)[None], rand(1, 28, 2, CHANNELS, 24, 24, seed=2)
    corners = torch.stack([cells[0] // 14, cells[0] % 14], 1)

    def part(left: int, right: int) -> Tensor:
        """Columns *left* to *right* (of cells) of the picture, from those columns alone."""
        inside = (corners[:, 1] >= left) & (corners[:, 1] < right)
        local = corners[inside, 0] * (right - left) + corners[inside, 1] - left
        columns = np.s_[..., 16 * left : 16 * right]
        return model.synthesize(coarse[columns], mask[columns], candidates[:, inside], local[None])

    with torch.no_grad():
        whole = model.synthesize(coarse, mask, candidates, cells)
        margin = -(-(model.psnet.reach + model.config.overlap) // 16)
        assert margin == 3
        for left, right in ((0, 4), (5, 6), (4, 9), (9, 14)):
            first = max(0, left - margin)
            made = part(first, min(14, right + margin))[..., 16 * (left - first) :][..., : 16 * (right - left)]
            torch.testing.assert_close(made, whole[..., 16 * left : 16 * right], rtol=1e-4, atol=1e-5)
        # One cell around is not enough.
        near = part(4, 7)[..., 16:32]
        assert (near - whole[..., 80:96]).abs().max() > 1e-3


def test_images_of_a_batch_do_not_mix(model: TMAD, out: TMADOutput, inputs: tuple[Tensor, ...]) -> None:
    with torch.no_grad():
        alone = model(*(value[1:] for value in inputs))
    for name, value in vars(out).items():
        torch.testing.assert_close(getattr(alone, name), value[1:])


@pytest.mark.parametrize("straight_through", [True, False])
def test_the_result_reaches_coarse_network_psnet_and_where_wanted_retrieval_and_the_memory_gives_no_gradient(
    straight_through: bool,
) -> None:
    config = replace(MODEL, retrieval=replace(MODEL.retrieval, straight_through=straight_through))
    model, batch = with_noise(TMAD(config, seed=1)), make_batch()
    result = model(to_model(batch.image), batch.mask.float(), batch.pool_yx, batch.cells)
    assert not result.pool.requires_grad
    result.output.square().sum().backward()
    for name, parameter in model.named_parameters():
        if straight_through or not name.startswith("retrieval."):
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name
        else:
            assert parameter.grad is None, name


@pytest.mark.parametrize("residual", ["none", "coarse", "detail"])
def test_an_untrained_generator_gives_what_its_residual_adds_to(residual: str) -> None:
    model, batch = TMAD(replace(MODEL, psnet=replace(MODEL.psnet, residual=residual))).eval(), make_batch()
    image, mask = to_model(batch.image), batch.mask.float()
    with torch.no_grad():
        out = model(image, mask, batch.pool_yx, batch.cells)
        memory = model.read_memory(out.coarse, batch.pool_yx)
        found = model.retrieve(out.coarse, memory, batch.cells)
        _, details = lay_out(found.candidates, batch.cells, out.coarse, mask, patch_size=16)
    added = details[:, 0].sum(1) if residual == "detail" else torch.zeros_like(image)
    drawn = in_cells(batch.cells) & (mask > 0)
    expected = torch.where(drawn, out.coarse + added, out.coarse)
    if residual == "none":
        assert not torch.allclose(out.output, expected, atol=0.05)
    else:
        torch.testing.assert_close(out.output, expected)


def test_the_seed_fixes_the_weights_and_the_global_generator_is_left_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = TMAD(MODEL, seed=3).state_dict()
    assert torch.equal(torch.rand(3), expected)
    second, third = TMAD(MODEL, seed=3).state_dict(), TMAD(MODEL, seed=4).state_dict()
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert not torch.equal(first["coarse.layers.0.weight"], third["coarse.layers.0.weight"])


def test_weighted_sum_and_other_candidate_counts_run_through_the_whole_generator(inputs: tuple[Tensor, ...]) -> None:
    for changes in ({"mode": "weighted_sum"}, {"num_candidates": 1}, {"num_candidates": 6}):
        config = replace(MODEL, retrieval=replace(MODEL.retrieval, **changes))
        result = TMAD(config)(*inputs)
        assert result.candidates.shape[2] == config.retrieval.num_candidates
        assert result.output.isfinite().all()


def test_sides_may_differ_and_be_any_multiple(model: TMAD) -> None:
    image, mask = torch.rand(1, 3, 16, 48), torch.zeros(1, 1, 16, 48)
    mask[..., 20:40] = 1
    with torch.no_grad():
        result = model(image, mask, torch.zeros(1, 12, 2, dtype=torch.int64), torch.tensor([[1, 2]]))
    assert result.output.shape == (1, 3, 16, 48)
    assert torch.equal(result.output[..., :20], image[..., :20])


def test_the_size_multiple_is_the_smallest_both_parts_accept() -> None:
    assert TMADConfig().size_multiple == 32
    assert MODEL.size_multiple == 16
    assert replace(MODEL, patch_size=12).size_multiple == 12
    assert TMADConfig(patch_size=20).size_multiple == 40
