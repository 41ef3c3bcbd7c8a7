"""Models and states on disk: continuation bit for bit, and every way in which a folder can be wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tmad.tiny import MODEL, TRAINING, make_batch, make_state, train, with_loss, with_optim
from tmad.checkpoint import load_model, load_state, model_digest, save_model, save_state
from tmad.config import TrainingConfig
from tmad.images import to_model
from tmad.model import TMAD
from tmad.step import TrainingState

EVERY_OTHER = with_loss(gp_every=2)
"""The penalty at every second step, so that a lost step count would show."""


def assert_same(a: TrainingState, b: TrainingState) -> None:
    """Equal to the last bit: networks, averages, moments, counters."""
    left, right = a.tensors(), b.tensors()
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []
    assert a.counters() == b.counters()


@pytest.fixture(scope="module")
def trained() -> TrainingState:
    state = make_state(EVERY_OTHER)
    train(state, 2)
    return state


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    save_model(TMAD(MODEL, seed=1), tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def state_folder(trained: TrainingState, tmp_path: Path) -> Path:
    save_state(trained, tmp_path / "state")
    return tmp_path / "state"


@pytest.mark.parametrize(
    "phases",
    [
        (["coarse"] * 2, ["coarse"] * 2),
        (["coarse", "joint", "joint"], ["joint"] * 2),
        (["coarse", "coarse"], ["joint", "joint"]),
    ],
    ids=["coarse phase", "joint phase", "between the phases"],
)
def test_n_steps_saved_and_loaded_and_k_more_equal_n_plus_k_steps(phases: tuple, tmp_path: Path) -> None:
    before, after = phases

    def run(state: TrainingState, names: list[str], first: int) -> list[dict]:
        return [metrics for i, name in enumerate(names) for metrics in train(state, 1, name, first=first + i)]

    unbroken = make_state(EVERY_OTHER)
    run(unbroken, before, 0)
    save_state(unbroken, tmp_path)
    expected = run(unbroken, after, len(before))

    resumed = make_state(EVERY_OTHER, seed=77)
    load_state(resumed, tmp_path)
    assert run(resumed, after, len(before)) == expected
    assert_same(resumed, unbroken)


def test_loading_gives_back_everything_into_a_state_that_was_already_trained(
    trained: TrainingState, state_folder: Path
) -> None:
    other = make_state(EVERY_OTHER, seed=5)
    train(other, 1)
    load_state(other, state_folder)
    assert_same(other, trained)


def test_a_checkpoint_with_the_former_names_of_the_discriminators_is_continued(
    trained: TrainingState, state_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for file in (state_folder / "state.json", state_folder / "state.safetensors"):
        data = file.read_bytes()
        assert b"discriminator" in data
        if file.suffix == ".json":
            file.write_bytes(data.replace(b"discriminator", b"critic"))
        else:
            save_file({name.replace("discriminator", "critic"): value for name, value in load_file(file).items()}, file)
    again = make_state(trained.config, seed=5)
    with caplog.at_level("INFO"):
        load_state(again, state_folder)
    assert_same(again, trained)
    assert "the setting critics is called discriminators now" in caplog.text


def test_a_bad_step_is_remembered_across_a_checkpoint(tmp_path: Path) -> None:
    state = make_state()
    state.bad_steps, state.bad_steps_in_row = 7, 2
    save_state(state, tmp_path)
    resumed = make_state()
    load_state(resumed, tmp_path)
    assert (resumed.bad_steps, resumed.bad_steps_in_row) == (7, 2)


def test_a_checkpoint_holds_the_averaged_model_as_an_artifact(trained: TrainingState, state_folder: Path) -> None:
    assert {path.name for path in state_folder.iterdir()} == {"model", "state.safetensors", "state.json"}
    model = load_model(state_folder / "model")
    average, current = trained.ema_model.state_dict(), trained.model.state_dict()
    assert all(torch.equal(value, average[name]) for name, value in model.state_dict().items())
    assert any(not torch.equal(value, current[name]) for name, value in model.state_dict().items())


def test_a_model_comes_back_in_evaluation_mode_and_computes_the_same(model_folder: Path) -> None:
    assert {path.name for path in model_folder.iterdir()} == {"config.json", "model.safetensors", "README.md"}
    model, loaded, batch = TMAD(MODEL, seed=1).eval(), load_model(model_folder), make_batch()
    assert loaded.config == MODEL
    assert not loaded.training
    inputs = to_model(batch.image), batch.mask.float(), batch.pool_yx, batch.cells
    with torch.no_grad():
        assert torch.equal(model(*inputs).output, loaded(*inputs).output)


def test_saving_over_a_model_replaces_it(model_folder: Path) -> None:
    save_model(TMAD(MODEL, seed=2), model_folder)
    assert torch.equal(load_model(model_folder).coarse.layers[0].weight, TMAD(MODEL, seed=2).coarse.layers[0].weight)


def test_the_digest_tells_weights_and_settings_apart_and_nothing_else(model_folder: Path, tmp_path: Path) -> None:
    first = model_digest(model_folder)
    assert len(first) == 16
    assert int(first, 16) >= 0
    save_model(TMAD(MODEL, seed=1), tmp_path / "same")
    save_model(TMAD(MODEL, seed=2), tmp_path / "weights")
    other = replace(MODEL, retrieval=replace(MODEL.retrieval, temperature=3.0))
    save_model(TMAD(other, seed=1), tmp_path / "settings")
    (tmp_path / "same" / "README.md").write_text("another card")
    assert model_digest(tmp_path / "same") == first
    assert len({first, model_digest(tmp_path / "weights"), model_digest(tmp_path / "settings")}) == 3


# Another configuration


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (with_loss(EVERY_OTHER, weight_tv=0.5), "loss.weight_tv: 0.02 -> 0.5"),
        (with_optim(EVERY_OTHER, lr=1e-5), "optim.lr: 0.002 -> 1e-05"),
        (
            replace(EVERY_OTHER, model=replace(MODEL, psnet=replace(MODEL.psnet, base_width=8))),
            "model.psnet.base_width: 4 -> 8",
        ),
        (
            replace(EVERY_OTHER, model=replace(MODEL, coarse=replace(MODEL.coarse, dilations=(1, 2)))),
            "model.coarse.dilations: [2] -> [1, 2]",
        ),
    ],
    ids=["loss", "rate", "width", "dilations"],
)
def test_a_state_of_another_configuration_is_refused_with_the_difference(
    config: TrainingConfig, message: str, state_folder: Path
) -> None:
    state = make_state(config)
    before = state.tensors()
    with pytest.raises(ValueError, match="was made with another configuration") as caught:
        load_state(state, state_folder)
    assert str(caught.value) == f"{state_folder} was made with another configuration: {message}"
    assert all(torch.equal(value, before[name]) for name, value in state.tensors().items())


def test_every_difference_is_listed(state_folder: Path) -> None:
    state = make_state(with_optim(with_loss(TRAINING, weight_l1=2), max_bad_steps=3))
    with pytest.raises(ValueError, match="another configuration") as caught:
        load_state(state, state_folder)
    for part in ("loss.gp_every: 2 -> 1", "loss.weight_l1: 1.0 -> 2.0", "optim.max_bad_steps: 20 -> 3"):
        assert part in str(caught.value)


# Folders that are wrong


def edit_json(path: Path, change: Callable[[dict], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_tensors(path: Path, change: Callable[[dict], object]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"looked for config\.json in .*nowhere: no such folder"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"looked for state\.json in .*nowhere: no such folder"):
        load_state(make_state(), tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_of_a_model_is_named(name: str, model_folder: Path) -> None:
    (model_folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"looked for {name} in .*model: no such file"):
        load_model(model_folder)


@pytest.mark.parametrize("name", ["state.json", "state.safetensors"])
def test_a_missing_file_of_a_state_is_named(name: str, state_folder: Path) -> None:
    (state_folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"looked for {name} in .*state: no such file"):
        load_state(make_state(EVERY_OTHER), state_folder)


@pytest.mark.parametrize("version", [0, 1, 3, None])
def test_another_format_version_is_refused_with_both(version: int | None, model_folder: Path) -> None:
    edit_json(model_folder / "config.json", lambda c: c.update(format_version=version))
    with pytest.raises(ValueError, match=rf"config\.json has format version {version}; this code reads version 2"):
        load_model(model_folder)


def test_a_state_of_another_format_version_is_refused(state_folder: Path) -> None:
    edit_json(state_folder / "state.json", lambda c: c.update(format_version=3))
    with pytest.raises(ValueError, match=r"state\.json has format version 3"):
        load_state(make_state(EVERY_OTHER), state_folder)


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"\xff" * 64 + b[64:]])
def test_damaged_weights_are_refused_by_name(damage: Callable[[bytes], bytes], model_folder: Path) -> None:
    path = model_folder / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        load_model(model_folder)


def test_weights_that_are_not_finite_are_refused_by_name(model_folder: Path) -> None:
    edit_tensors(model_folder / "model.safetensors", lambda t: t["coarse.layers.0.bias"].fill_(float("nan")))
    with pytest.raises(
        ValueError, match=r"model\.safetensors has weights that are not finite: coarse\.layers\.0\.bias$"
    ):
        load_model(model_folder)


def test_a_damaged_state_is_refused_by_name(state_folder: Path) -> None:
    path = state_folder / "state.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"state\.safetensors is damaged"):
        load_state(make_state(EVERY_OTHER), state_folder)


@pytest.mark.parametrize("content", ["", '{"format_version": 1, "mod', "\x00\xff", '{"a":' * 100_000])
def test_damaged_settings_are_refused_by_name(content: str, model_folder: Path) -> None:
    (model_folder / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        load_model(model_folder)


@pytest.mark.parametrize("content", ["[]", '"text"', '{"format_version": 1}', '{"format_version": 2, "model": null}'])
def test_settings_without_their_parts_are_refused_by_name(content: str, model_folder: Path) -> None:
    (model_folder / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config\.json (is damaged|has format version)"):
        load_model(model_folder)


@pytest.mark.parametrize("part", ["counters", "config"])
def test_a_state_file_without_its_parts_is_refused_by_name(part: str, state_folder: Path) -> None:
    edit_json(state_folder / "state.json", lambda c: c.pop(part))
    with pytest.raises(ValueError, match=rf"state\.json is damaged: it lacks {part}"):
        load_state(make_state(EVERY_OTHER), state_folder)


def test_an_unknown_setting_of_a_model_is_refused_with_the_near_one(model_folder: Path) -> None:
    edit_json(model_folder / "config.json", lambda c: c["model"].update(patch_sise=16))
    with pytest.raises(ValueError, match=r"patch_sise \(did you mean patch_size"):
        load_model(model_folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("coarse.layers.0.bias"), r"missing coarse\.layers\.0\.bias"),
        (lambda t: t.update(surprise=torch.zeros(1)), "unexpected surprise"),
        (
            lambda t: t.update({"coarse.layers.0.bias": torch.zeros(7)}),
            r"coarse\.layers\.0\.bias is \(7,\), expected \(4,\)",
        ),
    ],
    ids=["missing", "unexpected", "reshaped"],
)
def test_weights_that_do_not_fit_their_settings_are_refused_one_by_one(
    change: Callable[[dict], object], message: str, model_folder: Path
) -> None:
    edit_tensors(model_folder / "model.safetensors", change)
    with pytest.raises(ValueError, match=rf"does not fit config\.json beside it: {message}$"):
        load_model(model_folder)


def test_a_state_whose_networks_lack_a_tensor_is_refused(state_folder: Path) -> None:
    edit_tensors(state_folder / "state.safetensors", lambda t: t.pop("global_discriminator/layers.0.bias"))
    with pytest.raises(ValueError, match=r"(?s)saved global_discriminator does not fit.*layers\.0\.bias"):
        load_state(make_state(EVERY_OTHER), state_folder)


def test_a_state_with_half_of_a_parameters_moments_is_refused(state_folder: Path) -> None:
    name = "adam/generator/coarse.layers.0.bias/exp_avg_sq"
    edit_tensors(state_folder / "state.safetensors", lambda t: t.pop(name))
    with pytest.raises(ValueError, match=r"adam/generator/coarse\.layers\.0\.bias"):
        load_state(make_state(EVERY_OTHER), state_folder)
