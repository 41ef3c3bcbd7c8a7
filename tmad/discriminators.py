"""The two discriminators, C(.) in Eq. 6, 7 and 9: one of single patches, one 70x70 PatchGAN of whole images."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tmad.blocks import LEAK, DownBlock, ResidualBlock, conv, leaky, normalise_spectra
from tmad.config import DiscriminatorsConfig


class PatchDiscriminator(nn.Module):
    """Discriminator of the patch distribution loss (Eq. 6-7): two down-blocks, two residual blocks, a map of scores."""

    def __init__(self, config: DiscriminatorsConfig) -> None:
        super().__init__()
        base = config.patch_base_width
        self.layers = nn.Sequential(
            conv(3, base, 1),
            leaky(),
            DownBlock(base, 2 * base),
            DownBlock(2 * base, 4 * base),
            ResidualBlock(4 * base),
            ResidualBlock(4 * base),
            conv(4 * base, 1),
        )
        _with_constant_slopes(self)
        if config.spectral_norm:
            normalise_spectra(self)

    def forward(self, patches: Tensor) -> Tensor:
        """(M, 3, k, k) in [-1, 1] -> raw scores (M, 1, k/4, k/4)."""
        scores: Tensor = self.layers(patches)
        return scores


class GlobalDiscriminator(nn.Module):
    """Discriminator of the blending loss (Eq. 9): PatchGAN with a 70x70 field (Isola et al. 2017), no normalisation."""

    def __init__(self, config: DiscriminatorsConfig) -> None:
        super().__init__()
        base = config.global_base_width
        widths = [3, base, 2 * base, 4 * base, 8 * base]
        strides = [2, 2, 2, 1]
        layers: list[nn.Module] = []
        for (a, b), stride in zip(pairwise(widths), strides, strict=True):
            layers += [_conv4(a, b, stride), leaky()]
        self.layers = nn.Sequential(*layers, _conv4(widths[-1], 1, 1))
        _with_constant_slopes(self)
        if config.spectral_norm:
            normalise_spectra(self)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1], sides of at least 32 -> raw scores (B, 1, H/8 - 2, W/8 - 2)."""
        scores: Tensor = self.layers(images)
        return scores


def _conv4(in_channels: int, out_channels: int, stride: int) -> nn.Conv2d:
    layer = nn.Conv2d(in_channels, out_channels, 4, stride=stride, padding=1)
    nn.init.kaiming_normal_(layer.weight, a=LEAK)
    nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return layer


class _Leaky(nn.LeakyReLU):
    """Leaky ReLU of networks that a penalty differentiates twice. PyTorch's own has a second derivative of zeros, which
    are then differentiated through all layers."""

    def forward(self, x: Tensor) -> Tensor:
        # Compiled, the function below would lose the gradients of what stands before it.
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return super().forward(x)
        result: Tensor = _ConstantSlope.apply(x)
        return result


class _ConstantSlope(torch.autograd.Function):
    """Leaky ReLU whose slope is a constant for the second derivative."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return F.leaky_relu(x, LEAK)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(output)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Tensor | None:
        (output,) = ctx.saved_tensors
        return None if grad is None else torch.ops.aten.leaky_relu_backward(grad, output.detach(), LEAK, True)


def _with_constant_slopes(network: nn.Module) -> None:
    for parent in [*network.modules()]:
        for name, child in parent.named_children():
            if isinstance(child, nn.LeakyReLU):
                setattr(parent, name, _Leaky(LEAK, inplace=True))


def gradient_penalty(discriminator: nn.Module, real: Tensor, fake: Tensor, mix: Tensor) -> Tensor:
    """WGAN-GP (Gulrajani et al. 2017): E[(|grad C(x)| - 1)^2] at x = mix * real + (1 - mix) * fake, one norm a sample.

    *real*, *fake* (M, C, H, W), detached; *mix* (M,) in [0, 1). The score of a sample is the mean of its map. Always
    in float32, outside autocast. Differentiable in the discriminator's parameters (a second backward), whose spectral
    norms have to be taken before (`blocks.normalised_once`). A scalar.
    """

    def score(images: Tensor) -> Tensor:
        return discriminator(images).flatten(1).mean(dim=1).sum()

    with torch.autocast(real.device.type, enabled=False):
        weight = mix.float()[:, None, None, None]
        # Not `torch.autograd.grad`, which no compiled code can differentiate again, by the weights of C.
        gradient = torch.func.grad(score)(weight * real.float() + (1 - weight) * fake.float())
        norms = torch.linalg.vector_norm(gradient.flatten(1), dim=1)
        return (norms - 1).square().mean()
