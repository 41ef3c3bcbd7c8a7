"""Checkpoints that a disk, a network or a crash has spoilt: found, told, passed over, and never mistaken for none."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from pipeline.errors import CheckpointsDamaged, TrainingFailed
from pipeline.train.checkpoints import (
    MANIFEST_FILE,
    RAY_RECORDS_FILE,
    checkpoint_name,
    damage,
    forget_broken_records,
    newest_usable,
    seal,
)
from pipeline.train.context import RayContext
from tests.pipeline.conftest import start_processes
from tests.pipeline.runs import LocalContext, Recorder, run_in
from tmad.step import OneWorker

OLD, NEW = checkpoint_name(8), checkpoint_name(12)


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run of 12 images with checkpoints after 4, 8 and 12, and its summary; not to be written to."""
    folder = tmp_path_factory.mktemp("finished")
    return folder, run_in(folder)


@pytest.fixture
def run(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> Path:
    """A copy of its checkpoints."""
    return shutil.copytree(finished[0], tmp_path / "checkpoints")


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda one: _truncate(one / "state.safetensors"), r"state\.safetensors has [\d,]+ bytes, [\d,]+ were written"),
        (lambda one: _flip_a_bit(one / "state.safetensors"), r"state\.safetensors has other content than was written"),
        (lambda one: _flip_a_bit(one / "model/model.safetensors"), r"model/model\.safetensors has other content"),
        (lambda one: (one / "run.json").unlink(), r"run\.json is missing"),
        (lambda one: (one / MANIFEST_FILE).unlink(), r"manifest\.json is missing"),
        (lambda one: _truncate(one / MANIFEST_FILE), r"manifest\.json is damaged"),
        (lambda one: (one / MANIFEST_FILE).write_text("[]"), r"manifest\.json is damaged"),
    ],
    ids=["truncated", "one bit", "one bit of the model", "file lost", "no manifest", "half a manifest", "other JSON"],
)
def test_a_damaged_newest_checkpoint_is_told_and_the_one_before_it_leads_to_the_same_end(
    finished: tuple[Path, dict[str, Any]],
    run: Path,
    caplog: pytest.LogCaptureFixture,
    spoil: Callable[[Path], None],
    told: str,
) -> None:
    unbroken, expected = finished
    spoil(run / NEW)
    recorder = Recorder()
    with caplog.at_level(logging.WARNING):
        summary = run_in(run, tracker=recorder)
    assert caplog.records[0].levelno == logging.WARNING
    assert re.search(rf"checkpoint {NEW} cannot be used: .*{told}", caplog.text)
    assert f"going on from checkpoint {OLD} instead of {NEW}" in caplog.text
    assert recorder.at(8)["health/damaged_checkpoints"] == 1
    # The damaged one keeps its name and its content, as Ray has it in its books.
    assert summary == {**expected, "checkpoint": f"{NEW}_2"}
    assert damage(run / f"{NEW}_2") == []
    state = "state.safetensors"
    assert (run / f"{NEW}_2" / state).read_bytes() == (unbroken / NEW / state).read_bytes()


def test_a_run_never_starts_from_zero_because_all_its_checkpoints_are_damaged(run: Path) -> None:
    for folder in run.iterdir():
        _truncate(folder / "state.safetensors")
    with pytest.raises(CheckpointsDamaged, match="none of them can be used") as caught:
        run_in(run)
    for images in (4, 8, 12):
        assert f"{checkpoint_name(images)}: state.safetensors has " in str(caught.value)
    assert list(caught.value.details["damaged"]) == [checkpoint_name(images) for images in (12, 8, 4)]


class Uncommitted(LocalContext):
    """Storage as a crash left it: nothing in it is known to have been complete."""

    def checkpoints(self) -> dict[str, bool]:
        return dict.fromkeys(super().checkpoints(), False)


