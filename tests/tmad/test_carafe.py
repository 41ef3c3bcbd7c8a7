"""CARAFE against the formula of Wang et al. (2019), pixel by pixel."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tmad.carafe import Carafe, bilinear_kernels, reassemble
from tmad.config import CarafeConfig


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def reassemble_twin(features: Tensor, weights: Tensor, kernel: int) -> Tensor:
    """Each output pixel l' = (2y+a, 2x+b): the weighted sum over the k x k neighbours of its source (y, x), Eq. 4."""
    batch, channels, height, width = features.shape
    out = []
    for y_out in range(2 * height):
        for x_out in range(2 * width):
            y, a = divmod(y_out, 2)
            x, b = divmod(x_out, 2)
            total = features.new_zeros(batch, channels)
            for i in range(kernel):
                for j in range(kernel):
                    v, u = y + i - kernel // 2, x + j - kernel // 2
                    if 0 <= v < height and 0 <= u < width:
                        w = weights[:, 2 * a + b, i * kernel + j, y, x]
                        total = total + w[:, None] * features[:, :, v, u]
            out.append(total)
    return torch.stack(out, dim=-1).reshape(batch, channels, 2 * height, 2 * width)


def unfolded(features: Tensor, layer: Carafe) -> Tensor:
    """The usual way, as the reference implementation goes: predict, shuffle, softmax, unfold, sum."""
    k = layer.kernel
    batch, channels, height, width = features.shape
    kernels = F.pixel_shuffle(
        # pixel_shuffle wants the sub-pixels as the fastest index.
        layer.encode(layer.compress(features)).reshape(batch, 4, k * k, height, width).transpose(1, 2).flatten(1, 2),
        2,
    ).softmax(1)
    windows = F.unfold(features, k, padding=k // 2).reshape(batch, channels * k * k, height, width)
    windows = F.interpolate(windows, scale_factor=2, mode="nearest").reshape(
        batch, channels, k * k, *kernels.shape[-2:]
    )
    return (windows * kernels[:, None]).sum(2)


@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_reassembly_equals_the_formula_pixel_by_pixel(kernel: int) -> None:
    features, weights = rand(2, 3, 3, 4), rand(2, 4, kernel**2, 3, 4, seed=1)
    torch.testing.assert_close(reassemble(features, weights, kernel), reassemble_twin(features, weights, kernel))


def test_the_gradients_of_the_reassembly_are_those_of_the_formula() -> None:
    upstream, gradients = rand(2, 3, 6, 8, seed=2), []
    for function in (reassemble, reassemble_twin):
        features, weights = rand(2, 3, 3, 4).requires_grad_(), rand(2, 4, 9, 3, 4, seed=1).requires_grad_()
        gradients.append(torch.autograd.grad((function(features, weights, 3) * upstream).sum(), (features, weights)))
    torch.testing.assert_close(gradients[0], gradients[1])


def test_the_reassembly_passes_gradcheck() -> None:
    inputs = rand(1, 2, 2, 3).requires_grad_(), rand(1, 4, 9, 2, 3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda f, w: reassemble(f, w, 3), inputs)


def test_the_layer_equals_the_unfolded_implementation() -> None:
    layer = Carafe(4, CarafeConfig()).double()
    torch.nn.init.normal_(layer.encode.weight, std=0.5)
    torch.nn.init.normal_(layer.encode.bias, std=0.5)
    features = rand(2, 4, 5, 3)
    # The layer's softmax runs in single precision.
    torch.testing.assert_close(layer(features), unfolded(features, layer), rtol=1e-5, atol=1e-6)


def test_each_output_pixel_is_a_mean_so_a_constant_stays_inside_the_border() -> None:
    layer = Carafe(3, CarafeConfig(kernel=3))
    torch.nn.init.normal_(layer.encode.weight, std=0.5)
    out = layer(torch.full((1, 3, 6, 6), 0.7))
    torch.testing.assert_close(out[..., 2:-2, 2:-2], torch.full((1, 3, 8, 8), 0.7))


def test_the_first_step_begins_as_bilinear_interpolation() -> None:
    features = rand(1, 8, 9, 9, dtype=torch.float32)
    bilinear = F.interpolate(features, scale_factor=2, mode="bilinear", align_corners=False)
    inner = (..., slice(4, -4), slice(4, -4))
    got = Carafe(8, CarafeConfig())(features)[inner]
    nearest = F.interpolate(features, scale_factor=2, mode="nearest")[inner]
    error = (got - bilinear[inner]).abs().mean()
    # The spread of START_SPREAD over 25 taps pulls a tenth of the way to their mean.
    assert error < 0.15 * (nearest - bilinear[inner]).abs().mean() + 0.1 * bilinear[inner].abs().mean()


@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_bilinear_kernels_are_the_weights_of_bilinear_upsampling(kernel: int) -> None:
    kernels = bilinear_kernels(kernel)
    assert kernels.shape == (4, kernel**2)
    if kernel > 1:
        assert torch.allclose(kernels.sum(1), torch.ones(4))
        features = rand(1, 2, 7, 7, dtype=torch.float32)
        weights = kernels.reshape(1, 4, kernel**2, 1, 1).expand(1, 4, kernel**2, 7, 7)
        expected = F.interpolate(features, scale_factor=2, mode="bilinear", align_corners=False)
        inner = (..., slice(2, -2), slice(2, -2))
        torch.testing.assert_close(reassemble(features, weights, kernel)[inner], expected[inner])


def test_the_kernels_depend_on_the_content() -> None:
    layer = Carafe(3, CarafeConfig(kernel=3))
    torch.nn.init.normal_(layer.encode.weight, std=0.5)
    x = rand(1, 3, 6, 6, dtype=torch.float32)
    assert not torch.allclose(layer(2 * x), 2 * layer(x), atol=1e-3)


def test_settings_shape_the_layer() -> None:
    layer = Carafe(12, CarafeConfig(kernel=3, encoder_kernel=5, mid_channels=8))
    assert tuple(layer.compress.weight.shape) == (8, 12, 1, 1)
    assert tuple(layer.encode.weight.shape) == (4 * 9, 8, 5, 5)
    assert layer(torch.randn(1, 12, 3, 5)).shape == (1, 12, 6, 10)
    assert Carafe(4, CarafeConfig()).compress.out_channels == 4


def test_every_parameter_learns() -> None:
    layer = Carafe(3, CarafeConfig(kernel=3))
    (layer(rand(1, 3, 4, 4, dtype=torch.float32)) * rand(1, 3, 8, 8, seed=3, dtype=torch.float32)).sum().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in layer.parameters())


