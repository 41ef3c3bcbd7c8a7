"""`jobs/sweep.py` as a program: a sweep that is killed and goes on, a trial that always fails, what a dry run tells."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jobs.sweep import main
from pipeline.config import DataConfig, from_json
from pipeline.presets import smoke
from pipeline.runs.cli import run_job
from pipeline.sweep.config import SWEEP_PRESETS
from pipeline.sweep.launch import _coarse
from pipeline.tracking import mlflow_client
from tests.conftest import RAY_ENVIRONMENT, ROOT
from tests.jobs.conftest import CallJob
from tests.jobs.processes import Job, small_sets
from tmad.checkpoint import save_model
from tmad.model import TMAD

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1500)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with prepared sets of 32-pixel crops: ten for training, four for validation."""
    return small_sets(tmp_path_factory.mktemp("sweep"))


def arguments_of(place: Path, name: str, *more: str) -> list[str]:
    return [
        "--preset", "smoke", "--name", name, "--run.runs", str(place / "runs"),
        "--run.data.train", str(place / "train"), "--run.data.val", str(place / "val"),
        "--run.workers.num-workers", "1",
        "--run.schedule.validate-every-images", "4", "--reduction", "2", "--max-concurrent", "2", *more,
    ]  # fmt: skip


def command(place: Path, name: str, *more: str) -> list[str]:
    return [sys.executable, str(ROOT / "jobs" / "sweep.py"), *arguments_of(place, name, *more)]


def environment() -> dict[str, str]:
    return {**os.environ, **RAY_ENVIRONMENT, "MLFLOW_DISABLE_TELEMETRY": "true"}


def run(*arguments: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), env=environment(), capture_output=True, text=True)


def begun(folder: Path) -> dict[str, int]:
    """Images of the newest checkpoint of each trial."""
    newest: dict[str, int] = {}
    for path in folder.glob("trials/*/checkpoints/images_*"):
        trial = path.parts[-3]
        newest[trial] = max(newest.get(trial, 0), int(path.name.split("_")[1]))
    return newest


