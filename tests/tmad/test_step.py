"""The training step: what each term and module learns, what a zero weight leaves out, what a bad step leaves alone."""

from __future__ import annotations

import copy
import math
import pickle
import shutil
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.utils._python_dispatch import TorchDispatchMode

from tests.tmad.test_losses import equation_6, equation_7, flat, mean, region_twin, softplus, variation_twin
from tests.tmad.test_retrieval import expected_distance_twin
from tests.tmad.tiny import (
    MODEL,
    TRAINING,
    Features,
    make_batch,
    make_state,
    moved,
    snapshot,
    train,
    with_loss,
    with_noise,
    with_optim,
)
from tmad import carafe
from tmad.batch import Batch
from tmad.config import TrainingConfig
from tmad.images import to_model
from tmad.model import TMAD, TMADOutput
from tmad.perceptual import untrained_vgg19
from tmad.retrieval import retrieval_gain
from tmad.rng import torch_generator
from tmad.step import NonFiniteLoss, TrainingState, cosine_restarts

WEIGHTS = {
    "weight_hole": "coarse_hole",
    "weight_valid": "coarse_valid",
    "weight_l1": "l1",
    "weight_perceptual": "perceptual",
    "weight_retrieval": "retrieval",
    "weight_tv": "tv",
    "weight_gan_patch": "gan_patch",
    "weight_gan_global": "gan_global",
}
"""Each weight of Eq. 1, 8, 9 and the name of its term among the metrics."""

STILL = 1e-12
"""A learning rate that moves nothing worth mentioning."""

PLAIN_DISCRIMINATORS = replace(TRAINING, discriminators=replace(TRAINING.discriminators, spectral_norm=False))
"""Without the power iteration a score does not depend on how often the discriminator was asked before."""


def only(name: str, config: TrainingConfig = TRAINING) -> TrainingConfig:
    """*config* with one weight at 1 and all others at 0."""
    return with_loss(config, **{weight: float(weight == name) for weight in WEIGHTS})


def step(state: TrainingState, phase: str = "joint", **more: object) -> dict[str, Tensor]:
    batch = more.pop("batch", None) or make_batch()
    return state.step(batch, phase, global_batch=len(batch), progress=0.0, **more)  # type: ignore[arg-type]


class Recorder:
    """One worker that keeps copies of the gradients it is shown, and of the scalars whose mean is asked."""

    def __init__(self, poison: str = "") -> None:
        self.gradients: list[dict[int, Tensor]] = []
        self.means: list[float] = []
        self.poison = poison

    def mean(self, value: Tensor) -> Tensor:
        self.means.append(float(value.detach()))
        return value

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        parameters = list(parameters)
        self.gradients.append({id(p): p.grad.clone() for p in parameters})
        if self.poison:
            parameters[-1].grad.view(-1)[0] = float(self.poison)


def gradients(config: TrainingConfig, phase: str = "joint") -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    """Gradients by name of each update of one step (discriminators first, if any), and the step's metrics."""
    state, recorder = make_state(config), Recorder()
    names = {
        id(parameter): f"{part}.{name}"
        for part in ("model", "patch_discriminator", "global_discriminator")
        for name, parameter in getattr(state, part).named_parameters()
    }
    metrics = step(state, phase, workers=recorder)
    return [{names[key]: value for key, value in update.items()} for update in recorder.gradients], metrics


def minus(a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value - b[name] if name in b else value for name, value in a.items()}


def assert_close(a: dict[str, Tensor], b: dict[str, Tensor], minuend: dict[str, Tensor] | None = None) -> None:
    """Equal up to rounding, relative to the largest gradient, and where *a* is a difference, to that of its *minuend*;
    a missing gradient is zero."""
    largest = max(float(value.abs().max()) for value in [*a.values(), *b.values()])
    assert largest > 0
    rounding = max((float(value.abs().max()) for value in (minuend or {}).values()), default=0.0)
    assert rounding < 1000 * largest
    for name in a.keys() | b.keys():
        zero = torch.zeros(())
        difference = (a.get(name, zero) - b.get(name, zero)).abs().max()
        # S is the softmax of scores of some tens to hundreds, which float32 knows to 1e-5.
        assert float(difference) < 1e-4 * largest + 1e-5 * rounding, name


# What learns


def with_residual(residual: str, config: TrainingConfig = TRAINING) -> TrainingConfig:
    return replace(config, model=replace(config.model, psnet=replace(config.model.psnet, residual=residual)))


@pytest.mark.parametrize(("residual", "steps"), [("none", 1), ("coarse", 2), ("detail", 2)])
def test_joint_steps_move_every_parameter_of_every_module(residual: str, steps: int) -> None:
    # With a residual, the first step moves the outputs, which start at zero, and only then the layers before them.
    state = make_state(with_residual(residual))
    parts = {
        "coarse": state.model.coarse,
        "theta": state.model.retrieval.embed_query,
        "phi": state.model.retrieval.embed_memory,
        "backbone": state.model.psnet.encoder,
        "texture": nn.ModuleList([state.model.psnet.texture_half, state.model.psnet.texture_quarter]),
        "decoder": nn.ModuleList(
            [getattr(state.model.psnet, name) for name in ("up_half", "up_full", "decode", "output")]
            + ([state.model.psnet.gains] if residual == "detail" else [])
        ),
        "patch discriminator": state.patch_discriminator,
        "global discriminator": state.global_discriminator,
        "average": state.ema_model,
    }
    before = {name: snapshot(part) for name, part in parts.items()}
    train(state, steps)
    for name, part in parts.items():
        still = before[name].keys() - moved(before[name], part)
        # Relative scores do not depend on the last bias of the patch discriminator (Eq. 6); only rounding may move it.
        assert still <= ({"layers.6.bias"} if name == "patch discriminator" else set()), (name, still)
    assert sum(p.numel() for p in state.model.parameters()) == sum(
        value.numel() for name in list(parts)[:6] for value in before[name].values()
    )


