"""Training with Ray, from a prepared set to a registered model: two workers, one run a name, workers that die."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray.exceptions import RayTaskError
from ray.train import WorkerGroupError

from jobs.train_places import main
from pipeline.config import DataConfig, RunConfig, TrackingConfig, WorkersConfig, from_json
from pipeline.data.schema import read_manifest
from pipeline.errors import CheckpointsDamaged, ClusterTooSmall, ConfigMismatch, MissingInput, TrainingFailed
from pipeline.models import load_any_model
from pipeline.presets import smoke
from pipeline.runs.cluster import require
from pipeline.runs.lease import LEASE_NAME
from pipeline.storage import write_atomic
from pipeline.tracking import mlflow_client, read_json_lines
from pipeline.train.launch import _cause, train
from tests.jobs.processes import small_sets, training_workers

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.usefixtures("ray_session")]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with prepared sets of 32-pixel crops: ten for training, four for validation."""
    return small_sets(tmp_path_factory.mktemp("train"))


def _config(place: Path, name: str, **changes: Any) -> RunConfig:
    base = replace(
        smoke(),
        name=name,
        runs=str(place / "runs"),
        data=DataConfig(train=str(place / "train"), val=str(place / "val")),
        tracking=TrackingConfig(uri="none"),
    )
    return replace(base, **changes)


