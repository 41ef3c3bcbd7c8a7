"""Two at once: each job on a folder, a name, or a registry entry that another one works on."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.claim import claim_folder
from pipeline.config import DataConfig, TrackingConfig
from pipeline.data.prepare import PrepareConfig, prepare
from pipeline.errors import ConfigMismatch, FolderInUse
from pipeline.evaluation.config import EvaluateConfig
from pipeline.evaluation.evaluate import evaluate
from pipeline.inpaint.config import InpaintConfig
from pipeline.inpaint.run import inpaint_all
from pipeline.presets import smoke
from pipeline.promote import PromoteConfig, promote
from pipeline.registry import register_model
from pipeline.report.pictures import png_bytes
from pipeline.storage import write_atomic
from pipeline.sweep.ablate import AblateConfig, ablate
from pipeline.sweep.config import SweepConfig
from pipeline.sweep.launch import sweep
from pipeline.tracking import Tracker, mlflow_client
from pipeline.train.launch import train
from tests.conftest import ROOT
from tests.pipeline.conftest import SetMaker
from tests.tmad.tiny import make_image, make_mask

Begin = Callable[[], object]


@pytest.fixture
def jobs(
    make_set: SetMaker, model_folder: Path, tracking_uri: str, tmp_path: Path
) -> Callable[[str], dict[str, Begin]]:
    """By name, what begins each job on the folder RUNS/same."""
    for name, data in (("i/a.png", png_bytes(make_image(0))), ("m/a.png", png_bytes(make_mask() * 255))):
        write_atomic(str(tmp_path / name), data)
    run_id = Tracker.create(tracking_uri, "tests", "one")
    assert run_id is not None
    register_model(model_folder, tracking_uri=tracking_uri, run_id=run_id, name="same")
    data, val = make_set(name="train"), make_set(name="val")

    def begin(runs: str) -> dict[str, Begin]:
        out = f"{runs}/same"
        run = replace(
            smoke(), name=None, runs=runs, data=DataConfig(train=data, val=val), tracking=TrackingConfig(uri="none")
        )
        study = {"run": run, "name": "same"}
        inputs = {"input": str(tmp_path / "i"), "masks": str(tmp_path / "m"), "model": str(model_folder)}
        promotion = PromoteConfig(name="same", out=runs, data=val, tracking_uri=tracking_uri, wait_s=0.1)
        return {
            "prepare": lambda: prepare(PrepareConfig(source=str(tmp_path / "i"), out=out)),
            "inpaint": lambda: inpaint_all(InpaintConfig(**inputs, output=out)),
            "evaluate": lambda: evaluate(EvaluateConfig(model=str(model_folder), data=val, out=out)),
            "train": lambda: train(replace(run, name="same")),
            "sweep": lambda: sweep(SweepConfig(**study, space=("loss.weight_l1=0.1..10",))),
            "ablate": lambda: ablate(AblateConfig(**{**study, "name": "x"}, study="blending")),
            "promote": lambda: promote(promotion),
        }

    return begin


@pytest.mark.parametrize("where", ["here", "s3"])
def test_no_job_begins_in_a_folder_where_another_one_works_and_each_says_who(jobs, where, tmp_path, request) -> None:
    """Whichever job works there holds the same claim, which `tests/jobs/test_ends.py` sees of each."""
    runs = str(tmp_path / "runs") if where == "here" else f"{request.getfixturevalue('bucket')}/runs"
    begin = jobs(runs)
    for name, job in begin.items():
        with claim_folder(f"{runs}/x-blending" if name == "ablate" else f"{runs}/same"):
            with pytest.raises(FolderInUse, match=rf"another job writes to .*: process {os.getpid()} on ") as refused:
                job()
            assert "\n" not in refused.value.message, name


def test_a_name_is_a_run_or_a_sweep_and_never_both(jobs, tmp_path) -> None:
    begin = jobs(str(tmp_path / "runs"))
    write_atomic(str(tmp_path / "runs" / "same" / "sweep.json"), b"{}")
    with pytest.raises(ConfigMismatch, match="holds a sweep, not a run: take another --name"):
        begin["train"]()
    (tmp_path / "runs" / "same" / "sweep.json").rename(tmp_path / "runs" / "same" / "config.json")
    with pytest.raises(ConfigMismatch, match="holds a run, not a sweep: take another --name"):
        begin["sweep"]()
    assert [path.name for path in (tmp_path / "runs" / "same").iterdir()] == ["config.json"]


REGISTERING = """
import os, sys
from pipeline.registry import register_model
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
