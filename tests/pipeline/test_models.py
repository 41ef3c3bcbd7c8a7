"""One loader for every reference to a model, and what it says when there is none."""

from __future__ import annotations

import logging
import shutil
import sqlite3
from pathlib import Path

import fsspec
import pytest

from pipeline.errors import ModelNotFound
from pipeline.models import absolute_model, find_model, load_any_model
from pipeline.models.registry import register_model
from pipeline.tracking import Tracker
from tests.tmad.tiny import MODEL
from tmad.builtin import builtin_model
from tmad.checkpoint import model_digest


def test_an_artifact_folder_is_loaded_in_evaluation_mode(model_folder: Path) -> None:
    model = load_any_model(str(model_folder), "cpu")
    assert model.config == MODEL
    assert not model.training


def test_a_finished_run_and_a_checkpoint_give_their_model(model_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(model_folder, tmp_path / "model")
    (tmp_path / "config.json").write_text('{"this": "is the configuration of the run"}')
    assert find_model(str(tmp_path)) == tmp_path / "model"


def test_an_unfinished_run_gives_its_newest_complete_checkpoint_with_a_warning(
    model_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("images_000000100", "images_000000200"):
        shutil.copytree(model_folder, tmp_path / "checkpoints" / name / "model")
    broken = tmp_path / "checkpoints" / "images_000000300" / "model"
    broken.mkdir(parents=True)
    (broken / "model.safetensors").write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        assert find_model(str(tmp_path)) == tmp_path / "checkpoints" / "images_000000200" / "model"
    assert "is not finished" in caplog.text


def test_a_model_at_a_uri_is_copied_here(model_folder: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(str(model_folder), "/tests-models/run/model", recursive=True)
    folder = find_model("memory://tests-models/run")
    assert model_digest(folder) == model_digest(model_folder)


def test_registry_references_by_alias_and_version(
    model_folder: Path, tracking_uri: str, capfd: pytest.CaptureFixture[str]
) -> None:
    run_id = Tracker.create(tracking_uri, "tests", "models")
    assert run_id is not None
    register_model(model_folder, tracking_uri=tracking_uri, run_id=run_id, name="tests", alias="champion")
    for ref in ("models:/tests@champion", "models:/tests/1", f"runs:/{run_id}/model"):
        assert model_digest(find_model(ref, tracking_uri=tracking_uri)) == model_digest(model_folder)
    assert "Downloading" not in capfd.readouterr().err, "MLflow's own bar"


def test_without_a_server_the_database_of_the_current_folder_is_asked(
    model_folder: Path, tracking_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelNotFound, match=r"say where with tracking_uri .* no runs/mlflow\.db here"):
        find_model("models:/tests@champion")
    run_id = Tracker.create(tracking_uri, "tests", "models")
    assert run_id is not None
    register_model(model_folder, tracking_uri=tracking_uri, run_id=run_id, name="tests", alias="champion")
    (tmp_path / "runs").mkdir()
    # SQLite's own copy, as the writer may still hold pages that are not in the file.
    with (
        sqlite3.connect(tracking_uri.removeprefix("sqlite:///")) as source,
        sqlite3.connect(tmp_path / "runs" / "mlflow.db") as target,
    ):
        source.backup(target)
    assert model_digest(find_model("models:/tests@champion")) == model_digest(model_folder)


def test_what_the_registry_has_is_said_when_a_name_or_alias_is_wrong(model_folder: Path, tracking_uri: str) -> None:
    run_id = Tracker.create(tracking_uri, "tests", "models")
    assert run_id is not None
    register_model(model_folder, tracking_uri=tracking_uri, run_id=run_id, name="tests", alias="champion")
    with pytest.raises(ModelNotFound, match=r"tests has versions 1; aliases: champion"):
        find_model("models:/tests@best", tracking_uri=tracking_uri)
    with pytest.raises(ModelNotFound, match=r"registered models: tests"):
        find_model("models:/other/1", tracking_uri=tracking_uri)


@pytest.mark.parametrize("ref", ["models:/tests", "models:/tests/champion", "models:/@x", "models:/"])
def test_a_malformed_registry_reference_is_refused(ref: str, tracking_uri: str) -> None:
    with pytest.raises(ModelNotFound, match=r"write models:/name@alias or models:/name/3"):
        find_model(ref, tracking_uri=tracking_uri)


def test_where_nothing_is_every_place_that_was_looked_at_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        ModelNotFound,
        match=r"looked for config\.json and model\.safetensors in .*/gone, .*/gone/model, .*/checkpoints/\*",
    ):
        find_model(str(tmp_path / "gone"))
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "folders" / name).mkdir(parents=True)
    with pytest.raises(ModelNotFound, match="no model at"):
        find_model(str(tmp_path / "folders"))


def test_near_misses_get_a_hint(model_folder: Path) -> None:
    with pytest.raises(ModelNotFound, match="name the folder, not the file"):
        find_model(str(model_folder / "model.safetensors"))
    with pytest.raises(ModelNotFound, match="write models:/tmad@champion"):
        find_model("tmad@champion")
    with pytest.raises(ModelNotFound, match="no model was named"):
        find_model("")


def test_credentials_in_a_reference_are_not_shown() -> None:
    with pytest.raises(ModelNotFound) as error:
        find_model("memory://user:hunter2@tests-models/nothing")
    assert "hunter2" not in str(error.value)


def test_the_model_in_the_box_has_a_name_that_holds_in_every_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute_model("builtin") == "builtin"
    assert absolute_model("models:/tmad@champion") == "models:/tmad@champion"
    assert absolute_model("runs/first") == str(tmp_path / "runs" / "first")
    assert find_model(absolute_model("builtin")) == builtin_model()