def test_the_coarse_phase_moves_the_coarse_network_and_nothing_else() -> None:
    state = make_state()
    before = {name: snapshot(getattr(state, name)) for name in ("model", "patch_discriminator", "global_discriminator")}
    metrics = step(state, "coarse")
    names = moved(before["model"], state.model)
    assert names == {name for name in before["model"] if name.startswith("coarse.")}
    assert not moved(before["patch_discriminator"], state.patch_discriminator)
    assert not moved(before["global_discriminator"], state.global_discriminator)
    assert set(metrics) == {
        "loss/coarse_hole",
        "loss/coarse_valid",
        "loss/total",
        "grad_norm/generator",
        "grad_norm/coarse",
        "lr",
        "bad_steps",
    }


def test_the_gradient_norms_of_the_networks_make_up_those_of_their_optimizers() -> None:
    (metrics,) = train(make_state(), 1)
    parts = {
        "generator": ("coarse", "retrieval", "psnet"),
        "discriminators": ("patch_discriminator", "global_discriminator"),
    }
    assert {name for name in metrics if name.startswith("grad_norm/")} == {
        f"grad_norm/{name}" for whole, names in parts.items() for name in (whole, *names)
    }
    for whole, names in parts.items():
        norms = [metrics[f"grad_norm/{name}"] for name in names]
        assert all(norms)
        assert math.hypot(*norms) == pytest.approx(metrics[f"grad_norm/{whole}"], rel=1e-5)


@pytest.mark.parametrize("phase", ["coarse", "joint"])
def test_on_one_batch_the_reconstruction_terms_fall(phase: str) -> None:
    history = train(make_state(), 60, phase, fixed=True)
    names = ["coarse_hole", "coarse_valid", "total"] + (["l1", "perceptual"] if phase == "joint" else [])
    for name in [f"loss/{name}" for name in names]:
        assert history[-1][name] < 0.9 * history[0][name], name


@pytest.mark.parametrize("weight", [weight for weight in WEIGHTS if "gan" not in weight])
def test_each_term_falls_when_it_is_the_only_one(weight: str) -> None:
    history = train(make_state(with_optim(only(weight), lr=5e-3)), 12, fixed=True)
    name = f"loss/{WEIGHTS[weight]}"
    # No choice of patches is nearer than the memory's nearest ones.
    floors = [metrics["retrieval/best"] / 127.5 if weight == "weight_retrieval" else 0.0 for metrics in history]
    assert history[-1][name] - floors[-1] < 0.95 * (history[0][name] - floors[0])
    assert history[-1]["loss/total"] == history[-1][name]


@pytest.fixture(scope="module")
def trained_discriminators() -> tuple[TrainingState, list[dict]]:
    """A state whose discriminators have learnt one batch by heart while the generator stood still, and the steps."""
    state = make_state(with_loss(with_optim(lr=STILL, lr_discriminators=5e-3), gradient_penalty=0.1))
    return state, train(state, 8, fixed=True)


def test_the_discriminators_tell_real_from_fake_while_the_generator_stands_still(trained_discriminators: tuple) -> None:
    _, history = trained_discriminators
    for name in ("discriminator_patch", "discriminator_global"):
        assert history[-1][f"loss/{name}"] < 0.9 * history[0][f"loss/{name}"]
        assert history[-1][f"{name}/real"] > history[-1][f"{name}/fake"] + 0.5


@pytest.mark.parametrize("relativistic", [True, False])
@pytest.mark.parametrize("weight", ["weight_gan_patch", "weight_gan_global"])
def test_each_adversarial_term_falls_while_the_discriminators_stand_still(
    weight: str, relativistic: bool, trained_discriminators: tuple
) -> None:
    config = with_loss(with_optim(only(weight), lr_discriminators=STILL, lr=1e-3), relativistic=relativistic)
    state, (discriminators, _) = make_state(config), trained_discriminators
    state.restore(discriminators.tensors(), discriminators.counters())
    history = train(state, 8, fixed=True)
    name = WEIGHTS[weight]
    assert history[-1][f"loss/{name}"] < 0.8 * history[0][f"loss/{name}"]
    fakes = [metrics[f"{name.replace('gan', 'discriminator')}/fake"] for metrics in history]
    assert fakes[-1] > fakes[0] + 0.1


def test_the_penalty_falls_as_the_discriminators_are_trained_on_it() -> None:
    history = train(make_state(with_optim(lr=STILL, lr_discriminators=5e-3)), 8, fixed=True)
    for name in ("penalty/patch", "penalty/global"):
        assert history[-1][name] < 0.7 * history[0][name]


def test_the_total_is_the_weighted_sum_of_the_terms() -> None:
    metrics = step(make_state())
    expected = sum(getattr(TRAINING.loss, weight) * metrics[f"loss/{name}"] for weight, name in WEIGHTS.items())
    torch.testing.assert_close(metrics["loss/total"], expected)


# A weight of zero


@pytest.fixture(scope="module")
def still_discriminators() -> TrainingConfig:
    """Discriminators that stand still and count no questions, so that the generator's terms are comparable."""
    return with_loss(with_optim(PLAIN_DISCRIMINATORS, lr_discriminators=STILL), **dict.fromkeys(WEIGHTS, 0.5))


@pytest.fixture(scope="module")
def all_terms(still_discriminators: TrainingConfig) -> dict[str, Tensor]:
    return gradients(still_discriminators)[0][-1]


