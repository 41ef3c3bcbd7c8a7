"""jobs/prepare.py as a user meets it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.prepare import main
from pipeline.cli import run_job

JOB = Path(__file__).resolve().parents[2] / "jobs" / "prepare.py"


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs the job in *tmp_path*; returns exit code, standard output and standard error."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit) as done:
            run_job(main, [str(argument) for argument in arguments])
        shown = capsys.readouterr()
        return int(done.value.code), shown.out, " ".join(shown.err.replace("│", " ").split())

    return call


def test_the_help_teaches_from_any_folder(tmp_path):
    done = subprocess.run([sys.executable, JOB, "--help"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for part in ("Examples:", "ray job submit", "--masks-per-image", "quarantine.jsonl", "--against", "--dry-run", "pool-size"):
        assert part in done.stdout


def test_a_dry_run_prints_settings_and_writes_nothing(run, tmp_path):
    code, out, _ = run("--source", "photos", "--out", "set", "--crop-size", 128, "--dry-run")
    assert code == 0
    assert json.loads(out)["crop_size"] == 128
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--source", "nowhere", "--out", "set"], 1, "there is no folder"),
        (["--source", "x", "--out", "y", "--crop-sise", "3"], 2, "--crop-size"),
        (["--source", "x", "--out", "y", "--crop-size", "100"], 2, "crop_size must be a multiple of"),
        (["--source", "x"], 2, "--out"),
    ],
)
def test_what_cannot_be_done_ends_with_one_clear_message(run, arguments, code, message):
    found, _, shown = run(*arguments)
    assert found == code
    assert message in shown
    assert "Traceback" not in shown


@pytest.mark.ray
def test_a_folder_of_photographs_becomes_a_set_and_the_second_time_at_once(run, ray_session, photo_folder):
    arguments = ["--source", photo_folder, "--out", "sets/train", "--crop-size", 128, "--images-per-shard", 6]
    code, out, shown = run(*arguments)
    assert code == 0, shown
    assert "12 records in 2 shards" in out
    assert "12/12 images" in shown
    assert "images/s" in shown
    assert "with pictures: " in shown
    assert "sets/train/report.html" in shown
    code, again, shown = run(*arguments)
    assert (code, again) == (0, out)
    assert "2 of 2 shards are already there and are kept" in shown
    code, _, shown = run(*arguments, "--seed", 1)
    assert code == 1
    assert "seed was 0, now 1" in shown
