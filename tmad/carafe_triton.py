"""CARAFE's up-sampling as one operator for GPUs: softmax over the taps and reassembly in one kernel, and its gradients.

`tmad.carafe` says what is computed and uses this module on CUDA devices only. Nothing is unfolded or padded, and the
kernels read and write any memory layout by its strides. Every value is written once, by one program, without atomics:
the same inputs give the same bits.

A program works on a strip of pixels of one row. What the strip takes from a row of the other side is a matrix with K
diagonals, so that matrix units do the sums: many of their products are with zeros, and still it takes a fifth of the
instructions of sums over taps. Operands have the features' dtype, hence weights are rounded to bfloat16 where features
are, as the form for CPUs rounds them; sums are float32. In float32 products are made of three in TF32, to 1e-6.

Legend: P pixels of a strip, M = 4 P outputs of them, pixel by pixel; U columns around the strip that its taps reach,
and some more up to a power of 2; C channels of a block; T taps; TAPS, T filled up to a power of 2.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import FunctionCtx

PIXELS = 16
"""P; smaller is no operand of a matrix unit, and larger means more zeros."""
CHANNELS = (16, 128)
"""Channels of a block, at least and at most."""
WARPS = 4


@triton.jit
def _strip(height, width, P: tl.constexpr):
    """Image, row and first column of this program's strip."""
    strips = tl.cdiv(width, P)
    row = tl.program_id(0) // strips
    return (row // height).to(tl.int64), row % height, tl.program_id(0) % strips * P


@triton.jit
def _forward(
    features,
    logits,
    out,
    scales,
    height,
    width,
    channels,
    fb,
    fc,
    fy,
    fx,
    lb,
    lt,
    ly,
    lx,
    ob,
    oc,
    oy,
    ox,
    K: tl.constexpr,
    P: tl.constexpr,
    U: tl.constexpr,
    C: tl.constexpr,
    TAPS: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out[c, 2y+a, 2x+b] = sum_ij softmax(logits[ab])_ij f[c, y+i-k/2, x+j-k/2].

    *scales*: the largest logit and the inverse of the softmax's sum.
    """
    image, y, first = _strip(height, width, P)
    m = tl.arange(0, 4 * P)
    pixel, sub = m // 4, m % 4
    x = first + pixel
    inside = x < width
    taps = tl.arange(0, TAPS)
    at = logits + image * lb + y * ly + (x * lx + sub * K * K * lt)[:, None] + taps[None, :] * lt
    logit = tl.load(at, mask=inside[:, None] & (taps < K * K)[None, :], other=0.0).to(ACC)
    logit = tl.where((taps < K * K)[None, :], logit, float("-inf"))
    top = tl.max(logit, 1)
    weights = tl.exp(logit - top[:, None])
    scale = 1 / tl.sum(weights, 1)

    c = tl.program_id(1) * C + tl.arange(0, C)
    columns = tl.arange(0, U)
    source_x = first + columns - K // 2
    source = features + image * fb + (source_x * fx)[:, None] + c[None, :] * fc
    readable = ((source_x >= 0) & (source_x < width))[:, None] & (c < channels)[None, :]
    j = columns[None, :] - pixel[:, None]
    taken = (j >= 0) & (j < K)
    sums = tl.zeros((4 * P, C), ACC)
    for i in tl.static_range(K):
        source_y = y + i - K // 2
        value = tl.load(source + source_y * fy, mask=readable & (source_y >= 0) & (source_y < height), other=0.0)
        weight = tl.where(taken, tl.gather(weights, i * K + j & TAPS - 1, 1), 0.0)
        sums = tl.dot(weight.to(value.dtype), value, sums, input_precision=PRECISION, out_dtype=ACC)

    target = out + image * ob + ((2 * y + sub // 2) * oy + (2 * x + sub % 2) * ox)[:, None] + c[None, :] * oc
    tl.store(target, sums * scale[:, None], mask=inside[:, None] & (c < channels)[None, :])
    noted = scales + ((image * height + y) * width + x) * 8 + sub
    written = inside & (tl.program_id(1) == 0)
    tl.store(noted, top, mask=written)
    tl.store(noted + 4, scale, mask=written)


@triton.jit
def _backward_features(
    grad,
    logits,
    scales,
    grad_features,
    height,
    width,
    channels,
    gb,
    gc,
    gy,
    gx,
    lb,
    lt,
    ly,
    lx,
    db,
    dc,
    dy,
    dx,
    K: tl.constexpr,
    P: tl.constexpr,
    U: tl.constexpr,
    C: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What the pixels around took from each of the strip, gathered instead of scattered, so that nothing collides."""
    image, y, first = _strip(height, width, P)
    pixel = tl.arange(0, P)
    # Columns of the gradient: two sub-pixels for each of the pixels around.
    column = tl.arange(0, 2 * U)
    taker_x, b = first + column // 2 - K // 2, column % 2
    j = pixel[:, None] - column[None, :] // 2 + K - 1
    c = tl.program_id(1) * C + tl.arange(0, C)
    across = (taker_x >= 0) & (taker_x < width)
    taken = (j >= 0) & (j < K) & across[None, :]
    at = logits + image * lb + (taker_x * lx + b * K * K * lt)[None, :] + j * lt
    noted = scales + taker_x * 8 + b
    upstream = grad + image * gb + ((2 * taker_x + b) * gx)[:, None] + c[None, :] * gc
    readable = across[:, None] & (c < channels)[None, :]
    sums = tl.zeros((P, C), ACC)
    for i in range(K):
        taker_y = y + K // 2 - i
        there = (taker_y >= 0) & (taker_y < height)
        for a in tl.static_range(2):
            noted_here = noted + (image * height + taker_y) * width * 8 + 2 * a
            top = tl.load(noted_here, mask=across & there, other=0.0)
            scale = tl.load(noted_here + 4, mask=across & there, other=0.0)
            logit = tl.load(at + taker_y * ly + (2 * a * K * K + i * K) * lt, mask=taken & there, other=0.0).to(ACC)
            weight = tl.where(taken & there, tl.exp(logit - top[None, :]) * scale[None, :], 0.0)
            value = tl.load(upstream + (2 * taker_y + a) * gy, mask=readable & there, other=0.0)
            sums = tl.dot(weight.to(value.dtype), value, sums, input_precision=PRECISION, out_dtype=ACC)
    x = first + pixel
    target = grad_features + image * db + y * dy + (x * dx)[:, None] + c[None, :] * dc
    tl.store(target, sums, mask=(x < width)[:, None] & (c < channels)[None, :])


@triton.jit
def _backward_logits(
    grad,
    features,
    logits,
    scales,
    grad_logits,
    height,
    width,
    channels,
    gb,
    gc,
    gy,
    gx,
    fb,
    fc,
    fy,
    fx,
    lb,
    lt,
    ly,
    lx,
    db,
    dt,
    dy,
    dx,
    K: tl.constexpr,
    P: tl.constexpr,
    U: tl.constexpr,
    C: tl.constexpr,
    BLOCKS: tl.constexpr,
    TAPS: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """d/d weights, products of gradient and neighbours summed over all channels; then back through the softmax."""
    image, y, first = _strip(height, width, P)
    m = tl.arange(0, 4 * P)
    pixel, sub = m // 4, m % 4
    x = first + pixel
    inside = x < width
    taps = tl.arange(0, TAPS)
    columns = tl.arange(0, U)
    source_x = first + columns - K // 2
    across = (source_x >= 0) & (source_x < width)
    upstream = grad + image * gb + ((2 * y + sub // 2) * gy + (2 * x + sub % 2) * gx)[:, None]
    source = features + image * fb + (source_x * fx)[:, None]
    by_weights = tl.zeros((4 * P, TAPS), ACC)
    for i in tl.static_range(K):
        source_y = y + i - K // 2
        there = (source_y >= 0) & (source_y < height)
        products = tl.zeros((4 * P, U), ACC)
        for block in tl.static_range(BLOCKS):
            c = block * C + tl.arange(0, C)
            kept = (c < channels)[None, :]
            got = tl.load(upstream + c[None, :] * gc, mask=inside[:, None] & kept, other=0.0)
            value = tl.load(source + source_y * fy + c[None, :] * fc, mask=across[:, None] & kept & there, other=0.0)
            products = tl.dot(got, tl.trans(value), products, input_precision=PRECISION, out_dtype=ACC)
        here = ((taps >= i * K) & (taps < i * K + K))[None, :]
        column = pixel[:, None] + taps[None, :] - i * K & U - 1
        by_weights = tl.where(here, tl.gather(products, column, 1), by_weights)
    real = inside[:, None] & (taps < K * K)[None, :]
    rows = (x * lx + sub * K * K * lt)[:, None] + taps[None, :] * lt
    logit = tl.load(logits + image * lb + y * ly + rows, mask=real, other=0.0).to(ACC)
    noted = scales + ((image * height + y) * width + x) * 8 + sub
    top = tl.load(noted, mask=inside, other=0.0)
    scale = tl.load(noted + 4, mask=inside, other=0.0)
    weights = tl.where(real, tl.exp(logit - top[:, None]) * scale[:, None], 0.0)
    mean = tl.sum(weights * by_weights, 1)
    target = grad_logits + image * db + y * dy + (x * dx + sub * K * K * dt)[:, None] + taps[None, :] * dt
    tl.store(target, weights * (by_weights - mean[:, None]), mask=real)


def upsample(features: Tensor, logits: Tensor, kernel: int) -> Tensor:
    """`tmad.carafe.upsample` for GPUs: (B, C, H, W) and (B, 4 kernel^2, H, W) -> (B, C, 2H, 2W), laid out as *features*
    are. Differentiable once in both."""
    out: Tensor = _carafe(features, logits, kernel)[0]
    return out


# Opaque to the compiler, not a `triton_op`: there is nothing around it to fuse with, and only so do the interpreter's
# tests reach what a compiled network calls.
@torch.library.custom_op("tmad::carafe", mutates_args=())
def _carafe(features: Tensor, logits: Tensor, kernel: int) -> tuple[Tensor, Tensor]:
    batch, channels, height, width = features.shape
    out, scales = _empty_results(features)
    sizes = _sizes(features, kernel)
    with torch.cuda.device_of(features):
        _forward[(batch * height * triton.cdiv(width, PIXELS), triton.cdiv(channels, sizes["C"]))](
            features,
            logits,
            out,
            scales,
            height,
            width,
            channels,
            *features.stride(),
            *logits.stride(),
            *out.stride(),
            TAPS=triton.next_power_of_2(kernel * kernel),
            **sizes,
        )
    return out, scales


@_carafe.register_fake
def _(features: Tensor, logits: Tensor, kernel: int) -> tuple[Tensor, Tensor]:
    return _empty_results(features)


@torch.library.custom_op("tmad::carafe_backward", mutates_args=())
def _carafe_backward(
    grad: Tensor, features: Tensor, logits: Tensor, scales: Tensor, kernel: int
) -> tuple[Tensor, Tensor]:
    batch, channels, height, width = features.shape
    grad_features, grad_logits = torch.empty_like(features), torch.empty_like(logits)
    sizes = _sizes(features, kernel)
    strips = batch * height * triton.cdiv(width, PIXELS)
    with torch.cuda.device_of(features):
        _backward_features[(strips, triton.cdiv(channels, sizes["C"]))](
            grad,
            logits,
            scales,
            grad_features,
            height,
            width,
            channels,
            *grad.stride(),
            *logits.stride(),
            *grad_features.stride(),
            **sizes,
        )
        _backward_logits[(strips,)](
            grad,
            features,
            logits,
            scales,
            grad_logits,
            height,
            width,
            channels,
            *grad.stride(),
            *features.stride(),
            *logits.stride(),
            *grad_logits.stride(),
            TAPS=triton.next_power_of_2(kernel * kernel),
            BLOCKS=triton.cdiv(channels, sizes["C"]),
            **sizes,
        )
    return grad_features, grad_logits


@_carafe_backward.register_fake
def _(grad: Tensor, features: Tensor, logits: Tensor, scales: Tensor, kernel: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(features), torch.empty_like(logits)


def _keep(ctx: FunctionCtx, inputs: tuple[Tensor, Tensor, int], output: tuple[Tensor, Tensor]) -> None:
    features, logits, kernel = inputs
    ctx.save_for_backward(features, logits, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.kernel = kernel  # type: ignore[attr-defined]


def _differentiate(ctx: FunctionCtx, grad: Tensor, _: Tensor | None) -> tuple[Tensor, Tensor, None]:
    features, logits, scales = ctx.saved_tensors  # type: ignore[attr-defined]
    return *_carafe_backward(grad, features, logits, scales, ctx.kernel), None  # type: ignore[attr-defined]


_carafe.register_autograd(_differentiate, setup_context=_keep)


def _empty_results(features: Tensor) -> tuple[Tensor, Tensor]:
    """The output, laid out as *features* are, and room for the softmax's (B, H, W, 8)."""
    batch, channels, height, width = features.shape
    last = features.is_contiguous(memory_format=torch.channels_last) and not features.is_contiguous()
    out = torch.empty(
        (batch, channels, 2 * height, 2 * width),
        dtype=features.dtype,
        device=features.device,
        memory_format=torch.channels_last if last else torch.contiguous_format,
    )
    exact = torch.promote_types(features.dtype, torch.float32)
    return out, features.new_empty((batch, height, width, 8), dtype=exact)


def _sizes(features: Tensor, kernel: int) -> dict[str, Any]:
    """What the kernels are compiled for."""
    fewest, most = CHANNELS
    return {
        "K": kernel,
        "P": PIXELS,
        "U": triton.next_power_of_2(PIXELS + kernel - 1),
        "C": min(max(triton.next_power_of_2(features.shape[1]), fewest), most),
        "ACC": tl.float64 if features.dtype == torch.float64 else tl.float32,
        "PRECISION": "tf32x3" if features.dtype == torch.float32 else "ieee",
        "num_warps": WARPS,
    }
