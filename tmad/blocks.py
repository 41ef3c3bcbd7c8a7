"""The building blocks of Table I: PGGAN-style convolutions with leaky ReLU 0.2 and no normalisation layers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
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
    # Layers whose rows are alike beside each other: they share operators.
    lists.sort(key=lambda one: one.original.shape[1:])
    bounds = [one[0] for one in lists]
    taken = _normalised(*(one.original for one in lists), bounds=bounds) if lists else ()
    try:
        for bound, weight in zip(bounds, taken, strict=True):
            bound.taken = weight
        yield
    finally:
        for bound in bounds:
            bound.taken = None


@contextmanager
def rounded_once(*networks: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Inside, the convolutions of *networks* have the weights of now in *dtype*: rounded together, and their gradients
    together turned back, where autocast calls two operators for each weight."""
    layers = [layer for network in networks for layer in network.modules() if isinstance(layer, nn.Conv2d)]
    weights = [weight for layer in layers for weight in (layer.weight, layer.bias)]
    holders = [holder for layer in layers for holder in _holders(layer)]
    before = [holder[name] for holder, name in holders]
    rounded = _Round.apply(dtype, *weights) if layers and layers[0].weight.dtype != dtype else before
    try:
        for (holder, name), weight in zip(holders, rounded, strict=True):
            holder[name] = weight
        yield
    finally:
        for (holder, name), weight in zip(holders, before, strict=True):
            holder[name] = weight


def _holders(layer: nn.Conv2d) -> list[tuple[dict[str, Any], str]]:
    """Where a convolution finds its weight and its bias."""
    # As `torch.func.functional_call` does it, which has no place for the weight that a parametrization has computed.
    own: dict[str, Any] = layer._parameters
    lists: Any = getattr(layer, "parametrizations", None)
    return [(own, "weight") if lists is None else (vars(lists.weight[0]), "taken"), (own, "bias")]


class _Round(torch.autograd.Function):
    """Tensors in another type; one operator for all of them, and one for all gradients."""

    @staticmethod
    def forward(ctx: FunctionCtx, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.dtype = tensors[0].dtype  # type: ignore[attr-defined]
        return tuple(_converted(tensors, dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        found = iter(_converted([grad for grad in grads if grad is not None], ctx.dtype))  # type: ignore[attr-defined]
        return None, *(None if grad is None else next(found) for grad in grads)


def _converted(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    found = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    torch._foreach_copy_(found, list(tensors))
    return found


def _normalised(*weights: Tensor, bounds: Sequence[SpectralBound]) -> tuple[Tensor, ...]:
    with torch.autocast(weights[0].device.type, enabled=False):
        result: tuple[Tensor, ...] = _Normalise.apply(bounds, *weights)
        return result


class _Normalise(torch.autograd.Function):
    """Weights at their bounds. Layers whose rows are equally long are one product of matrices, and vectors rows of one
    tensor, filled up with zeros, so that a step calls few operators for all of them. The derivative of a spectral norm
    is u v^T, whose vectors count as constants."""

    @staticmethod
    def forward(ctx: FunctionCtx, bounds: Sequence[SpectralBound], *weights: Tensor) -> tuple[Tensor, ...]:
        buffer, blocks, parts = _stacked(weights)
        torch._foreach_copy_(parts, list(weights))
        matrices = [block.flatten(2) for block in blocks]
        left, lefts = _rows(buffer, [matrix.shape[:2] for matrix in matrices])
        right, rights = _rows(buffer, [matrix.mT.shape[:2] for matrix in matrices])
        us = [row[: len(bound._u)] for row, bound in zip(left, bounds, strict=True)]
        vs = [row[: len(bound._v)] for row, bound in zip(right, bounds, strict=True)]
        kept = [bound._u for bound in bounds], [bound._v for bound in bounds]
        torch._foreach_copy_(us + vs, kept[0] + kept[1])
        if bounds[0].training:
            for matrix, u, v in zip(matrices, lefts, rights, strict=True):
                torch.bmm(matrix, v, out=u)
            left /= left.norm(dim=1, keepdim=True).clamp_(min=LEAST_NORM)
            for matrix, u, v in zip(matrices, lefts, rights, strict=True):
                torch.bmm(matrix.mT, u, out=v)
            # v = W^T u / |W^T u|, so that this is u^T W v.
            norms = right.norm(dim=1).clamp_(min=LEAST_NORM)
            right /= norms[:, None]
            torch._foreach_copy_(kept[0] + kept[1], us + vs)
        else:
            norms = torch.cat(
                [u.mT @ matrix @ v for matrix, u, v in zip(matrices, lefts, rights, strict=True)]
            ).flatten()
        scales = torch.stack([bound.bound for bound in bounds]) / norms
        ctx.save_for_backward(buffer, left, right, norms, scales, *weights)
        scaled = [block * _spread(each) for block, each in zip(blocks, scales.split([*map(len, blocks)]), strict=True)]
        return tuple(_parts(scaled, weights))

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        buffer, left, right, norms, scales, *weights = ctx.saved_tensors  # type: ignore[attr-defined]
        found, blocks, parts = _stacked(weights)
        torch._foreach_copy_(parts, list(grads))
        # L depends on W by s W, s = bound / norm: dL/dW = s G - s <G, W> / norm u v^T.
        layers = [*map(len, blocks)]
        products = (found * buffer).split([block.numel() for block in blocks])
        along = torch.cat([product.view(count, -1).sum(1) for product, count in zip(products, layers, strict=True)])
        left = left * (-scales * along / norms)[:, None]
        each = zip(blocks, scales.split(layers), left.split(layers), right.split(layers), strict=True)
        for block, scale, u, v in each:
            _, rows, *columns = block.shape
            v = v[:, None, : math.prod(columns)].unflatten(2, columns)
            block.mul_(_spread(scale)).addcmul_(_spread(u[:, :rows]), v)
        return None, *parts


def _stacked(weights: Sequence[Tensor]) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """A buffer of zeros with room for *weights*; its blocks (layers, C_out, C_in, h, w), one for neighbours whose rows
    are alike, as high as the highest; and where in them the weights belong, laid out as they are."""
    groups = [[*same] for _, same in groupby(weights, lambda one: (one.shape[1:], one.stride()[1:]))]
    shapes = [(len(same), max(map(len, same)), *same[0].shape[1:]) for same in groups]
    buffer = weights[0].new_zeros(sum(map(math.prod, shapes)))
    blocks = [
        part.as_strided(shape, (math.prod(shape[1:]), math.prod(shape[2:]), *same[0].stride()[1:]))
        for part, shape, same in zip(buffer.split([*map(math.prod, shapes)]), shapes, groups, strict=True)
    ]
    return buffer, blocks, _parts(blocks, weights)


def _parts(blocks: Sequence[Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
    places = (place for block in blocks for place in block)
    return [place[: len(weight)] for place, weight in zip(places, weights, strict=True)]


def _rows(like: Tensor, shapes: Sequence[Sequence[int]]) -> tuple[Tensor, list[Tensor]]:
    """Zeros, a row for each layer, and of each block (layers, size) those that its vectors fill, as columns."""
    rows = like.new_zeros(sum(count for count, _ in shapes), max(size for _, size in shapes))
    blocks = rows.split([count for count, _ in shapes])
    return rows, [block[:, :size, None] for block, (_, size) in zip(blocks, shapes, strict=True)]


def _spread(values: Tensor) -> Tensor:
    """A value for each weight, (layers, ...), over a block (layers, C_out, C_in, h, w)."""
    return values[(..., *[None] * (5 - values.ndim))]


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