@pytest.mark.parametrize("weight", WEIGHTS)
def test_a_term_contributes_its_own_gradient_and_with_weight_zero_nothing(
    weight: str, still_discriminators: TrainingConfig, all_terms: dict[str, Tensor]
) -> None:
    without, metrics = gradients(with_loss(still_discriminators, **{weight: 0.0}))
    alone, _ = gradients(
        with_loss(only(weight, still_discriminators), **{weight: getattr(still_discriminators.loss, weight)})
    )
    assert f"loss/{WEIGHTS[weight]}" not in metrics
    assert set(metrics) >= {f"loss/{name}" for other, name in WEIGHTS.items() if other != weight}
    assert_close(minus(all_terms, without[-1]), alone[-1], all_terms)


@pytest.mark.parametrize(("weight", "discriminator"), [("weight_gan_patch", "patch"), ("weight_gan_global", "global")])
def test_a_discriminator_whose_weight_is_zero_is_left_untouched(weight: str, discriminator: str) -> None:
    state = make_state(with_loss(**{weight: 0.0}))
    before = copy.deepcopy(getattr(state, f"{discriminator}_discriminator").state_dict())
    metrics = train(state, 2)[-1]
    after = getattr(state, f"{discriminator}_discriminator").state_dict()
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    assert not [
        name
        for name in metrics
        if name.startswith(f"discriminator_{discriminator}") or name == f"penalty/{discriminator}"
    ]
    assert f"loss/discriminator_{discriminator}" not in metrics
    other = "global" if discriminator == "patch" else "patch"
    assert f"loss/discriminator_{other}" in metrics


def test_without_adversarial_terms_no_discriminator_is_asked() -> None:
    state = make_state(with_loss(weight_gan_patch=0.0, weight_gan_global=0.0))
    for discriminator in (state.patch_discriminator, state.global_discriminator):
        discriminator.register_forward_hook(lambda *args: pytest.fail("a discriminator was asked"))
    assert "grad_norm/discriminators" not in step(state)


def test_without_the_perceptual_term_no_feature_network_is_needed_and_with_it_it_is() -> None:
    TrainingState(with_loss(weight_perceptual=0.0))
    with pytest.raises(ValueError, match=r"loss\.weight_perceptual is 0\.02 .* but no feature network was given"):
        TrainingState(TRAINING)


# The values of the terms, and the adversarial game


