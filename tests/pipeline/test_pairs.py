"""Two at once: each job on a folder, a name, or a registry entry that another one works on; and on a disk that others
have filled."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.config import DataConfig, TrackingConfig
from pipeline.data.prepare import PrepareConfig, prepare
from pipeline.data.prepare import check as check_preparation
from pipeline.errors import ConfigMismatch, FolderInUse, StorageFailed, TrackingUnreachable
from pipeline.evaluation.config import EvaluateConfig
from pipeline.evaluation.evaluate import check as check_evaluation
from pipeline.evaluation.evaluate import evaluate
from pipeline.inpaint.config import InpaintConfig
from pipeline.inpaint.run import check as check_inpainting
from pipeline.inpaint.run import inpaint_all
from pipeline.models.registry import register_model
from pipeline.presets import smoke
from pipeline.promotion.promote import PromoteConfig, promote
from pipeline.promotion.promote import check as check_promotion
from pipeline.report.pictures import png_bytes
from pipeline.runs.lease import lease_folder
from pipeline.storage import write_atomic
from pipeline.sweep.ablate import AblateConfig, ablate
from pipeline.sweep.ablate import check as check_ablation
from pipeline.sweep.config import SweepConfig
from pipeline.sweep.launch import sweep
from pipeline.sweep.plan import plan
from pipeline.tracking import Tracker, mlflow_client
from pipeline.train.launch import train
from pipeline.train.preflight import preflight
from tests.conftest import ROOT
from tests.jobs.processes import small_sets
from tests.pipeline.conftest import SetMaker
from tests.tmad.tiny import make_image, make_mask
from tmad.checkpoint import WEIGHTS_FILE

Jobs = Callable[..., dict[str, Any]]

BEGIN: dict[str, Callable[[Any], object]] = {
    **{"prepare": prepare, "inpaint": inpaint_all, "evaluate": evaluate, "promote": promote},
    **{"train": train, "sweep": sweep, "ablate": ablate},
}
LOOK: dict[str, Callable[[Any], object]] = {
    **{"prepare": check_preparation, "inpaint": check_inpainting, "evaluate": check_evaluation},
    **{"train": lambda config: preflight(config).text(), "sweep": plan, "ablate": check_ablation},
    "promote": check_promotion,
}
"""What `--dry-run` does."""


@pytest.fixture
def jobs(make_set: SetMaker, model_folder: Path, tracking_uri: str, tmp_path: Path) -> Jobs:
    """By name, what asks for each job on the folder RUNS/same."""
    for name, data in (("i/a.png", png_bytes(make_image(0))), ("m/a.png", png_bytes(make_mask() * 255))):
        write_atomic(str(tmp_path / name), data)
    run_id = Tracker.create(tracking_uri, "tests", "one")
    assert run_id is not None
    register_model(model_folder, tracking_uri=tracking_uri, run_id=run_id, name="same")
    val, sets = make_set(name="val"), small_sets(tmp_path / "sets")

    def asked(runs: str, tracking: str | None = None) -> dict[str, Any]:
        out = f"{runs}/same"
        recorded = {"tracking_uri": tracking, "mlflow_run": "0" * 32} if tracking else {}
        run = replace(
            smoke(),
            name=None,
            runs=runs,
            data=DataConfig(train=str(sets / "train"), val=str(sets / "val")),
            tracking=TrackingConfig(uri=tracking or "none"),
        )
        study = {"run": run, "name": "same"}
        inputs = {"input": str(tmp_path / "i"), "masks": str(tmp_path / "m"), "model": str(model_folder)}
        promotion = PromoteConfig(name="same", out=runs, data=val, tracking_uri=tracking or tracking_uri, wait_s=0.1)
        return {
            "prepare": PrepareConfig(source=str(tmp_path / "i"), out=out, crop_size=64, patch_size=16),
            "inpaint": InpaintConfig(**inputs, output=out, tracking_uri=tracking),
            "evaluate": EvaluateConfig(model=str(model_folder), data=val, out=out, **recorded),
            "train": replace(run, name="same"),
            "sweep": SweepConfig(**study, space=("loss.weight_l1=0.1..10",)),
            "ablate": AblateConfig(**{**study, "name": "x"}, study="blending"),
            "promote": promotion,
        }

    return asked


@pytest.mark.parametrize("where", ["here", "s3"])
def test_no_job_begins_in_a_folder_where_another_one_works_and_each_says_who(jobs, where, tmp_path, request) -> None:
    """Whichever job works there holds the same lease, which `tests/jobs/test_ends.py` sees of each."""
    runs = str(tmp_path / "runs") if where == "here" else f"{request.getfixturevalue('bucket')}/runs"
    for name, config in jobs(runs).items():
        with lease_folder(f"{runs}/x-blending" if name == "ablate" else f"{runs}/same"):
            with pytest.raises(FolderInUse, match=rf"another job writes to .*: process {os.getpid()} on ") as refused:
                BEGIN[name](config)
            assert "\n" not in refused.value.message, name


def test_a_name_is_a_run_or_a_sweep_and_never_both(jobs, tmp_path) -> None:
    asked = jobs(str(tmp_path / "runs"))
    write_atomic(str(tmp_path / "runs" / "same" / "sweep.json"), b"{}")
    with pytest.raises(ConfigMismatch, match="holds a sweep, not a run: take another --name"):
        train(asked["train"])
    (tmp_path / "runs" / "same" / "sweep.json").rename(tmp_path / "runs" / "same" / "config.json")
    with pytest.raises(ConfigMismatch, match="holds a run, not a sweep: take another --name"):
        sweep(asked["sweep"])
    assert [path.name for path in (tmp_path / "runs" / "same").iterdir()] == ["config.json"]


@pytest.mark.parametrize("name", sorted(LOOK.keys() - {"promote"}))
def test_a_job_without_room_says_so_before_it_works_and_in_its_dry_run(jobs, name, tmp_path, monkeypatch) -> None:
    runs = tmp_path / "runs"
    config = jobs(str(runs))[name]
    assert "are free in" in "\n".join([text] if isinstance(text := LOOK[name](config), str) else text)
    monkeypatch.setattr("pipeline.storage.shutil.disk_usage", lambda place: SimpleNamespace(free=0))
    option = {"train": "--runs", "sweep": "--run.runs", "ablate": "--run.runs", "inpaint": "--output"}
    said = f"not enough room in .*: about .* are to come, 0.0 MB are free; .* with {option.get(name, '--out')}"
    for act in (LOOK, BEGIN):
        if name == "train" and act is LOOK:  # which lists all that is wrong
            assert re.search(f"FAILED  room +{said}", LOOK[name](config))
            continue
        with pytest.raises(StorageFailed, match=said):
            act[name](config)
    results = {path.suffix for path in runs.rglob("*") if path.is_file()}
    assert results <= {".json"}, "settings, and none of the work"


@pytest.mark.parametrize("name", sorted(LOOK.keys() - {"prepare"}))
def test_a_job_whose_tracking_server_is_dead_says_so_within_seconds_and_before_it_works(jobs, name, tmp_path) -> None:
    config = jobs(str(tmp_path / "runs"), "http://127.0.0.1:9")[name]
    said = r"no answer from MLflow at http://127.0.0.1:9 within 5 s: Connection refused; start the server, correct"
    for act in (LOOK, BEGIN):
        if name == "train" and act is LOOK:
            assert re.search(f"FAILED  tracking +{said}", LOOK[name](config))
            continue
        with pytest.raises(TrackingUnreachable, match=said):
            act[name](config)
    assert {path.suffix for path in tmp_path.joinpath("runs").rglob("*") if path.is_file()} <= {".json"}


@pytest.mark.parametrize("name", BEGIN)
def test_a_place_that_can_be_no_folder_is_one_sentence_at_the_start_and_in_the_dry_run(jobs, name, tmp_path) -> None:
    (tmp_path / "file").write_text("a user's")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for place in ("file", "file/below", "link"):
        config = jobs(str(tmp_path / place))[name]
        for act in (LOOK, BEGIN):
            if act is LOOK and name in ("train", "promote"):  # the one lists all that is wrong, as seen above
                continue
            with pytest.raises(StorageFailed, match=r"cannot be a folder: .* is a (file|link to nothing); choose anot"):
                act[name](config)
    assert (tmp_path / "file").read_text() == "a user's"


def test_a_model_that_is_damaged_or_does_not_fit_is_one_sentence_at_the_start_and_in_the_dry_run(
    jobs: Jobs, model_folder: Path, tmp_path: Path
) -> None:
    damaged, runs = shutil.copytree(model_folder, tmp_path / "damaged"), tmp_path / "runs"
    os.truncate(damaged / WEIGHTS_FILE, 1000)
    asked = jobs(str(runs))
    small = replace(asked["inpaint"], limit=1)
    for name, config, said in (
        ("inpaint", replace(asked["inpaint"], model=str(damaged)), f"{damaged}/{WEIGHTS_FILE} is damaged"),
        ("evaluate", replace(asked["evaluate"], model=str(damaged)), f"{damaged}/{WEIGHTS_FILE} is damaged"),
        ("inpaint", small, "limit must be at least 32, got 1"),
    ):
        for act in (LOOK, BEGIN):
            with pytest.raises(ValueError, match=said) as refused:
                act[name](config)
            assert "\n" not in str(refused.value)
    assert not runs.exists()


REGISTERING = """
import os, sys
from pipeline.models.registry import register_model
from pipeline.tracking import Tracker
import mlflow.pyfunc, mlflow.store.tracking.sqlalchemy_store  # once, for all of them
children = []
for number in range(6):
    if not (child := os.fork()):
        run_id = Tracker.create(sys.argv[1], "first", f"run-{number}")
        register_model(sys.argv[2], tracking_uri=sys.argv[1], run_id=run_id, name="shared")
        os._exit(0)
    children.append(child)
print([os.waitpid(child, 0)[1] for child in children])
"""


def test_six_runs_that_register_under_one_name_at_once_are_six_versions_and_one_has_the_alias(
    tracking_uri: str, model_folder: Path
) -> None:
    command = [sys.executable, "-c", REGISTERING, tracking_uri, str(model_folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=170)
    assert done.stdout.splitlines()[-1:] == [str([0] * 6)], done.stderr
    client = mlflow_client(tracking_uri)
    versions = client.search_model_versions("name = 'shared'")
    assert sorted(int(one.version) for one in versions) == [1, 2, 3, 4, 5, 6]
    assert len({one.run_id for one in versions}) == 6
    assert client.get_registered_model("shared").aliases.keys() == {"champion"}
