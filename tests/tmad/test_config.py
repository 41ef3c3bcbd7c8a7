"""Settings: the paper's values, what is refused and how it is said, the way through JSON and back."""

from __future__ import annotations

import ast
import inspect
import json
from dataclasses import FrozenInstanceError, asdict, fields, is_dataclass
from itertools import pairwise

import pytest
from pydantic import ValidationError

from tests.tmad.tiny import TRAINING
from tmad import config as module
from tmad.config import (
    CarafeConfig,
    CoarseConfig,
    LossConfig,
    MemoryConfig,
    OptimConfig,
    PSNetConfig,
    RetrievalConfig,
    TMADConfig,
    TrainingConfig,
    from_dict,
)

SETTINGS = [kind for _, kind in inspect.getmembers(module, is_dataclass)]


def test_the_defaults_are_the_papers_values() -> None:
    config = TrainingConfig()
    assert (config.model.patch_size, config.model.memory.pool_size, config.model.retrieval.num_candidates) == (
        32,
        100,
        4,
    )
    blocks = config.model.coarse, config.model.psnet
    assert (blocks[0].num_down_blocks, blocks[0].num_res_blocks) == (3, 8)
    assert (blocks[1].num_res_blocks, blocks[1].num_texture_res_blocks) == (5, 2)
    loss = config.loss
    assert (loss.weight_hole, loss.weight_valid, loss.weight_l1) == (6, 1, 1)
    assert (loss.weight_gan_patch, loss.weight_perceptual, loss.weight_tv, loss.weight_gan_global) == (
        0.05,
        0.02,
        0.02,
        0.02,
    )
    assert loss.relativistic
    assert config.model.retrieval.temperature == 1
    assert (config.optim.lr, config.optim.lr_discriminators) == (1e-4, None)


def test_the_memory_stride_is_a_half_for_rectangles_and_a_quarter_for_free_form() -> None:
    assert TMADConfig().memory_stride == 8
    assert TMADConfig(memory=MemoryConfig(rule="clean", stride_divisor=2)).memory_stride == 16


def test_where_the_paper_does_not_hold_up_the_defaults_are_what_was_measured() -> None:
    config = TrainingConfig()
    assert (config.model.psnet.residual, config.loss.patch_region) == ("detail", "hole")
    assert (config.model.retrieval.straight_through, config.loss.weight_retrieval) == (False, 1)


def test_the_overlap_is_a_share_of_the_patch_up_to_a_half() -> None:
    assert TMADConfig().overlap == 16
    assert TMADConfig(patch_size=20).overlap == 10
    assert [TMADConfig(psnet=PSNetConfig(overlap=share)).overlap for share in (0, 0.5)] == [0, 16]


def test_a_rate_of_zero_for_the_coarse_network_is_a_setting_and_for_others_none() -> None:
    assert OptimConfig(lr_coarse_joint=0).lr_coarse_joint == 0
    with pytest.raises(ValidationError, match="lr_discriminators"):
        OptimConfig(lr_discriminators=0)


@pytest.mark.parametrize("kind", SETTINGS, ids=lambda kind: kind.__name__)
def test_every_setting_says_what_it_is_and_where_it_comes_from(kind: type) -> None:
    body = ast.parse(inspect.getsource(kind)).body[0].body  # type: ignore[attr-defined]
    described = {
        field.target.id: text.value.value
        for field, text in pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)
    }
    for field in fields(kind):
        if not is_dataclass(field.type) and not str(field.type).endswith("Config"):
            text = described.get(field.name, "")
            assert any(origin in text for origin in ("[P", "[A", "[D", "Eq.", "Fig.")), (
                f"{kind.__name__}.{field.name}: {text!r}"
            )


@pytest.mark.parametrize("kind", SETTINGS, ids=lambda kind: kind.__name__)
def test_settings_are_frozen_keyword_only_and_refuse_unknown_names(kind: type) -> None:
    config = kind()
    with pytest.raises(FrozenInstanceError):
        setattr(config, fields(kind)[0].name, None)
    with pytest.raises((TypeError, ValidationError)):
        kind(1)
    with pytest.raises(ValidationError, match="surprise"):
        kind(surprise=1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CarafeConfig(kernel=4), r"carafe\.kernel must be odd, got 4"),
        (lambda: CarafeConfig(encoder_kernel=2), r"carafe\.encoder_kernel must be odd, got 2"),
        (lambda: TMADConfig(patch_size=30), "multiple of 4 and at least 8, got 30"),
        (lambda: TMADConfig(patch_size=4), "multiple of 4 and at least 8, got 4"),
        (lambda: TMADConfig(memory=MemoryConfig(stride_divisor=3)), r"must divide patch_size \(32\), got 3"),
        (lambda: TMADConfig(memory=MemoryConfig(pool_size=2)), r"at least retrieval\.num_candidates \(4\), got 2"),
        (lambda: TMADConfig(retrieval=RetrievalConfig(num_candidates=101)), r"num_candidates \(101\), got 100"),
        (lambda: LossConfig(weight_l1=-1), "weight_l1"),
        (lambda: OptimConfig(lr=0), "lr"),
        (lambda: MemoryConfig(rule="cleanest"), "rule"),  # type: ignore[arg-type]
        (lambda: RetrievalConfig(temperature=0), "temperature"),
        (lambda: PSNetConfig(overlap=0.51), "overlap"),
        (lambda: PSNetConfig(overlap=-0.1), "overlap"),
        (lambda: LossConfig(weight_retrieval=-1), "weight_retrieval"),
        (lambda: OptimConfig(lr_coarse_joint=-1e-4), "lr_coarse_joint"),
        (lambda: CoarseConfig(dilations=(2, 0)), "dilations"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]


@pytest.mark.parametrize("config", [TrainingConfig(), TRAINING])
def test_settings_survive_json(config: TrainingConfig) -> None:
    assert from_dict(TrainingConfig, json.loads(json.dumps(asdict(config)))) == config


def test_settings_that_are_left_out_keep_their_defaults() -> None:
    config = from_dict(TrainingConfig, {"model": {"psnet": {"base_width": 8}}})
    assert config.model.psnet.base_width == 8
    assert config.model.psnet.num_res_blocks == 5
    assert config.optim == OptimConfig()


def test_an_unknown_name_is_refused_with_the_near_ones_and_its_place() -> None:
    values = {"model": {"psnet": {"base_widht": 8}}, "optim": {"learning": 1}, "presicion": "fp32"}
    with pytest.raises(ValueError, match="unknown setting in TrainingConfig") as caught:
        from_dict(TrainingConfig, values)
    message = str(caught.value)
    assert "model.psnet.base_widht (did you mean base_width?)" in message
    assert "presicion (did you mean precision?)" in message
    assert "optim.learning (did you mean" in message
    assert "lr" in message


def test_a_value_of_the_wrong_type_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"(?s)model.*patch_size.*valid integer"):
        from_dict(TrainingConfig, {"model": {"patch_size": "wide"}})
    with pytest.raises(ValueError, match="optim"):
        from_dict(TrainingConfig, {"optim": 3})