def on_the_block(model: TMAD, batch: Batch) -> tuple[TMADOutput, Tensor, Tensor, Tensor]:
    """The generator on each image's block of drawn cells, cut out by hand: its output, the block's image and mask, and
    I_s of the whole image."""
    image, mask = to_model(batch.image), batch.mask.float()
    raw = model.predict_coarse(image, mask)
    coarse = torch.where(mask > 0, raw, image)
    memory = model.read_memory(coarse, batch.pool_yx)
    side = math.isqrt(batch.cells.shape[1])
    parts = []
    for number, cells in enumerate(batch.cells.tolist()):
        y, x = cells[0] // 4 * 16, cells[0] % 4 * 16
        assert cells == [(y // 16 + row) * 4 + x // 16 + column for row in range(side) for column in range(side)]
        place = (number, slice(None), slice(y, y + 16 * side), slice(x, x + 16 * side))
        parts.append([whole[place] for whole in (image, mask, raw, coarse)])
    block_image, block_mask, *rest = (torch.stack(one) for one in zip(*parts, strict=True))
    cells = torch.arange(side * side).expand(len(batch), -1)
    return model.fill(block_image, block_mask, *rest, memory, cells), block_image, block_mask, raw


def cells_of(pictures: Tensor) -> Tensor:
    """All cells of (B, C, H, W), (B, N, C, 16, 16)."""
    batch, channels, height, width = pictures.shape
    grid = pictures.reshape(batch, channels, height // 16, 16, width // 16, 16)
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels, 16, 16)


@pytest.mark.parametrize("region", ["cell", "hole"])
@pytest.mark.parametrize("relativistic", [True, False])
def test_every_term_of_a_step_equals_its_equation_written_out(relativistic: bool, region: str) -> None:
    config = with_loss(
        with_optim(PLAIN_DISCRIMINATORS, lr_discriminators=STILL), relativistic=relativistic, patch_region=region
    )
    state, batch = make_state(config), make_batch(num_cells=12)
    with_noise(state.model)
    twin = copy.deepcopy(state)
    metrics = {name: float(value) for name, value in step(state, batch=batch).items()}

    whole_image, whole_mask = to_model(batch.image), batch.mask.float()
    with torch.no_grad():
        out, image, mask, raw = on_the_block(twin.model, batch)
        target, hole = cells_of(image), cells_of(mask)
        seen = out.patches if region == "cell" else hole * out.patches + (1 - hole) * target
        reals = torch.cat([out.candidates.flatten(0, 2), target.flatten(0, 1)])
        real, fake = twin.patch_discriminator(reals), twin.patch_discriminator(seen.flatten(0, 1))
        memory = twin.patch_discriminator(out.pool.flatten(0, 1))
        global_real, global_fake = twin.global_discriminator(image), twin.global_discriminator(out.output)
        maps = [Features()(x.flatten(0, 1)) for x in (seen, target)]
    assert len(reals) == 2 * 9 * (2 + 1)
    # What the memory is compared with: the true cells that have a hole in them, and no others.
    counted = hole.flatten(2).amax(2) > 0
    assert counted.any(1).all()
    assert not counted.all()
    distances = (out.pool[:, None] - target[:, :, None]).abs().flatten(3).mean(3)
    top = distances.gather(2, out.candidate_index[..., :1])[..., 0]
    with torch.no_grad():
        reference = twin.untrained(cells_of(out.coarse), out.pool, out.pool).index
    untrained = distances.gather(2, reference[..., :1])[..., 0]
    r, f = flat(real), flat(fake)
    alone = mean([softplus(-x) for x in r]) + mean([softplus(x) for x in f]), mean([softplus(-x) for x in f])
    blend = flat(global_real), flat(global_fake)
    expected = {
        "loss/coarse_hole": region_twin(raw, whole_image, whole_mask),
        "loss/coarse_valid": region_twin(raw, whole_image, 1 - whole_mask),
        "loss/l1": float((seen - target).abs().mean()),
        "loss/retrieval": expected_distance_twin(out.weights, distances, counted),
        "retrieval/top": 127.5 * float(top[counted].mean()),
        "retrieval/untrained": 127.5 * float(untrained[counted].mean()),
        "retrieval/best": 127.5 * float(distances.amin(2)[counted].mean()),
        "retrieval/random": 127.5 * float(distances.mean(2)[counted].mean()),
        "retrieval/entropy": float(-(out.weights * out.weights.log()).sum(2)[counted].mean()),
        "loss/perceptual": sum(float((a - b).abs().mean()) for a, b in zip(*maps, strict=True)),
        "loss/tv": variation_twin(out.output, mask),
        "loss/discriminator_patch": equation_6(real, fake) if relativistic else alone[0],
        "loss/gan_patch": equation_7(memory, real, fake) if relativistic else alone[1],
        "loss/discriminator_global": mean([softplus(-x) for x in blend[0]]) + mean([softplus(x) for x in blend[1]]),
        "loss/gan_global": mean([softplus(-x) for x in blend[1]]),
        "discriminator_patch/real": mean(r),
        "discriminator_patch/fake": mean(f),
        "discriminator_global/real": mean(blend[0]),
        "discriminator_global/fake": mean(blend[1]),
    }
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-4)


def test_with_the_region_hole_the_patch_terms_see_the_cell_as_it_stands_in_the_result() -> None:
    config = with_loss(
        with_optim(PLAIN_DISCRIMINATORS, lr_discriminators=STILL), patch_region="hole", relativistic=False
    )
    state, batch = make_state(config), make_batch()
    twin = copy.deepcopy(state)
    metrics = step(state, batch=batch)
    with torch.no_grad():
        out, image, mask, _ = on_the_block(twin.model, batch)
        target, hole = cells_of(image), cells_of(mask)
        assert 0.1 < hole.mean() < 0.9
        seen = hole * out.patches + (1 - hole) * target
        maps = [Features()(x.flatten(0, 1)) for x in (seen, target)]
        expected = {
            "l1": (hole * (out.patches - target).abs()).mean(),
            "perceptual": sum((a - b).abs().mean() for a, b in zip(*maps, strict=True)),
            "gan_patch": nn.functional.softplus(-twin.patch_discriminator(seen.flatten(0, 1))).mean(),
            "tv": variation_twin(out.output, mask),
        }
        score = float(twin.patch_discriminator(seen.flatten(0, 1)).mean())
    for name, value in expected.items():
        assert float(metrics[f"loss/{name}"]) == pytest.approx(float(value), rel=1e-4), name
    assert float(metrics["discriminator_patch/fake"]) == pytest.approx(score, rel=1e-4)


def test_a_residual_psnet_learns_although_most_pixels_of_its_cells_are_no_hole() -> None:
    # Judged over the whole cell, where the median of what is to be added is zero, it is still at 1.0 instead of 0.33.
    model = replace(MODEL, psnet=replace(MODEL.psnet, residual="coarse"))
    config = with_optim(only("weight_l1", replace(TRAINING, model=model)), lr=5e-3, lr_coarse_joint=STILL)
    state, batch = make_state(with_loss(config, patch_region="hole")), make_batch()
    train(state, 120, fixed=True)
    image, mask = to_model(batch.image), batch.mask.float()
    with torch.no_grad():
        out = state.model(image, mask, batch.pool_yx, batch.cells)
    errors = [region_twin(filled, image, mask) for filled in (out.output, out.coarse)]
    assert errors[0] < 0.5 * errors[1]


def with_retrieval(config: TrainingConfig = TRAINING, **changes: object) -> TrainingConfig:
    model = replace(config.model, retrieval=replace(config.model.retrieval, **changes))
    return replace(config, model=model)


@pytest.mark.parametrize(("straight_through", "weight"), [(False, 0.0), (False, 1.0), (True, 0.0), (True, 1.0)])
def test_retrieval_learns_through_the_path_of_the_paper_or_from_its_own_term_or_not_at_all(
    straight_through: bool, weight: float
) -> None:
    config = with_loss(with_retrieval(straight_through=straight_through), weight_retrieval=weight)
    (_, update), metrics = gradients(config)
    reached = {name for name in update if name.startswith("model.retrieval.") and update[name].any()}
    assert len(reached) == (8 if straight_through or weight else 0)
    assert ("loss/retrieval" in metrics) == bool(weight)
    # Watched it is in any case.
    names = {"top", "untrained", "best", "random", "entropy", "distinct"}
    assert {f"retrieval/{name}" for name in names} <= set(metrics)


def test_the_retrieval_term_teaches_no_part_of_psnet() -> None:
    state = make_state(only("weight_retrieval"))
    before = snapshot(state.model)
    train(state, 2)
    names = {name.split(".")[0] for name in moved(before, state.model)}
    # Through the cells that are asked for it also reaches the network that makes them.
    assert names == {"retrieval", "coarse"}


def test_on_one_batch_the_retrieval_term_finds_nearer_patches_than_the_untrained_embedding() -> None:
    state = make_state(with_optim(only("weight_retrieval"), lr=5e-3, lr_coarse_joint=0.0))
    untrained = snapshot(state.untrained)
    history = train(state, 60, fixed=True)
    first, last = history[0], history[-1]
    assert first["retrieval/untrained"] == last["retrieval/untrained"]
    assert not moved(untrained, state.untrained)
    gain = retrieval_gain(*(last[f"retrieval/{name}"] for name in ("top", "untrained", "best")))
    assert gain is not None
    assert gain > 0.3
    assert last["retrieval/entropy"] < first["retrieval/entropy"]


def test_a_frozen_coarse_network_is_left_untouched_and_not_differentiated() -> None:
    config = with_optim(lr_coarse_joint=0.0)
    (_, update), metrics = gradients(config)
    assert not [name for name in update if name.startswith("model.coarse.")]
    assert not {"loss/coarse_hole", "loss/coarse_valid", "grad_norm/coarse"} & set(metrics)
    # All others get the gradients that they get beside a coarse network that learns.
    (_, everything), _ = gradients(TRAINING)
    others = {name: value for name, value in everything.items() if not name.startswith("model.coarse.")}
    assert others.keys() == update.keys()
    assert_close(others, update)

    state, seen = make_state(config), []
    state.model.coarse.register_forward_hook(lambda module, args, out: seen.append(out.requires_grad))
    before = snapshot(state.model.coarse)
    train(state, 2)
    assert not moved(before, state.model.coarse)
    assert seen == [False, False]
    assert not [name for name in state.tensors() if name.startswith("adam/generator/coarse.")]
    # In the phase of its own it learns as ever.
    train(state, 1, "coarse")
    assert moved(before, state.model.coarse) == before.keys()


def test_the_common_mean_is_asked_of_the_workers_for_both_expectations_of_both_sides() -> None:
    recorder = Recorder()
    metrics = step(make_state(PLAIN_DISCRIMINATORS), workers=recorder)
    # Discriminator and generator each ask for the mean of the fakes' scores, then of the reals'.
    assert recorder.means[:2] == pytest.approx(
        [float(metrics["discriminator_patch/fake"]), float(metrics["discriminator_patch/real"])]
    )
    assert len(recorder.means) == 4
    for config, phase in ((with_loss(relativistic=False), "joint"), (TRAINING, "coarse")):
        recorder = Recorder()
        step(make_state(config), phase, workers=recorder)
        assert recorder.means == []


def test_each_update_sees_the_gradients_of_its_own_networks_only() -> None:
    updates, _ = gradients(TRAINING)
    assert len(updates) == 2
    discriminators, generator = ({name.split(".")[0] for name in update} for update in updates)
    assert discriminators == {"patch_discriminator", "global_discriminator"}
    assert generator == {"model"}


def test_after_a_step_every_network_can_learn_again_and_holds_no_gradient() -> None:
    state = make_state()
    step(state)
    for module in (state.model, state.patch_discriminator, state.global_discriminator):
        assert all(parameter.requires_grad and parameter.grad is None for parameter in module.parameters())


def test_the_penalty_is_applied_every_nth_step_and_n_times_as_strong() -> None:
    none, one, three = (
        gradients(with_loss(PLAIN_DISCRIMINATORS, **changes))[0][0]
        for changes in ({"gradient_penalty": 0.0}, {"gp_every": 1}, {"gp_every": 3})
    )
    assert_close(minus(three, none), {name: 3 * value for name, value in minus(one, none).items()})
    history = train(make_state(with_loss(gp_every=3)), 4)
    for name in ("penalty/patch", "penalty/global"):
        assert [name in metrics for metrics in history] == [True, False, False, True]


def test_without_a_penalty_none_is_computed() -> None:
    metrics = step(make_state(with_loss(gradient_penalty=0.0)))
    assert not [name for name in metrics if name.startswith("penalty")]


def test_the_penalty_mixes_with_the_weights_the_batch_brings() -> None:
    batch = make_batch()
    values = []
    for mix in (batch.mix, 1 - batch.mix):
        metrics = step(make_state(), batch=replace(batch, mix=mix))
        values.append((float(metrics["penalty/patch"]), float(metrics["penalty/global"])))
    assert values[0][0] != values[1][0]
    assert values[0][1] != values[1][1]


# Rates, norms, counters


def test_the_cosine_falls_from_one_and_restarts_with_each_period() -> None:
    assert cosine_restarts(0, 4) == 1
    assert cosine_restarts(0.125, 4) == pytest.approx(0.5)
    assert cosine_restarts(0.2499999, 4) == pytest.approx(0, abs=1e-6)
    assert [cosine_restarts(p, 4) for p in (0.25, 0.5, 0.75)] == [1, 1, 1]
    assert cosine_restarts(0.5, 1) == pytest.approx(0.5)
    assert cosine_restarts(1 / 3, 1) == pytest.approx((1 + math.cos(math.pi / 3)) / 2)
    assert [cosine_restarts(p, 4) for p in (1, 1.7)] == [pytest.approx(0, abs=1e-12)] * 2


@pytest.mark.parametrize(("progress", "factor"), [(0.0, 1.0), (0.25, 0.5), (0.5, 1.0), (1.0, 0.0)])
def test_progress_drives_the_rates_of_generator_and_discriminators(progress: float, factor: float) -> None:
    state = make_state(with_optim(lr=1e-3, lr_discriminators=4e-3, min_lr=1e-5, cosine_periods=2))
    metrics = state.step(make_batch(), "coarse", global_batch=2, progress=progress)
    rates = {name: optimizer.param_groups[0]["lr"] for name, optimizer in state.optimizers.items()}
    assert rates["generator"] == pytest.approx(1e-5 + factor * (1e-3 - 1e-5))
    assert rates["discriminators"] == pytest.approx(1e-5 + factor * (4e-3 - 1e-5))
    assert float(metrics["lr"]) == pytest.approx(rates["generator"])


@pytest.mark.parametrize(("phase", "rate"), [("coarse", 1e-3), ("joint", 2e-4)])
def test_the_coarse_network_may_have_a_rate_of_its_own_in_the_joint_phase(phase: str, rate: float) -> None:
    state = make_state(with_optim(lr=1e-3, lr_coarse_joint=2e-4, min_lr=0))
    metrics = step(state, phase)
    rates = {
        id(parameter): group["lr"]
        for group in state.optimizers["generator"].param_groups
        for parameter in group["params"]
    }
    assert [rates[id(parameter)] for parameter in state.model.coarse.parameters()] == pytest.approx(
        [rate] * len(list(state.model.coarse.parameters()))
    )
    others = [*state.model.retrieval.parameters(), *state.model.psnet.parameters()]
    assert [rates[id(parameter)] for parameter in others] == pytest.approx([1e-3] * len(others))
    assert len(rates) == len(list(state.model.parameters()))
    assert float(metrics["lr"]) == pytest.approx(1e-3)


def test_the_reported_norm_is_the_one_before_clipping_and_the_update_uses_the_clipped_gradient() -> None:
    state, recorder = make_state(with_optim(clip_grad_norm=1e-3, betas=(0.5, 0.999))), Recorder()
    metrics = step(state, workers=recorder)
    for name, update in zip(("discriminators", "generator"), recorder.gradients, strict=True):
        norm = torch.stack([value.norm() for value in update.values()]).norm()
        torch.testing.assert_close(metrics[f"grad_norm/{name}"], norm)
        assert norm > 0.01
    # The generator as a whole, each discriminator on its own.
    for name, networks in (
        ("generator", [state.model]),
        ("discriminators", [state.patch_discriminator, state.global_discriminator]),
    ):
        for network in networks:
            assert float(given_to_adam(state, name, network)) == pytest.approx(1e-3, rel=1e-2)


def given_to_adam(state: TrainingState, optimizer: str, network: nn.Module) -> Tensor:
    """Norm of the gradient that Adam was given at its first step: its first moment is (1 - beta1) times that."""
    moments = [state.optimizers[optimizer].state[parameter]["exp_avg"] for parameter in network.parameters()]
    return torch.stack([moment.norm() for moment in moments]).norm() / (1 - TRAINING.optim.betas[0])


def test_a_loud_discriminator_does_not_slow_the_other_one_down() -> None:
    norms = {name: value for name, value in train(make_state(), 1)[0].items() if name.startswith("grad_norm/")}
    quiet, loud = sorted((norms["grad_norm/patch_discriminator"], norms["grad_norm/global_discriminator"]))
    name = "patch_discriminator" if quiet == norms["grad_norm/patch_discriminator"] else "global_discriminator"
    assert loud > 1.05 * quiet
    state = make_state(with_optim(clip_grad_norm=(quiet + loud) / 2))
    train(state, 1)
    assert float(given_to_adam(state, "discriminators", getattr(state, name))) == pytest.approx(quiet, rel=1e-3)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_with_one_discriminator_the_norm_of_all_is_its_own(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    state = TrainingState(with_loss(weight_gan_global=0.0), device=device, perceptual=Features())
    (metrics,) = train(state, 1)
    assert metrics["grad_norm/discriminators"] == pytest.approx(metrics["grad_norm/patch_discriminator"])


def test_a_limit_of_zero_does_not_clip() -> None:
    state, recorder = make_state(with_optim(clip_grad_norm=0)), Recorder()
    step(state, workers=recorder)
    moments = [moment["exp_avg"] for moment in state.optimizers["generator"].state.values()]
    norm = torch.stack([value.norm() for value in recorder.gradients[1].values()]).norm()
    torch.testing.assert_close(2 * torch.stack([m.norm() for m in moments]).norm(), norm)


def test_images_are_counted_over_all_workers() -> None:
    state = make_state()
    for _ in range(3):
        state.step(make_batch(), "coarse", global_batch=8, progress=0.0)
    assert state.counters() == {"images_seen": 24, "steps": 3, "bad_steps": 0, "bad_steps_in_row": 0}


def test_metrics_are_detached_scalars() -> None:
    for name, value in step(make_state()).items():
        assert value.ndim == 0, name
        assert not value.requires_grad, name


# Determinism and precision


@pytest.mark.parametrize("phase", ["coarse", "joint"])
def test_the_same_seed_and_batches_give_the_same_weights_to_the_last_bit(phase: str) -> None:
    states = [make_state(seed=seed) for seed in (4, 4, 5)]
    histories = [train(state, 3, phase) for state in states]
    assert histories[0] == histories[1]
    assert histories[0] != histories[2]
    a, b = states[0].tensors(), states[1].tensors()
    assert all(torch.equal(value, b[name]) for name, value in a.items())


def test_a_step_draws_nothing() -> None:
    state = make_state()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    step(state)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_seed_of_a_state_fixes_discriminators_too_and_they_differ_between_seeds() -> None:
    a, b, c = (make_state(seed=seed).patch_discriminator.state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(value, b[name]) for name, value in a.items())
    weights = [name for name in a if name.endswith("original")]
    assert not any(torch.equal(a[name], c[name]) for name in weights)


def test_bfloat16_keeps_losses_in_single_precision_and_near_those_of_it() -> None:
    exact = step(make_state())
    state = make_state(replace(TRAINING, precision="bf16"))
    rough = step(state)
    assert set(rough) == set(exact)
    for name, value in rough.items():
        assert value.dtype == torch.float32, name
        if name.startswith(("loss/", "penalty/")):
            assert float(value) == pytest.approx(float(exact[name]), rel=0.03), name
    assert {parameter.dtype for parameter in state.model.parameters()} == {torch.float32}


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    "change",
    [
        "use_channels_last",
        # As it is compiled, forward and backward, but not translated to C++, which takes most of a minute.
        pytest.param("aot_eager", marks=pytest.mark.slow),
        pytest.param(
            "inductor",
            marks=[
                pytest.mark.soak,
                pytest.mark.timeout(600),
                pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler"),
            ],
        ),
    ],
)
def test_compiled_networks_and_another_layout_compute_the_same_but_for_rounding(
    change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, other = make_state(), make_state()
    names = other.tensors().keys()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    if change == "use_channels_last":
        other.use_channels_last()
    else:
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=change))
        other.compile()
    for phase in ("coarse", "joint", "joint"):
        at_first = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        expected, found = step(plain, phase), step(other, phase)
        assert found.keys() == expected.keys()
        for name, value in found.items():
            assert float(value) == pytest.approx(float(expected[name]), rel=2e-3, abs=1e-4), name
    assert {name for name in other.tensors() if not name.startswith("adam/")} == names
    if change != "use_channels_last":
        # Coarse network, PSNet, features with and without gradient, scores of the patch discriminator in three places
        # and of the other in two, two penalties. CARAFE's form for CPUs breaks graphs, nothing else does.
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        assert graphs >= 11
        assert graphs == at_first, "nothing is compiled again"
        assert all("`out=`" in reason for reason in torch._dynamo.utils.counters["graph_break"])
        torch._dynamo.reset()
    else:
        kernels = [one for one in other.model.psnet.parameters() if one.ndim == 4 and min(one.shape[1:]) > 1]
        assert kernels
        assert not any(one.is_contiguous() for one in kernels)
    restored = make_state()
    restored.restore(other.tensors(), other.counters())
    for name, value in restored.tensors().items():
        assert torch.equal(value, other.tensors()[name]), name


