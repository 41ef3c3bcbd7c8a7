"""The networks of Table I: how many blocks of which kind, shapes, fields of view, spectral bound, penalty."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.tmad.tiny import MODEL, TRAINING, make_state, train
from tmad.blocks import SPECTRAL_GAIN, DownBlock, ResidualBlock, UpBlock
from tmad.carafe import Carafe
from tmad.coarse import CoarseNet, compose
from tmad.config import CarafeConfig, CoarseConfig, CriticsConfig, PSNetConfig, TMADConfig
from tmad.discriminators import GlobalCritic, PatchCritic, gradient_penalty
from tmad.model import TMAD
from tmad.psnet import PSNet, fine_detail


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def count(module: nn.Module) -> dict[str, int]:
    """Blocks of Table I inside *module*, and its convolutions of size 1 that stand outside blocks."""
    kinds = Counter(type(part).__name__ for part in module.modules())
    return {"down": kinds["DownBlock"], "res": kinds["ResidualBlock"], "up": kinds["UpBlock"]}


def own_convolutions(layers: nn.Sequential) -> list[tuple[int, int, tuple[int, ...]]]:
    """(in, out, kernel) of the convolutions directly in a sequence, not inside its blocks."""
    return [(c.in_channels, c.out_channels, tuple(c.kernel_size)) for c in layers if isinstance(c, nn.Conv2d)]


def field(module: nn.Module, x: Tensor) -> tuple[int, int]:
    """Height and width of the input area that the central output depends on, by the gradient."""
    x = x.clone().requires_grad_()
    out = module(x)
    (gradient,) = torch.autograd.grad(out[0, :, out.shape[2] // 2, out.shape[3] // 2].sum(), x)
    touched = gradient[0].abs().sum(0) > 0
    rows, columns = touched.any(1).nonzero(), touched.any(0).nonzero()
    return int(rows.max() - rows.min() + 1), int(columns.max() - columns.min() + 1)


@pytest.fixture(scope="module")
def full() -> TMAD:
    """The generator with the paper's values."""
    return TMAD(TMADConfig())


def test_the_coarse_network_has_the_blocks_of_table_i(full: TMAD) -> None:
    layers = full.coarse.layers
    assert count(layers) == {"down": 3, "res": 8, "up": 3}
    kinds = [type(layer) for layer in layers]
    assert kinds == [nn.Conv2d, nn.LeakyReLU, *3 * [DownBlock], *8 * [ResidualBlock], *3 * [UpBlock], nn.Conv2d]
    assert own_convolutions(layers) == [(4, 16, (1, 1)), (16, 3, (1, 1))]
    assert [block[2].out_channels for block in layers if isinstance(block, DownBlock)] == [32, 64, 128]
    assert [block[3].out_channels for block in layers if isinstance(block, UpBlock)] == [64, 32, 16]


def test_psnet_has_the_blocks_of_table_i(full: TMAD) -> None:
    net = full.psnet
    assert count(net.encoder) == {"down": 2, "res": 5, "up": 0}
    assert own_convolutions(net.encoder) == [(3, 16, (1, 1))]
    texture = nn.Sequential(*net.texture_half, *net.texture_quarter)
    assert count(texture) == {"down": 2, "res": 2, "up": 0}
    assert own_convolutions(texture) == [(12, 16, (1, 1))]
    assert [type(block) for block in (net.up_half, net.up_full)] == [UpBlock, UpBlock]
    # The third up-block of the count: two convolutions at full resolution, then out-conv.
    assert own_convolutions(net.decode) == [(16, 16, (3, 3)), (16, 16, (3, 3))]
    assert (net.output.in_channels, net.output.out_channels, net.output.kernel_size) == (16, 3, (1, 1))


def test_no_network_has_a_normalisation_layer_or_an_activation_behind_its_last_convolution(full: TMAD) -> None:
    critics = CriticsConfig()
    networks = [full, PatchCritic(critics), GlobalCritic(critics)]
    for network in networks:
        leaves = [part for part in network.modules() if not isinstance(part, nn.Conv2d) and not list(part.children())]
        # Spectral normalisation and its constant are parametrizations of a weight, not layers.
        leaves = [part for part in leaves if type(part).__name__ not in ("_SpectralNorm", "_Scale")]
        assert {type(part) for part in leaves} == {nn.LeakyReLU}
    last = (full.coarse.layers[-1], full.psnet.output, networks[1].layers[-1], networks[2].layers[-1])
    assert all(isinstance(layer, nn.Conv2d) for layer in last)


