"""Averaged weights: the decay in images, the update by hand, the ramp at the start."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.tmad.tiny import make_state, snapshot, train, with_optim
from tmad import ema


class Small(nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([value, 2 * value]))
        self.register_buffer("vector", torch.tensor([value]))
        self.register_buffer("count", torch.tensor(int(value)))


def test_after_one_half_life_an_old_weight_counts_half() -> None:
    assert ema.decay(100, 10**6, 100) == pytest.approx(0.5)
    assert ema.decay(200, 10**6, 100) == pytest.approx(0.25)
    assert ema.decay(1, 10**6, 100) ** 100 == pytest.approx(0.5)


def test_the_half_life_is_never_longer_than_a_tenth_of_the_run() -> None:
    assert ema.decay(4, 40, 1e9) == pytest.approx(0.5)
    assert ema.decay(4, 4, 1e9) == pytest.approx(0.5**10)


def test_no_half_life_keeps_nothing_of_the_old() -> None:
    assert ema.decay(4, 400, 0) == 0
    average, model = Small(1.0), Small(3.0)
    ema.update(average, model, 0.0, torch.tensor(True))
    assert all(
        torch.equal(a, b) for a, b in zip(average.state_dict().values(), model.state_dict().values(), strict=True)
    )


def test_the_average_is_the_written_out_sum_and_buffers_are_copied() -> None:
    average, model = Small(1.0), Small(3.0)
    ema.update(average, model, 0.75, torch.tensor(True))
    torch.testing.assert_close(average.weight.detach(), torch.tensor([0.75 * 1 + 0.25 * 3, 0.75 * 2 + 0.25 * 6]))
    assert (average.vector, average.count) == (3, 3)
    assert model.weight.tolist() == [3, 6]


def test_a_step_that_was_not_finite_leaves_the_average_as_it_was() -> None:
    average, model = Small(1.0), Small(3.0)
    ema.update(average, model, 0.75, torch.tensor(False))
    assert average.weight.tolist() == [1, 2]


def test_training_keeps_the_average_by_hand() -> None:
    state = make_state(with_optim(ema_halflife_images=6))
    twin = snapshot(state.ema_model)
    for step in range(5):
        train(state, 1, "coarse", first=step)
        images_seen = 2 * (step + 1)
        keep = 0.5 ** (2 / min(6, 0.1 * images_seen))
        twin = {name: keep * twin[name] + (1 - keep) * value.detach() for name, value in state.model.named_parameters()}
    for name, value in state.ema_model.named_parameters():
        torch.testing.assert_close(value, twin[name], rtol=1e-5, atol=1e-7)


def test_a_long_half_life_lags_behind_and_none_follows_exactly() -> None:
    distances = []
    for halflife in (0, 1e6):
        state = make_state(with_optim(ema_halflife_images=halflife))
        train(state, 25, "coarse", fixed=True)
        pairs = zip(state.ema_model.parameters(), state.model.parameters(), strict=True)
        distances.append(sum(float((a - b).abs().sum().detach()) for a, b in pairs))
    assert distances[0] == 0
    assert distances[1] > 0


def test_the_average_needs_no_gradient_and_stands_in_evaluation_mode() -> None:
    state = make_state()
    train(state, 1)
    assert not any(parameter.requires_grad for parameter in state.ema_model.parameters())
    assert not state.ema_model.training
    assert state.model.training
