"""The whole path in one go, on the smallest networks: photographs to report, and again without doing anything twice."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jobs import demo
from pipeline.demo.run import DemoConfig, DemoResult, run_demo
from pipeline.errors import ConfigMismatch
from pipeline.evaluation.config import METHODS
from tests.jobs.conftest import CallJob
from tests.pipeline.conftest import loop_in_this_process
from tmad.images import to_rgb

# The first test waits for the whole path, which on a busy machine takes minutes.
pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> DemoConfig:
    out = tmp_path_factory.mktemp("demo")
    return DemoConfig(out=str(out), training="smoke", train_crops=2, val_crops=1)


@pytest.fixture(scope="module")
def first(config: DemoConfig, ray_session: None) -> DemoResult:
    with pytest.MonkeyPatch.context() as patch, loop_in_this_process():
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        return run_demo(config)


def test_the_metrics_hold_every_method_and_the_registered_model(first: DemoResult) -> None:
    metrics = json.loads(first.metrics.read_text())
    methods = metrics["evaluation"]["methods"]
    assert methods.keys() == set(METHODS)
    measured = {name for name, entry in methods.items() if entry["not_measured"] is None}
    assert measured >= {"tmad", "coarse", "patchmatch", "biharmonic"}
    assert all(methods[name]["metrics"]["psnr_hole"]["mean"] > 0 for name in measured)
    assert metrics["evaluation"]["model_digest"] == metrics["training"]["model_digest"]
    assert first.model == metrics["training"]["registered"]["uri"] == "models:/tmad-smoke@champion"


def test_the_report_is_one_page_with_pictures_and_credits(first: DemoResult) -> None:
    page = first.report.read_text()
    assert page.count("data:image/") >= 7 * 3 + 3 * 3
    assert 'src="http' not in page
    for credit in ("chelsea.png", "Creative Commons Attribution 2.0", "no VGG-19 weights"):
        assert credit in page


def test_the_filled_photographs_keep_every_pixel_outside_the_hole(first: DemoResult) -> None:
    folder = first.report.parent / "inpaint"
    for image in sorted((folder / "images").iterdir()):
        truth = to_rgb(Image.open(image))
        result = np.asarray(Image.open(folder / "results" / f"{image.stem}.png"))
        hole = np.asarray(Image.open(folder / "masks" / f"{image.stem}.png")) > 127
        assert 0 < hole.mean() < 0.9
        assert np.array_equal(result[~hole], truth[~hole])
        assert not np.array_equal(result[hole], truth[hole])


def test_a_second_run_keeps_everything(config: DemoConfig, first: DemoResult) -> None:
    kept = [
        path for path in Path(config.out).rglob("*") if path.suffix in (".safetensors", ".parquet", ".html", ".png")
    ]
    before = {path: path.stat().st_mtime_ns for path in kept}
    again = run_demo(config)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert (again.report, again.metrics, again.model) == (first.report, first.metrics, first.model)


def test_the_message_says_where_to_look_and_how_to_open_mlflow(first: DemoResult) -> None:
    message = first.message()
    for part in ("report.html", "metrics.json", "mlflow ui --backend-store-uri sqlite:///", "train", "evaluate"):
        assert part in message


def test_an_older_demo_with_other_settings_is_refused_and_named(config: DemoConfig, first: DemoResult) -> None:
    other = DemoConfig(out=config.out, training="smoke", train_crops=3, val_crops=1)
    with pytest.raises(ConfigMismatch, match=r"crops_per_image: 2 -> 3.*remove .*demo and .*demo-data"):
        run_demo(other)


def test_a_dry_run_prints_the_choices_and_makes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main(["--out", str(tmp_path / "runs"), "--dry-run"]) == 0
    assert json.loads(capsys.readouterr().out)["training"] == "demo"
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("more", [["--dry-run"], []])
def test_a_place_that_cannot_be_written_to_is_one_line_before_anything_is_made(
    tmp_path: Path, call_job: CallJob, more: list[str]
) -> None:
    (tmp_path / "file").write_text("no folder")
    code, _, said = call_job(demo.main, "--out", tmp_path / "file" / "runs", *more)
    assert code == 1
    assert "cannot be a folder" in said.splitlines()[-1]
