"""The blocks of Table I: halving, up-sampling, residual sums, and the spectral bound."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from tmad.blocks import (
    SPECTRAL_GAIN,
    DownBlock,
    ResidualBlock,
    UpBlock,
    conv,
    leaky,
    normalise_spectra,
    normalised_once,
    out_conv,
    rounded_once,
)
from tmad.carafe import Carafe
from tmad.config import CarafeConfig


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def spectral_norm_of(weight: Tensor) -> float:
    return float(torch.linalg.matrix_norm(weight.detach().double().flatten(1), ord=2))


@pytest.mark.parametrize("size", [(8, 8), (6, 10), (12, 4)])
def test_a_down_block_is_two_convolutions_and_nearest_neighbour_halving(size: tuple[int, int]) -> None:
    block = DownBlock(3, 6)
    first, second = (layer for layer in block if isinstance(layer, nn.Conv2d))
    x = rand(2, 3, *size)
    literal = F.leaky_relu(F.conv2d(x, first.weight, first.bias, padding=1), 0.2)
    literal = F.leaky_relu(F.conv2d(literal, second.weight, second.bias, padding=1), 0.2)
    literal = F.interpolate(literal, scale_factor=0.5, mode="nearest")
    torch.testing.assert_close(block(x.clone()), literal)


def test_the_gradients_of_a_down_block_are_those_of_the_literal_one() -> None:
    block, gradients = DownBlock(3, 6), []
    first, second = (layer for layer in block if isinstance(layer, nn.Conv2d))
    for literal in (False, True):
        x = rand(2, 3, 8, 8).requires_grad_()
        y = F.leaky_relu(F.conv2d(x, first.weight, first.bias, padding=1), 0.2)
        y = F.leaky_relu(F.conv2d(y, second.weight, second.bias, padding=1), 0.2)
        y = F.interpolate(y, scale_factor=0.5, mode="nearest") if literal else block(x)
        gradients.append(torch.autograd.grad(y.square().sum(), [x, *block.parameters()]))
    torch.testing.assert_close(gradients[0], gradients[1])


def test_an_up_block_is_carafe_and_two_convolutions() -> None:
    block = UpBlock(6, 3, CarafeConfig())
    assert [type(layer) for layer in block] == [Carafe, nn.Conv2d, nn.LeakyReLU, nn.Conv2d, nn.LeakyReLU]
    assert [(layer.in_channels, layer.out_channels) for layer in block if isinstance(layer, nn.Conv2d)] == [
        (6, 3),
        (3, 3),
    ]
    assert block(rand(1, 6, 3, 5)).shape == (1, 3, 6, 10)


@pytest.mark.parametrize("dilation", [1, 2, 4])
def test_a_residual_block_is_the_plain_sum_with_a_dilated_first_convolution(dilation: int) -> None:
    block = ResidualBlock(4, dilation)
    first, _, second, _ = block.branch
    x = rand(2, 4, 9, 9)
    branch = F.leaky_relu(F.conv2d(x, first.weight, first.bias, padding=dilation, dilation=dilation), 0.2)
    branch = F.leaky_relu(F.conv2d(branch, second.weight, second.bias, padding=1), 0.2)
    torch.testing.assert_close(block(x), x + branch)


def test_a_residual_block_does_not_change_its_input() -> None:
    x = rand(1, 4, 6, 6)
    before = x.clone()
    ResidualBlock(4)(x)
    assert torch.equal(x, before)


def test_a_residual_branch_starts_weak_and_an_output_near_the_middle() -> None:
    x = rand(4, 16, 12, 12)
    assert (ResidualBlock(16)(x) - x).std() < 0.3
    assert out_conv(16)(x).std() < 0.3


def test_every_activation_has_slope_one_fifth() -> None:
    assert leaky()(torch.tensor([-5.0, 5.0])).tolist() == [-1.0, 5.0]
    slopes = {
        layer.negative_slope
        for block in (DownBlock(2, 4), UpBlock(4, 2, CarafeConfig()), ResidualBlock(2))
        for layer in block.modules()
        if isinstance(layer, nn.LeakyReLU)
    }
    assert slopes == {0.2}


def test_convolutions_keep_the_variance_of_their_input() -> None:
    x = rand(2, 64, 16, 16)
    for _ in range(6):
        x = F.leaky_relu(conv(64, 64)(x), 0.2)
    assert 0.3 < x.square().mean() < 3


def test_every_convolution_is_held_at_the_gain_times_the_spectral_norm_of_a_random_one() -> None:
    torch.manual_seed(0)
    layers = nn.Sequential(conv(3, 8), leaky(), conv(8, 16, 1), leaky(), conv(16, 4))
    normalise_spectra(layers)
    # Two singular values may lie close together: the power iteration needs its time to tell them apart.
    for _ in range(1000):
        layers(rand(1, 3, 6, 6))
    layers.eval()
    for layer in (layers[0], layers[2], layers[4]):
        bound = SPECTRAL_GAIN * (1 + math.sqrt(layer.out_channels / layer.weight[0].numel()))
        assert spectral_norm_of(layer.weight) == pytest.approx(bound, rel=1e-3)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_weights_normalised_together_are_those_of_pytorchs_spectral_norm_with_their_gradients_and_vectors(
    training: bool, layout: torch.memory_format
) -> None:
    torch.manual_seed(0)
    layers = nn.Sequential(conv(3, 8), ResidualBlock(8), conv(8, 5, 1))
    twins = [one for one in copy.deepcopy(layers).modules() if isinstance(one, nn.Conv2d)]
    ours = [one for one in layers.modules() if isinstance(one, nn.Conv2d)]
    normalise_spectra(layers)
    layers.to(memory_format=layout).train(training)  # type: ignore[call-overload]
    before = [{name: value.clone() for name, value in one.state_dict().items()} for one in ours]
    loss = expected = torch.zeros(())
    with normalised_once(layers):
        weights = [one.weight for one in ours]
        assert all(one.weight is weight for one, weight in zip(ours, weights, strict=True))
    for number, (weight, twin, state) in enumerate(zip(weights, twins, before, strict=True)):
        spectral_norm(twin).train(training).load_state_dict(state)
        wanted = SPECTRAL_GAIN * (1 + math.sqrt(len(weight) / weight[0].numel())) * twin.weight
        torch.testing.assert_close(weight, wanted)
        factor = rand(*weight.shape, seed=number)
        loss, expected = loss + (weight.sin() * factor).sum(), expected + (wanted.sin() * factor).sum()
    loss.backward()
    expected.backward()
    for one, twin, state in zip(ours, twins, before, strict=True):
        found, vectors = one.parametrizations.weight, {"parametrizations.weight.0._u", "parametrizations.weight.0._v"}
        torch.testing.assert_close(found.original.grad, twin.parametrizations.weight.original.grad)
        torch.testing.assert_close(one.state_dict(), dict(twin.state_dict()))
        changed = {name for name, value in one.state_dict().items() if not torch.equal(value, state[name])}
        assert changed == (vectors if training else set())
        assert found[0].taken is None


def test_weights_rounded_together_are_those_that_autocast_rounds_with_the_same_gradients() -> None:
    torch.manual_seed(0)
    layers = nn.Sequential(conv(3, 8), conv(8, 8), conv(8, 5, 1))
    unused = conv(5, 5)
    normalise_spectra(layers[1])
    twin = copy.deepcopy(layers)
    parameters, x = dict(layers.named_parameters()), rand(2, 3, 6, 6)
    with normalised_once(layers, twin), torch.autocast("cpu", torch.bfloat16):
        expected = twin(x)
        with rounded_once(layers, unused, dtype=torch.bfloat16):
            assert (
                {layer.weight.dtype for layer in layers} == {layer.bias.dtype for layer in layers} == {torch.bfloat16}
            )
            found = layers(x)
        assert layers[1].weight.dtype == torch.float32
    torch.testing.assert_close(found, expected)
    (found.float().sin().sum() + expected.float().sin().sum()).backward()
    for one, other in zip(layers.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=0.02, atol=0.02)
    assert unused.weight.grad is None
    with pytest.raises(RuntimeError, match="early"), rounded_once(layers, dtype=torch.bfloat16):
        raise RuntimeError("early")
    assert all(parameter is parameters[name] for name, parameter in layers.named_parameters())
    assert layers[1].parametrizations.weight[0].taken is None


def test_the_spectral_bound_does_not_depend_on_the_weights_scale() -> None:
    layer = nn.Sequential(conv(3, 8))
    normalise_spectra(layer)
    for _ in range(100):
        layer(rand(1, 3, 6, 6))
    before = layer[0].weight.detach().clone()
    with torch.no_grad():
        layer[0].parametrizations.weight.original.mul_(100)
    torch.testing.assert_close(layer[0].weight.detach(), before, rtol=1e-3, atol=1e-4)


def test_the_bound_is_the_spectral_norm_that_random_weights_have() -> None:
    for out_channels, in_channels, size in ((64, 32, 3), (128, 64, 1), (16, 48, 3)):
        fan_in = in_channels * size**2
        norms = [spectral_norm_of(rand(out_channels, fan_in, seed=seed) / math.sqrt(fan_in)) for seed in range(3)]
        assert 1 + math.sqrt(out_channels / fan_in) == pytest.approx(sum(norms) / 3, rel=0.05)


def test_evaluation_does_not_turn_the_power_iteration() -> None:
    layers = nn.Sequential(conv(3, 8))
    normalise_spectra(layers)
    layers.eval()
    before = {name: value.clone() for name, value in layers.state_dict().items()}
    first, second = layers(rand(1, 3, 6, 6)), layers(rand(1, 3, 6, 6))
    assert torch.equal(first, second)
    assert all(torch.equal(value, before[name]) for name, value in layers.state_dict().items())
