"""The networks of Table I: how many blocks of which kind, shapes, fields of view, spectral bound, penalty."""

from __future__ import annotations

import copy
import math
from collections import Counter
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.tmad.tiny import MODEL, TRAINING, make_state, train
from tmad.blocks import SPECTRAL_GAIN, DownBlock, ResidualBlock, SpectralBound, UpBlock, normalised_once
from tmad.carafe import Carafe
from tmad.coarse import CoarseNet, compose
from tmad.config import CarafeConfig, CoarseConfig, DiscriminatorsConfig, PSNetConfig, TMADConfig
from tmad.discriminators import GlobalDiscriminator, PatchDiscriminator, gradient_penalty
from tmad.model import TMAD
from tmad.mosaic import NUM_BANDS
from tmad.psnet import PSNet


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
    # Coarse result and mask.
    assert own_convolutions(net.encoder) == [(4, 16, (1, 1))]
    texture = nn.Sequential(*net.texture_half, *net.texture_quarter)
    assert count(texture) == {"down": 2, "res": 2, "up": 0}
    assert own_convolutions(texture) == [(12, 16, (1, 1))]
    assert [type(block) for block in (net.up_half, net.up_full)] == [UpBlock, UpBlock]
    # The third up-block of the count: two convolutions at full resolution, then out-conv.
    assert own_convolutions(net.decode) == [(16, 16, (3, 3)), (16, 16, (3, 3))]
    assert (net.output.in_channels, net.output.out_channels, net.output.kernel_size) == (16, 3, (1, 1))
    # Beyond the table [D]: gains of two bands of four candidates.
    assert (net.gains.in_channels, net.gains.out_channels, net.gains.kernel_size) == (16, 8, (1, 1))


def test_no_network_has_a_normalisation_layer_or_an_activation_behind_its_last_convolution(full: TMAD) -> None:
    discriminators = DiscriminatorsConfig()
    networks = [full, PatchDiscriminator(discriminators), GlobalDiscriminator(discriminators)]
    for network in networks:
        leaves = [part for part in network.modules() if not isinstance(part, nn.Conv2d) and not list(part.children())]
        # The spectral bound is a parametrization of a weight, no layer.
        leaves = [part for part in leaves if not isinstance(part, SpectralBound)]
        assert all(isinstance(part, nn.LeakyReLU) for part in leaves)
    last = (full.coarse.layers[-1], full.psnet.output, full.psnet.gains, networks[1].layers[-1], networks[2].layers[-1])
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


PARTS = tuple[Tensor, Tensor, Tensor, Tensor]
"""What PSNet sees: coarse result, mask, mosaics, details."""


def psnet_inputs(height: int = 32, width: int = 48, *, batch: int = 2, candidates: int = 2, seed: int = 0) -> PARTS:
    size = height, width
    return (
        rand(batch, 3, *size, seed=seed),
        (rand(batch, 1, *size, seed=seed + 1) > 0).float(),
        rand(batch, candidates, 3, *size, seed=seed + 2),
        rand(batch, candidates, NUM_BANDS, 3, *size, seed=seed + 3),
    )


