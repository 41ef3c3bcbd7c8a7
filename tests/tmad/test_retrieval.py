"""Retrieval against Eq. 2-5 written out: similarity, exact candidates, straight-through gradient, W-Sum;
and what it learns from the expected distance."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tmad.config import RetrievalConfig
from tmad.losses import expected_distance
from tmad.retrieval import (
    GREY_LEVELS,
    Retrieval,
    StraightThroughGather,
    intact_share,
    patch_distances,
    retrieval_gain,
    retrieval_statistics,
    similarity,
)

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
        return Retrieval(replace(CONFIG, **changes))


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


def scores_of(net: Retrieval, cells: Tensor, pool: Tensor) -> Tensor:
    query, memory = (
        embed(x.flatten(0, 1)).reshape(2, x.shape[1], -1)
        for embed, x in ((net.embed_query, cells), (net.embed_memory, pool))
    )
    return similarity_twin(query.detach(), memory.detach())


def windows_of(pool: Tensor) -> Tensor:
    """What is held of the memory in these tests: more channels and wider than a patch."""
    return rand(*pool.shape[:2], 5, SIDE + 2, SIDE + 2, seed=9, dtype=torch.float32)


def test_at_the_default_temperature_the_weights_are_the_softmax_of_equation_3() -> None:
    net, (cells, pool) = retrieval(), patches()
    assert net.config.temperature == 1
    torch.testing.assert_close(net(cells, pool, pool).weights, scores_of(net, cells, pool).softmax(-1))


def test_the_candidates_are_the_most_similar_patches_in_order() -> None:
    net, (cells, pool) = retrieval(temperature=2.0), patches()
    held = windows_of(pool)
    found = net(cells, pool, held)
    scores = scores_of(net, cells, pool)
    torch.testing.assert_close(found.weights, (scores / 2).softmax(-1))
    for b in range(2):
        for n in range(4):
            ranking = sorted(range(7), key=lambda p: -float(scores[b, n, p]))
            assert found.index[b, n].tolist() == ranking[:3]
            for c in range(3):
                assert torch.equal(found.candidates[b, n, c], held[b, ranking[c]])


def test_what_is_held_of_the_memory_changes_no_choice() -> None:
    net, (cells, pool) = retrieval(), patches()
    plain, wide = net(cells, pool, pool), net(cells, pool, windows_of(pool))
    assert torch.equal(plain.index, wide.index)
    assert torch.equal(plain.weights, wide.weights)


@pytest.mark.parametrize("temperature", [0.05, 2.0, 50.0])
def test_the_temperature_changes_no_ranking(temperature: float) -> None:
    default, other = retrieval(), retrieval(temperature=temperature)
    cells, pool = patches()
    assert torch.equal(default(cells, pool, pool).index, other(cells, pool, pool).index)
    assert not torch.allclose(default(cells, pool, pool).weights, other(cells, pool, pool).weights)


def test_a_patch_of_the_memory_moves_with_its_place_in_the_pool() -> None:
    net, (cells, pool) = retrieval(), patches()
    order = torch.tensor([3, 1, 6, 0, 2, 5, 4])
    plain, shuffled = net(cells, pool, pool), net(cells, pool[:, order], pool[:, order])
    assert torch.equal(plain.candidates, shuffled.candidates)
    assert torch.equal(plain.index, order[shuffled.index])


@pytest.mark.parametrize("num", [1, 2, 4, 6])
def test_the_number_of_candidates_of_table_iv_can_be_chosen(num: int) -> None:
    cells, pool = patches()
    found = retrieval(num_candidates=num)(cells, pool, pool)
    assert found.candidates.shape == (2, 4, num, 3, SIDE, SIDE)
    every = retrieval(num_candidates=7)(cells, pool, pool)
    assert torch.equal(found.index, every.index[..., :num])


def test_weighted_sum_hands_over_the_softmax_mean_of_what_is_held() -> None:
    cells, pool = patches()
    held = windows_of(pool)
    found = retrieval(mode="weighted_sum")(cells, pool, held)
    mean = sum(found.weights[:, :, p, None, None, None] * held[:, None, p] for p in range(7))
    for c in range(3):
        torch.testing.assert_close(found.candidates[:, :, c], mean)
    # Weights of a trained embedding are not those of a plain mean.
    assert not torch.allclose(mean, held.mean(1, keepdim=True), atol=1e-3)


WITH_GRADIENT = ({"straight_through": True}, {"mode": "weighted_sum"})


@pytest.mark.parametrize("changes", WITH_GRADIENT)
def test_both_embeddings_learn_through_the_candidates_where_the_path_is_open(changes: dict) -> None:
    net, (cells, pool) = retrieval(**changes), patches()
    upstream = rand(2, 4, 3, 3, SIDE, SIDE, dtype=torch.float32)
    (net(cells, pool, pool).candidates * upstream).sum().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_by_default_no_gradient_of_the_candidates_reaches_the_embeddings_and_the_weights_still_carry_one() -> None:
    net, (cells, pool) = retrieval(), patches()
    assert not net.config.straight_through
    found = net(cells, pool, pool)
    assert not found.candidates.requires_grad
    found.weights[..., 0].sum().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in net.parameters())


def test_the_straight_through_path_changes_no_value() -> None:
    cells, pool = patches()
    off, on = (retrieval(straight_through=value)(cells, pool, pool) for value in (False, True))
    for name in ("candidates", "index", "weights"):
        assert torch.equal(getattr(off, name), getattr(on, name))


def test_sampling_and_weighted_sum_give_the_embeddings_the_same_gradient() -> None:
    gradients = []
    for changes in WITH_GRADIENT:
        net, (cells, pool) = retrieval(**changes), patches()
        (net(cells, pool, pool).candidates * rand(2, 4, 3, 3, SIDE, SIDE, dtype=torch.float32)).sum().backward()
        gradients.append([parameter.grad for parameter in net.parameters()])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_the_softmax_stays_in_single_precision_under_bfloat16() -> None:
    net, (cells, pool) = retrieval(), patches()
    with torch.autocast("cpu", torch.bfloat16):
        found = net(cells, pool, pool)
    assert found.weights.dtype == torch.float32
    torch.testing.assert_close(found.weights.sum(-1), torch.ones(2, 4))
    assert torch.equal(found.candidates[0, 0, 0], pool[0, found.index[0, 0, 0]])


# What is measured, and what retrieval learns from


def test_the_intact_share_counts_the_candidates_pixels_outside_the_hole() -> None:
    # Two images of 4 x 4 pixels, windows of 2 x 2: top left, top right, bottom left, bottom right.
    mask = torch.zeros(2, 1, 4, 4)
    mask[0, 0, 0, 0] = 1  # a quarter of the first image's first window
    pool_yx = torch.tensor([[0, 0], [0, 2], [2, 0], [2, 2]]).expand(2, 4, 2)
    index = torch.tensor([[[0, 1], [0, 2]], [[3, 3], [3, 3]]])
    assert float(intact_share(mask, pool_yx, index, 2)) == (0.75 + 1 + 0.75 + 1 + 4) / 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_distances_are_the_mean_absolute_difference_of_each_pair_in_float32(dtype: torch.dtype) -> None:
    targets, pool = (one.to(dtype) for one in patches())
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        distances = patch_distances(pool, targets.clone().requires_grad_())
    assert distances.dtype == torch.float32
    assert not distances.requires_grad
    for b, n, p in torch.cartesian_prod(torch.arange(2), torch.arange(4), torch.arange(7)).tolist():
        expected = (pool[b, p].double() - targets[b, n].double()).abs().mean()
        assert float(distances[b, n, p]) == pytest.approx(float(expected), rel=1e-5)


COUNTED = torch.tensor([[True, True, False, True], [False, True, True, False]])


def found_by_chance(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights, index, an untrained index and distances for 2 images, 4 cells, 7 patches, 3 candidates."""
    weights, distances = rand(2, 4, 7, seed=seed).softmax(-1).float(), rand(2, 4, 7, seed=seed + 1).abs().float()
    return weights, index_of(2, 4, 3, 7), index_of(2, 4, 3, 7).flip(1), distances


