"""Training onto storage that fails: slow and refused uploads, a bucket that cannot be written to, a full disk."""

from __future__ import annotations

import json
import logging
import os
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline import storage
from pipeline.config import DataConfig, RunConfig, TrackingConfig
from pipeline.errors import StorageFailed, TrainingFailed
from pipeline.presets import smoke
from pipeline.train.checkpoints import damage
from pipeline.train.launch import train
from tests.faults import FaultyProxy
from tests.jobs.processes import small_sets

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_sets(tmp_path_factory.mktemp("sets"))


def config_of(sets: Path, runs: str, name: str, **changes: Any) -> RunConfig:
    data = DataConfig(train=str(sets / "train"), val=str(sets / "val"))
    base = replace(smoke(), name=name, runs=runs, data=data, tracking=TrackingConfig(uri="none"))
    return replace(base, **changes)


def test_uploads_that_are_slow_and_fail_for_a_while_are_made_again(
    sets: Path, bucket: str, faulty_cluster: FaultyProxy
) -> None:
    faulty_cluster.answer("SlowDown", method="PUT|POST", target="checkpoints/.*state", times=2)
    faulty_cluster.reset(method="PUT|POST", target="checkpoints/.*model", times=1)
    faulty_cluster.delay(2.0, method="PUT|POST", target="checkpoints/.*json", times=2)
    finished = train(config_of(sets, f"{bucket}/runs", "patient"))
    assert faulty_cluster.unspent() == 0
    folder = storage.local_copy(f"{bucket}/runs/patient/checkpoints/{finished['checkpoint']}")
    assert damage(folder) == []


def test_a_bucket_that_may_not_be_written_to_is_told_before_anything_is_scheduled(
    sets: Path, bucket: str, faulty_cluster: FaultyProxy
) -> None:
    faulty_cluster.answer("AccessDenied", method="PUT|POST", target="/runs/")
    with pytest.raises(StorageFailed, match=r"cannot write .*/runs/refused/claim.json: .*AccessDenied"):
        train(config_of(sets, f"{bucket}/runs", "refused"))


def test_a_permission_that_is_withdrawn_ends_the_run_at_the_next_checkpoint_by_its_name(
    sets: Path, bucket: str, faulty_cluster: FaultyProxy
) -> None:
    faulty_cluster.answer("AccessDenied", method="PUT|POST", target="checkpoints/images_0+16/")
    with pytest.raises(
        TrainingFailed,
        match=r"images_0+16 was not kept: cannot write s3://.*AccessDenied.*newest checkpoint is .*images_0+8;",
    ):
        train(config_of(sets, f"{bucket}/runs", "withdrawn"))
    # A restart would only be refused again.
    assert faulty_cluster.seen("PUT|POST", r"checkpoints/images_0+16/") == 1


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


@pytest.mark.skipif(not os.environ.get("TMAD_SOAK_S"), reason="mounts a file system: set TMAD_SOAK_S")
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
