"""Retrieval against Eq. 2-5 written out: similarity, exact candidates, straight-through gradient, W-Sum."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tmad.config import RetrievalConfig
from tmad.retrieval import Retrieval, StraightThroughGather, candidate_statistics, similarity

CONFIG = RetrievalConfig(num_candidates=3, hidden_channels=4, embed_channels=2)
SIDE = 6


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def index_of(batch: int, cells: int, candidates: int, pool: int) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    rows = [torch.randperm(pool, generator=generator)[:candidates] for _ in range(batch * cells)]
    return torch.stack(rows).reshape(batch, cells, candidates)


def similarity_twin(query: Tensor, memory: Tensor) -> Tensor:
    """Eq. 3 for one pair after the other."""
    result = query.new_zeros(query.shape[0], query.shape[1], memory.shape[1])
    for b, n, p in torch.cartesian_prod(*(torch.arange(size) for size in result.shape)).tolist():
        phi = memory[b, p]
        result[b, n, p] = sum(query[b, n] * phi) / math.sqrt(float(sum(phi * phi)))
    return result


def written_out(weights: Tensor, pool: Tensor, index: Tensor) -> Tensor:
    """Eq. 4 as it stands: candidate c is {(1 - S).detach + S} (x) T, 1 being the one-hot vector of its choice."""
    chosen = torch.nn.functional.one_hot(index, pool.shape[1]).to(weights.dtype)
    ones = (chosen - weights[:, :, None]).detach() + weights[:, :, None]
    return torch.einsum("bncp,bp...->bnc...", ones, pool)


def retrieval(**changes: object) -> Retrieval:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Retrieval(replace(CONFIG, **changes), SIDE)


def patches(seed: int = 0) -> tuple[Tensor, Tensor]:
    cells = rand(2, 4, 3, SIDE, SIDE, seed=seed, dtype=torch.float32).clamp(-1, 1)
    return cells, rand(2, 7, 3, SIDE, SIDE, seed=seed + 1, dtype=torch.float32).clamp(-1, 1)


def test_similarity_is_equation_3_and_normalises_the_memory_only() -> None:
    query, memory = rand(2, 3, 5), rand(2, 4, 5, seed=1)
    torch.testing.assert_close(similarity(query, memory), similarity_twin(query, memory))
    torch.testing.assert_close(similarity(query, 7 * memory), similarity(query, memory))
    torch.testing.assert_close(similarity(7 * query, memory), 7 * similarity(query, memory))


def test_without_normalisation_similarity_is_the_inner_product_of_equation_2() -> None:
    query, memory = rand(2, 3, 5), rand(2, 4, 5, seed=1)
    plain = similarity(query, memory) * memory.norm(dim=-1)[:, None]
    torch.testing.assert_close(plain, torch.einsum("bnd,bpd->bnp", query, memory))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_candidate_is_its_memory_patch_to_the_last_bit(dtype: torch.dtype) -> None:
    pool, index = rand(2, 7, 3, 4, 4).to(dtype), index_of(2, 5, 3, 7)
    weights = rand(2, 5, 7, seed=1, dtype=torch.float32).softmax(-1).requires_grad_()
    candidates = StraightThroughGather.apply(weights, pool, index)
    for b in range(2):
        for n in range(5):
            for c in range(3):
                assert torch.equal(candidates[b, n, c], pool[b, index[b, n, c]])


def test_the_backward_pass_is_that_of_equation_5() -> None:
    pool, index = rand(2, 7, 3, 4, 4), index_of(2, 5, 3, 7)
    upstream = rand(2, 5, 3, 3, 4, 4, seed=2)
    gradients = []
    for function in (StraightThroughGather.apply, written_out):
        weights = rand(2, 5, 7, seed=1).softmax(-1).requires_grad_()
        (gradient,) = torch.autograd.grad((function(weights, pool, index) * upstream).sum(), weights)
        gradients.append(gradient)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-12, atol=1e-12)


def test_the_backward_pass_passes_gradcheck_against_the_softmax_weighted_sum() -> None:
    # Eq. 5 says dp/dw = dS/dw (x) T: the numerical derivative of S (x) T, which the exact forward pass does not have.
    pool, index = rand(2, 4, 1, 2, 2), index_of(2, 3, 2, 4)

    class Checked(torch.autograd.Function):
        @staticmethod
        def forward(ctx: torch.autograd.function.FunctionCtx, weights: Tensor) -> Tensor:
            ctx.save_for_backward(weights)
            return torch.einsum("bnp,bphij->bnhij", weights, pool.squeeze(2)[:, :, None])[:, :, None].expand(
                -1, -1, 2, -1, -1, -1
            )

        @staticmethod
        def backward(ctx: torch.autograd.function.FunctionCtx, upstream: Tensor) -> Tensor:
            (weights,) = ctx.saved_tensors  # type: ignore[attr-defined]
            with torch.enable_grad():
                weights = weights.detach().requires_grad_()
                (gradient,) = torch.autograd.grad(StraightThroughGather.apply(weights, pool, index), weights, upstream)
            return gradient

    logits = rand(2, 3, 4, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: Checked.apply(x.softmax(-1)), logits)


def test_the_memory_is_data_and_receives_no_gradient() -> None:
    pool = rand(1, 4, 1, 2, 2).requires_grad_()
    weights = rand(1, 3, 4).softmax(-1).requires_grad_()
    StraightThroughGather.apply(weights, pool, index_of(1, 3, 2, 4)).sum().backward()
    assert pool.grad is None
    assert weights.grad is not None


def test_the_candidates_are_the_most_similar_patches_in_order() -> None:
    net, (cells, pool) = retrieval(), patches()
    found = net(cells, pool)
    query, memory = (
        embed(x.flatten(0, 1)).reshape(2, x.shape[1], -1)
        for embed, x in ((net.embed_query, cells), (net.embed_memory, pool))
    )
    scores = similarity_twin(query.detach(), memory.detach())
    torch.testing.assert_close(found.weights, (scores / math.sqrt(2 * SIDE**2)).softmax(-1))
    for b in range(2):
        for n in range(4):
            ranking = sorted(range(7), key=lambda p: -float(scores[b, n, p]))
            assert found.index[b, n].tolist() == ranking[:3]
    assert torch.equal(found.candidates[1, 2, 0], pool[1, found.index[1, 2, 0]])


@pytest.mark.parametrize("temperature", [0.05, 1.0, 50.0])
def test_the_temperature_changes_no_ranking(temperature: float) -> None:
    default, other = retrieval(), retrieval(temperature=temperature)
    cells, pool = patches()
    assert torch.equal(default(cells, pool).index, other(cells, pool).index)
    assert not torch.allclose(default(cells, pool).weights, other(cells, pool).weights)


def test_a_patch_of_the_memory_moves_with_its_place_in_the_pool() -> None:
    net, (cells, pool) = retrieval(), patches()
    order = torch.tensor([3, 1, 6, 0, 2, 5, 4])
    plain, shuffled = net(cells, pool), net(cells, pool[:, order])
    assert torch.equal(plain.candidates, shuffled.candidates)
    assert torch.equal(plain.index, order[shuffled.index])


@pytest.mark.parametrize("num", [1, 2, 4, 6])
def test_the_number_of_candidates_of_table_iv_can_be_chosen(num: int) -> None:
    cells, pool = patches()
    found = retrieval(num_candidates=num)(cells, pool)
    assert found.candidates.shape == (2, 4, num, 3, SIDE, SIDE)
    assert torch.equal(found.index, retrieval()(cells, pool, num_candidates=num).index)


def test_weighted_sum_hands_over_the_softmax_mean_of_the_memory() -> None:
    cells, pool = patches()
    found = retrieval(mode="weighted_sum")(cells, pool)
    mean = sum(found.weights[:, :, p, None, None, None] * pool[:, None, p] for p in range(7))
    for c in range(3):
        torch.testing.assert_close(found.candidates[:, :, c], mean)


@pytest.mark.parametrize("mode", ["sample", "weighted_sum"])
def test_both_embeddings_learn_through_the_candidates(mode: str) -> None:
    net, (cells, pool) = retrieval(mode=mode), patches()
    upstream = rand(2, 4, 3, 3, SIDE, SIDE, dtype=torch.float32)
    (net(cells, pool).candidates * upstream).sum().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_sampling_and_weighted_sum_give_the_embeddings_the_same_gradient() -> None:
    gradients = []
    for mode in ("sample", "weighted_sum"):
        net, (cells, pool) = retrieval(mode=mode), patches()
        (net(cells, pool).candidates * rand(2, 4, 3, 3, SIDE, SIDE, dtype=torch.float32)).sum().backward()
        gradients.append([parameter.grad for parameter in net.parameters()])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_the_softmax_stays_in_single_precision_under_bfloat16() -> None:
    net, (cells, pool) = retrieval(), patches()
    with torch.autocast("cpu", torch.bfloat16):
        found = net(cells, pool)
    assert found.weights.dtype == torch.float32
    torch.testing.assert_close(found.weights.sum(-1), torch.ones(2, 4))
    assert torch.equal(found.candidates[0, 0, 0], pool[0, found.index[0, 0, 0]])


def test_the_statistics_of_candidates_count_intact_pixels_and_different_windows() -> None:
    # Two images of 4 x 4 pixels, windows of 2 x 2: top left, top right, bottom left, bottom right.
    mask = torch.zeros(2, 1, 4, 4)
    mask[0, 0, 0, 0] = 1  # a quarter of the first image's first window
    pool_yx = torch.tensor([[0, 0], [0, 2], [2, 0], [2, 2]]).expand(2, 4, 2)
    index = torch.tensor([[[0, 1], [0, 2]], [[3, 3], [3, 3]]])
    statistics = candidate_statistics(mask, pool_yx, index, 2)
    # The first image: 3/4, 1, 3/4 and 1 intact, three of four windows; the second: all intact, one of four.
    assert float(statistics["candidates/intact"]) == (0.75 + 1 + 0.75 + 1 + 4) / 8
    assert float(statistics["candidates/distinct"]) == (3 / 4 + 1 / 4) / 2