@pytest.fixture(scope="module")
def finished(place: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The smoke run, to its end, tracked and registered."""
    return train(_config(place, "whole", tracking=TrackingConfig(experiment="smoke", registered_name="tmad-smoke")))


def test_two_workers_train_both_phases_and_register_the_model(place: Path, finished: dict[str, Any]) -> None:
    run = place / "runs" / "whole"
    assert finished["images"] == 24
    assert {"val/psnr_hole", "val/coarse_psnr_hole"} <= finished["validation"].keys()
    assert json.loads((run / "finished.json").read_text()) == finished
    assert sorted(path.name for path in (run / "checkpoints").glob("images_*")) == [
        "images_000000000016",
        "images_000000000024",
    ]
    rows = read_json_lines(str(run / "metrics.jsonl"))
    value, images = max((row["val/psnr_hole"], -row["step"]) for row in rows if "val/psnr_hole" in row)
    assert finished["best"]["images"] == -images
    assert finished["best"]["value"] == value
    assert load_any_model(finished["best"]["model"]).config == smoke().model
    steps = [row["step"] for row in rows]
    assert steps == [8, 8, 8, 16, 16, 16, 24, 24, 24], "of training, of validation, of the checkpoint"
    assert all(row["system/checkpoint_s"] > 0 for row in rows[2::3])
    assert all(0 < row["system/processors"] < 64 for row in rows[::3])
    of_the_node = ("system/cpu_utilization_percentage", "system/system_memory_usage_percentage")
    assert all(0 < row[name] <= 100 for row in rows[::3] for name in of_the_node)
    assert from_json((run / "config.json").read_text()).schedule == smoke().schedule
    environment = json.loads((run / "environment.json").read_text())
    assert environment["packages"]["torch"]
    assert environment["data_digests"].keys() == {"train", "val"}

    registered = finished["registered"]
    assert registered["uri"] == "models:/tmad-smoke@champion"
    by_name = load_any_model(registered["uri"], tracking_uri=finished["tracking_uri"])
    by_folder = load_any_model(str(run))
    assert all(torch.equal(a, b) for a, b in zip(by_name.parameters(), by_folder.parameters(), strict=True))
    client = mlflow_client(finished["tracking_uri"])
    tracked = client.get_run(finished["mlflow_run_id"])
    assert tracked.info.status == "FINISHED"
    assert tracked.data.params["schedule.joint_images"] == "16"
    assert {"loss/gan_patch", "val/psnr_hole", "rate/images_per_s", *of_the_node} <= tracked.data.metrics.keys()
    digests = {one.tags[0].value: one.dataset.digest for one in tracked.inputs.dataset_inputs}
    assert digests == {
        "training": environment["data_digests"]["train"],
        "validation": environment["data_digests"]["val"],
    }
    assert "None" not in tracked.data.tags.values()
    assert tracked.data.tags.get("mlflow.source.git.commit") == environment["code"]["commit"]


def test_the_models_card_says_what_it_has_seen_and_goes_with_it_everywhere(
    place: Path, finished: dict[str, Any]
) -> None:
    card = (place / "runs" / "whole" / "model" / "README.md").read_text()
    digests = json.loads((place / "runs" / "whole" / "environment.json").read_text())["data_digests"]
    holes = f"`{read_manifest(str(place / 'train')).settings['mask']}`"
    for part in (finished["model_digest"], finished["config_digest"], *digests.values(), holes):
        assert part in card
    for name, value in finished["validation"].items():
        assert f"| `{name}` | {value:.4g} |" in card
    assert "perceptual loss left out: not the paper's method" in card
    client = mlflow_client(finished["tracking_uri"])
    assert client.get_model_version_by_alias("tmad-smoke", "champion").description == card
    kept = client.list_artifacts(finished["mlflow_run_id"], "model_card")
    assert [file.path for file in kept] == ["model_card/README.md"]


def test_the_same_command_again_says_finished_and_does_nothing(
    place: Path, finished: dict[str, Any], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr("pipeline.train.launch._fit", refuse)
    config = _config(place, "whole", workers=WorkersConfig(num_workers=4))
    with caplog.at_level(logging.INFO):
        assert train(config) == finished
    assert "run whole is finished" in caplog.text


def test_other_settings_under_the_same_name_are_refused_with_the_difference(
    place: Path, finished: dict[str, Any]
) -> None:
    with pytest.raises(ConfigMismatch, match=r"run whole .*\(seed: 0 -> 3\).*another --name"):
        train(_config(place, "whole", seed=3))


def test_other_data_in_the_same_folder_is_refused(place: Path, finished: dict[str, Any]) -> None:
    swapped = place / "runs" / "whole" / "data.json"
    before = swapped.read_text()
    swapped.write_text(json.dumps({**json.loads(before), "train": "0123456789abcdef"}))
    try:
        with pytest.raises(ConfigMismatch, match=r"data.train: content 0123456789abcdef -> "):
            train(_config(place, "whole"))
    finally:
        swapped.write_text(before)


def _unfinished_copy(place: Path, name: str) -> Path:
    """The checkpoints of the whole run under another name, as if the last lines of its end were missing."""
    run = shutil.copytree(place / "runs" / "whole", place / "runs" / name)
    (run / "finished.json").unlink()
    shutil.rmtree(run / "model")
    return run


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("kills", [1, pytest.param(2, marks=pytest.mark.soak)])
def test_a_damaged_newest_checkpoint_and_workers_that_are_killed_change_nothing_in_the_result(
    kills: int, place: Path, finished: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """One behind the checkpoint that is taken instead, and one of those that Ray then starts at the same place, which
    ends the job."""
    name = f"damaged-{kills}"
    run = _unfinished_copy(place, name)
    _truncate(run / "checkpoints" / "images_000000000024" / "state.safetensors")
    schedule = replace(smoke().schedule, log_every_images=4)
    config = _config(place, name, workers=replace(smoke().workers, max_failures=1), schedule=schedule)
    metrics = str(run / "metrics.jsonl")
    killed: list[int] = []

    def kill() -> None:
        deadline = time.monotonic() + 300
        while len(killed) < kills and time.monotonic() < deadline:
            if sum(row["step"] == 20 for row in read_json_lines(metrics)) > len(killed):
                killed.append([*training_workers()][-1])
                os.kill(killed[-1], signal.SIGKILL)
            time.sleep(0.02)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    with caplog.at_level(logging.INFO):
        if kills == 2:
            with pytest.raises(TrainingFailed, match=f"training stopped: .*same command with --name {name} continues"):
                train(config)
        summary = train(config)
    killer.join(timeout=10)
    assert len(set(killed)) == kills
    assert caplog.text.count("continuing after 16 images") == kills + 1
    assert "checkpoint images_000000000024 cannot be used: state.safetensors has " in caplog.text
    assert "going on from checkpoint images_000000000016 instead of images_000000000024" in caplog.text
    assert summary["checkpoint"] == "images_000000000024_2"
    assert summary["model_digest"] == finished["model_digest"]
    told = [row for row in read_json_lines(metrics) if "health/damaged_checkpoints" in row]
    assert [row["step"] for row in told] == [16] * (kills + 1)
    # Ray keeps the newest two of its list; the damaged one is one of them, under a folder of its own.
    kept = {path.name for path in (run / "checkpoints").glob("images_*")}
    assert kept == {"images_000000000024", "images_000000000024_2"}


def test_of_several_workers_that_failed_the_one_that_says_why_is_told_without_what_is_secret() -> None:
    why = ValueError("s3://key:secret@bucket is no place")
    lost = {0: ConnectionError("connection closed by peer"), 1: RayTaskError("work", "a long traceback", why)}
    assert _cause(WorkerGroupError("workers failed", lost)) == "ValueError: s3://***@bucket is no place"


def test_a_run_that_another_job_has_taken_over_keeps_no_checkpoint_any_more(place: Path, in_this_process: None) -> None:
    run = place / "runs" / "taken"
    lease = run / LEASE_NAME

    def take_over() -> None:
        deadline = time.monotonic() + 300
        # A job that has just got its folder removes what others have begun to write there.
        while not (run / "config.json").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        theirs = {**json.loads(lease.read_text()), "token": "another", "process": "elsewhere"}
        write_atomic(str(lease), json.dumps(theirs).encode())

    other = threading.Thread(target=take_over, daemon=True)
    other.start()
    with pytest.raises(TrainingFailed, match=r"images_0+8 was not kept: .*runs/taken was taken over: process"):
        train(_config(place, "taken"))
    other.join(timeout=10)
    assert not list((run / "checkpoints").glob("images_*"))
    assert json.loads(lease.read_text())["token"] == "another"


def test_checkpoints_that_are_all_damaged_stop_the_run_and_are_named(
    place: Path, finished: dict[str, Any], in_this_process: None
) -> None:
    run = _unfinished_copy(place, "all-damaged")
    for folder in (run / "checkpoints").glob("images_*"):
        _truncate(folder / "state.safetensors")
    with pytest.raises(CheckpointsDamaged, match=r"images_000000000024: state.* images_000000000016: state") as caught:
        train(_config(place, "all-damaged"))
    assert caught.value.details["damaged"].keys() == {"images_000000000016", "images_000000000024"}


def test_a_list_of_checkpoints_cut_short_and_a_deleted_checkpoint_do_not_keep_a_run_from_going_on(
    place: Path, finished: dict[str, Any], in_this_process: None, caplog: pytest.LogCaptureFixture
) -> None:
    run = _unfinished_copy(place, "lost-list")
    _truncate(run / "checkpoints" / "checkpoint_manager_snapshot.json")
    shutil.rmtree(run / "checkpoints" / "images_000000000024")
    with caplog.at_level(logging.INFO):
        summary = train(_config(place, "lost-list"))
    assert "Ray's list of checkpoints" in caplog.text
    assert "continuing after 16 images" in caplog.text
    assert (summary["images"], summary["checkpoint"]) == (24, finished["checkpoint"])


def test_a_dry_run_compares_the_cluster_with_what_is_asked_for(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
    command = f"--data.train {place}/train --data.val {place}/val --runs {place}/dry --tracking.uri none".split()
    assert main(["--preset", "smoke", "--dry-run", *command, "--workers.cpus-per-worker", "100"]) == 1
    said = capsys.readouterr().err
    assert "asked for 201 CPU, the cluster has 4 CPU: 197 CPU missing; a run would wait 600 s" in said
    assert "1 of 8 checks failed" in said
    assert not (place / "dry").exists()


def test_losses_that_are_not_finite_are_the_end_and_not_a_failure_that_is_tried_again(
    place: Path, in_this_process: None
) -> None:
    config = _config(place, "nan", optim=replace(smoke().optim, lr=1e30, max_bad_steps=2))
    with pytest.raises(TrainingFailed, match=r"steps in a row were not finite .*with --name nan continues"):
        train(config)


def test_more_than_the_cluster_has_is_refused_before_anything_waits(place: Path) -> None:
    config = _config(place, "huge", workers=WorkersConfig(num_workers=2, use_gpu=True, cpus_per_worker=100))
    with pytest.raises(
        ClusterTooSmall, match=r"asked for 201 CPU, 2 GPU, the cluster has 4 CPU.*197 CPU missing.*lower --workers.num"
    ):
        train(config)
    require({"CPU": 4}, "--option")


def test_a_set_prepared_for_another_model_is_refused(place: Path) -> None:
    model = replace(smoke().model, patch_size=16)
    with pytest.raises(ValueError, match=r"prepared for patch_size 8, model.patch_size is 16"):
        train(_config(place, "other-patch", model=model))
    with pytest.raises(ValueError, match=r"patches_per_image is 25, but a crop of 32 pixels has 16 cells"):
        train(_config(place, "many-cells", schedule=replace(smoke().schedule, patches_per_image=25)))


def test_a_missing_set_is_refused(place: Path) -> None:
    with pytest.raises(MissingInput, match="nowhere"):
        train(_config(place, "nothing", data=DataConfig(train=str(place / "nowhere"), val=str(place / "val"))))
    assert not (place / "runs" / "nothing").exists()