# Bad steps


class Poisoned(Features):
    """A feature network that answers NaN while *bad* is set."""

    bad = True

    def forward(self, images: Tensor) -> list[Tensor]:
        factor = math.nan if self.bad else 1.0
        return [factor * features for features in super().forward(images)]


def weights_of(state: TrainingState, *parts: str) -> dict[str, Tensor]:
    """All weights and Adam moments; power-iteration vectors, which follow the weights, left out."""
    chosen = tuple(f"{part}/" for part in parts)
    return {
        name: value.clone()
        for name, value in state.tensors().items()
        if name.startswith(chosen) and not name.endswith(("._u", "._v"))
    }


def assert_unchanged(before: dict[str, Tensor], state: TrainingState, *parts: str) -> None:
    after = weights_of(state, *parts)
    assert before.keys() <= after.keys()
    # Adam makes its moments at its first call, even of a bad step: zeros, as if there had been none.
    assert all(torch.equal(before.get(name, torch.zeros_like(value)), value) for name, value in after.items())


def test_a_nan_in_the_scores_skips_the_step_and_changes_no_weight() -> None:
    state = make_state()
    train(state, 1)
    everything = ("model", "ema", "patch_discriminator", "global_discriminator", "adam")
    before = weights_of(state, *everything)
    state.patch_discriminator.register_forward_hook(lambda network, inputs, scores: scores * math.nan)
    metrics = step(state)
    assert_unchanged(before, state, *everything)
    assert state.counters() == {"images_seen": 4, "steps": 2, "bad_steps": 1, "bad_steps_in_row": 1}
    assert float(metrics["bad_steps"]) == 1
    assert not metrics["grad_norm/discriminators"].isfinite()