@pytest.mark.parametrize("kernel", [3, 5])
def test_in_bfloat16_the_reassembly_is_one_rounding_away_from_the_exact_result(kernel: int) -> None:
    features = rand(2, 8, 9, 7).to(torch.bfloat16).requires_grad_()
    weights = rand(2, 4, kernel**2, 9, 7, seed=1).softmax(2).to(torch.bfloat16)
    out = reassemble(features, weights, kernel)
    assert out.dtype == torch.bfloat16
    exact_features = features.detach().double().requires_grad_()
    exact = reassemble(exact_features, weights.double(), kernel)
    # Half a step of bfloat16 (8 significant bits), and the roundings of the float32 sum where its terms cancel.
    allowed = exact.abs() * 2**-8 + 1e-6
    assert ((out.double() - exact).abs() <= allowed).all()
    # The same for the features' gradient but for its terms, which bfloat16 rounds one by one.
    upstream = rand(2, 8, 18, 14, seed=2).to(torch.bfloat16)
    (gradient,) = torch.autograd.grad((out * upstream).sum(), features)
    (wanted,) = torch.autograd.grad((exact * upstream.double()).sum(), exact_features)
    assert gradient.dtype == torch.bfloat16
    assert (gradient.double() - wanted).norm() < 3 * 2**-9 * wanted.norm()
