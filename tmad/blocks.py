"""The building blocks of Table I: PGGAN-style convolutions with leaky ReLU 0.2 and no normalisation layers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional as F
from torch.nn.utils.parametrize import is_parametrized, register_parametrization

from tmad.carafe import SCALE, Carafe
from tmad.config import CarafeConfig
from tmad.patches import Part, grown, reduced

LEAK = 0.2
"""Slope of every leaky ReLU for negative values [P: Sec. IV]."""

RESIDUAL_INIT = 0.1
"""A residual branch starts this much weaker than its input: without normalisation layers the sum over blocks would
grow with their number [D]."""


START_NOISE = 0.1
"""Share of the He initialisation that is kept beside a linear start, so that the halves of a pair can part [D]."""


def conv(in_channels: int, out_channels: int, size: int = 3, *, stride: int = 1, dilation: int = 1) -> nn.Conv2d:
    """A convolution that keeps the size (divided by *stride*), He-initialised for a leaky ReLU behind it."""
    layer = nn.Conv2d(in_channels, out_channels, size, stride=stride, padding=dilation * (size // 2), dilation=dilation)
    nn.init.kaiming_normal_(layer.weight, a=LEAK)
    nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return layer


def out_conv(in_channels: int, out_channels: int = 3) -> nn.Conv2d:
    """The linear 1x1 output convolution; starts small, so that training starts near the middle of the range."""
    layer = conv(in_channels, out_channels, 1)
    with torch.no_grad():
        layer.weight *= RESIDUAL_INIT
    return layer


@torch.no_grad()
def start_linear(layer: nn.Conv2d, *, first: bool = False, last: bool = False) -> nn.Conv2d:
    """Re-initialise *layer* so that a stack of such layers starts as a linear map that hands its input through [D].

    "Looks-linear" initialisation (Balduzzi et al. 2017): channels come in pairs x and -x, of which one always passes
    the leaky ReLU, so that x = (leaky(x) - leaky(-x)) / (1 + leak) survives any depth. The map between the first
    halves is the identity as far as it goes, and random beyond. *first*: the input is no pair; *last*: the output.
    Without normalisation layers this is what lets the coarse network start as "shrink and enlarge the picture" instead
    of having to find that out. Returns *layer*.
    """
    layer.weight *= START_NOISE
    out_half = layer.out_channels if last else layer.out_channels // 2
    in_half = layer.in_channels if first else layer.in_channels // 2
    shape = (out_half, in_half, *layer.kernel_size)
    linear = torch.zeros(shape)
    kept = min(out_half, in_half)
    nn.init.dirac_(linear[:kept, :kept])
    if out_half > kept:
        nn.init.normal_(linear[kept:], std=math.prod(shape[1:]) ** -0.5)
    if not first:
        linear = torch.cat([linear, -linear], dim=1) / (1 + LEAK)
    if not last:
        linear = torch.cat([linear, -linear])
    layer.weight[: linear.shape[0], : linear.shape[1]] += linear
    return layer


def leaky() -> nn.LeakyReLU:
    """Leaky ReLU 0.2, in place: it needs its output only for the backward pass."""
    return nn.LeakyReLU(LEAK, inplace=True)


class DownBlock(nn.Sequential):
    """conv3x3, conv3x3, nearest-neighbour halving; channels doubled by the second convolution (Table I).

    Nearest-neighbour halving keeps every second pixel, so convolution and halving are one convolution of stride 2:
    the same numbers at a quarter of the work.
    """

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__(conv(channels, channels), leaky(), conv(channels, out_channels, stride=2), leaky())


class UpBlock(nn.Sequential):
    """CARAFE x2, conv3x3, conv3x3; channels changed by the first convolution (Table I)."""

    def __init__(self, channels: int, out_channels: int, carafe: CarafeConfig) -> None:
        super().__init__(
            Carafe(channels, carafe),
            conv(channels, out_channels),
            leaky(),
            conv(out_channels, out_channels),
            leaky(),
        )


def decoded_from(inner: Part, height: int, width: int, carafe: CarafeConfig, levels: int) -> list[Part]:
    """What *levels* up-blocks in a row have to read for the part *inner* of an output of *height* x *width* pixels:
    the part of each one's input, the first block's last, in pixels of that input."""
    found = []
    for _ in range(levels):
        read = reduced(grown(inner, 2, height, width), SCALE)  # by the two convolutions
        height, width = height // SCALE, width // SCALE
        inner = grown(read, max(carafe.kernel, carafe.encoder_kernel) // 2, height, width)
        found.append(inner)
    return found


class ResidualBlock(nn.Module):
    """x + leaky(conv3x3(leaky(conv3x3_dilated(x)))): activation after both convolutions, plain sum (Table I)."""

    def __init__(self, channels: int, dilation: int = 1) -> None:
        super().__init__()
        second = conv(channels, channels)
        with torch.no_grad():
            second.weight *= RESIDUAL_INIT
        self.branch = nn.Sequential(conv(channels, channels, dilation=dilation), leaky(), second, leaky())

    @property
    def last(self) -> nn.Conv2d:
        """The branch's second convolution."""
        return self.branch[2]  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        return x + self.branch(x)


SPECTRAL_GAIN = 1.2
"""Share by which the spectral bound exceeds that of a weight with standard deviation 1/sqrt(fan_in) [D]."""


START_ITERATIONS = 16
"""Power iterations before the first use."""

LEAST_NORM = 1e-12