def test_every_upsampling_is_carafe_with_its_default_kernels(full: TMAD) -> None:
    layers = [part for part in full.modules() if isinstance(part, Carafe)]
    assert len(layers) == 5
    assert {layer.kernel for layer in layers} == {5}
    assert [layer.compress.out_channels for layer in layers] == [64, 64, 32, 64, 64]


@pytest.mark.parametrize("height_width", [(32, 32), (16, 48), (8, 8)])
def test_the_coarse_network_keeps_the_size_and_stays_in_range(height_width: tuple[int, int]) -> None:
    net = CoarseNet(CoarseConfig(base_width=4), CarafeConfig())
    with torch.no_grad():
        net.layers[-1].weight.mul_(1e6)
    result = net(rand(2, 3, *height_width), torch.zeros(2, 1, *height_width))
    assert result.shape == (2, 3, *height_width)
    assert result.min() == -1
    assert result.max() == 1


def test_a_coarse_output_beyond_the_range_finds_its_way_back() -> None:
    net, image, mask = (
        CoarseNet(CoarseConfig(base_width=4), CarafeConfig(kernel=3)),
        rand(1, 3, 16, 16),
        torch.zeros(1, 1, 16, 16),
    )
    with torch.no_grad():
        net.layers[-1].bias.fill_(3.0)
    optimizer = torch.optim.SGD([net.layers[-1].bias], lr=2.0)
    for _ in range(10):
        optimizer.zero_grad()
        net(image, mask).square().mean().backward()
        optimizer.step()
    assert net.layers[-1].bias.abs().max() < 1


def test_the_coarse_network_reads_the_mask() -> None:
    net, image = CoarseNet(CoarseConfig(base_width=4), CarafeConfig()), rand(1, 3, 16, 16)
    assert not torch.allclose(net(image, torch.zeros(1, 1, 16, 16)), net(image, torch.ones(1, 1, 16, 16)))


@pytest.mark.parametrize(
    ("setting", "expected"), [((2,), [2] * 8), ((1, 2, 4, 8), [1, 2, 4, 8, 1, 2, 4, 8]), ((1, 16), [1, 16] * 4)]
)
def test_dilations_are_repeated_in_turn(setting: tuple[int, ...], expected: list[int]) -> None:
    net = CoarseNet(CoarseConfig(base_width=4, dilations=setting), CarafeConfig())
    blocks = [layer for layer in net.layers if isinstance(layer, ResidualBlock)]
    assert [block.branch[0].dilation for block in blocks] == [(d, d) for d in expected]
    assert {block.branch[2].dilation for block in blocks} == {(1, 1)}


@pytest.mark.parametrize(("dilation", "side"), [(1, 5), (2, 7), (4, 11)])
def test_a_residual_block_sees_as_far_as_its_dilation_says(dilation: int, side: int) -> None:
    assert field(ResidualBlock(2, dilation), rand(1, 2, 31, 31)) == (side, side)


def test_the_coarse_network_sees_across_the_largest_hole() -> None:
    # 8 blocks with dilation 2 on the 1/8 grid reach 8 * 3 * 8 = 192 pixels to each side; a hole is 128 wide.
    image = torch.rand(1, 4, 320, 320)
    height, width = field(CoarseNet(CoarseConfig(base_width=2), CarafeConfig(kernel=3)).layers, image)
    assert min(height, width) >= 256


def test_compose_takes_the_fill_inside_and_the_image_outside_to_the_last_bit() -> None:
    fill, image = rand(2, 3, 8, 8), rand(2, 3, 8, 8, seed=1)
    mask = (rand(2, 1, 8, 8, seed=2) > 0).float()
    composed = compose(fill, image, mask)
    inside = mask.bool().expand_as(image)
    assert torch.equal(composed[inside], fill[inside])
    assert torch.equal(composed[~inside], image[~inside])