def test_a_nan_in_a_loss_skips_the_generators_update_and_the_average() -> None:
    state = TrainingState(TRAINING, perceptual=Poisoned())
    before = weights_of(state, "model", "ema", "adam/generator")
    metrics = step(state)
    assert_unchanged(before, state, "model", "ema", "adam/generator")
    assert (state.bad_steps, state.bad_steps_in_row) == (1, 1)
    assert not metrics["loss/perceptual"].isfinite()
    assert metrics["loss/l1"].isfinite()


@pytest.mark.parametrize("phase", ["coarse", "joint"])
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_gradient_of_another_worker_that_is_not_finite_skips_the_step_here_too(phase: str, value: str) -> None:
    state = make_state()
    everything = ("model", "ema", "patch_discriminator", "global_discriminator", "adam")
    before = weights_of(state, *everything)
    metrics = step(state, phase, workers=Recorder(poison=value))
    assert_unchanged(before, state, *everything)
    assert state.bad_steps == 1
    name = "grad_norm/generator" if phase == "coarse" else "grad_norm/discriminators"
    assert not metrics[name].isfinite()


def test_training_goes_on_after_a_bad_step_and_the_row_is_broken() -> None:
    network = Poisoned()
    state = TrainingState(TRAINING, perceptual=network)
    train(state, 2)
    network.bad = False
    history = train(state, 2)
    assert (state.bad_steps, state.bad_steps_in_row) == (2, 0)
    assert all(math.isfinite(value) for metrics in history for value in metrics.values())
    for module in (state.model, state.patch_discriminator):
        assert all(parameter.requires_grad for parameter in module.parameters())