class SpectralBound(nn.Module):
    """weight -> bound * weight / its spectral norm, as a parametrization of a convolution; one power iteration before
    each use in training (Miyato et al. 2018)."""

    _u: Tensor
    _v: Tensor
    bound: Tensor

    def __init__(self, weight: Tensor, bound: float) -> None:
        super().__init__()
        self.taken: Tensor | None = None
        """What `normalised_once` computed."""
        self.register_buffer("bound", torch.tensor(bound), persistent=False)
        for name, size in (("_u", len(weight)), ("_v", weight[0].numel())):
            self.register_buffer(name, F.normalize(weight.new_empty(size).normal_(), dim=0))
        for _ in range(START_ITERATIONS):
            _normalised(weight, bounds=[self])

    def forward(self, weight: Tensor) -> Tensor:
        """The weight of a convolution (C_out, C_in, h, w), float32."""
        if self.taken is not None:
            return self.taken
        (result,) = _normalised(weight, bounds=[self])
        return result

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Any weight will do."""
        return weight


@contextmanager
def normalised_once(*networks: nn.Module) -> Iterator[None]:
    """Inside, *networks* have the normalised weights of now: computed together, with one power iteration, instead of
    by each layer in each call."""
    layers = [layer for network in networks for layer in network.modules() if is_parametrized(layer, "weight")]
    lists: Any = [layer.parametrizations.weight for layer in layers]  # type: ignore[union-attr]
    bounds = [one[0] for one in lists]
    taken = _normalised(*(one.original for one in lists), bounds=bounds) if lists else ()
    try:
        for bound, weight in zip(bounds, taken, strict=True):
            bound.taken = weight
        yield
    finally:
        for bound in bounds:
            bound.taken = None


def _normalised(*weights: Tensor, bounds: Sequence[SpectralBound]) -> tuple[Tensor, ...]:
    with torch.autocast(weights[0].device.type, enabled=False):
        result: tuple[Tensor, ...] = _Normalise.apply(bounds, *weights)
        return result


class _Normalise(torch.autograd.Function):
    """Weights at their bounds. Their vectors are rows of one tensor, filled up with zeros, so that a step calls few
    operators for all of them; the derivative of a spectral norm is u v^T, whose vectors count as constants."""

    @staticmethod
    def forward(ctx: FunctionCtx, bounds: Sequence[SpectralBound], *weights: Tensor) -> tuple[Tensor, ...]:
        matrices = [weight.flatten(1) for weight in weights]
        left = matrices[0].new_zeros(len(matrices), max(len(matrix) for matrix in matrices))
        right = matrices[0].new_zeros(len(matrices), max(matrix.shape[1] for matrix in matrices))
        lefts = [row[: len(matrix)] for row, matrix in zip(left, matrices, strict=True)]
        rights = [row[: matrix.shape[1]] for row, matrix in zip(right, matrices, strict=True)]
        before = [bound._v for bound in bounds]
        if bounds[0].training:
            for matrix, u, v in zip(matrices, lefts, before, strict=True):
                torch.mv(matrix, v, out=u)
            left /= left.norm(dim=1, keepdim=True).clamp_(min=LEAST_NORM)
        else:
            torch._foreach_copy_(lefts, [bound._u for bound in bounds])
        for matrix, u, v in zip(matrices, lefts, rights, strict=True):
            torch.mv(matrix.t(), u, out=v)
        if bounds[0].training:
            # v = W^T u / |W^T u|, so that this is u^T W v.
            norms = right.norm(dim=1).clamp_(min=LEAST_NORM)
            right /= norms[:, None]
            torch._foreach_copy_([bound._u for bound in bounds] + before, lefts + rights)
        else:
            norms = torch.stack([u.dot(v) for u, v in zip(rights, before, strict=True)])
            torch._foreach_copy_(rights, before)
        scales = torch.stack([bound.bound for bound in bounds]) / norms
        ctx.save_for_backward(left, right, norms, scales, *weights)
        return tuple(weight * scale for weight, scale in zip(weights, scales, strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        left, right, norms, scales, *weights = ctx.saved_tensors  # type: ignore[attr-defined]
        # L depends on W by s W, s = bound / norm: dL/dW = s G - s <G, W> / norm u v^T.
        along = torch.stack([(grad * weight).sum() for grad, weight in zip(grads, weights, strict=True)])
        left = left * (-scales * along / norms)[:, None]
        found = []
        for grad, scale, u, v in zip(grads, scales, left, right, strict=True):
            u, v = u[: len(grad), None, None, None], v[: grad[0].numel()].view_as(grad[0])
            found.append(torch.addcmul(grad * scale, u, v))
        return None, *found


def normalise_spectra(module: nn.Module) -> None:
    """Put spectral normalisation (Miyato et al. 2018) on every convolution inside *module* but those of CARAFE.

    [D] Each weight, taken as a (C_out, fan_in) matrix, is held at SPECTRAL_GAIN times the spectral norm that a random
    one of its shape with standard deviation 1/sqrt(fan_in) has, 1 + sqrt(C_out / fan_in), instead of at 1. At 1, a
    stack without other normalisation loses half of its signal in every layer: PSNet's output started with a standard
    deviation of 0.0006. The bound is a constant either way: the network stays as Lipschitz as it was at the start.
    CARAFE's convolutions predict weights that a softmax bounds; at the bound they would start far from bilinear.
    """
    carafe = {part for child in module.modules() if isinstance(child, Carafe) for part in child.modules()}
    for block in module.modules():
        if isinstance(block, ResidualBlock):
            # The bound takes the start's factor away again; left in the stored weight, it would make Adam turn these
            # layers ten times faster than all others.
            with torch.no_grad():
                block.last.weight /= RESIDUAL_INIT
    for layer in [child for child in module.modules() if isinstance(child, nn.Conv2d) and child not in carafe]:
        fan_in = layer.weight[0].numel()
        bound = SPECTRAL_GAIN * (1 + math.sqrt(layer.out_channels / fan_in))
        register_parametrization(layer, "weight", SpectralBound(layer.weight.detach(), bound))
