"""`jobs/evaluate.py` as a program: help, dry run from another folder, errors as one line."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jobs.evaluate import main
from pipeline.errors import TrackingUnreachable
from pipeline.evaluation.config import EvaluateConfig
from pipeline.evaluation.evaluate import evaluate
from pipeline.tracking import mlflow_client
from tests.jobs.conftest import CallJob
from tests.pipeline.conftest import SetMaker

SCRIPT = Path(__file__).resolve().parent.parent.parent / "jobs" / "evaluate.py"


def test_a_dry_run_from_another_folder_prints_the_resolved_settings_and_looks_at_all_that_is_needed(
    make_set: SetMaker, model_folder: Path, tmp_path: Path
) -> None:
    arguments = ["--model", str(model_folder), "--methods", "tmad", "coarse", "--limit", "2", "--dry-run"]

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(SCRIPT), *arguments, *more]
        return subprocess.run(command, cwd=here, capture_output=True, text=True)

    here = tmp_path / "here"
    here.mkdir()
    ended = run("--data", make_set(4))
    assert ended.returncode == 0, ended.stderr
    settings = json.loads(ended.stdout)
    assert (settings["model"], settings["methods"], settings["limit"]) == (str(model_folder), ["tmad", "coarse"], 2)
    assert "2 images with" in ended.stderr
    ended = run("--data", "nowhere")
    assert ended.returncode == 1
    assert "nowhere" in ended.stderr.splitlines()[-1]
    assert list(here.iterdir()) == []


def test_an_mlflow_run_that_cannot_be_written_to_is_named_before_anything_is_measured(
    make_set: SetMaker, model_folder: Path, tracking_uri: str, tmp_path: Path
) -> None:
    settings = {"model": str(model_folder), "data": make_set(1), "out": str(tmp_path / "out"), "mlflow_run": "0" * 32}
    began = time.monotonic()
    with pytest.raises(TrackingUnreachable, match=r"no answer from MLflow at http://127.0.0.1:9 within 5 s"):
        evaluate(EvaluateConfig(**settings, tracking_uri="http://127.0.0.1:9"))
    assert time.monotonic() - began < 30
    with pytest.raises(ValueError, match="no MLflow run '0000"):
        evaluate(EvaluateConfig(**settings, tracking_uri=tracking_uri))
    client = mlflow_client(tracking_uri)
    deleted = client.create_run("0").info.run_id
    client.delete_run(deleted)
    with pytest.raises(ValueError, match=f"the MLflow run '{deleted}' at .* was deleted"):
        evaluate(EvaluateConfig(**{**settings, "mlflow_run": deleted}, tracking_uri=tracking_uri))
    assert not (tmp_path / "out").exists()


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