def test_too_many_bad_steps_in_a_row_stop_the_run_and_name_the_terms() -> None:
    network = Poisoned()
    state = TrainingState(with_optim(max_bad_steps=3), perceptual=network)
    train(state, 2)
    network.bad = False
    train(state, 1)
    network.bad = True
    train(state, 2)
    with pytest.raises(NonFiniteLoss) as caught:
        train(state, 1)
    message = str(caught.value)
    assert "3 steps in a row were not finite (images 6 to 12 of the run)" in message
    assert "not finite in the last one: loss/perceptual, loss/total, grad_norm/generator, grad_norm/coarse" in message
    assert caught.value.terms[:2] == ("loss/perceptual", "loss/total")
    assert "optim.max_bad_steps" in message
    assert state.bad_steps == 5


def test_the_error_survives_the_way_between_processes() -> None:
    error = pickle.loads(pickle.dumps(NonFiniteLoss("3 steps in a row", ["loss/l1"])))
    assert isinstance(error, NonFiniteLoss)
    assert str(error) == "3 steps in a row"
    assert error.terms == ("loss/l1",)


class NeverWait(TorchDispatchMode):
    """Refuses what makes the host wait for a GPU: `.item()`, `float(tensor)`, `if tensor`, shapes out of values; counts
    calls by operator."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.calls[name] += 1
        assert name not in {"_local_scalar_dense", "is_nonzero", "nonzero", "equal", "masked_select", "unique2"}, name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("phase", ["coarse", "joint"])
def test_a_step_never_waits_for_the_device(phase: str) -> None:
    state = make_state()
    # A GPU's steps are read one step late, from memory of the host.
    state._late = 2
    with NeverWait():
        step(state, phase)
        step(state, phase)
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NeverWait():
        float(torch.ones(()))


def test_a_step_calls_one_operator_for_all_weights_and_takes_each_spectral_norm_once_for_each_set_of_weights() -> None:
    state = make_state()
    state._late = 2
    step(state)
    with NeverWait() as seen:
        step(state)
    groups = sum(len(optimizer.param_groups) for optimizer in state.optimizers.values())
    assert seen.calls["_fused_adam_"] == groups
    # The average: no call for a single weight, where there were two.
    assert seen.calls["lerp_"] == 0
    assert seen.calls["_foreach_sub"] <= 1 + groups

    def normalised(*networks: nn.Module) -> int:
        layers = [part for network in networks for part in network.modules() if is_parametrized(part, "weight")]
        return len({one.weight.shape[1:] for one in layers})

    # Two products for each length of rows; the discriminators' weights change within the step.
    psnet = normalised(state.model.psnet)
    discriminators = normalised(state.patch_discriminator, state.global_discriminator)
    assert min(psnet, discriminators) > 0
    # Retrieval compares memory and cells by one product more, which is differentiated by both.
    assert seen.calls["bmm"] == 2 * (psnet + 2 * discriminators) + 4
    assert seen.calls["mv"] == seen.calls["vdot"] == 0


class OneOperator(torch.autograd.Function):
    """As many calls as CARAFE's on a GPU: one, and two for its gradients."""

    @staticmethod
    def forward(ctx, features: Tensor, logits: Tensor, kernel: int) -> Tensor:
        ctx.save_for_backward(features, logits)
        return features.new_zeros(*features.shape[:2], *(2 * side for side in features.shape[2:]))

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        features, logits = ctx.saved_tensors
        return torch.zeros_like(features), torch.zeros_like(logits), None


