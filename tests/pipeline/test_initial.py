"""A run that starts from another model: what is taken, what stops it, and that a run that goes on takes it no more."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.config import RunConfig, digest, refusal
from pipeline.data.schema import read_manifest
from pipeline.errors import ConfigMismatch, CorruptSource, ModelNotFound, WeightsMismatch
from pipeline.models.registry import register_model
from pipeline.tracking import Tracker
from pipeline.train.initial import REPORT_FILE, WEIGHTS_FILE, KeptWeights, find_initial, keep_initial, kept_initial
from pipeline.train.launch import _begin, resolve
from pipeline.train.loop import train_loop
from tests.pipeline.conftest import SetMaker
from tests.pipeline.runs import CONFIG, LocalContext, Recorder, Stopped, make_feed
from tests.tmad.tiny import Features, make_state, train
from tmad.checkpoint import load_model, model_digest, save_model, save_state
from tmad.step import OneWorker, TrainingState


@pytest.fixture(scope="module")
def trained() -> TrainingState:
    state = make_state(CONFIG.training, seed=5)
    train(state, 2)
    return state


@pytest.fixture
def checkpoint(trained: TrainingState, tmp_path: Path) -> Path:
    save_state(trained, tmp_path / "images_000000000004")
    return tmp_path / "images_000000000004"


def _from(source: object, config: RunConfig = CONFIG, **changes: Any) -> RunConfig:
    return replace(config, init_from=str(source), **changes)


def _started(config: RunConfig) -> dict[str, Tensor]:
    state = make_state(config.training, seed=config.seed)
    state.start_from(find_initial(config, None).tensors)
    return state.tensors()


def _same(a: dict[str, Tensor], b: dict[str, Tensor], prefix: str) -> bool:
    """Whether all tensors below *prefix* are equal to the last bit."""
    names = [name for name in a if name.startswith(prefix)]
    assert names
    return all(torch.equal(a[name], b[name]) for name in names)


def test_an_artifact_gives_the_generator_and_its_average_and_leaves_the_discriminators(
    checkpoint: Path, trained: TrainingState
) -> None:
    started, source, fresh = _started(_from(checkpoint / "model")), trained.tensors(), make_state().tensors()
    generator = {name.replace("ema/", "model/"): value for name, value in source.items() if name.startswith("ema/")}
    assert _same(started, generator, "model/")
    assert _same({name.replace("ema/", "model/"): started[name] for name in started if "ema/" in name}, generator, "")
    assert _same(started, fresh, "patch_discriminator/")
    assert not any(name.startswith("adam/") for name in started)


def test_a_checkpoint_gives_the_discriminators_too(checkpoint: Path, trained: TrainingState) -> None:
    started, source = _started(_from(checkpoint)), trained.tensors()
    assert _same(started, source, "patch_discriminator/")
    assert _same(started, source, "global_discriminator/")
    report = find_initial(_from(checkpoint), None).report
    assert report["networks"] == ["coarse", "retrieval", "psnet", "patch_discriminator", "global_discriminator"]
    assert report["model_digest"] == model_digest(checkpoint / "model")
    assert report["missing"] == report["unexpected"] == report["reshaped"] == report["settings"] == []


def test_an_unfinished_run_and_a_registered_model_are_taken(
    checkpoint: Path, tmp_path: Path, tracking_uri: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(checkpoint, run / "checkpoints" / checkpoint.name)
    assert "global_discriminator" in find_initial(_from(run), None).report["networks"]
    run_id = Tracker.create(tracking_uri, "tests", "initial")
    assert run_id is not None
    register_model(checkpoint / "model", tracking_uri=tracking_uri, run_id=run_id, name="tests", alias="champion")
    config = resolve(_from("models:/tests@champion"))
    assert config.init_from == "models:/tests@champion"
    assert find_initial(config, tracking_uri).report["model_digest"] == model_digest(checkpoint / "model")
    with pytest.raises(ModelNotFound):
        find_initial(_from(tmp_path / "nowhere"), None)


WIDER = replace(CONFIG, model=replace(CONFIG.model, psnet=replace(CONFIG.model.psnet, base_width=8, num_res_blocks=2)))
"""Another PSNet: every layer reshaped, one residual block more."""


def test_a_model_that_does_not_fit_is_refused_with_tensors_and_settings(checkpoint: Path) -> None:
    with pytest.raises(
        WeightsMismatch,
        match=r"does not fit: missing model/psnet\.\S+; .* and \d+ more; settings that differ: "
        r"psnet\.base_width: 4 -> 8; psnet\.num_res_blocks: 1 -> 2; .*--init-allow-partial",
    ) as caught:
        find_initial(_from(checkpoint / "model", WIDER), None)
    report = caught.value.details["report"]
    assert all("psnet" in name for kind in ("missing", "unexpected", "reshaped") for name in report[kind])
    assert "model/psnet.encoder.0.parametrizations.weight.original (4, 4, 1, 1) -> (8, 4, 1, 1)" in report["reshaped"]


def test_what_fits_is_taken_on_request_layer_by_layer(
    checkpoint: Path, trained: TrainingState, caplog: pytest.LogCaptureFixture
) -> None:
    more = replace(CONFIG.model, retrieval=replace(CONFIG.model.retrieval, num_candidates=3))
    config = _from(checkpoint, replace(CONFIG, model=more), init_allow_partial=True)
    with caplog.at_level(logging.WARNING):
        initial = find_initial(config, None)
    assert "takes a part of the model" in caplog.text
    # Three candidates reach the first convolution of the texture encoder, whose vector u would fit, and their gains.
    layers = {name.split(".parametrizations")[0].split(" ")[0] for name in initial.report["reshaped"]}
    gains = {"model/psnet.gains.weight", "model/psnet.gains.bias"}
    assert layers > gains
    (layer,) = layers - gains
    assert f"{layer}.parametrizations.weight.0._u" in initial.report["left_out"]
    assert not any(name.startswith(layer) for name in initial.tensors)
    started, fresh = _started(config), make_state(config.training).tensors()
    assert _same(started, fresh, layer)
    assert _same(started, fresh, "model/psnet.gains")
    assert _same({k: v for k, v in started.items() if k.startswith("global_discriminator/")}, trained.tensors(), "")


def test_the_coarse_network_alone_is_taken_from_a_model_with_another_psnet(
    checkpoint: Path, trained: TrainingState
) -> None:
    config = _from(checkpoint, WIDER, init_networks="coarse")
    initial = find_initial(config, None)
    assert initial.report["networks"] == ["coarse"]
    assert initial.report["settings"] == []
    started, fresh = _started(config), make_state(WIDER.training).tensors()
    assert all(torch.equal(value, trained.tensors()[f"ema/{k[6:]}"]) for k, value in initial.tensors.items())
    assert _same(started, fresh, "model/psnet.")
    deeper = replace(WIDER.model, coarse=replace(CONFIG.model.coarse, num_res_blocks=3))
    with pytest.raises(WeightsMismatch, match=r"missing model/coarse\..*coarse\.num_res_blocks: 2 -> 3"):
        find_initial(replace(config, model=deeper), None)


def test_a_model_of_which_nothing_fits_is_refused_in_any_case(checkpoint: Path) -> None:
    carafe = replace(CONFIG.model.carafe, mid_channels=3)
    wider = replace(CONFIG.model, carafe=carafe, coarse=replace(CONFIG.model.coarse, base_width=6))
    config = _from(checkpoint, replace(CONFIG, model=wider), init_networks="coarse", init_allow_partial=True)
    with pytest.raises(WeightsMismatch, match="nothing fits"):
        find_initial(config, None)


def test_joint_training_begins_with_the_given_coarse_network_and_goes_on_without_it(
    checkpoint: Path, trained: TrainingState, tmp_path: Path
) -> None:
    still = replace(CONFIG.optim, lr=1e-9, min_lr=0.0)
    schedule = replace(CONFIG.schedule, coarse_images=0)
    config = _from(checkpoint, replace(CONFIG, schedule=schedule, optim=still), init_networks="coarse")
    run = tmp_path / "run"
    report = keep_initial(config, str(run), None)
    assert kept_initial(config, str(run)) == report == json.loads((run / REPORT_FILE).read_text())
    kept = KeptWeights(str(run / WEIGHTS_FILE), report["digest"])

    def go(folder: Path, stop_at: int | None = None) -> dict[str, Any]:
        context = LocalContext(folder, workers=OneWorker())
        return train_loop(config, context, make_feed(stop_at), Recorder(), Features(), kept)

    with pytest.raises(Stopped):
        go(tmp_path / "kept", stop_at=6)
    (run / WEIGHTS_FILE).unlink()
    summary = go(tmp_path / "kept")
    coarse = load_model(tmp_path / "kept" / summary["checkpoint"] / "model").coarse
    for name, value in coarse.state_dict().items():
        assert torch.allclose(value, trained.ema_model.coarse.state_dict()[name], atol=1e-6), name


def test_kept_weights_that_are_not_those_of_the_start_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    report = keep_initial(_from(checkpoint), str(tmp_path), None)
    kept = KeptWeights(str(tmp_path / WEIGHTS_FILE), report["digest"])
    assert kept.read().keys() == set(report["matched"])
    data = bytearray((tmp_path / WEIGHTS_FILE).read_bytes())
    data[-1] ^= 1
    (tmp_path / WEIGHTS_FILE).write_bytes(data)
    with pytest.raises(CorruptSource, match=f"the run was begun with {kept.digest}"):
        kept.read()


def test_the_model_belongs_to_what_a_run_is(tmp_path: Path) -> None:
    config = _from(tmp_path / "a")
    assert digest(config) != digest(CONFIG)
    assert refusal(CONFIG, config) == [f"init_from: None -> {tmp_path / 'a'}"]
    assert refusal(config, replace(config, init_allow_partial=True)) == []
    with pytest.raises(ValueError, match="it is not given"):
        replace(CONFIG, init_networks="coarse")
    assert resolve(_from("runs/a")).init_from == str(Path("runs/a").absolute())


def test_a_run_that_goes_on_keeps_what_it_was_begun_with_whatever_the_model_is_by_then(
    checkpoint: Path, tmp_path: Path, make_set: SetMaker
) -> None:
    sets = {which: read_manifest(make_set(name=which)) for which in ("train", "val")}
    source, run = tmp_path / "source", tmp_path / "run"
    shutil.copytree(checkpoint / "model", source)
    config = _from(source)
    _begin(str(run), config, sets, None)
    begun = {name: (run / name).read_bytes() for name in (REPORT_FILE, WEIGHTS_FILE)}
    environment = json.loads((run / "environment.json").read_text())
    assert environment["init_digest"] == json.loads(begun[REPORT_FILE])["digest"]
    save_model(make_state(seed=8).model, source)
    assert find_initial(config, None).report["model_digest"] != json.loads(begun[REPORT_FILE])["model_digest"]
    _begin(str(run), config, sets, None)
    shutil.rmtree(source)
    _begin(str(run), config, sets, None)
    assert begun == {name: (run / name).read_bytes() for name in begun}
    with pytest.raises(ConfigMismatch, match=r"init_from: .*/source -> "):
        _begin(str(run), _from(checkpoint), sets, None)


def test_a_model_that_does_not_fit_leaves_no_run_behind(checkpoint: Path, tmp_path: Path, make_set: SetMaker) -> None:
    sets = {which: read_manifest(make_set(name=which)) for which in ("train", "val")}
    with pytest.raises(WeightsMismatch):
        _begin(str(tmp_path / "run"), _from(checkpoint, WIDER), sets, None)
    assert not (tmp_path / "run" / "config.json").exists()
    _begin(str(tmp_path / "run"), _from(checkpoint, WIDER, init_networks="coarse"), sets, None)