def make_psnet(
    candidates: int = 2, *, carafe: CarafeConfig | None = None, noise: bool = True, **changes: object
) -> PSNet:
    """A small PSNet, the same for the same settings; with *noise* its outputs do not start at zero."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = PSNet(replace(MODEL.psnet, **changes), carafe or CarafeConfig(kernel=3), candidates).eval()
        for layer in (net.output, getattr(net, "gains", None)):
            if noise and layer is not None:
                nn.init.normal_(layer.weight, std=0.3)
                nn.init.normal_(layer.bias, std=0.3)
    return net


@pytest.mark.parametrize("size", [(8, 8), (4, 12), (32, 20)])
def test_psnet_gives_a_picture_of_the_size_it_was_given(size: tuple[int, int]) -> None:
    result = make_psnet(3)(*psnet_inputs(*size, candidates=3))
    assert result.shape == (2, 3, *size)


def psnet_twin(net: PSNet, coarse: Tensor, mask: Tensor, mosaics: Tensor, details: Tensor) -> Tensor:
    """PSNet spelled out from its own weights, with explicit skips, sums and gains and the blocks' literal form."""

    def act(layer: nn.Module, x: Tensor) -> Tensor:
        return F.leaky_relu(F.conv2d(x, layer.weight, layer.bias, padding=layer.weight.shape[-1] // 2), 0.2)

    def down(block: nn.Module, x: Tensor) -> Tensor:
        return F.interpolate(act(block[2], act(block[0], x)), scale_factor=0.5, mode="nearest")

    def res(block: nn.Module, x: Tensor) -> Tensor:
        return x + act(block.branch[2], act(block.branch[0], x))

    def up(block: nn.Module, x: Tensor) -> Tensor:
        return act(block[3], act(block[1], block[0](x)))

    candidates = mosaics.shape[1]
    x = act(net.encoder[0], torch.cat([coarse, mask], 1))
    x = down(net.encoder[3], down(net.encoder[2], x))
    for block in net.encoder[4:]:
        x = res(block, x)
    half = act(net.texture_half[0], torch.cat([mosaics[:, c] for c in range(candidates)], 1))
    half = down(net.texture_half[2], half)
    quarter = down(net.texture_quarter[0], half)
    for block in net.texture_quarter[1:]:
        quarter = res(block, quarter)
    x = up(net.up_half, torch.cat([x, quarter], 1))
    x = up(net.up_full, torch.cat([x, half], 1))
    x = act(net.decode[2], act(net.decode[0], x))
    result = F.conv2d(x, net.output.weight, net.output.bias)
    if net.residual in ("coarse", "detail"):
        result = result + coarse
    if net.residual == "detail":
        gains = F.conv2d(x, net.gains.weight, net.gains.bias)
        for c in range(candidates):
            for band in range(NUM_BANDS):
                result = result + gains[:, None, NUM_BANDS * c + band] * details[:, c, band]
    return result


@pytest.mark.parametrize("residual", ["none", "coarse", "detail"])
def test_psnet_equals_its_blocks_written_out(residual: str) -> None:
    net, parts = make_psnet(residual=residual), psnet_inputs()
    torch.testing.assert_close(net(*parts), psnet_twin(net, *parts), rtol=1e-4, atol=1e-5)


def test_both_skips_reach_the_result() -> None:
    net, parts = make_psnet(), psnet_inputs()
    plain = net(*parts)
    changes = []
    for part in (net.encoder, net.texture_half, net.texture_quarter):
        handle = part.register_forward_hook(lambda module, args, out: out + 0.5)
        changes.append((net(*parts) - plain).abs().max())
        handle.remove()
    assert min(changes) > 1e-3


def test_psnet_reads_the_mask_and_every_candidate() -> None:
    net, (coarse, mask, mosaics, details) = make_psnet(), psnet_inputs()
    plain = net(coarse, mask, mosaics, details)
    assert not torch.allclose(net(coarse, 1 - mask, mosaics, details), plain)
    for c in range(2):
        other = mosaics.clone()
        other[:, c] += 1
        assert not torch.allclose(net(coarse, mask, other, details), plain)


@pytest.mark.parametrize("residual", ["coarse", "detail"])
def test_with_a_residual_option_psnet_starts_at_what_it_adds_to(residual: str) -> None:
    net, parts = make_psnet(noise=False, residual=residual), psnet_inputs()
    coarse, _, _, details = parts
    start = coarse if residual == "coarse" else coarse + details[:, 0, 0] + details[:, 0, 1]
    torch.testing.assert_close(net(*parts), start, rtol=1e-6, atol=1e-6)


def test_without_a_residual_option_psnet_starts_near_the_middle_of_the_range() -> None:
    assert make_psnet(noise=False, residual="none")(*psnet_inputs()).std() < 0.5


@pytest.mark.parametrize("residual", ["coarse", "detail"])
def test_a_residual_option_changes_nothing_but_the_sum(residual: str) -> None:
    plain, added, parts = make_psnet(residual="none"), make_psnet(residual=residual), psnet_inputs()
    added.load_state_dict(plain.state_dict(), strict=False)
    expected = plain(*parts) + parts[0]
    if residual == "detail":
        with torch.no_grad():
            added.gains.weight.zero_()
            added.gains.bias.copy_(torch.arange(4))
        expected = expected + parts[3][:, 0, 1] + 2 * parts[3][:, 1, 0] + 3 * parts[3][:, 1, 1]
    torch.testing.assert_close(added(*parts), expected)


def test_gains_differ_from_place_to_place_and_teach_the_decoder() -> None:
    net, (coarse, mask, mosaics, details) = make_psnet(), psnet_inputs()
    one_band = torch.zeros_like(details)
    one_band[:, 1, 0] = 1
    gain = net(coarse, mask, mosaics, one_band) - net(coarse, mask, mosaics, torch.zeros_like(details))
    # One gain for all colours.
    torch.testing.assert_close(gain[:, :1].expand(-1, 3, -1, -1), gain)
    assert gain.std() > 0.01
    (gain.square().mean()).backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in net.decode.parameters())


@pytest.mark.parametrize("shift", [(4, 0), (0, 4), (8, 12)])
def test_psnet_knows_no_cells_a_picture_that_is_moved_by_four_pixels_gives_a_result_moved_by_four(
    shift: tuple[int, int],
) -> None:
    net = make_psnet().double()
    parts = [part.double() for part in psnet_inputs(112, 112, batch=1)]
    moved = [torch.roll(part, shift, (-2, -1)) for part in parts]
    inner = np.s_[..., net.reach + 12 : -net.reach - 12, net.reach + 12 : -net.reach - 12]
    expected = torch.roll(net(*parts), shift, (-2, -1))[inner]
    assert expected.numel() > 1000
    # CARAFE's softmax runs in float32.
    torch.testing.assert_close(net(*moved)[inner], expected, rtol=1e-5, atol=1e-5)
    assert expected.std() > 0.1


@pytest.mark.parametrize(
    ("blocks", "texture_blocks", "carafe"),
    [
        (1, 1, CarafeConfig(kernel=3, mid_channels=4)),
        (2, 1, CarafeConfig(kernel=5, mid_channels=4)),
        (1, 3, CarafeConfig(kernel=3, mid_channels=4)),
        (1, 1, CarafeConfig(kernel=3, encoder_kernel=7, mid_channels=4)),
    ],
)
def test_nothing_beyond_its_reach_changes_a_pixel_of_psnet_and_something_near_it_does(
    blocks: int, texture_blocks: int, carafe: CarafeConfig
) -> None:
    net = make_psnet(1, carafe=carafe, num_res_blocks=blocks, num_texture_res_blocks=texture_blocks, base_width=2)
    with_strong_kernels(net)
    side = 4 * (-(-2 * (net.reach + 8) // 4))
    farthest = 0
    # All positions that a pixel can have in the quarter-resolution grid.
    for offset in range(4):
        y = side // 2 // 4 * 4 + offset
        parts = [part.requires_grad_() for part in psnet_inputs(side, side, batch=1, candidates=1)]
        gradients = torch.autograd.grad(net(*parts)[0, :, y, y].sum(), parts)
        for gradient in gradients:
            touched = (gradient.flatten(0, -3).abs().sum(0) > 0).nonzero()
            farthest = max(farthest, int((touched - y).abs().max()))
    assert farthest <= net.reach
    # The bound is not much too wide either: three pixels are lost to rounding to the grid.
    assert farthest >= net.reach - 4


def with_strong_kernels(net: nn.Module) -> nn.Module:
    """*net* with CARAFE as it may become: at the start its kernels hardly depend on what is there."""
    for part in net.modules():
        if isinstance(part, Carafe):
            nn.init.normal_(part.encode.weight, std=0.3)
            nn.init.normal_(part.encode.bias, std=0.3)
    return net


INNER = [np.s_[0:8, 4:16], np.s_[41:44, 3:90], np.s_[29:30, 64:65], np.s_[88:96, 80:96], np.s_[0:96, 0:96]]
"""Parts at borders and corners, inside, of one pixel, and all of a picture of 96 pixels."""


@pytest.mark.parametrize("inner", INNER, ids=str)
@pytest.mark.parametrize("carafe", [CarafeConfig(mid_channels=4), CarafeConfig(kernel=1, encoder_kernel=7)])
def test_a_part_of_what_the_networks_make_is_what_the_whole_has_there(
    inner: tuple[slice, slice], carafe: CarafeConfig
) -> None:
    psnet = with_strong_kernels(make_psnet(carafe=carafe).double())
    parts = [part.double() for part in psnet_inputs(96, 96, batch=1)]
    coarse = with_strong_kernels(CoarseNet(MODEL.coarse, carafe).double())
    # CARAFE's softmax runs in float32.
    near = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)
    near(psnet(*parts, inner), psnet(*parts)[..., *inner])
    near(coarse(parts[0], parts[1], inner), coarse(parts[0], parts[1])[..., *inner])


def test_the_reach_of_the_papers_settings_is_70_pixels(full: TMAD) -> None:
    assert full.psnet.reach == 70


@pytest.mark.parametrize("residual", ["none", "detail"])
def test_the_stored_weights_of_all_normalised_layers_turn_equally_fast(residual: str) -> None:
    # Adam moves every stored weight by the same: one that is ten times smaller turns ten times faster.
    with torch.random.fork_rng():
        torch.manual_seed(0)
        networks = [
            PSNet(PSNetConfig(residual=residual), CarafeConfig(), 4),
            PatchDiscriminator(DiscriminatorsConfig()),
            GlobalDiscriminator(DiscriminatorsConfig(global_base_width=16)),
        ]
    for network in networks:
        shares = {}
        for name, layer in network.named_modules():
            if nn.utils.parametrize.is_parametrized(layer, "weight"):
                stored = layer.parametrizations.weight.original.detach().flatten(1)
                bound = SPECTRAL_GAIN * (1 + math.sqrt(stored.shape[0] / stored.shape[1]))
                shares[name] = float(torch.linalg.matrix_norm(stored, ord=2)) / bound
        assert len(shares) >= 5
        assert min(shares.values()) > 0.7 * max(shares.values()), shares


def test_the_patch_discriminator_scores_a_map_of_a_quarter_of_the_side() -> None:
    discriminator = PatchDiscriminator(DiscriminatorsConfig(patch_base_width=4))
    assert count(discriminator) == {"down": 2, "res": 2, "up": 0}
    assert discriminator(rand(6, 3, 32, 32)).shape == (6, 1, 8, 8)


def test_the_global_discriminator_has_a_field_of_70_pixels() -> None:
    discriminator = GlobalDiscriminator(DiscriminatorsConfig(global_base_width=2))
    assert field(discriminator, rand(1, 3, 160, 160)) == (70, 70)
    assert discriminator(rand(2, 3, 64, 96)).shape == (2, 1, 6, 10)
    assert discriminator(rand(1, 3, 32, 32)).shape == (1, 1, 2, 2)


def test_the_global_discriminator_has_patchgan_widths() -> None:
    widths = [c.out_channels for c in GlobalDiscriminator(DiscriminatorsConfig()).layers if isinstance(c, nn.Conv2d)]
    assert widths == [64, 128, 256, 512, 1]


def normalised_convolutions(network: nn.Module) -> list[nn.Conv2d]:
    """Those that spectral normalisation is meant for: all but CARAFE's and PSNet's linear outputs."""
    left_out = {id(layer) for part in network.modules() if isinstance(part, Carafe) for layer in part.modules()}
    left_out |= {id(getattr(network, name, None)) for name in ("output", "gains")}
    return [part for part in network.modules() if isinstance(part, nn.Conv2d) and id(part) not in left_out]


@pytest.mark.parametrize("wanted", [True, False])
def test_spectral_normalisation_covers_psnet_but_carafe_and_its_output_the_discriminators_and_nothing_elsewhere(
    wanted: bool,
) -> None:
    config = replace(MODEL, psnet=replace(MODEL.psnet, spectral_norm=wanted))
    discriminators = replace(TRAINING.discriminators, spectral_norm=wanted)
    model = TMAD(config)
    for module in (model.psnet, PatchDiscriminator(discriminators), GlobalDiscriminator(discriminators)):
        convolutions = normalised_convolutions(module)
        assert {nn.utils.parametrize.is_parametrized(part, "weight") for part in convolutions} == {wanted}
    carafes = [part for part in model.psnet.modules() if isinstance(part, Carafe)]
    assert len(carafes) == 2
    for module in (model.coarse, model.retrieval, model.psnet.output, model.psnet.gains, *carafes):
        assert not any(nn.utils.parametrize.is_parametrized(part) for part in module.modules())


def test_the_spectral_bound_holds_after_training_steps_and_binds_there() -> None:
    state = make_state()
    train(state, 12)
    networks = [state.model.psnet, state.patch_discriminator, state.global_discriminator]
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
    assert max(originals) > 1.15


def penalty_twin(discriminator: nn.Module, real: Tensor, fake: Tensor, mix: Tensor, step: float = 1e-5) -> float:
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
                shifted.append(float(discriminator(moved[None]).mean()))
            squares += ((shifted[0] - shifted[1]) / (2 * step)) ** 2
        total += (math.sqrt(squares) - 1) ** 2
    return total / len(real)


class SmoothDiscriminator(nn.Module):
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
    discriminator, (real, fake, mix) = SmoothDiscriminator(), penalty_inputs()
    with torch.no_grad():
        expected = penalty_twin(discriminator, real.double(), fake.double(), mix.double())
    assert float(gradient_penalty(discriminator, real, fake, mix).detach()) == pytest.approx(expected, rel=1e-4)


def test_the_gradient_penalty_is_differentiable_in_the_discriminator() -> None:
    discriminator, inputs = SmoothDiscriminator(), penalty_inputs()
    gradient_penalty(discriminator, *inputs).backward()
    weight, step = discriminator.first.weight, 1e-5
    for place in ((0, 0, 0, 0), (2, 1, 1, 2)):
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                weight[place] += sign * step
            values.append(float(gradient_penalty(discriminator, *inputs).detach()))
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


@pytest.mark.parametrize("kind", [PatchDiscriminator, GlobalDiscriminator])
def test_the_penalty_reaches_the_weights_of_the_real_discriminators_as_with_pytorchs_leaky_relu(
    kind: type[nn.Module],
) -> None:
    discriminator = kind(TRAINING.discriminators)
    twin = copy.deepcopy(discriminator)
    for part in twin.modules():
        if isinstance(part, nn.LeakyReLU):
            part.__class__ = nn.LeakyReLU
    images, others = rand(2, 3, 32, 32), rand(2, 3, 32, 32, seed=1)
    with normalised_once(discriminator, twin):
        found, expected = (
            gradient_penalty(one, images, others, torch.tensor([0.3, 0.6])) for one in (discriminator, twin)
        )
        (found + expected).backward()
    for (name, parameter), other in zip(discriminator.named_parameters(), twin.parameters(), strict=True):
        if name.endswith("original"):
            assert parameter.grad is not None
            assert parameter.grad.abs().max() > 0
            torch.testing.assert_close(parameter.grad, other.grad)