@pytest.mark.parametrize("counted", [COUNTED, torch.ones(2, 4, dtype=torch.bool)])
def test_the_statistics_of_retrieval_equal_loops_over_the_cells_that_count(counted: Tensor) -> None:
    weights, index, reference, distances = found_by_chance()
    index[0, 3, 0] = index[0, 0, 0]  # two cells of the first image choose the same
    got = retrieval_statistics((weights, index), reference, distances, counted)
    lists: dict[str, list[float]] = {name: [] for name in ("top", "untrained", "best", "random", "entropy")}
    shares = []
    for b in range(2):
        firsts = []
        for n in range(4):
            if counted[b, n]:
                d = distances[b, n].tolist()
                firsts.append(int(index[b, n, 0]))
                lists["top"].append(127.5 * d[firsts[-1]])
                lists["untrained"].append(127.5 * d[int(reference[b, n, 0])])
                lists["best"].append(127.5 * min(d))
                lists["random"].append(127.5 * sum(d) / 7)
                lists["entropy"].append(-sum(w * math.log(w) for w in weights[b, n].tolist()))
        shares.append(len(set(firsts)) / min(len(firsts), 7))
    expected = {f"retrieval/{name}": sum(values) / len(values) for name, values in lists.items()}
    expected["retrieval/distinct"] = sum(shares) / 2
    assert {name: float(value) for name, value in got.items()} == pytest.approx(expected)
    assert GREY_LEVELS == 127.5


