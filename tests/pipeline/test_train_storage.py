"""Training onto storage that fails, from photographs: slow and refused uploads, a bucket that cannot be written to, a
full disk."""

from __future__ import annotations

import json
import logging
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from jobs.train_places import main
from pipeline import storage
from pipeline.config import DataConfig, RunConfig, TrackingConfig
from pipeline.data.collection import ImagesConfig
from pipeline.errors import ConfigMismatch, StorageFailed, TrainingFailed
from pipeline.models import load_any_model
from pipeline.models.registry import register_model
from pipeline.presets import smoke
from pipeline.tracking import Tracker, mlflow_client, read_json_lines
from pipeline.train.checkpoints import damage
from pipeline.train.launch import train
from tests.conftest import make_photo
from tests.faults import FaultyProxy
from tests.jobs.processes import small_sets
from tmad.checkpoint import model_digest, save_model
from tmad.model import TMAD

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_sets(tmp_path_factory.mktemp("sets"))


def config_of(sets: Path, runs: str, name: str, **changes: Any) -> RunConfig:
    data = DataConfig(train=str(sets / "train"), val=str(sets / "val"))
    base = replace(smoke(), name=name, runs=runs, data=data, tracking=TrackingConfig(uri="none"))
    return replace(base, **changes)


def test_photographs_of_which_some_are_unusable_a_registered_coarse_network_and_uploads_that_fail_for_a_while(
    sets: Path,
    bucket: str,
    faulty_cluster: FaultyProxy,
    tracking_uri: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """What the start of a joint training takes, and what its checkpoints may meet, in one training."""
    save_model(source := TMAD(smoke().model, seed=5), tmp_path / "model")
    run_id = Tracker.create(tracking_uri, "smoke", "coarse")
    assert run_id is not None
    register_model(tmp_path / "model", tracking_uri=tracking_uri, run_id=run_id, name="tmad-coarse")
    photos = tmp_path / "photos"
    for number in range(10):
        storage.write_atomic(str(photos / f"{number}.png"), (sets / f"photos/train/{number}.png").read_bytes())
    (photos / "3.png").write_bytes(b"no picture")
    config = config_of(
        sets,
        f"{bucket}/runs",
        "joint",
        data=DataConfig(images=ImagesConfig(source=str(photos), crop_size=32), val=str(sets / "val")),
        init_from="models:/tmad-coarse@champion",
        init_networks="coarse",
        schedule=replace(smoke().schedule, coarse_images=0, joint_images=24),
        optim=replace(smoke().optim, lr=1e-9, min_lr=0.0),
        workers=replace(smoke().workers, num_workers=1),
        tracking=TrackingConfig(uri=tracking_uri, experiment="smoke", registered_name="tmad-joint"),
    )
    faulty_cluster.answer("SlowDown", method="PUT|POST", target="checkpoints/.*state", times=2)
    faulty_cluster.reset(method="PUT|POST", target="checkpoints/.*model", times=1)
    faulty_cluster.delay(2.0, method="PUT|POST", target="checkpoints/.*json", times=2)
    with caplog.at_level(logging.INFO):
        finished = train(config)
    assert faulty_cluster.unspent() == 0
    run = f"{bucket}/runs/joint"
    assert damage(storage.local_copy(f"{run}/checkpoints/{finished['checkpoint']}")) == []

    assert "3.png cannot be used, another image takes its place: not-an-image" in caplog.text
    assert "2 images replaced since the start" in caplog.text
    rows = read_json_lines(f"{run}/metrics.jsonl")
    assert [row["data/replaced"] for row in rows if "data/replaced" in row][-1] == 2

    report = json.loads(storage.read_bytes(f"{run}/init_report.json"))
    assert (report["networks"], report["model_digest"]) == (["coarse"], model_digest(tmp_path / "model"))
    ours, theirs = load_any_model(run).coarse.state_dict(), source.coarse.state_dict()
    assert all(torch.allclose(value, theirs[name], atol=1e-6) for name, value in ours.items())
    client = mlflow_client(tracking_uri)
    tags = client.get_run(finished["mlflow_run_id"]).data.tags
    assert (tags["init_digest"], tags["init_model"]) == (report["digest"], report["model_digest"])
    assert "init_report.json" in {one.path for one in client.list_artifacts(finished["mlflow_run_id"])}


def test_a_bucket_that_may_not_be_written_to_is_told_before_anything_is_scheduled(
    sets: Path, bucket: str, faulty_cluster: FaultyProxy
) -> None:
    faulty_cluster.answer("AccessDenied", method="PUT|POST", target="/runs/")
    with pytest.raises(StorageFailed, match=r"cannot write .*/runs/refused/lease.json: .*AccessDenied"):
        train(config_of(sets, f"{bucket}/runs", "refused"))


def test_a_permission_that_is_withdrawn_ends_the_run_at_the_next_checkpoint_and_it_goes_on_as_from_the_prepared_set(
    sets: Path,
    bucket: str,
    faulty_cluster: FaultyProxy,
    in_this_process: None,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    prepared = train(config_of(sets, str(tmp_path / "runs"), "prepared"))

    photos = tmp_path / "photos"
    for path in (sets / "photos" / "train").iterdir():
        storage.write_atomic(str(photos / path.name), path.read_bytes())
    command = f"--preset smoke --data.val {sets}/val --runs {bucket}/runs --name live --tracking.uri none".split()
    command += f"--data.images.source {photos} --data.images.crop-size 32".split()
    command += ["--data.images.images-per-shard", "4", "--data.images.row-group-rows", "2"]
    faulty_cluster.answer("AccessDenied", method="PUT|POST", target="checkpoints/images_0+16/")
    with pytest.raises(
        TrainingFailed,
        match=r"images_0+16 was not kept: cannot write s3://.*AccessDenied.*newest checkpoint is .*images_0+8; "
        "the same command with --name live continues",
    ):
        main(command)
    # A restart would only be refused again.
    assert faulty_cluster.seen("PUT|POST", r"checkpoints/images_0+16/") == 1

    faulty_cluster.heal()
    with caplog.at_level(logging.INFO):
        main(command)
    assert "continuing after 8 images" in caplog.text
    losses = [
        {row["step"]: row for row in read_json_lines(f"{run}/metrics.jsonl") if "lr" in row}
        for run in (tmp_path / "runs" / "prepared", f"{bucket}/runs/live")
    ]
    assert losses[0].keys() == losses[1].keys() == {8, 16, 24}
    for step, row in losses[0].items():
        same = [name for name in row if name.startswith("loss/")]
        assert same
        assert {name: losses[1][step][name] for name in same} == {name: row[name] for name in same}
        assert losses[1][step]["data/replaced"] == 0
    summary = json.loads(storage.read_bytes(f"{bucket}/runs/live/finished.json"))
    assert summary["model_digest"] == prepared["model_digest"]

    Image.fromarray(make_photo(99, 40, 48)).save(photos / "99.png")
    with pytest.raises(ConfigMismatch, match=r"names or sizes of the photographs.* \w+ -> \w+, 11 images now\)"):
        main(command)
    with pytest.raises(ConfigMismatch, match=r"data.images.mask: brush_or_rectangle -> rectangle"):
        main([*command, "--data.images.mask", "rectangle"])


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1.5 MB: one checkpoint and a half."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", str(folder)], capture_output=True)
    if done.returncode:
        pytest.skip("file systems cannot be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.soak
def test_a_full_disk_ends_the_run_with_its_cause_and_leaves_a_checkpoint_to_go_on_from(
    sets: Path, small_disk: Path, ray_session: None, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_of(sets, str(small_disk), "full")
    with pytest.raises(TrainingFailed, match=r"checkpoint \w+ was not kept: cannot write .*No space left on device"):
        train(config)
    kept = [one for one in (small_disk / "full" / "checkpoints").glob("images_*") if damage(one) == []]
    assert kept
    subprocess.run(["mount", "-o", "remount,size=20m", str(small_disk)], check=True)
    with caplog.at_level(logging.INFO):
        finished = train(config)
    assert "continuing after" in caplog.text
    assert json.loads((small_disk / "full" / "finished.json").read_text()) == finished