@pytest.mark.soak
def test_eight_trials_killed_in_the_middle_go_on_and_end_in_a_winner_that_can_be_trained(place: Path) -> None:
    folder = place / "runs" / "killed"
    arguments = ("killed", "--trials", "8")
    with (place / "first.log").open("w") as log:
        first = subprocess.Popen(command(place, *arguments), env=environment(), stderr=log, stdout=log)
        deadline = time.monotonic() + 600
        while len(begun(folder)) < 3 and time.monotonic() < deadline and first.poll() is None:
            time.sleep(0.1)
        time.sleep(6)  # Tune writes its records every 5 s
        first.send_signal(signal.SIGKILL)
        first.wait()
    before = begun(folder)
    assert 3 <= len(before) < 8, (place / "first.log").read_text()
    told = {name: (folder / "trials" / name / "metrics.jsonl").read_bytes() for name in before}

    second = run(place, *arguments)
    assert second.returncode == 0, second.stderr
    assert "sweep killed was begun before: going on with it" in second.stderr
    assert "run coarse is finished" in second.stderr, "the coarse phase is not repeated"
    after = begun(folder)
    assert len(after) == 8
    assert before.keys() <= after.keys(), "the trials of before are those of now"
    for name, lines in told.items():
        assert (folder / "trials" / name / "metrics.jsonl").read_bytes().startswith(lines), "no trial began anew"

    summary = json.loads((folder / "summary.json").read_text())
    statuses = [trial["status"] for trial in summary["trials"]]
    assert set(statuses) == {"finished", "stopped early"}
    assert all(trial["images"] < 16 for trial in summary["trials"] if trial["status"] == "stopped early")
    best = max(
        (one for one in summary["trials"] if one["status"] == "finished"), key=lambda one: one["metrics"]["psnr_hole"]
    )
    assert summary["winner"]["number"] == best["number"]
    preset = from_json((folder / "winner.json").read_text())
    assert preset.loss.weight_l1 == best["point"]["loss.weight_l1"]
    assert preset.schedule == replace(smoke().schedule, validate_every_images=4)
    page = (folder / "report.html").read_text()
    assert page.count("<svg") == 3
    assert "http" not in page.split("<style>")[0]

    client = mlflow_client(f"sqlite:///{place}/runs/mlflow.db")
    parent = json.loads((folder / "tracking.json").read_text())["run_id"]
    assert client.get_run(parent).info.status == "FINISHED"
    experiment = client.get_run(parent).info.experiment_id
    nested = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{parent}'")
    assert len(nested) == 9, "eight trials and the coarse phase"
    by_status = {one.data.tags.get("trial_status"): one.info.status for one in nested}
    assert by_status == {None: "FINISHED", "finished": "FINISHED", "stopped early": "KILLED"}

    third = run(place, *arguments)
    assert third.returncode == 0
    assert "sweep killed is finished" in third.stderr
    other = run(place, *arguments, "--seed", "1")
    assert other.returncode == 1
    assert "begun with other settings (seed: 0 -> 1)" in other.stderr


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model whose coarse network trials may start from: no coarse phase of their own."""
    save_model(TMAD(smoke().model, seed=0), folder := tmp_path_factory.mktemp("start") / "model")
    return str(folder)


def test_ctrl_c_ends_a_sweep_without_a_summary_and_the_same_command_does_the_rest(
    place: Path, model: str, ray_session: None, call_job: CallJob
) -> None:
    folder = place / "runs" / "stopped"
    arguments = ("stopped", "--trials", "2", "--max-concurrent", "1", "--no-stop-early", "--init-from", model)
    job = Job(place / "stopped.log", command(place, *arguments))
    assert job.wait_for(lambda: any(folder.glob("trials/*/finished.json")), every_s=0.1), job.said()
    # A terminal sends it to all processes of the foreground.
    os.killpg(job.process.pid, signal.SIGINT)
    code, said = job.end()
    assert code == 130, said
    assert said.splitlines()[-1].endswith("stopped by SIGINT; the same command continues where it stopped")
    assert "Traceback" not in said
    assert {path.name for path in folder.iterdir()}.isdisjoint({"summary.json", "winner.json", "report.html"})
    (kept,) = folder.glob("trials/*/finished.json")
    before = kept.read_bytes()

    code, _, said = call_job(main, *arguments_of(place, *arguments))
    assert code == 0, said
    assert "sweep stopped was begun before: going on with it" in said
    summary = json.loads((folder / "summary.json").read_text())
    assert [trial["status"] for trial in summary["trials"]] == ["finished", "finished"]
    assert kept.read_bytes() == before
    client = mlflow_client(f"sqlite:///{place}/runs/mlflow.db")
    names = {client.get_run(trial["mlflow_run_id"]).info.run_name for trial in summary["trials"]}
    assert names == {"trial 1", "trial 2"}


def test_the_coarse_phase_is_a_run_that_trains_the_coarse_network_alone(
    place: Path, in_this_process: None, tmp_path: Path
) -> None:
    config = replace(SWEEP_PRESETS["smoke"](), name="coarse-phase")
    data = DataConfig(train=str(place / "train"), val=str(place / "val"))
    config = replace(config, run=replace(config.run, runs=str(tmp_path), data=data))
    assert _coarse(config, str(tmp_path / "sweep"), None, None) == str(tmp_path / "sweep" / "coarse")
    finished = json.loads((tmp_path / "sweep" / "coarse" / "finished.json").read_text())
    assert (finished["images"], finished["registered"]) == (smoke().schedule.coarse_images, None)
    assert finished["best"]["metric"] == "val/coarse_psnr_hole"


def test_a_trial_that_always_fails_ends_the_sweep_with_its_error(
    place: Path, model: str, ray_session: None, call_job: CallJob
) -> None:
    # The coarse network is given, so that none of another width fits.
    more = ("--init-from", model, "--space", "model.coarse.base_width=8,12")
    code, _, said = call_job(main, *arguments_of(place, "failing", "--trials", "4", "--max-concurrent", "1", *more))
    assert code == 1
    last = said.strip().splitlines()[-1]
    assert "trial 1 (" in last
    assert "failed: WeightsMismatch: init_from: " in last
    assert "does not fit" in last
    assert not (place / "runs" / "failing" / "summary.json").exists()


def test_a_dry_run_tells_trials_resources_and_hours_and_leaves_nothing(place: Path, capsys) -> None:
    assert main(arguments_of(place, "dry", "--trials", "9", "--dry-run", "--images-per-s", "0.01")) == 0
    told = capsys.readouterr().err
    assert "9 by random, 2 side by side; 16 images each, validated every 4" in told
    assert "one coarse phase of 8 images, shared by all trials" in told
    assert "1.5 CPU a trial with its data" in told
    # 8 images coarse and nine times 16 by two at once, at 0.01 images a second.
    assert "at most 2.2 hours" in told
    assert not (place / "runs" / "dry").exists()


def test_a_wrong_measure_is_one_line_with_the_valid_names(place: Path, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        run_job(main, arguments_of(place, "wrong", "--objectives", "psnr"))
    assert ended.value.code == 2
    told = " ".join(capsys.readouterr().err.replace("│", "").split())
    assert "psnr_hole, l1_hole_pct, ssim_full, swd_hole_truthscaled" in told
    assert not (place / "runs" / "wrong").exists()