def test_cells_that_do_not_count_change_no_statistic() -> None:
    weights, index, reference, distances = found_by_chance()
    plain = retrieval_statistics((weights, index), reference, distances, COUNTED)
    other = found_by_chance(seed=5)
    skip = ~COUNTED[..., None]
    mixed = [torch.where(skip, b, a) for a, b in ((weights, other[0]), (index, index.roll(1, 2)), (reference, index))]
    changed = retrieval_statistics((mixed[0], mixed[1]), mixed[2], torch.where(skip, other[3], distances), COUNTED)
    assert {name: float(v) for name, v in plain.items()} == pytest.approx({n: float(v) for n, v in changed.items()})


def test_one_patch_for_all_cells_is_the_smallest_share_and_a_memory_smaller_than_the_cells_can_be_used_up() -> None:
    distances, counted = rand(1, 6, 3, dtype=torch.float32), torch.ones(1, 6, dtype=torch.bool)
    weights = torch.full((1, 6, 3), 1 / 3)
    same, all_three = torch.zeros(1, 6, 1, dtype=torch.int64), torch.tensor([0, 1, 2, 2, 1, 0])[None, :, None]
    shares = [
        float(retrieval_statistics((weights, index), same, distances, counted)["retrieval/distinct"])
        for index in (same, all_three)
    ]
    assert shares == pytest.approx([1 / 3, 1])


def test_without_a_cell_that_counts_all_statistics_are_zero() -> None:
    weights, index, reference, distances = found_by_chance()
    nothing = retrieval_statistics((weights, index), reference, distances, torch.zeros(2, 4, dtype=torch.bool))
    assert {float(value) for value in nothing.values()} == {0.0}


@pytest.mark.parametrize(
    ("top", "expected"), [(30.0, 0.0), (20.0, 1.0), (25.0, 0.5), (35.0, -0.5)], ids=["same", "best", "half", "worse"]
)
def test_the_gain_says_how_much_of_the_way_to_the_best_patch_training_has_gone(top: float, expected: float) -> None:
    assert retrieval_gain(top, 30.0, 20.0) == expected


def test_there_is_no_gain_to_speak_of_where_an_untrained_embedding_finds_the_best() -> None:
    assert retrieval_gain(20.0, 20.0, 20.0) is None
    assert retrieval_gain(25.0, 20.0, 20.0) is None