def test_compose_lets_nothing_of_the_hidden_side_through_not_even_nan() -> None:
    mask = torch.zeros(1, 1, 4, 4)
    mask[..., :2] = 1
    image = rand(1, 3, 4, 4)
    image[..., :2] = math.nan
    fill = rand(1, 3, 4, 4).requires_grad_()
    composed = compose(fill, image, mask)
    assert composed.isfinite().all()
    (gradient,) = torch.autograd.grad(composed.sum(), fill)
    assert torch.equal(gradient, mask.expand_as(gradient))


@pytest.mark.parametrize("patch_size", [8, 16, 32])
def test_psnet_lands_on_the_cell_from_a_window_three_times_as_wide(patch_size: int) -> None:
    net = PSNet(replace(MODEL.psnet, base_width=4), CarafeConfig(kernel=3), num_candidates=3)
    cells = net(rand(5, 3, 3 * patch_size, 3 * patch_size), rand(5, 9, patch_size, patch_size))
    assert cells.shape == (5, 3, patch_size, patch_size)


def psnet_twin(net: PSNet, windows: Tensor, candidates: Tensor) -> Tensor:
    """PSNet spelled out from its own weights, with explicit crop and skips and the blocks' literal form."""

    def act(layer: nn.Module, x: Tensor) -> Tensor:
        return F.leaky_relu(F.conv2d(x, layer.weight, layer.bias, padding=layer.weight.shape[-1] // 2), 0.2)

    def down(block: nn.Module, x: Tensor) -> Tensor:
        return F.interpolate(act(block[2], act(block[0], x)), scale_factor=0.5, mode="nearest")

    def res(block: nn.Module, x: Tensor) -> Tensor:
        return x + act(block.branch[2], act(block.branch[0], x))

    def up(block: nn.Module, x: Tensor) -> Tensor:
        return act(block[3], act(block[1], block[0](x)))

    k = candidates.shape[-1]
    x = act(net.encoder[0], windows)
    x = down(net.encoder[3], down(net.encoder[2], x))
    for block in net.encoder[4:]:
        x = res(block, x)
    assert x.shape[-1] == 3 * k // 4
    x = x[..., k // 4 : 2 * (k // 4), k // 4 : 2 * (k // 4)]
    half = down(net.texture_half[2], act(net.texture_half[0], candidates))
    quarter = down(net.texture_quarter[0], half)
    for block in net.texture_quarter[1:]:
        quarter = res(block, quarter)
    x = up(net.up_half, torch.cat([x, quarter], 1))
    x = up(net.up_full, torch.cat([x, half], 1))
    x = act(net.decode[2], act(net.decode[0], x))
    return F.conv2d(x, net.output.weight, net.output.bias)


def test_psnet_equals_its_blocks_written_out() -> None:
    net = PSNet(MODEL.psnet, CarafeConfig(kernel=3), num_candidates=2).eval()
    windows, candidates = rand(3, 3, 48, 48), rand(3, 6, 16, 16)
    torch.testing.assert_close(net(windows, candidates), psnet_twin(net, windows, candidates))


def test_both_skips_reach_the_result() -> None:
    net = PSNet(PSNetConfig(base_width=4), CarafeConfig(kernel=3), num_candidates=2).eval()
    windows, candidates = rand(1, 3, 48, 48), rand(1, 6, 16, 16)
    plain = net(windows, candidates)
    changes = []
    for part in (net.encoder, net.texture_half, net.texture_quarter):
        handle = part.register_forward_hook(lambda module, args, out: out + 0.5)
        changes.append((net(windows, candidates) - plain).abs().max())
        handle.remove()
    assert min(changes) > 1e-3


def blurred_twin(patch: Tensor, radius: int) -> Tensor:
    """Mean of the pixels at most *radius* away in each direction, as far as the patch (C, H, W) goes."""
    out = torch.empty_like(patch)
    for y in range(patch.shape[1]):
        for x in range(patch.shape[2]):
            near = patch[:, max(0, y - radius) : y + radius + 1, max(0, x - radius) : x + radius + 1]
            out[:, y, x] = near.mean(dim=(1, 2))
    return out


@pytest.mark.parametrize(("side", "radius"), [(8, 1), (12, 1), (16, 2), (32, 4)])
def test_fine_detail_is_what_a_blur_over_a_quarter_of_the_side_takes_away(side: int, radius: int) -> None:
    patches = rand(2, 3, side, side)
    expected = torch.stack([patch - blurred_twin(patch, radius) for patch in patches])
    torch.testing.assert_close(fine_detail(patches), expected)


@pytest.mark.parametrize("residual", ["coarse", "texture"])
def test_with_the_residual_option_psnet_starts_at_what_it_adds_to(residual: str) -> None:
    plain = PSNet(MODEL.psnet, CarafeConfig(kernel=3), 2).eval()
    added = PSNet(replace(MODEL.psnet, residual=residual), CarafeConfig(kernel=3), 2).eval()
    windows, candidates = rand(2, 3, 48, 48), rand(2, 6, 16, 16)
    start = windows[..., 16:32, 16:32]
    if residual == "texture":
        start = start + fine_detail(candidates[:, :3])
    assert torch.equal(added(windows, candidates), start)
    added.load_state_dict(plain.state_dict())
    torch.testing.assert_close(added(windows, candidates), plain(windows, candidates) + start)


def test_the_patch_critic_scores_a_map_of_a_quarter_of_the_side() -> None:
    critic = PatchCritic(CriticsConfig(patch_base_width=4))
    assert count(critic) == {"down": 2, "res": 2, "up": 0}
    assert critic(rand(6, 3, 32, 32)).shape == (6, 1, 8, 8)


def test_the_global_critic_has_a_field_of_70_pixels() -> None:
    critic = GlobalCritic(CriticsConfig(global_base_width=2))
    assert field(critic, rand(1, 3, 160, 160)) == (70, 70)
    assert critic(rand(2, 3, 64, 96)).shape == (2, 1, 6, 10)
    assert critic(rand(1, 3, 32, 32)).shape == (1, 1, 2, 2)


def test_the_global_critic_has_patchgan_widths() -> None:
    widths = [c.out_channels for c in GlobalCritic(CriticsConfig()).layers if isinstance(c, nn.Conv2d)]
    assert widths == [64, 128, 256, 512, 1]


def normalised_convolutions(network: nn.Module) -> list[nn.Conv2d]:
    """Those that spectral normalisation is meant for: all but CARAFE's and PSNet's linear output."""
    left_out = {id(layer) for part in network.modules() if isinstance(part, Carafe) for layer in part.modules()}
    left_out.add(id(getattr(network, "output", None)))
    return [part for part in network.modules() if isinstance(part, nn.Conv2d) and id(part) not in left_out]


@pytest.mark.parametrize("wanted", [True, False])
def test_spectral_normalisation_covers_psnet_but_carafe_and_its_output_the_critics_and_nothing_elsewhere(
    wanted: bool,
) -> None:
    config = replace(MODEL, psnet=replace(MODEL.psnet, spectral_norm=wanted))
    critics = replace(TRAINING.critics, spectral_norm=wanted)
    model = TMAD(config)
    for module in (model.psnet, PatchCritic(critics), GlobalCritic(critics)):
        convolutions = normalised_convolutions(module)
        assert {nn.utils.parametrize.is_parametrized(part, "weight") for part in convolutions} == {wanted}
    carafes = [part for part in model.psnet.modules() if isinstance(part, Carafe)]
    assert len(carafes) == 2
    for module in (model.coarse, model.retrieval, model.psnet.output, *carafes):
        assert not any(nn.utils.parametrize.is_parametrized(part) for part in module.modules())


def test_the_spectral_bound_holds_after_training_steps_and_binds_there() -> None:
    state = make_state()
    train(state, 12)
    networks = [state.model.psnet, state.patch_critic, state.global_critic]
    layers = [part for network in networks for part in normalised_convolutions(network)]
    assert len(layers) > 30
    originals = []
    # Each reading of a weight in training mode is one power iteration: let it catch up with the last step.
    with torch.no_grad():
        for layer in layers:
            for _ in range(30):
                _ = layer.weight
    for network in networks:
        network.eval()
    for layer in layers:
        bound = SPECTRAL_GAIN * (1 + math.sqrt(layer.out_channels / layer.weight[0].numel()))
        sigma = torch.linalg.matrix_norm(layer.weight.detach().flatten(1), ord=2)
        assert sigma == pytest.approx(bound, rel=0.02)
        original = layer.parametrizations.weight.original.detach().flatten(1)
        originals.append(float(torch.linalg.matrix_norm(original, ord=2)) / bound)
    # Without the normalisation the weights would be far from the bound.
    assert max(originals) > 1.2


def penalty_twin(critic: nn.Module, real: Tensor, fake: Tensor, mix: Tensor, step: float = 1e-5) -> float:
    """E[(|grad C| - 1)^2] with each partial derivative as a central difference."""
    total = 0.0
    for x_real, x_fake, m in zip(real, fake, mix, strict=True):
        x = m * x_real + (1 - m) * x_fake
        squares = 0.0
        for place in range(x.numel()):
            shifted = []
            for sign in (1, -1):
                moved = x.clone()
                moved.view(-1)[place] += sign * step
                shifted.append(float(critic(moved[None]).mean()))
            squares += ((shifted[0] - shifted[1]) / (2 * step)) ** 2
        total += (math.sqrt(squares) - 1) ** 2
    return total / len(real)


class SmoothCritic(nn.Module):
    """Two convolutions in double precision with a smooth activation, so that finite differences are accurate."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 3, 3, padding=1)
        self.second = nn.Conv2d(3, 1, 3, padding=1)
        for number, parameter in enumerate(self.parameters()):
            parameter.data = rand(*parameter.shape, seed=number)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.second(self.first(x.double()).tanh())
        return scores


def penalty_inputs() -> tuple[Tensor, Tensor, Tensor]:
    return rand(3, 2, 4, 4), rand(3, 2, 4, 4, seed=1), torch.tensor([0.1, 0.5, 0.9])


def test_the_gradient_penalty_equals_finite_differences() -> None:
    critic, (real, fake, mix) = SmoothCritic(), penalty_inputs()
    with torch.no_grad():
        expected = penalty_twin(critic, real.double(), fake.double(), mix.double())
    assert float(gradient_penalty(critic, real, fake, mix).detach()) == pytest.approx(expected, rel=1e-4)


def test_the_gradient_penalty_is_differentiable_in_the_critic() -> None:
    critic, inputs = SmoothCritic(), penalty_inputs()
    gradient_penalty(critic, *inputs).backward()
    weight, step = critic.first.weight, 1e-5
    for place in ((0, 0, 0, 0), (2, 1, 1, 2)):
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                weight[place] += sign * step
            values.append(float(gradient_penalty(critic, *inputs).detach()))
            with torch.no_grad():
                weight[place] -= sign * step
        # The penalty itself is computed in single precision.
        assert float(weight.grad[place]) == pytest.approx((values[0] - values[1]) / (2 * step), rel=0.05, abs=0.02)


def test_the_gradient_penalty_vanishes_where_the_gradient_has_norm_one_and_is_one_where_it_is_zero() -> None:
    class Plane(nn.Module):
        def __init__(self, slope: float) -> None:
            super().__init__()
            self.slope = slope

        def forward(self, x: Tensor) -> Tensor:
            # A map of equal scores: their mean has the slope in one direction.
            return (self.slope * x[:, :1, :1, :1] + 0 * x.sum((1, 2, 3), keepdim=True)).expand(-1, 1, 4, 4)

    for slope, penalty in ((1.0, 0.0), (0.0, 1.0), (3.0, 4.0)):
        assert float(gradient_penalty(Plane(slope), *penalty_inputs())) == pytest.approx(penalty, abs=1e-5)


@pytest.mark.parametrize("kind", [PatchCritic, GlobalCritic])
def test_the_penalty_reaches_the_weights_of_the_real_critics(kind: type[nn.Module]) -> None:
    critic = kind(TRAINING.critics)
    gradient_penalty(critic, rand(2, 3, 32, 32), rand(2, 3, 32, 32, seed=1), torch.tensor([0.3, 0.6])).backward()
    gradients = [p.grad for name, p in critic.named_parameters() if name.endswith("original")]
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients)
