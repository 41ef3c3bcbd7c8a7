"""`jobs/evaluate.py` as a program: help, dry run from another folder, errors as one line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.evaluate import main
from tests.jobs.conftest import CallJob
from tests.pipeline.conftest import SetMaker

SCRIPT = Path(__file__).resolve().parent.parent.parent / "jobs" / "evaluate.py"


def test_a_dry_run_from_another_folder_prints_the_resolved_settings(tmp_path: Path) -> None:
    arguments = ["--model", "runs/demo", "--methods", "tmad", "coarse", "--limit", "5", "--dry-run"]
    run = subprocess.run([sys.executable, str(SCRIPT), *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    settings = json.loads(run.stdout)
    assert (settings["model"], settings["methods"], settings["limit"]) == ("runs/demo", ["tmad", "coarse"], 5)
    assert list(tmp_path.iterdir()) == []


def test_a_set_that_is_not_there_is_one_line_and_exit_code_1(call_job: CallJob) -> None:
    code, _, shown = call_job(main, "--model", "gone", "--data", "nowhere", "--methods", "tmad")
    assert code == 1
    assert len(shown.strip().splitlines()) == 1
    assert "nowhere" in shown


def test_an_unknown_option_is_refused_with_the_near_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--model", "m", "--limmit", "5"])
    assert end.value.code == 2
    assert "--limit" in capsys.readouterr().err


@pytest.mark.ray
def test_the_means_are_printed(
    ray_session: None, model_folder: Path, make_set: SetMaker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = make_set(1), str(tmp_path / "out")
    code = main(["--model", str(model_folder), "--data", data, "--out", out, "--methods", "tmad", "coarse"])
    said = capsys.readouterr().out
    assert code == 0
    assert "psnr_hole" in said
    assert "coarse result of T-MAD" in said
    assert said.strip().endswith("out/report.html")


def test_the_inputs_of_other_methods_are_exported_without_a_model(
    make_set: SetMaker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--data", make_set(2), "--export", str(tmp_path / "in")]) == 0
    assert "2 images and masks" in capsys.readouterr().out
    kinds = {
        kind: sorted(path.name for path in (tmp_path / "in" / kind).iterdir()) for kind in ("images", "masks", "truth")
    }
    assert kinds == {kind: ["photo-0.png", "photo-1.png"] for kind in ("images", "masks", "truth")}
