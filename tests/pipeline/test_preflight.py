"""A dry run: every check fails for its own reason, all failures are listed at once, nothing is left behind."""

from __future__ import annotations

import os
import re
import shutil
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from pipeline import storage, tracking
from pipeline.config import DataConfig, PerceptualConfig, RunConfig, TrackingConfig, to_json
from pipeline.data.collection import ImagesConfig
from pipeline.data.prepare import PrepareConfig, prepare
from pipeline.data.schema import read_manifest
from pipeline.errors import TrackingUnreachable
from pipeline.presets import smoke
from pipeline.runs.lease import lease_folder
from pipeline.train import footprint
from pipeline.train.footprint import checkpoint_count, measure, peak_bytes
from pipeline.train.launch import resolve
from pipeline.train.loop import train_loop
from pipeline.train.preflight import Preflight, preflight
from tests.conftest import make_photo
from tests.pipeline.runs import CONFIG, LocalContext, Recorder, make_feed
from tests.pipeline.test_contract import run_here
from tests.tmad.tiny import Features, make_batch, make_state, train
from tmad.checkpoint import save_state
from tmad.step import OneWorker, TrainingState


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with prepared sets of 32-pixel crops for the smoke preset, `wrong` for another patch size."""
    folder = tmp_path_factory.mktemp("preflight")
    for number in range(3):
        (folder / "photos").mkdir(exist_ok=True)
        Image.fromarray(make_photo(number, 40, 48)).save(folder / "photos" / f"{number}.png")
    model = smoke().model
    with pytest.MonkeyPatch.context() as patch:
        run_here(patch)
        for name, patch_size in (("train", 8), ("val", 8), ("wrong", 16)):
            prepare(
                PrepareConfig(
                    source=str(folder / "photos"),
                    out=str(folder / name),
                    crop_size=32,
                    patch_size=patch_size,
                    memory=model.memory,
                )
            )
    return folder


def _config(place: Path, runs: object, **changes: Any) -> RunConfig:
    base = replace(
        smoke(),
        runs=str(runs),
        data=DataConfig(train=str(place / "train"), val=str(place / "val")),
        tracking=TrackingConfig(uri="none"),
    )
    return replace(base, **changes)


def _failed(found: Preflight) -> dict[str, str]:
    return {check.name: check.text for check in found.checks if not check.ok}


def _closed_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def test_where_all_is_there_every_check_passes_and_nothing_is_left_behind(place: Path, tmp_path: Path) -> None:
    before = sorted(path for folder in (place, tmp_path) for path in folder.rglob("*"))
    config = _config(place, tmp_path / "some" / "runs", name="new", tracking=TrackingConfig())
    found = preflight(config, images_per_s=0.01)
    assert _failed(found) == {}
    assert [check.name for check in found.checks] == [
        *("data.train", "data.val", "runs", "name", "tracking", "resources", "perceptual", "model", "room")
    ]
    assert sorted(path for folder in (place, tmp_path) for path in folder.rglob("*")) == before
    plan = dict(found.plan)
    assert plan["batch"] == "4 images a step, 2 a worker"
    assert plan["steps"].startswith("6: 2 coarse (8 images), then 4 jointly (16 images), 8.0 times through 3 records")
    assert plan["checkpoints"].startswith("3, every 8 images and at the end, 2 kept; 1.2 MB each")
    assert plan["duration"].startswith("40 min at 0.01 images/s, as stated")


def test_the_duration_is_told_at_the_rate_that_is_measured_where_the_device_is(place: Path, tmp_path: Path) -> None:
    config = _config(place, tmp_path / "runs")
    told = dict(preflight(config).plan)["duration"]
    # Seconds of both phases, at twice one worker's rate.
    found = re.fullmatch(
        r"(\d+) s at coarse (\S+) images/s, joint (\S+) images/s \(2 times that of one worker\), .*", told
    )
    assert found is not None, told
    seconds, coarse, joint = map(float, found.groups())
    assert seconds == pytest.approx(8 / coarse + 16 / joint, abs=1)
    assert coarse > joint > 0
    on_gpus = replace(config, workers=replace(config.workers, use_gpu=True))
    assert torch.cuda.is_available() or dict(preflight(on_gpus).plan)["duration"].startswith("unknown, as this machine")


def test_all_that_is_wrong_is_listed_at_once(place: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    port = _closed_port()
    config = _config(
        place,
        tmp_path / "file" / "runs",
        model=replace(smoke().model, patch_size=16),
        data=DataConfig(train=str(place / "nowhere"), val=str(place / "val")),
        tracking=TrackingConfig(uri=f"http://user:hunter2@127.0.0.1:{port}"),
        workers=replace(smoke().workers, cpus_per_worker=1000),
        perceptual=PerceptualConfig(weights=str(tmp_path / "vgg19.pth")),
        init_from=str(tmp_path / "model"),
    )
    found = preflight(config)
    failed = _failed(found)
    said = {
        "data.train": "nowhere does not exist",
        "data.val": "prepared for patch_size 8, model.patch_size is 16",
        "runs": r"file/runs cannot be a folder: .*/file is a file",
        "tracking": "no answer from MLflow .*Connection refused.*go without where the job can",
        "resources": r"asked for 2001 CPU, this machine has \d+ CPU.* missing",
        "perceptual": "no VGG-19 weights at .*--perceptual.features off",
        "init_from": "no model at ",
    }
    assert failed.keys() == said.keys()
    assert [name for name, pattern in said.items() if not re.search(pattern, failed[name])] == []
    assert "hunter2" not in found.text()
    assert found.text().endswith("7 of 8 checks failed")


def test_a_shard_that_is_not_what_the_manifest_says_is_found(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "train", tmp_path / "train")
    (shard,) = read_manifest(str(tmp_path / "train")).shards
    path = tmp_path / "train" / shard.file
    path.write_bytes(path.read_bytes()[:-1])
    config = _config(place, tmp_path / "runs", data=DataConfig(train=str(tmp_path / "train"), val=str(place / "val")))
    assert re.search(f"1 of the 1 shards .* {shard.file} first", _failed(preflight(config))["data.train"])


def test_photographs_are_looked_at_as_a_training_set(place: Path, tmp_path: Path) -> None:
    images = ImagesConfig(source=str(place / "photos"), crop_size=32)
    found = preflight(_config(place, tmp_path / "runs", data=DataConfig(images=images, val=str(place / "val"))))
    assert _failed(found) == {}
    images = replace(images, source=str(tmp_path / "nowhere"))
    found = preflight(_config(place, tmp_path / "runs", data=DataConfig(images=images, val=str(place / "val"))))
    assert _failed(found).keys() == {"data.train"}
    assert not (tmp_path / "runs").exists()


def test_a_name_that_belongs_to_another_run_is_told(place: Path, tmp_path: Path) -> None:
    config = resolve(_config(place, tmp_path, name="old"))
    storage.write_atomic(f"{tmp_path}/old/config.json", to_json(config).encode())
    sets = {which: read_manifest(str(place / which)).digest for which in ("train", "val")}
    storage.write_atomic(f"{tmp_path}/old/data.json", str(sets).replace("'", '"').encode())
    assert "old was started before and would be continued" in preflight(config).text()
    assert "begun with other settings (seed: 0 -> 1)" in _failed(preflight(replace(config, seed=1)))["name"]
    with lease_folder(f"{tmp_path}/old"):
        assert f"another job trains old: process {os.getpid()} on" in _failed(preflight(config))["name"]


def test_the_probe_in_object_storage_is_removed(place: Path, bucket: str) -> None:
    assert _failed(preflight(_config(place, f"{bucket}/runs"))) == {}
    assert storage.file_sizes(bucket) == {}
    failed = _failed(preflight(_config(place, f"{bucket}-gone/runs")))
    assert failed.keys() == {"runs"}


def test_a_server_that_says_nothing_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "CHECK_TIMEOUT_S", 1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        with pytest.raises(TrackingUnreachable, match=r"within 1 s: .*timed out"):
            tracking.check_tracking(f"http://127.0.0.1:{silent.getsockname()[1]}")
        silent.settimeout(0.2)
        silent.accept()[0].close()
        with pytest.raises(TimeoutError):  # it was asked once
            silent.accept()


def test_a_database_that_is_there_is_asked_and_another_file_is_refused(tracking_uri: str, tmp_path: Path) -> None:
    assert tracking.check_tracking(tracking_uri).endswith("mlflow.db answers")
    (tmp_path / "other.db").write_bytes(b"no database" * 100)
    with pytest.raises(TrackingUnreachable, match="is no SQLite database: correct the tracking URI"):
        tracking.check_tracking(f"sqlite:///{tmp_path}/other.db")


@pytest.mark.parametrize(("coarse", "joint", "every"), [(4, 8, 4), (0, 6, 4), (2, 3, 1), (2, 0, 100)])
def test_the_plan_counts_the_checkpoints_that_a_run_writes(coarse: int, joint: int, every: int, tmp_path: Path) -> None:
    lengths = {"coarse_images": coarse, "joint_images": joint, "checkpoint_every_images": every}
    config = replace(CONFIG, schedule=replace(CONFIG.schedule, **lengths))
    train_loop(config, LocalContext(tmp_path, workers=OneWorker()), make_feed(), Recorder(), Features())
    assert checkpoint_count(config) == len(list(tmp_path.iterdir()))


def test_what_a_worker_holds_is_counted_tensor_by_tensor(tmp_path: Path) -> None:
    state = make_state(CONFIG.training)
    train(state, 1)
    found = measure(CONFIG, crop_size=64)
    sizes = {name: value.nbytes for name, value in state.tensors().items()}
    assert found.moments == sum(size for name, size in sizes.items() if name.startswith("adam/"))
    assert found.held - found.features == sum(sizes.values())
    save_state(state, tmp_path)
    written = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    names = len(sizes) * 200  # the headers of the files
    assert found.checkpoint < written < found.checkpoint + names


def test_a_step_takes_about_what_is_estimated_from_smaller_ones(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(footprint, "MEASURED_SIDE", 32)
    schedule = replace(CONFIG.schedule, batch_images=4, patches_per_image=16)
    # Without VGG-19, whose buffers are most of so small a step and do not grow with it.
    config = replace(CONFIG, schedule=schedule, perceptual=PerceptualConfig(features="off"))
    state = TrainingState(config.training)
    batch = make_batch(size=4, num_cells=16)
    state.step(batch, "joint", global_batch=4, progress=0.0)
    real = peak_bytes(lambda: state.step(batch, "joint", global_batch=4, progress=0.0))
    estimate = measure(config, crop_size=64).step
    assert 0.9 * real < estimate < 1.3 * real
    # The largest step counts, not the one that happens to be measured.
    assert measure(replace(config, loss=replace(config.loss, gp_every=4)), crop_size=64).step == estimate
    alone = replace(config, schedule=replace(schedule, joint_images=0))
    assert measure(alone, crop_size=64).step < real / 2
    assert capfd.readouterr().err == "", "the profiler complains of what a step leaves to the next one"
