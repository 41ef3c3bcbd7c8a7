"""The training loop in one process: phases, resumption to the last bit, validation, what stops it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipeline.config import PerceptualConfig, RunConfig, ScheduleConfig
from pipeline.errors import TrainingFailed
from pipeline.tracking import Tracker
from pipeline.train.context import LocalContext
from pipeline.train.loop import (
    Feed,
    Meter,
    Stretch,
    checkpoint_name,
    due,
    duration,
    progress_line,
    stretch_at,
    train_loop,
)
from tests.tmad.tiny import TRAINING, Features, make_batch
from tmad.batch import Batch
from tmad.checkpoint import load_model
from tmad.step import NonFiniteLoss, OneWorker

CONFIG = RunConfig(
    name="test",
    model=TRAINING.model,
    critics=TRAINING.critics,
    optim=TRAINING.optim,
    perceptual=PerceptualConfig(features="untrained"),
    schedule=ScheduleConfig(
        coarse_images=4,
        joint_images=8,
        batch_images=2,
        patches_per_image=9,
        validate_every_images=100,
        validation_images=2,
        checkpoint_every_images=4,
        log_every_images=4,
    ),
)


class Stopped(Exception):
    """The process was killed here."""


class Recorder(Tracker):
    """Keeps what a run would have sent."""

    def __init__(self) -> None:
        super().__init__(None, None)
        self.values: list[tuple[int, dict[str, float]]] = []
        self.images: list[tuple[int | None, np.ndarray]] = []

    def metrics(self, values: Any, step: int) -> None:
        self.values.append((step, dict(values)))

    def image(self, name: str, array: np.ndarray, step: int | None = None) -> None:
        self.images.append((step, array))

    def at(self, step: int) -> dict[str, float]:
        return {name: value for when, values in self.values if when == step for name, value in values.items()}


def _feed(stop_at: int | None = None) -> Feed:
    """Batches that depend on their position alone, as those of a prepared set; *stop_at*: fail there."""

    def training(start_images: int) -> Iterator[Batch]:
        for images in range(start_images, 10**6, 2):
            if images == stop_at:
                raise Stopped
            yield make_batch(images)

    return Feed(training=training, validation=lambda: iter([make_batch(999)]))


def _run(
    folder: Path,
    config: RunConfig = CONFIG,
    *,
    feed: Feed | None = None,
    tracker: Tracker | None = None,
    features: nn.Module | None = None,
) -> dict[str, Any]:
    context = LocalContext(folder, workers=OneWorker())
    return train_loop(config, context, feed or _feed(), tracker or Recorder(), features or Features())


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], Recorder]:
    """A whole run: its checkpoints, its summary, what it recorded."""
    folder, recorder = tmp_path_factory.mktemp("unbroken"), Recorder()
    return folder, _run(folder, tracker=recorder), recorder


@pytest.mark.parametrize("stop_at", [2, 6, 8, 10], ids=lambda images: f"stopped-after-{images}-images")
def test_a_run_that_was_stopped_and_continued_ends_as_the_unbroken_one_to_the_last_bit(
    tmp_path: Path, unbroken: tuple[Path, dict[str, Any], Recorder], stop_at: int
) -> None:
    with pytest.raises(Stopped):
        _run(tmp_path, feed=_feed(stop_at))
    summary = _run(tmp_path)
    folder, expected, _ = unbroken
    assert summary == expected
    for file in ("state.safetensors", "model/model.safetensors"):
        ours, theirs = (one / summary["checkpoint"] / file for one in (tmp_path, folder))
        assert ours.read_bytes() == theirs.read_bytes()


def test_a_finished_run_trains_no_further(tmp_path: Path, unbroken: tuple[Path, dict[str, Any], Recorder]) -> None:
    folder, expected, _ = unbroken
    before = {path.name for path in folder.iterdir()}
    assert _run(folder, feed=_feed(stop_at=0)) == expected
    assert {path.name for path in folder.iterdir()} == before


def test_checkpoints_come_by_images_and_hold_model_and_configuration(
    unbroken: tuple[Path, dict[str, Any], Recorder],
) -> None:
    folder, summary, _ = unbroken
    assert sorted(path.name for path in folder.iterdir()) == [checkpoint_name(images) for images in (4, 8, 12)]
    newest = folder / summary["checkpoint"]
    assert load_model(newest / "model").config == CONFIG.model
    assert json.loads((newest / "run.json").read_text())["config"]["optim"]["lr"] == CONFIG.optim.lr


def test_the_coarse_phase_comes_first_and_trains_no_other_term(
    unbroken: tuple[Path, dict[str, Any], Recorder],
) -> None:
    recorder = unbroken[2]
    coarse = {name for name in recorder.at(4) if name.startswith("loss/")}
    assert coarse == {"loss/coarse_hole", "loss/coarse_valid", "loss/total"}
    assert {"loss/gan_patch", "loss/perceptual", "loss/critic_global"} <= recorder.at(8).keys()


def test_each_phase_ends_with_measures_and_pictures(unbroken: tuple[Path, dict[str, Any], Recorder]) -> None:
    _, summary, recorder = unbroken
    assert [step for step, _ in recorder.images] == [4, 12]
    assert "val/coarse_psnr_hole" in recorder.at(4)
    assert "val/psnr_hole" not in recorder.at(4)
    assert {"val/psnr_hole", "val/l1_hole_pct", "val/ssim_full", "val/coarse_psnr_hole"} <= recorder.at(12).keys()
    assert recorder.at(12)["val/images"] == 2
    assert summary["validation"].items() <= recorder.at(12).items()


def test_rates_are_reported_at_every_interval(unbroken: tuple[Path, dict[str, Any], Recorder]) -> None:
    for images in (4, 8, 12):
        assert unbroken[2].at(images)["rate/images_per_s"] > 0
        assert 0 <= unbroken[2].at(images)["rate/data_wait_share"] <= 1


class Broken(Features):
    """Features that are not a number."""

    def forward(self, images: Tensor) -> list[Tensor]:
        return [one * torch.nan for one in super().forward(images)]


def test_losses_that_are_not_finite_stop_the_run_by_their_name_and_change_no_weight(tmp_path: Path) -> None:
    config = replace(CONFIG, optim=replace(CONFIG.optim, max_bad_steps=3))
    recorder = Recorder()
    with pytest.raises(NonFiniteLoss, match="loss/perceptual"):
        _run(tmp_path, config, tracker=recorder, features=Broken())
    assert recorder.at(8)["bad_steps"] == 2
    newest = load_model(tmp_path / checkpoint_name(8) / "model").state_dict()
    after_coarse = load_model(tmp_path / checkpoint_name(4) / "model").state_dict()
    assert all(torch.equal(newest[name], after_coarse[name]) for name in newest)


def test_workers_whose_weights_differ_stop_the_run(tmp_path: Path) -> None:
    class Drifted(LocalContext):
        def same_everywhere(self, value: Tensor) -> bool:
            return False

    context = Drifted(tmp_path, workers=OneWorker())
    with pytest.raises(TrainingFailed, match="the workers' weights differ after 0 images"):
        train_loop(CONFIG, context, _feed(), Recorder(), Features())


def test_a_checkpoint_of_another_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        _run(tmp_path, feed=_feed(stop_at=6))
    other = replace(CONFIG, loss=replace(CONFIG.loss, weight_tv=0.5))
    with pytest.raises(ValueError, match=r"weight_tv: 0\.02 -> 0\.5"):
        _run(tmp_path, other)


def test_the_schedule_changes_phase_where_the_coarse_images_are_reached() -> None:
    schedule = CONFIG.schedule
    assert [stretch_at(schedule, images).phase for images in (0, 3, 4, 11)] == ["coarse", "coarse", "joint", "joint"]
    assert stretch_at(schedule, 6).progress(6) == 0.25
    assert stretch_at(replace(schedule, coarse_images=0), 0) == Stretch("joint", 0, 8)


@pytest.mark.parametrize(("before", "after", "is_due"), [(0, 4, False), (8, 10, True), (10, 19, False), (9, 31, True)])
def test_an_interval_is_due_when_a_multiple_is_passed(before: int, after: int, is_due: bool) -> None:
    assert due(before, after, 10) is is_due


def test_a_mean_over_an_interval_leaves_out_what_is_not_finite(tmp_path: Path) -> None:
    meter = Meter()
    for value in (1.0, float("nan"), float("inf"), 3.0):
        meter.add({"loss/total": torch.tensor(value), "lr": torch.tensor(value)}, 2)
    metrics = meter.read(LocalContext(tmp_path, workers=OneWorker()))
    assert metrics["loss/total"] == 2.0
    assert metrics["lr"] == 3.0


def test_the_progress_line_says_phase_images_losses_rate_wait_and_time_left() -> None:
    metrics = {"loss/total": 1.25, "rate/images_per_s": 10.0, "rate/data_wait_share": 0.031, "bad_steps": 2.0}
    line = progress_line(Stretch("joint", 4_000, 16_000), 10_000, metrics)
    assert line == (
        "joint 6,000/12,000 images, total 1.25, 10.0 images/s, 3 % waiting for data, "
        "2 steps skipped so far (not finite), phase ends in 10 min"
    )


@pytest.mark.parametrize(
    ("seconds", "text"), [(45, "45 s"), (720, "12 min"), (11_100, "3 h 05 min"), (187_200, "2 d 4 h")]
)
def test_durations_read_easily(seconds: float, text: str) -> None:
    assert duration(seconds) == text
