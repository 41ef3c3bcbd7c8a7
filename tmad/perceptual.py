"""Perceptual loss on VGG-19 features before the ReLU (Sec. III-C): conv_5, conv_9 and conv_15.

Counting convolutions from 1 these are conv3_1, conv4_1 and conv5_3. The weights are torchvision's ImageNet VGG-19; this
module reads a file and never fetches one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CHANNELS = (64, 64, "pool", 128, 128, "pool", 256, 256, 256, 256, "pool", 512, 512, 512, 512, "pool", 512, 512, 512)
"""VGG-19 as far as conv5_3: output channels of its convolutions, each followed by a ReLU, and its 2x2 max pools."""

FEATURE_CONVOLUTIONS = (5, 9, 15)
"""The convolutions, counted from 1, whose outputs are compared [P]: conv3_1, conv4_1, conv5_3."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class VGG19Features(nn.Module):
    """VGG-19 up to conv5_3, frozen; gives the three feature maps before their ReLU."""

    scale: Tensor
    shift: Tensor

    def __init__(self, convolutions: Sequence[int] = FEATURE_CONVOLUTIONS) -> None:
        """*convolutions* whose outputs are compared, counted from 1; layers beyond the last are left out."""
        super().__init__()
        layers: list[nn.Module] = []
        channels, count = 3, 0
        for item in CHANNELS:
            if not isinstance(item, int):
                layers.append(nn.MaxPool2d(2))
                continue
            layers.append(nn.Conv2d(channels, item, 3, padding=1))
            channels, count = item, count + 1
            if count == max(convolutions):
                break
            layers.append(nn.ReLU())
        self.convolutions = tuple(convolutions)
        self.features = nn.Sequential(*layers)
        mean, std = (torch.tensor(each).reshape(1, 3, 1, 1) for each in (IMAGENET_MEAN, IMAGENET_STD))
        self.register_buffer("scale", 0.5 / std)
        self.register_buffer("shift", (0.5 - mean) / std)
        self.requires_grad_(False)
        self.eval()

    def forward(self, images: Tensor) -> list[Tensor]:
        """(M, 3, h, w) in [-1, 1], sides of at least 16 -> a map for each of `convolutions`; ImageNet's normalisation
        is applied."""
        # ((images + 1) / 2 - mean) / std, by one operator.
        x = torch.addcmul(self.shift, images, self.scale)
        maps, count = [], 0
        for layer in self.features:
            x = layer(x)
            if isinstance(layer, nn.Conv2d):
                count += 1
                if count in self.convolutions:
                    maps.append(x)
        return maps


def perceptual_loss(fake: Sequence[Tensor], real: Sequence[Tensor]) -> Tensor:
    """Mean absolute difference of feature maps (M, C, h, w), summed over the maps."""
    return torch.stack([(a.float() - b).abs().mean() for a, b in zip(fake, real, strict=True)]).sum()


def style_loss(fake: Sequence[Tensor], real: Sequence[Tensor]) -> Tensor:
    """Mean absolute difference of the Gram matrices of feature maps (M, C, h, w) after their ReLU, patch by patch,
    summed over the maps (Gatys et al. 2016): which features occur together, wherever in the patch they are."""
    pairs = zip(fake, real, strict=True)
    return torch.stack([F.l1_loss(gram(a), gram(b)) for a, b in pairs]).sum()


def gram(features: Tensor) -> Tensor:
    """(M, C, h, w) -> (M, C, C), divided by the C * h * w values of a map; float32."""
    flat = features.float().relu().flatten(2)
    with torch.autocast(features.device.type, enabled=False):
        return flat @ flat.transpose(1, 2) / flat[0].numel()


def load_vgg19(path: Path | str, *, sha256: str, convolutions: Sequence[int] = FEATURE_CONVOLUTIONS) -> VGG19Features:
    """VGG-19 from a file in torchvision's layout (`features.N.weight`), loaded without unpickling.

    *sha256* is the expected digest or its first characters. Raises `FileNotFoundError`, or `ValueError` for another
    digest, a file that is no dictionary of tensors, or missing layers.
    """
    path = Path(path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if not digest.startswith(sha256.lower()):
        raise ValueError(f"{path} has sha256 {digest}, expected {sha256}...: not the weights that were asked for")
    network = VGG19Features(convolutions)
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
        wanted = {name: tensors[name] for name in network.state_dict() if name.startswith("features.")}
        network.load_state_dict(wanted, strict=False)
    except Exception as error:
        raise ValueError(f"{path} does not hold VGG-19 weights in torchvision's layout: {error}") from error
    return network


def untrained_vgg19(generator: torch.Generator, convolutions: Sequence[int] = FEATURE_CONVOLUTIONS) -> VGG19Features:
    """VGG-19 with random He-initialised weights: for tests, and for runs that ask for it explicitly."""
    network = VGG19Features(convolutions)
    for layer in network.features:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu", generator=generator)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return network
