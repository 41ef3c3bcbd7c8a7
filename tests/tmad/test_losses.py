"""Each loss against its equation, written out as loops over pixels and scores."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tmad.losses import (
    global_discriminator_loss,
    global_generator_loss,
    patch_discriminator_loss,
    patch_generator_loss,
    region_l1,
    total_variation,
)


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def same(value: Tensor) -> Tensor:
    """The mean over one worker."""
    return value


def scores(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Maps of memory, real and fake patches: different numbers of each, as in Eq. 6-7."""
    return rand(9, 1, 2, 2, seed=seed) + 0.3, rand(7, 1, 2, 2, seed=seed + 1) + 1, rand(5, 1, 2, 2, seed=seed + 2) - 1


def softplus(z: float) -> float:
    """sigma^+(z) = log(1 + e^z), the function all scores go through."""
    return math.log(1 + math.exp(z))


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def flat(x: Tensor) -> list[float]:
    return x.detach().flatten().tolist()


def equation_6(real: Tensor, fake: Tensor) -> float:
    r, f = flat(real), flat(fake)
    return mean([softplus(-(x - mean(f))) for x in r]) + mean([softplus(x - mean(r)) for x in f])


def equation_7(memory: Tensor, real: Tensor, fake: Tensor) -> float:
    m, r, f = flat(memory), flat(real), flat(fake)
    return mean([softplus(x - mean(f)) for x in m]) + mean([softplus(-(x - mean(r))) for x in f])


def region_twin(result: Tensor, truth: Tensor, region: Tensor) -> float:
    """Eq. 1, one region: mean |I_s - I| over its pixels, image by image; an empty one counts as 0."""
    per_image = []
    for b in range(len(result)):
        values = [
            abs(float(result[b, c, y, x]) - float(truth[b, c, y, x]))
            for c in range(result.shape[1])
            for y in range(result.shape[2])
            for x in range(result.shape[3])
            if region[b, 0, y, x] > 0
        ]
        per_image.append(mean(values) if values else 0.0)
    return mean(per_image)


def variation_twin(image: Tensor, mask: Tensor) -> float:
    """Eq. 9's total variation: |difference| of each pair of neighbours that touches the hole, a mean per direction."""
    total = 0.0
    for down, right in ((1, 0), (0, 1)):
        per_image = []
        for b in range(len(image)):
            values = []
            for y in range(image.shape[2] - down):
                for x in range(image.shape[3] - right):
                    if mask[b, 0, y, x] or mask[b, 0, y + down, x + right]:
                        values += (image[b, :, y + down, x + right] - image[b, :, y, x]).abs().tolist()
            per_image.append(mean(values) if values else 0.0)
        total += mean(per_image)
    return total


def a_mask(seed: int = 0) -> Tensor:
    mask = (rand(3, 1, 5, 6, seed=seed) > 0.5).double()
    mask[2] = 0
    return mask


def test_equation_1_is_a_mean_over_each_region() -> None:
    result, truth, mask = rand(3, 3, 5, 6), rand(3, 3, 5, 6, seed=1), a_mask()
    for region in (mask, 1 - mask):
        assert float(region_l1(result, truth, region)) == pytest.approx(region_twin(result, truth, region))


def test_the_reconstruction_loss_does_not_depend_on_the_holes_size() -> None:
    truth = torch.zeros(1, 3, 8, 8)
    for side in (1, 3, 8):
        mask = torch.zeros(1, 1, 8, 8)
        mask[..., :side, :side] = 1
        assert region_l1(truth + 0.25, truth, mask) == pytest.approx(0.25)


def test_the_reconstruction_loss_looks_nowhere_else() -> None:
    result, mask = rand(1, 3, 4, 4).requires_grad_(), torch.zeros(1, 1, 4, 4)
    mask[..., 1, 2] = 1
    (gradient,) = torch.autograd.grad(region_l1(result, torch.zeros(1, 3, 4, 4), mask), result)
    assert torch.equal(gradient != 0, (mask > 0).expand_as(gradient))


def test_an_empty_region_costs_nothing_and_gives_no_gradient() -> None:
    result = rand(1, 3, 4, 4).requires_grad_()
    loss = region_l1(result, torch.zeros(1, 3, 4, 4), torch.zeros(1, 1, 4, 4))
    (gradient,) = torch.autograd.grad(loss, result)
    assert loss == 0
    assert not gradient.any()


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000))
def test_the_discriminators_loss_is_equation_6(seed: int) -> None:
    _, real, fake = scores(seed)
    loss = patch_discriminator_loss(real, fake, relativistic=True, mean=same)
    assert float(loss) == pytest.approx(equation_6(real, fake))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000))
def test_the_generators_loss_is_equation_7(seed: int) -> None:
    memory, real, fake = scores(seed)
    loss = patch_generator_loss(memory, real, fake, relativistic=True, mean=same)
    assert float(loss) == pytest.approx(equation_7(memory, real, fake))


def central_difference(function: object, x: Tensor, place: int, step: float = 1e-6) -> float:
    values = []
    for sign in (1, -1):
        moved = x.detach().clone()
        moved.view(-1)[place] += sign * step
        values.append(function(moved))  # type: ignore[operator]
    return (values[0] - values[1]) / (2 * step)


def test_the_relativistic_means_are_differentiated_too() -> None:
    memory, real, fake = scores(0)
    real.requires_grad_(), fake.requires_grad_()
    d_real, d_fake = torch.autograd.grad(
        patch_discriminator_loss(real, fake, relativistic=True, mean=same), (real, fake)
    )
    assert float(d_real.flatten()[3]) == pytest.approx(central_difference(lambda r: equation_6(r, fake), real, 3))
    assert float(d_fake.flatten()[3]) == pytest.approx(central_difference(lambda f: equation_6(real, f), fake, 3))
    loss = patch_generator_loss(memory, real.detach(), fake, relativistic=True, mean=same)
    (d_fake,) = torch.autograd.grad(loss, fake)
    assert float(d_fake.flatten()[3]) == pytest.approx(
        central_difference(lambda f: equation_7(memory, real, f), fake, 3)
    )