VIEWS = {
    *("_reshape_alias", "_unsafe_view", "alias", "as_strided", "detach", "expand", "lift_fresh", "permute", "select"),
    *("slice", "split", "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unsqueeze", "view"),
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"),
}
"""Operators that start no kernel."""


def test_a_joint_step_of_the_default_networks_calls_fewer_than_1500_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(carafe, "upsample", OneOperator.apply)
    config = TrainingConfig(precision="bf16")
    model = replace(config.model, patch_size=16)
    model = replace(model, coarse=replace(model.coarse, base_width=4), psnet=replace(model.psnet, base_width=4))
    config = replace(config, model=model, discriminators=TRAINING.discriminators)
    state = TrainingState(config, perceptual=untrained_vgg19(torch_generator("vgg")))
    state._late = 2
    batch = make_batch(size=1, num_cells=16, config=model)
    step(state, batch=batch)
    with NeverWait() as seen:
        step(state, batch=batch)
    calls = {name: number for name, number in seen.calls.items() if name not in VIEWS}
    assert sum(calls.values()) < 1500, Counter(calls).most_common(20)
    # No weight is rounded by itself: there are 142 of them.
    assert calls["_to_copy"] < 60


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("phase", ["coarse", "joint"])
def test_pytorch_sees_no_wait_in_a_step_on_a_gpu(phase: str) -> None:
    state = TrainingState(TRAINING, perceptual=Features(), device="cuda")
    batch = make_batch().to(torch.device("cuda"))
    step(state, phase, batch=batch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(state, phase, batch=batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_what_is_read_a_step_late_is_counted_and_stops_the_run_all_the_same() -> None:
    network = Poisoned()
    state = TrainingState(with_optim(max_bad_steps=2), perceptual=network)
    state._late = 1
    train(state, 2)
    assert (state.bad_steps, state.bad_step.images_seen) == (1, 0)
    network.bad = False
    with pytest.raises(NonFiniteLoss, match="images 0 to 4 of the run"):
        train(state, 1)
    assert (state.bad_steps, state.bad_step.images_seen) == (2, 2)
    assert state.counters() == {"images_seen": 6, "steps": 3, "bad_steps": 2, "bad_steps_in_row": 0}


# Continuation in memory; through files: test_checkpoint.py


def test_a_restored_state_is_independent_of_the_tensors_it_came_from() -> None:
    state = make_state()
    train(state, 2)
    tensors = state.tensors()
    kept = {name: value.clone() for name, value in tensors.items()}
    other = make_state(seed=9)
    other.restore(kept, state.counters())
    train(other, 1)
    saved = state.tensors()
    assert all(torch.equal(value, saved[name]) for name, value in kept.items())


def test_tensors_of_another_network_are_refused_by_its_name() -> None:
    state = make_state()
    tensors = state.tensors()
    tensors["patch_discriminator/layers.0.bias"] = torch.zeros(99)
    with pytest.raises(
        ValueError, match=r"(?s)saved patch_discriminator does not fit this configuration.*layers\.0\.bias"
    ):
        make_state().restore(tensors, state.counters())
    del tensors["patch_discriminator/layers.0.bias"]
    with pytest.raises(ValueError, match=r"(?s)saved patch_discriminator.*Missing key"):
        make_state().restore(tensors, state.counters())
