"""The best model of a run, kept beside its checkpoints, and the end of a run that no longer improves."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline import storage
from pipeline.models import find_model
from pipeline.train.checkpoints import checkpoint_name
from pipeline.train.early_stopping import Course, best_kept, is_better, keep_best
from tests.pipeline.runs import CONFIG, Recorder, Stopped, make_feed, run_in
from tests.tmad.tiny import MODEL
from tmad.checkpoint import load_model, model_digest
from tmad.config import OptimConfig
from tmad.model import TMAD

OFTEN = replace(CONFIG, schedule=replace(CONFIG.schedule, validate_every_images=2, checkpoint_every_images=2))
"""A validation and a checkpoint at every step."""

STANDING_STILL = replace(
    OFTEN,
    optim=OptimConfig(lr=1e-30, min_lr=0, ema_halflife_images=0),
    schedule=replace(
        OFTEN.schedule, checkpoint_every_images=4, best_metric="coarse_psnr_hole", stop_after_validations=2
    ),
)
"""The coarse network learns nothing, so no validation is better than the first one, after 2 images."""


@pytest.mark.parametrize("metric", ["psnr_hole", "l1_hole_pct", "coarse_psnr_hole"])
def test_the_model_of_the_best_validation_is_kept(tmp_path: Path, metric: str) -> None:
    config = replace(OFTEN, schedule=replace(OFTEN.schedule, best_metric=metric))
    recorder = Recorder()
    run_in(tmp_path / "checkpoints", config, tracker=recorder, best=tmp_path / "best")
    values = {step: row[f"val/{metric}"] for step, row in recorder.values if f"val/{metric}" in row}
    assert len(values) == (6 if metric.startswith("coarse") else 4)
    images = (min if metric.startswith("l1") else max)(values, key=lambda step: values[step])
    name = checkpoint_name(images)
    assert best_kept(str(tmp_path / "best"), metric) == {
        "name": name,
        "model": str(tmp_path / "best" / name),
        "metric": f"val/{metric}",
        "value": values[images],
        "images": images,
    }
    assert [path.name for path in (tmp_path / "best").iterdir()] == [name]
    assert model_digest(find_model(str(tmp_path / "best"))) == model_digest(tmp_path / "checkpoints" / name / "model")
    assert json.loads((tmp_path / "best" / name / "run.json").read_text())["config"]["name"] == "test"


def test_lower_is_better_where_the_measure_says_so() -> None:
    assert is_better(20.0, 10.0, "psnr_hole")
    assert is_better(1.0, 2.0, "coarse_l1_hole_pct")
    assert not is_better(10.0, 10.0, "psnr_hole")
    assert not is_better(float("nan"), 10.0, "psnr_hole")


class Crash(Exception):
    """The process ended here."""


def test_a_crash_at_any_moment_leaves_a_complete_best_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = 10**6

    def counted(call: Any) -> Any:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                raise Crash
            return call(*args, **kwargs)

        return wrapper

    for name in ("write_atomic", "remove", "remove_folder"):
        monkeypatch.setattr(storage, name, counted(getattr(storage, name)))
    models = {images: TMAD(MODEL, seed=images) for images in (2, 4)}
    crashes = 0
    for allowed in range(100):
        best = str(tmp_path / str(allowed))
        left = 10**6
        keep_best(best, models[2], Course(best=10.0, best_images=2), CONFIG)
        left = allowed
        try:
            keep_best(best, models[4], Course(best=11.0, best_images=4), CONFIG)
        except Crash:
            crashes += 1
        kept = best_kept(best, "psnr_hole")
        assert kept is not None
        assert kept["value"] in (10.0, 11.0)
        seed = {10.0: 2, 11.0: 4}[kept["value"]]
        assert _same_weights(find_model(kept["model"]), models[seed])
        if crashes == allowed:
            break
    assert crashes == 7, "five files are written, then the older manifest and its folder go"
    assert kept["value"] == 11.0


def _same_weights(folder: Path, model: TMAD) -> bool:
    return all(map(torch.equal, load_model(folder).parameters(), model.parameters()))


def test_a_better_model_of_a_stretch_that_a_crash_undid_stays(tmp_path: Path) -> None:
    best = str(tmp_path)
    keep_best(best, TMAD(MODEL, seed=1), Course(best=12.0, best_images=8), CONFIG)
    keep_best(best, TMAD(MODEL, seed=2), Course(best=11.0, best_images=6), CONFIG)
    kept = best_kept(best, "psnr_hole")
    assert kept is not None
    assert (kept["value"], kept["images"]) == (12.0, 8)


def test_in_object_storage_the_older_model_goes_too(bucket: str) -> None:
    best = f"{bucket}/run/best"
    for images, value in ((2, 10.0), (4, 11.0), (6, 10.5)):
        keep_best(best, TMAD(MODEL, seed=images), Course(best=value, best_images=images), CONFIG)
    name = checkpoint_name(4)
    assert {key.split("/", 1)[0] for key in storage.list_files(best)} == {name}
    kept = best_kept(best, "psnr_hole")
    assert kept is not None
    assert kept["model"] == f"{best}/{name}"
    assert _same_weights(find_model(best), TMAD(MODEL, seed=4))


def test_the_joint_phase_ends_when_its_measure_no_longer_improves(tmp_path: Path) -> None:
    summary = run_in(tmp_path, STANDING_STILL)
    # The validation at the end of the coarse phase, after 4 images, does not count.
    assert summary["images"] == 8
    assert summary["stopped"].startswith("val/coarse_psnr_hole has not improved for 2 validations in a row since ")
    assert summary["stopped"].endswith(" after 2 images")
    assert summary["checkpoint"] == checkpoint_name(8)
    assert run_in(tmp_path, STANDING_STILL, feed=make_feed(stop_at=8)) == summary


def test_validations_that_did_not_improve_are_counted_across_a_restart(tmp_path: Path) -> None:
    schedule = replace(STANDING_STILL.schedule, checkpoint_every_images=2)
    config = replace(STANDING_STILL, schedule=schedule)
    with pytest.raises(Stopped):
        run_in(tmp_path, config, feed=make_feed(stop_at=6))
    assert run_in(tmp_path, config)["images"] == 8


def test_without_the_setting_a_run_goes_on_to_its_end(tmp_path: Path) -> None:
    schedule = replace(STANDING_STILL.schedule, stop_after_validations=None)
    summary = run_in(tmp_path, replace(STANDING_STILL, schedule=schedule))
    assert (summary["images"], summary["stopped"]) == (12, None)