def test_what_a_crash_left_of_the_very_first_checkpoint_does_not_stop_the_next_attempt(
    run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in (OLD, NEW):
        shutil.rmtree(run / name)
    only = run / checkpoint_name(4)
    context = Uncommitted(run, workers=OneWorker())
    found = newest_usable(context)
    assert found is not None
    assert found.name == only.name
    _truncate(only / "state.safetensors")
    with caplog.at_level(logging.WARNING):
        assert newest_usable(context) is None
    assert f"checkpoint {only.name} cannot be used" in caplog.text
    assert "no checkpoint was ever complete: training from the start" in caplog.text
    with pytest.raises(CheckpointsDamaged):
        newest_usable(LocalContext(run, workers=OneWorker()))


def test_the_manifest_names_every_file_but_itself(run: Path) -> None:
    named = json.loads((run / NEW / MANIFEST_FILE).read_text())["files"]
    there = {str(path.relative_to(run / NEW)) for path in (run / NEW).rglob("*") if path.is_file()}
    assert named.keys() == there - {MANIFEST_FILE}
    assert named["run.json"]["bytes"] == (run / NEW / "run.json").stat().st_size


class Gloo(LocalContext):
    """One of two processes, each with a storage of its own."""

    def __init__(self, folder: Path, rank: int) -> None:
        super().__init__(folder, workers=OneWorker())
        self.rank, self.world_size = rank, 2

    everyones = RayContext.everyones
    same_everywhere = RayContext.same_everywhere


def _worker(rank: int, folder: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    results = {}
    for case in ("first sees damage", "second sees damage", "other content", "all damaged"):
        try:
            found = newest_usable(Gloo(Path(folder, case, str(rank)), rank))
            results[case] = found.name if found else "nothing"
        except (TrainingFailed, CheckpointsDamaged) as error:
            results[case] = f"{type(error).__name__}: {error}"
    Path(folder, f"{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(
    finished: tuple[Path, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, str], dict[str, str]]:
    """What two processes with copies of the checkpoints decided in each case."""
    folder = tmp_path_factory.mktemp("ranks")
    for case in ("first sees damage", "second sees damage", "other content", "all damaged"):
        for rank in "01":
            shutil.copytree(finished[0], folder / case / rank)
    _truncate(folder / "first sees damage" / "0" / NEW / "state.safetensors")
    _truncate(folder / "second sees damage" / "1" / NEW / "state.safetensors")
    other = folder / "other content" / "1" / NEW
    _flip_a_bit(other / "state.safetensors")
    (other / MANIFEST_FILE).unlink()
    seal(other)
    for one in (folder / "all damaged" / "0").iterdir():
        _truncate(one / "state.safetensors")
    start_processes(_worker, str(folder), count=2)
    first, second = (json.loads((folder / f"{rank}.json").read_text()) for rank in "01")
    return first, second


def test_the_first_worker_decides_for_all(ranks: tuple[dict[str, str], dict[str, str]]) -> None:
    assert [one["first sees damage"] for one in ranks] == [OLD, OLD]


@pytest.mark.parametrize("case", ["second sees damage", "other content"])
def test_workers_that_read_different_content_stop_alike(
    ranks: tuple[dict[str, str], dict[str, str]], case: str
) -> None:
    for one in ranks:
        assert one[case].startswith(f"TrainingFailed: the workers read different content of checkpoint {NEW}")


def test_workers_without_a_usable_checkpoint_stop_alike(ranks: tuple[dict[str, str], dict[str, str]]) -> None:
    assert ranks[0]["all damaged"] == ranks[1]["all damaged"]
    assert ranks[0]["all damaged"].startswith("CheckpointsDamaged: the run has checkpoints and none of them")


@pytest.mark.parametrize("broken", ["half", "a checkpoint gone", "not"])
def test_a_list_of_rays_that_it_would_stumble_over_is_taken_away(
    run: Path, caplog: pytest.LogCaptureFixture, broken: str
) -> None:
    records = run / RAY_RECORDS_FILE
    records.write_text(json.dumps({"checkpoint_results": [{"checkpoint_dir_name": name} for name in (OLD, NEW)]}))
    if broken == "half":
        _truncate(records)
    if broken == "a checkpoint gone":
        shutil.rmtree(run / NEW)
    with caplog.at_level(logging.WARNING):
        forget_broken_records(str(run))
    assert records.exists() is (broken == "not")
    assert ("is not used" in caplog.text) is (broken != "not")
    assert ("it names images_000000000012, which is gone" in caplog.text) is (broken == "a checkpoint gone")