def test_the_compensation_term_draws_the_mean_of_the_synthesized_patches_towards_the_memory() -> None:
    _, real, fake = scores(0)
    fake.requires_grad_()
    # A memory that scores far above: raising the fakes' mean lowers the loss much; one far below: hardly at all.
    gradients = []
    for level in (10.0, -10.0):
        loss = patch_generator_loss(torch.full((9, 1, 2, 2), level), real, fake, relativistic=True, mean=same)
        gradients.append(float(torch.autograd.grad(loss, fake)[0].sum()))
    assert gradients[0] < gradients[1] - 0.5


def test_without_the_relativistic_terms_each_score_stands_alone() -> None:
    memory, real, fake = scores(0)
    r, f = flat(real), flat(fake)
    discriminator = patch_discriminator_loss(real, fake, relativistic=False, mean=same)
    assert float(discriminator) == pytest.approx(mean([softplus(-x) for x in r]) + mean([softplus(x) for x in f]))
    generator = patch_generator_loss(memory, real, fake, relativistic=False, mean=same)
    assert float(generator) == pytest.approx(mean([softplus(-x) for x in f]))
    assert float(generator) == float(patch_generator_loss(memory + 9, real - 9, fake, relativistic=False, mean=same))


def test_the_workers_mean_replaces_the_own_one_in_both_expectations() -> None:
    memory, real, fake = scores(0)
    asked: list[float] = []

    def common(value: Tensor) -> Tensor:
        asked.append(float(value))
        return value + 2.0

    r, f = flat(real), flat(fake)
    discriminator = patch_discriminator_loss(real, fake, relativistic=True, mean=common)
    assert asked == pytest.approx([mean(f), mean(r)])
    expected = mean([softplus(-(x - mean(f) - 2)) for x in r]) + mean([softplus(x - mean(r) - 2) for x in f])
    assert float(discriminator) == pytest.approx(expected)
    generator = patch_generator_loss(memory, real, fake, relativistic=True, mean=common)
    expected = mean([softplus(x - mean(f) - 2) for x in flat(memory)]) + mean([softplus(-(x - mean(r) - 2)) for x in f])
    assert float(generator) == pytest.approx(expected)


def test_discriminator_and_generator_pull_in_opposite_directions() -> None:
    memory, real, fake = scores(0)
    fake.requires_grad_()
    discriminator = patch_discriminator_loss(real, fake, relativistic=True, mean=same)
    generator = patch_generator_loss(memory, real, fake, relativistic=True, mean=same)
    assert torch.autograd.grad(discriminator, fake)[0].sum() > 0
    assert torch.autograd.grad(generator, fake)[0].sum() < 0


def test_the_blending_losses_of_equation_9_are_the_non_saturating_ones() -> None:
    _, real, fake = scores(4)
    r, f = flat(real), flat(fake)
    expected = mean([softplus(-x) for x in r]) + mean([softplus(x) for x in f])
    assert float(global_discriminator_loss(real, fake)) == pytest.approx(expected)
    assert float(global_generator_loss(fake)) == pytest.approx(mean([softplus(-x) for x in f]))


def test_huge_scores_stay_finite() -> None:
    huge = torch.tensor([1e4, -1e4])
    losses = [
        patch_discriminator_loss(huge, -huge, relativistic=True, mean=same),
        patch_generator_loss(huge, huge, -huge, relativistic=True, mean=same),
        global_discriminator_loss(huge, -huge),
        global_generator_loss(-huge),
    ]
    assert torch.stack(losses).isfinite().all()


@pytest.mark.parametrize("seed", range(4))
def test_total_variation_counts_the_pairs_that_touch_the_hole(seed: int) -> None:
    image, mask = rand(3, 3, 5, 6, seed=seed), a_mask(seed)
    assert float(total_variation(image, mask)) == pytest.approx(variation_twin(image, mask))


def test_total_variation_reaches_one_pixel_beyond_the_hole_and_no_further() -> None:
    mask = torch.zeros(1, 1, 9, 9)
    mask[..., 4, 3:6] = 1
    image = rand(1, 1, 9, 9)
    matters = torch.zeros(9, 9, dtype=torch.bool)
    for y in range(9):
        for x in range(9):
            louder = image.clone()
            louder[..., y, x] += 10
            matters[y, x] = total_variation(louder, mask) != total_variation(image, mask)
    rim = torch.zeros(9, 9, dtype=torch.bool)
    rim[3:6, 3:6] = True
    rim[4, 2:7] = True
    assert torch.equal(matters, rim)


def test_total_variation_of_a_flat_picture_and_of_no_hole_is_zero() -> None:
    assert total_variation(torch.full((1, 3, 6, 6), 0.4), torch.ones(1, 1, 6, 6)) == 0
    assert total_variation(rand(1, 3, 6, 6), torch.zeros(1, 1, 6, 6)) == 0


def test_the_losses_of_two_halves_average_to_that_of_the_whole_batch() -> None:
    result, truth, mask = rand(4, 3, 5, 6), rand(4, 3, 5, 6, seed=1), a_mask()[[0, 1, 2, 0]]
    for loss in (lambda s: region_l1(result[s], truth[s], mask[s]), lambda s: total_variation(result[s], mask[s])):
        halves = (loss(slice(0, 2)) + loss(slice(2, 4))) / 2
        torch.testing.assert_close(halves, loss(slice(0, 4)))
