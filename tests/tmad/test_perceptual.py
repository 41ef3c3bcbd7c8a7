"""The perceptual loss: VGG-19's layers, the three maps before their ReLU, and how weights are read from a file."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.tmad.tiny import Features
from tmad.perceptual import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    VGG19Features,
    load_vgg19,
    perceptual_loss,
    style_loss,
    untrained_vgg19,
)
from tmad.rng import torch_generator

TORCHVISION_CONVOLUTIONS = (0, 2, 5, 7, 10, 12, 14, 16, 19, 21, 23, 25, 28, 30, 32)
"""Where torchvision's `vgg19().features` has the convolutions conv1_1 to conv5_3."""


@pytest.fixture(scope="module")
def vgg() -> VGG19Features:
    return untrained_vgg19(torch_generator("vgg"))


@pytest.fixture(scope="module")
def weights_file(vgg: VGG19Features, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file in torchvision's layout, with the classifier's first layer as such files have it."""
    tensors = {name: value for name, value in vgg.state_dict().items() if name.startswith("features.")}
    tensors["features.34.weight"], tensors["classifier.0.bias"] = torch.zeros(1), torch.zeros(1)
    path = tmp_path_factory.mktemp("vgg") / "vgg19.pth"
    torch.save(tensors, path)
    return path


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def maps_twin(vgg: VGG19Features, images: Tensor) -> list[Tensor]:
    """VGG-19 as its paper lists it: blocks of 2, 2, 4, 4 and (as far as needed) 3 convolutions, a pool between them."""
    mean = torch.tensor([0.485, 0.456, 0.406]).reshape(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).reshape(3, 1, 1)
    x = ((images + 1) / 2 - mean) / std
    tensors, found, number = vgg.state_dict(), {}, 0
    for block, convolutions in ((1, 2), (2, 2), (3, 4), (4, 4), (5, 3)):
        x = F.max_pool2d(x, 2) if block > 1 else x
        for place in range(1, convolutions + 1):
            key = f"features.{TORCHVISION_CONVOLUTIONS[number]}"
            x = F.conv2d(x, tensors[f"{key}.weight"], tensors[f"{key}.bias"], padding=1)
            found[f"conv{block}_{place}"] = x
            x, number = x.relu(), number + 1
    return [found["conv3_1"], found["conv4_1"], found["conv5_3"]]


def test_the_maps_are_those_of_conv3_1_conv4_1_and_conv5_3_before_the_relu(vgg: VGG19Features) -> None:
    images = rand(2, 3, 32, 16)
    maps, expected = vgg(images), maps_twin(vgg, images)
    assert [tuple(m.shape) for m in maps] == [(2, 256, 8, 4), (2, 512, 4, 2), (2, 512, 2, 1)]
    for a, b in zip(maps, expected, strict=True):
        # The normalisation is one product there, and rounds otherwise.
        torch.testing.assert_close(a, b, rtol=1e-5, atol=5e-5)
        assert (a < 0).any()


def test_no_layer_beyond_conv5_3_is_computed(vgg: VGG19Features) -> None:
    assert len(vgg.features) == 33
    assert isinstance(vgg.features[-1], nn.Conv2d)


def test_the_loss_is_the_mean_absolute_difference_of_each_map_summed(vgg: VGG19Features) -> None:
    fake, real = rand(2, 3, 16, 16), rand(2, 3, 16, 16, seed=1)
    expected = sum((a - b).abs().mean() for a, b in zip(maps_twin(vgg, fake), maps_twin(vgg, real), strict=True))
    torch.testing.assert_close(perceptual_loss(vgg(fake), vgg(real)), expected)
    assert perceptual_loss(vgg(real), vgg(real)) == 0


def test_the_gradient_goes_through_the_network_which_stays_frozen(vgg: VGG19Features) -> None:
    fake, real = rand(1, 3, 16, 16).requires_grad_(), rand(1, 3, 16, 16, seed=1)
    perceptual_loss(vgg(fake), vgg(real)).backward()
    assert fake.grad.abs().max() > 0
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in vgg.parameters())
    assert not vgg.training


def test_the_style_loss_is_that_of_gram_matrices_written_out_and_knows_no_places(vgg: VGG19Features) -> None:
    fake, real = [rand(2, 3, 4, 5)], [rand(2, 3, 4, 5, seed=1)]
    grams = []
    for (maps,) in (fake, real):
        flat = maps.clamp(min=0).reshape(2, 3, 20)
        grams.append(torch.stack([one @ one.T for one in flat]) / 60)
    torch.testing.assert_close(style_loss(fake, real), (grams[0] - grams[1]).abs().mean())
    moved = [fake[0].flatten(2)[..., torch.randperm(20)].reshape(2, 3, 4, 5)]
    torch.testing.assert_close(style_loss(fake, real), style_loss(moved, real))


def test_fewer_convolutions_need_fewer_layers_and_a_file_of_those(vgg: VGG19Features, tmp_path: Path) -> None:
    kept = {name: value for name, value in vgg.state_dict().items() if name.startswith(("features.0.", "features.2."))}
    torch.save(kept, tmp_path / "two.pth")
    short = load_vgg19(tmp_path / "two.pth", sha256="", convolutions=(1, 2))
    images = rand(1, 3, 16, 16)
    mean, std = torch.tensor(IMAGENET_MEAN)[:, None, None], torch.tensor(IMAGENET_STD)[:, None, None]
    first = vgg.features[0](((images + 1) / 2 - mean) / std)
    expected = [first, vgg.features[2](first.relu())]
    torch.testing.assert_close(short(images), expected)
    with pytest.raises(ValueError, match="does not hold VGG-19 weights"):
        load_vgg19(tmp_path / "two.pth", sha256="", convolutions=(3,))


def test_any_network_that_gives_maps_can_stand_in() -> None:
    features = Features()
    fake, real = rand(2, 3, 16, 16), rand(2, 3, 16, 16, seed=1)
    expected = sum((a - b).abs().mean() for a, b in zip(features(fake), features(real), strict=True))
    torch.testing.assert_close(perceptual_loss(features(fake), features(real)), expected)


def test_untrained_weights_are_a_function_of_the_generator_and_keep_the_signal_alive(vgg: VGG19Features) -> None:
    again = untrained_vgg19(torch_generator("vgg"))
    assert torch.equal(again.features[0].weight, vgg.features[0].weight)
    assert not torch.equal(untrained_vgg19(torch_generator("b")).features[0].weight, vgg.features[0].weight)
    assert 0.1 < vgg(rand(1, 3, 32, 32))[-1].std() < 10


def test_weights_in_torchvisions_layout_are_read_from_a_file(vgg: VGG19Features, weights_file: Path) -> None:
    loaded = load_vgg19(weights_file, sha256=digest(weights_file)[:8].upper())
    images = rand(1, 3, 16, 16)
    assert all(torch.equal(a, b) for a, b in zip(loaded(images), vgg(images), strict=True))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_another_digest_is_refused_with_both(weights_file: Path) -> None:
    with pytest.raises(ValueError, match=rf"sha256 {digest(weights_file)}, expected 0123abcd"):
        load_vgg19(weights_file, sha256="0123abcd")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth"):
        load_vgg19(tmp_path / "nowhere.pth", sha256="")


@pytest.mark.parametrize("content", [{"features.0.weight": torch.zeros(64, 3, 3, 3)}, [1, 2], {"state": "x"}])
def test_a_file_without_the_layers_is_refused(content: object, tmp_path: Path) -> None:
    path = tmp_path / "other.pth"
    torch.save(content, path)
    with pytest.raises(ValueError, match=r"other\.pth does not hold VGG-19 weights in torchvision's layout"):
        load_vgg19(path, sha256=digest(path))


def test_a_file_that_would_run_code_when_unpickled_is_refused(tmp_path: Path) -> None:
    path, trace = tmp_path / "evil.pth", tmp_path / "trace"
    torch.save({"features.0.weight": _Evil(trace)}, path)
    with pytest.raises(ValueError, match="does not hold VGG-19 weights"):
        load_vgg19(path, sha256=digest(path))
    assert not trace.exists()


class _Evil:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple:
        return Path.touch, (self.trace,)
