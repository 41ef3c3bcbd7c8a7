"""CARAFE, content-aware up-sampling by 2 (Wang et al., ICCV 2019), without a compiled extension.

Every output pixel is a weighted sum of the k_up x k_up input pixels around its source, the weights being predicted
from the features and normalised by a softmax. The reassembly runs as one loop over the k_up^2 shifts that accumulates
into the output: nothing is unfolded, and for the backward pass only the padded features and the weights are kept.
On a CUDA device softmax and reassembly are one operator instead (`carafe_triton`).
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional as F

from tmad.config import CarafeConfig

SCALE = 2
HAS_TRITON = find_spec("triton") is not None
"""Triton comes with PyTorch's CUDA builds, but not with all of them."""

START_SPREAD = 0.004
"""Added to every tap of the kernels that up-sampling starts with, before they are normalised."""


def bilinear_kernels(kernel: int) -> Tensor:
    """The (4, kernel^2) reassembly kernels of bilinear up-sampling by 2, sub-pixels and taps in raster order.

    Up-sampling starts with these [D]. Started from equal taps, as the CARAFE paper's own code does, three levels blur
    over 35 pixels; reaching the same loss outside the hole took 1.5 times the images (docs/log.md).
    """
    taps = torch.zeros(SCALE, kernel)
    half = kernel // 2
    taps[:, half] = 0.75
    if half:
        taps[0, half - 1] = taps[1, half + 1] = 0.25
    return torch.einsum("ai,bj->abij", taps, taps).reshape(SCALE * SCALE, kernel * kernel)


class _Reassemble(torch.autograd.Function):
    """Weighted sums over shifted views; see `reassemble`. Saves its inputs, recomputes the rest."""

    @staticmethod
    def forward(ctx: FunctionCtx, features: Tensor, weights: Tensor, kernel: int) -> Tensor:
        batch, channels, height, width = features.shape
        padded = _pad(features, kernel)
        # In float32 whatever comes in: 25 roundings to bfloat16 are three times as wrong as one.
        exact = torch.promote_types(features.dtype, torch.float32)
        out = features.new_zeros(batch, channels, SCALE * SCALE, height, width, dtype=exact)
        for shift in range(kernel * kernel):
            i, j = divmod(shift, kernel)
            view = padded[:, :, None, i : i + height, j : j + width]
            out.addcmul_(view, weights[:, None, :, shift])
        ctx.save_for_backward(padded, weights)
        ctx.kernel = kernel  # type: ignore[attr-defined]
        return _interleave(out.to(features.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        padded, weights = ctx.saved_tensors  # type: ignore[attr-defined]
        kernel: int = ctx.kernel  # type: ignore[attr-defined]
        grad = _deinterleave(grad)
        height, width = grad.shape[-2:]
        grad_padded = torch.zeros_like(padded, dtype=torch.promote_types(padded.dtype, torch.float32))
        grad_weights = torch.empty_like(weights)
        for shift in range(kernel * kernel):
            i, j = divmod(shift, kernel)
            window = (slice(None), slice(None), slice(i, i + height), slice(j, j + width))
            grad_padded[window] += (grad * weights[:, None, :, shift]).sum(2)
            torch.sum(grad * padded[window][:, :, None], dim=1, out=grad_weights[:, :, shift])
        half = kernel // 2
        return grad_padded[..., half : half + height, half : half + width].to(padded.dtype), grad_weights, None


def _pad(features: Tensor, kernel: int) -> Tensor:
    return F.pad(features, (kernel // 2,) * 4)


def _interleave(out: Tensor) -> Tensor:
    """(B, C, 4, H, W), sub-pixels in raster order -> (B, C, 2H, 2W)."""
    batch, channels, _, height, width = out.shape
    grid = out.reshape(batch, channels, SCALE, SCALE, height, width).permute(0, 1, 4, 2, 5, 3)
    return grid.reshape(batch, channels, SCALE * height, SCALE * width)


def _deinterleave(grad: Tensor) -> Tensor:
    """The inverse of `_interleave`."""
    batch, channels, height, width = grad.shape
    grid = grad.reshape(batch, channels, height // SCALE, SCALE, width // SCALE, SCALE).permute(0, 1, 3, 5, 2, 4)
    return grid.reshape(batch, channels, SCALE * SCALE, height // SCALE, width // SCALE).contiguous()


def reassemble(features: Tensor, weights: Tensor, kernel: int) -> Tensor:
    """Content-aware reassembly: out[c, 2y+a, 2x+b] = sum_ij w[ab, ij, y, x] * f[c, y+i-k/2, x+j-k/2].

    *features* (B, C, H, W), zeros beyond the border; *weights* (B, 4, kernel^2, H, W), sub-pixels ab and shifts ij in
    raster order. Returns (B, C, 2H, 2W). Differentiable once in both.
    """
    return _Reassemble.apply(features, weights, kernel)


def upsample(features: Tensor, logits: Tensor, kernel: int) -> Tensor:
    """Reassembly of *features* (B, C, H, W) with the softmax of *logits* (B, 4 * kernel^2, H, W); see `reassemble`.

    The device chooses the form; both are the same function but for rounding. The softmax runs in float32.
    """
    if _is_fused(features.device):
        from tmad import carafe_triton  # Triton, which takes seconds to import, where it is needed

        return carafe_triton.upsample(features, logits, kernel)
    batch, _, height, width = logits.shape
    logits = logits.reshape(batch, SCALE * SCALE, kernel**2, height, width)
    weights = logits.float().softmax(dim=2).to(features.dtype)
    return reassemble(features, weights, kernel)


def _is_fused(device: torch.device) -> bool:
    return HAS_TRITON and device.type == "cuda"


class Carafe(nn.Module):
    """CARAFE up-sampling x2 with its kernel-prediction branch."""

    def __init__(self, channels: int, config: CarafeConfig) -> None:
        super().__init__()
        self.kernel = config.kernel
        mid = min(config.mid_channels, channels)
        self.compress = nn.Conv2d(channels, mid, 1)
        self.encode = nn.Conv2d(
            mid, SCALE * SCALE * config.kernel**2, config.encoder_kernel, padding=config.encoder_kernel // 2
        )
        nn.init.xavier_uniform_(self.compress.weight)
        nn.init.zeros_(self.compress.bias)  # type: ignore[arg-type]
        nn.init.normal_(self.encode.weight, std=0.001)
        with torch.no_grad():
            self.encode.bias.copy_((bilinear_kernels(config.kernel) + START_SPREAD).log().flatten())  # type: ignore[union-attr]

    def forward(self, features: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, 2H, 2W); the kernel softmax runs in float32."""
        return upsample(features, self.encode(self.compress(features)), self.kernel)