def expected_distance_twin(weights: Tensor, distances: Tensor, counted: Tensor) -> float:
    per_image = []
    for b in range(len(weights)):
        cells = [
            sum(float(weights[b, n, p] * distances[b, n, p]) for p in range(weights.shape[2]))
            for n in range(weights.shape[1])
            if counted[b, n]
        ]
        per_image.append(sum(cells) / len(cells) if cells else 0.0)
    return sum(per_image) / len(per_image)


@pytest.mark.parametrize("counted", [COUNTED, torch.zeros(2, 4, dtype=torch.bool), COUNTED & (torch.arange(4) < 1)])
def test_the_expected_distance_equals_its_formula_over_the_cells_that_count(counted: Tensor) -> None:
    weights, _, _, distances = found_by_chance()
    expected = expected_distance_twin(weights, distances, counted)
    assert float(expected_distance(weights, distances, counted)) == pytest.approx(expected)


def test_the_gradient_of_the_expected_distance_moves_weight_from_far_patches_to_near_ones() -> None:
    # Of one cell, in the scores: S_j (d_j - E d).
    distances = rand(2, 4, 7, seed=1).abs()
    scores = rand(2, 4, 7).requires_grad_()
    weights = scores.softmax(-1)
    (gradient,) = torch.autograd.grad(expected_distance(weights, distances, COUNTED), scores)
    for b in range(2):
        for n in range(4):
            s, d = weights[b, n].detach(), distances[b, n]
            expected = s * (d - (s * d).sum()) * COUNTED[b, n] / COUNTED[b].sum() / 2
            torch.testing.assert_close(gradient[b, n], expected)
    assert torch.autograd.gradcheck(lambda x: expected_distance(x.softmax(-1), distances, COUNTED), scores)


def test_the_expected_distance_teaches_retrieval_to_find_the_nearest_patch() -> None:
    # Each cell is the negative of what belongs there: an untrained embedding, which goes by likeness, is far off.
    net = retrieval(hidden_channels=16)
    untrained = retrieval(hidden_channels=16)
    noise, pool = patches(seed=3)
    truth = 0.8 * pool[:, [5, 2, 0, 3]] + 0.2 * noise
    cells = -0.5 * truth
    distances, counted = patch_distances(pool, truth), torch.ones(2, 4, dtype=torch.bool)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        expected_distance(net(cells, pool, pool).weights, distances, counted).backward()
        optimizer.step()
    with torch.no_grad():
        found, before = net(cells, pool, pool), untrained(cells, pool, pool)
    first = retrieval_statistics((before.weights, before.index), before.index, distances, counted)
    last = retrieval_statistics((found.weights, found.index), before.index, distances, counted)
    assert torch.equal(found.weights.argmax(-1), distances.argmin(-1))
    assert found.weights.amax(-1).min() > 0.6
    assert last["retrieval/entropy"] < 0.5 * first["retrieval/entropy"]
    top, reference, best = (float(last[f"retrieval/{name}"]) for name in ("top", "untrained", "best"))
    assert reference > best
    assert retrieval_gain(top, reference, best) == pytest.approx(1)
    assert retrieval_gain(float(first["retrieval/top"]), reference, best) == 0


def test_at_the_start_the_nearest_patch_is_most_similar_whatever_the_seed() -> None:
    generator = torch.Generator().manual_seed(3)
    # Smooth patches of all brightnesses, which an angle does not tell apart.
    patches = (
        0.1 * torch.randn(1, 60, 3, 8, 8, generator=generator) + torch.linspace(-0.8, 0.8, 60)[:, None, None, None]
    )
    for seed in range(4):
        torch.manual_seed(seed)
        retrieval = Retrieval(RetrievalConfig(num_candidates=2))
        embedded = retrieval.embed_memory(patches[0]).flatten(1)
        nearest = torch.cdist(embedded, embedded).topk(2, largest=False).indices[:, 1]
        found = retrieval(patches, patches, patches).index[0]
        assert torch.equal(found[:, 0], torch.arange(60))
        assert (found[:, 1] == nearest).float().mean() > 0.9
