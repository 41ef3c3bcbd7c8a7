"""CARAFE's up-sampling as one operator for GPUs: softmax over the taps and reassembly in one kernel, and its gradients.

`tmad.carafe` says what is computed and uses this module on CUDA devices only. Nothing is unfolded or padded, the
kernels read and write any memory layout by its strides, and sums run in float32 (in float64 for float64). Every value
is written once, by one program, without atomics: the same inputs give the same bits.

A program works on a strip of pixels and a block of channels, and makes the four outputs of each pixel from one reading
of its neighbours. Legend: P pixels of a strip, in raster order; C channels of a block; T taps; TAPS, T filled up to a
power of 2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import FunctionCtx

TILE = 1024
"""Values of a program's P x C tile: eight a thread, which is one load of 16 bytes in bfloat16."""
MAX_CHANNELS = 64
"""Channels of a block, at most."""
WARPS = 4


@triton.jit
def _weight(at, top, there, ACC: tl.constexpr):
    """exp(logit - top) of a strip; 1 where *there* is false, since it is multiplied by zeros."""
    return tl.exp(tl.load(at, mask=there, other=0.0).to(ACC) - top)


@triton.jit
def _forward(
    features,
    logits,
    out,
    lse,
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
    C: tl.constexpr,
    ACC: tl.constexpr,
):
    """out[c, 2y+a, 2x+b] = sum_ij softmax(logits[ab])_ij f[c, y+i-k/2, x+j-k/2]; lse: log of the softmax's sum."""
    T: tl.constexpr = K * K
    pixels = height * width
    strips = tl.cdiv(pixels, P)
    image = (tl.program_id(0) // strips).to(tl.int64)
    p = tl.program_id(0) % strips * P + tl.arange(0, P)
    c = tl.program_id(1) * C + tl.arange(0, C)
    y = p // width
    x = p % width
    inside = p < pixels
    kept = c < channels
    at = logits + image * lb + y * ly + x * lx
    source = features + image * fb + (y * fy + x * fx)[:, None] + c[None, :] * fc

    top0 = tl.load(at, mask=inside, other=0.0).to(ACC)
    top1 = tl.load(at + T * lt, mask=inside, other=0.0).to(ACC)
    top2 = tl.load(at + 2 * T * lt, mask=inside, other=0.0).to(ACC)
    top3 = tl.load(at + 3 * T * lt, mask=inside, other=0.0).to(ACC)
    for t in tl.static_range(1, T):
        top0 = tl.maximum(top0, tl.load(at + t * lt, mask=inside, other=0.0).to(ACC))
        top1 = tl.maximum(top1, tl.load(at + (T + t) * lt, mask=inside, other=0.0).to(ACC))
        top2 = tl.maximum(top2, tl.load(at + (2 * T + t) * lt, mask=inside, other=0.0).to(ACC))
        top3 = tl.maximum(top3, tl.load(at + (3 * T + t) * lt, mask=inside, other=0.0).to(ACC))

    total0 = tl.zeros((P,), ACC)
    total1 = tl.zeros((P,), ACC)
    total2 = tl.zeros((P,), ACC)
    total3 = tl.zeros((P,), ACC)
    sum0 = tl.zeros((P, C), ACC)
    sum1 = tl.zeros((P, C), ACC)
    sum2 = tl.zeros((P, C), ACC)
    sum3 = tl.zeros((P, C), ACC)
    # Each exponential is taken once: sums are divided by the softmax's own sum at the end.
    for t in tl.static_range(T):
        i = t // K - K // 2
        j = t % K - K // 2
        there = inside & (y + i >= 0) & (y + i < height) & (x + j >= 0) & (x + j < width)
        value = tl.load(source + (i * fy + j * fx), mask=there[:, None] & kept[None, :], other=0.0).to(ACC)
        w0 = _weight(at + t * lt, top0, inside, ACC)
        w1 = _weight(at + (T + t) * lt, top1, inside, ACC)
        w2 = _weight(at + (2 * T + t) * lt, top2, inside, ACC)
        w3 = _weight(at + (3 * T + t) * lt, top3, inside, ACC)
        total0 += w0
        total1 += w1
        total2 += w2
        total3 += w3
        sum0 += w0[:, None] * value
        sum1 += w1[:, None] * value
        sum2 += w2[:, None] * value
        sum3 += w3[:, None] * value

    target = out + image * ob + (2 * y * oy + 2 * x * ox)[:, None] + c[None, :] * oc
    written = inside[:, None] & kept[None, :]
    tl.store(target, sum0 / total0[:, None], mask=written)
    tl.store(target + ox, sum1 / total1[:, None], mask=written)
    tl.store(target + oy, sum2 / total2[:, None], mask=written)
    tl.store(target + (oy + ox), sum3 / total3[:, None], mask=written)
    once = inside & (tl.program_id(1) == 0)
    noted = lse + image * 4 * pixels + p
    tl.store(noted, top0 + tl.log(total0), mask=once)
    tl.store(noted + pixels, top1 + tl.log(total1), mask=once)
    tl.store(noted + 2 * pixels, top2 + tl.log(total2), mask=once)
    tl.store(noted + 3 * pixels, top3 + tl.log(total3), mask=once)


@triton.jit
def _backward_features(
    grad,
    logits,
    lse,
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
    C: tl.constexpr,
    ACC: tl.constexpr,
):
    """df[c, v, u]: what the pixels around (v, u) took from it, gathered instead of scattered, so nothing collides."""
    T: tl.constexpr = K * K
    pixels = height * width
    strips = tl.cdiv(pixels, P)
    image = (tl.program_id(0) // strips).to(tl.int64)
    p = tl.program_id(0) % strips * P + tl.arange(0, P)
    c = tl.program_id(1) * C + tl.arange(0, C)
    y = p // width
    x = p % width
    inside = p < pixels
    kept = c < channels
    at = logits + image * lb + y * ly + x * lx
    noted = lse + image * 4 * pixels + p
    source = grad + image * gb + (2 * y * gy + 2 * x * gx)[:, None] + c[None, :] * gc
    total = tl.zeros((P, C), ACC)
    for t in tl.static_range(T):
        i = K // 2 - t // K
        j = K // 2 - t % K
        there = inside & (y + i >= 0) & (y + i < height) & (x + j >= 0) & (x + j < width)
        read = there[:, None] & kept[None, :]
        for s in tl.static_range(4):
            top = tl.load(noted + (s * pixels + i * width + j), mask=there, other=0.0)
            w = _weight(at + ((s * T + t) * lt + i * ly + j * lx), top, there, ACC)
            shift = (2 * i + s // 2) * gy + (2 * j + s % 2) * gx
            total += w[:, None] * tl.load(source + shift, mask=read, other=0.0).to(ACC)
    target = grad_features + image * db + (y * dy + x * dx)[:, None] + c[None, :] * dc
    tl.store(target, total, mask=inside[:, None] & kept[None, :])


@triton.jit
def _through_softmax(product, at, noted, target, inside, taps, lt, dt, T: tl.constexpr, ACC: tl.constexpr):
    """From d/d weights (P, T) of one sub-pixel to d/d logits: w (d - sum w d)."""
    real = inside[:, None] & (taps < T)[None, :]
    logit = tl.load(at[:, None] + taps[None, :] * lt, mask=real, other=0.0).to(ACC)
    top = tl.load(noted, mask=inside, other=0.0)
    w = tl.where(real, tl.exp(logit - top[:, None]), 0.0)
    mean = tl.sum(w * product, 1)
    tl.store(target[:, None] + taps[None, :] * dt, w * (product - mean[:, None]), mask=real)


@triton.jit
def _backward_logits(
    grad,
    features,
    logits,
    lse,
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
    C: tl.constexpr,
    TAPS: tl.constexpr,
    ACC: tl.constexpr,
):
    """d/d weights: products of gradient and neighbours summed over all channels; then back through the softmax."""
    T: tl.constexpr = K * K
    pixels = height * width
    strips = tl.cdiv(pixels, P)
    image = (tl.program_id(0) // strips).to(tl.int64)
    p = tl.program_id(0) % strips * P + tl.arange(0, P)
    y = p // width
    x = p % width
    inside = p < pixels
    taps = tl.arange(0, TAPS)
    upstream = grad + image * gb + (2 * y * gy + 2 * x * gx)[:, None]
    source = features + image * fb + (y * fy + x * fx)[:, None]
    # All taps of a pixel stay in registers: they are written once, and in one piece where channels are last.
    product0 = tl.zeros((P, TAPS), ACC)
    product1 = tl.zeros((P, TAPS), ACC)
    product2 = tl.zeros((P, TAPS), ACC)
    product3 = tl.zeros((P, TAPS), ACC)
    for first in range(0, channels, C):
        c = first + tl.arange(0, C)
        kept = (c < channels)[None, :]
        read = inside[:, None] & kept
        at_grad = upstream + c[None, :] * gc
        at_source = source + c[None, :] * fc
        grad0 = tl.load(at_grad, mask=read, other=0.0).to(ACC)
        grad1 = tl.load(at_grad + gx, mask=read, other=0.0).to(ACC)
        grad2 = tl.load(at_grad + gy, mask=read, other=0.0).to(ACC)
        grad3 = tl.load(at_grad + (gy + gx), mask=read, other=0.0).to(ACC)
        for t in tl.static_range(T):
            i = t // K - K // 2
            j = t % K - K // 2
            there = inside & (y + i >= 0) & (y + i < height) & (x + j >= 0) & (x + j < width)
            value = tl.load(at_source + (i * fy + j * fx), mask=there[:, None] & kept, other=0.0).to(ACC)
            here = (taps == t)[None, :]
            product0 += tl.where(here, tl.sum(grad0 * value, 1)[:, None], 0.0)
            product1 += tl.where(here, tl.sum(grad1 * value, 1)[:, None], 0.0)
            product2 += tl.where(here, tl.sum(grad2 * value, 1)[:, None], 0.0)
            product3 += tl.where(here, tl.sum(grad3 * value, 1)[:, None], 0.0)
    at = logits + image * lb + y * ly + x * lx
    noted = lse + image * 4 * pixels + p
    target = grad_logits + image * db + y * dy + x * dx
    _through_softmax(product0, at, noted, target, inside, taps, lt, dt, T, ACC)
    _through_softmax(product1, at + T * lt, noted + pixels, target + T * dt, inside, taps, lt, dt, T, ACC)
    _through_softmax(product2, at + 2 * T * lt, noted + 2 * pixels, target + 2 * T * dt, inside, taps, lt, dt, T, ACC)
    _through_softmax(product3, at + 3 * T * lt, noted + 3 * pixels, target + 3 * T * dt, inside, taps, lt, dt, T, ACC)


def upsample(features: Tensor, logits: Tensor, kernel: int) -> Tensor:
    """`tmad.carafe.upsample` for GPUs: (B, C, H, W) and (B, 4 kernel^2, H, W) -> (B, C, 2H, 2W), laid out as *features*
    are. Weights stay in float32 whatever the dtypes. Differentiable once in both."""
    out: Tensor = _carafe(features, logits, kernel)[0]
    return out


# Opaque to the compiler, not a `triton_op`: there is nothing around it to fuse with, and only so do the interpreter's
# tests reach what a compiled network calls.
@torch.library.custom_op("tmad::carafe", mutates_args=())
def _carafe(features: Tensor, logits: Tensor, kernel: int) -> tuple[Tensor, Tensor]:
    batch, channels, height, width = features.shape
    out, lse = _empty_results(features)
    strip, block = _tile(height * width, channels)
    with torch.cuda.device_of(features):
        _forward[(batch * triton.cdiv(height * width, strip), triton.cdiv(channels, block))](
            features,
            logits,
            out,
            lse,
            height,
            width,
            channels,
            *features.stride(),
            *logits.stride(),
            *out.stride(),
            K=kernel,
            P=strip,
            C=block,
            ACC=_accumulator(features),
            num_warps=WARPS,
        )
    return out, lse


@_carafe.register_fake
def _(features: Tensor, logits: Tensor, kernel: int) -> tuple[Tensor, Tensor]:
    return _empty_results(features)


@torch.library.custom_op("tmad::carafe_backward", mutates_args=())
def _carafe_backward(grad: Tensor, features: Tensor, logits: Tensor, lse: Tensor, kernel: int) -> tuple[Tensor, Tensor]:
    batch, channels, height, width = features.shape
    grad_features, grad_logits = torch.empty_like(features), torch.empty_like(logits)
    strip, block = _tile(height * width, channels)
    strips, accumulator = batch * triton.cdiv(height * width, strip), _accumulator(features)
    with torch.cuda.device_of(features):
        _backward_features[(strips, triton.cdiv(channels, block))](
            grad,
            logits,
            lse,
            grad_features,
            height,
            width,
            channels,
            *grad.stride(),
            *logits.stride(),
            *grad_features.stride(),
            K=kernel,
            P=strip,
            C=block,
            ACC=accumulator,
            num_warps=WARPS,
        )
        _backward_logits[(strips,)](
            grad,
            features,
            logits,
            lse,
            grad_logits,
            height,
            width,
            channels,
            *grad.stride(),
            *features.stride(),
            *logits.stride(),
            *grad_logits.stride(),
            K=kernel,
            P=strip,
            C=block,
            TAPS=triton.next_power_of_2(kernel * kernel),
            ACC=accumulator,
            num_warps=WARPS,
        )
    return grad_features, grad_logits


@_carafe_backward.register_fake
def _(grad: Tensor, features: Tensor, logits: Tensor, lse: Tensor, kernel: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(features), torch.empty_like(logits)


def _keep(ctx: FunctionCtx, inputs: tuple[Tensor, Tensor, int], output: tuple[Tensor, Tensor]) -> None:
    features, logits, kernel = inputs
    ctx.save_for_backward(features, logits, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.kernel = kernel  # type: ignore[attr-defined]


def _differentiate(ctx: FunctionCtx, grad: Tensor, _: Tensor | None) -> tuple[Tensor, Tensor, None]:
    features, logits, lse = ctx.saved_tensors  # type: ignore[attr-defined]
    return *_carafe_backward(grad, features, logits, lse, ctx.kernel), None  # type: ignore[attr-defined]


_carafe.register_autograd(_differentiate, setup_context=_keep)


def _empty_results(features: Tensor) -> tuple[Tensor, Tensor]:
    """The output, laid out as *features* are, and room for the softmax's (B, 4, H, W)."""
    batch, channels, height, width = features.shape
    last = features.is_contiguous(memory_format=torch.channels_last) and not features.is_contiguous()
    out = torch.empty(
        (batch, channels, 2 * height, 2 * width),
        dtype=features.dtype,
        device=features.device,
        memory_format=torch.channels_last if last else torch.contiguous_format,
    )
    exact = torch.promote_types(features.dtype, torch.float32)
    return out, features.new_empty((batch, 4, height, width), dtype=exact)


def _tile(pixels: int, channels: int) -> tuple[int, int]:
    """P and C of the programs."""
    block = min(triton.next_power_of_2(channels), MAX_CHANNELS)
    return min(triton.next_power_of_2(pixels), TILE // block), block


def _accumulator(features: Tensor) -> tl.dtype:
    return tl.float64 if features.dtype == torch.float64 else tl.float32
