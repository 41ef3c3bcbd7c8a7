"""The training loop in one process: phases, resumption to the last bit, validation, what stops it."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.errors import Interrupted, TrainingFailed
from pipeline.train.loop import (
    Meter,
    Stretch,
    _system,
    checkpoint_name,
    due,
    duration,
    progress_line,
    stretch_at,
    train_loop,
)
from pipeline.train.preemption import Kind, Notice
from pipeline.train.validate import validate
from tests.pipeline.runs import CONFIG, LocalContext, Recorder, Stopped, make_feed, run_in
from tests.tmad.tiny import Features, make_batch
from tmad.batch import Batch
from tmad.checkpoint import load_model, load_state
from tmad.model import TMAD
from tmad.step import NonFiniteLoss, OneWorker, TrainingState


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], Recorder]:
    """A whole run: its checkpoints, its summary, what it recorded."""
    folder, recorder = tmp_path_factory.mktemp("unbroken"), Recorder()
    return folder, run_in(folder, tracker=recorder), recorder


@pytest.mark.parametrize("stop_at", [2, 6, 8, 10], ids=lambda images: f"stopped-after-{images}-images")
def test_a_run_that_was_stopped_and_continued_ends_as_the_unbroken_one_to_the_last_bit(
    tmp_path: Path, unbroken: tuple[Path, dict[str, Any], Recorder], stop_at: int
) -> None:
    with pytest.raises(Stopped):
        run_in(tmp_path, feed=make_feed(stop_at))
    summary = run_in(tmp_path)
    folder, expected, _ = unbroken
    assert summary == expected
    for file in ("state.safetensors", "model/model.safetensors"):
        ours, theirs = (one / summary["checkpoint"] / file for one in (tmp_path, folder))
        assert ours.read_bytes() == theirs.read_bytes()


def test_a_finished_run_trains_no_further(tmp_path: Path, unbroken: tuple[Path, dict[str, Any], Recorder]) -> None:
    folder, expected, _ = unbroken
    before = {path.name for path in folder.iterdir()}
    assert run_in(folder, feed=make_feed(stop_at=0)) == expected
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
    assert {"loss/gan_patch", "loss/perceptual", "loss/discriminator_global"} <= recorder.at(8).keys()


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


def test_losses_that_are_not_finite_stop_the_run_by_their_name_if_going_back_does_not_help(tmp_path: Path) -> None:
    config = replace(CONFIG, optim=replace(CONFIG.optim, max_bad_steps=2))
    recorder = Recorder()
    with pytest.raises(NonFiniteLoss) as caught:
        run_in(tmp_path, config, tracker=recorder, features=Broken())
    assert "2 steps in a row were not finite (images 8 to 12 of the run); not finite in the last one: loss/perc" in str(
        caught.value
    )
    assert "loss/perceptual, loss/total on worker 0 with images image-10-0, image-10-1" in str(caught.value)
    assert f"going back to checkpoint {checkpoint_name(4)} did not help" in str(caught.value)
    assert recorder.at(8)["health/rollbacks"] == 1
    # What is due in a bad row is not kept: its weights may be what is wrong.
    assert {path.name for path in tmp_path.iterdir()} == {checkpoint_name(4)}


def test_without_a_checkpoint_there_is_nothing_to_go_back_to(tmp_path: Path) -> None:
    schedule = replace(CONFIG.schedule, coarse_images=0)
    config = replace(CONFIG, optim=replace(CONFIG.optim, max_bad_steps=2), schedule=schedule)
    with pytest.raises(NonFiniteLoss, match=r"images 0 to 4 of the run.* no checkpoint yet to go back to"):
        run_in(tmp_path, config, features=Broken())


BAD = (8, 10)
"""Images at which the batches of a run give no finite loss: its last checkpoint is that of 8."""

HEALING = replace(
    CONFIG,
    optim=replace(CONFIG.optim, max_bad_steps=2),
    schedule=replace(CONFIG.schedule, joint_images=14),
)


@pytest.fixture(scope="module")
def healed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run of 18 images that goes back once, and its summary."""
    folder = tmp_path_factory.mktemp("healed")
    return folder, run_in(folder, HEALING, feed=make_feed(nan_at=BAD))


def test_a_bad_row_sends_the_run_back_to_its_newest_checkpoint_and_data_go_on_behind_the_row(
    healed: tuple[Path, dict[str, Any]],
) -> None:
    folder, summary = healed
    assert (summary["rollbacks"], summary["bad_steps"], summary["images"]) == (1, 2, 18)
    # Due at 12, where the row ended; kept after the first good step.
    assert sorted(path.name for path in folder.iterdir()) == [checkpoint_name(images) for images in (4, 8, 14, 16, 18)]
    state = TrainingState(HEALING.training, perceptual=Features())
    load_state(state, folder / checkpoint_name(8))
    state.images_seen, state.steps, state.bad_steps = 12, 6, 2
    for images in (12, 14, 16):
        state.step(make_batch(images), "joint", global_batch=2, progress=(images - 4) / 14)
    kept = TrainingState(HEALING.training, seed=1, perceptual=Features())
    load_state(kept, folder / summary["checkpoint"])
    assert kept.counters() == state.counters()
    ours, theirs = state.tensors(), kept.tensors()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.parametrize("stop_at", [10, 12, 14], ids=["in the row", "after going back", "after the next checkpoint"])
def test_a_run_that_went_back_and_was_stopped_ends_as_the_unbroken_one_to_the_last_bit(
    tmp_path: Path, healed: tuple[Path, dict[str, Any]], stop_at: int
) -> None:
    with pytest.raises(Stopped):
        run_in(tmp_path, HEALING, feed=make_feed(stop_at, nan_at=BAD))
    assert run_in(tmp_path, HEALING, feed=make_feed(nan_at=BAD)) == healed[1]
    ours, theirs = (one / healed[1]["checkpoint"] / "state.safetensors" for one in (tmp_path, healed[0]))
    assert ours.read_bytes() == theirs.read_bytes()


def test_the_log_names_terms_and_images_of_a_bad_row_and_where_the_run_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        run_in(tmp_path, HEALING, feed=make_feed(nan_at=BAD))
    first, back = (record.getMessage() for record in caplog.records)
    assert re.search(r"not finite: loss/coarse_hole, .*\(after 8 images, with image-8-0, image-8-1\)", first)
    assert back.startswith(
        f"back to the weights of checkpoint {checkpoint_name(8)}; data continue after 12 images: 2 steps"
    )


def test_one_bad_step_is_skipped_and_sends_nothing_back(tmp_path: Path) -> None:
    summary = run_in(tmp_path, HEALING, feed=make_feed(nan_at=(8, 12)))
    assert (summary["rollbacks"], summary["bad_steps"]) == (0, 2)


class Announced(LocalContext):
    """An end is announced after so many steps."""

    def __init__(self, folder: Path, kind: Kind, steps: int) -> None:
        super().__init__(folder, workers=OneWorker())
        self.kind, self.left = kind, steps

    def notice(self) -> Notice | None:
        self.left -= 1
        return Notice(self.kind, "told to end") if self.left == 0 else None


@pytest.mark.parametrize("kind", ["stop", "restart"])
def test_an_announced_end_leaves_a_checkpoint_from_which_the_run_goes_on_to_the_last_bit(
    tmp_path: Path, unbroken: tuple[Path, dict[str, Any], Recorder], kind: Kind
) -> None:
    with pytest.raises(Interrupted, match="after 6 images; checkpoint images_000000000006 is kept") as caught:
        train_loop(CONFIG, Announced(tmp_path, kind, 3), make_feed(), Recorder(), Features())
    assert caught.value.details["restart"] is (kind == "restart")
    assert {path.name for path in tmp_path.iterdir()} == {checkpoint_name(4), checkpoint_name(6)}
    # No batch before those six images is made again.
    assert run_in(tmp_path, feed=make_feed(from_images=6)) == unbroken[1]
    ours, theirs = (one / checkpoint_name(12) / "state.safetensors" for one in (tmp_path, unbroken[0]))
    assert ours.read_bytes() == theirs.read_bytes()


def test_a_machine_that_will_be_gone_costs_a_checkpoint_and_training_goes_on(
    tmp_path: Path, unbroken: tuple[Path, dict[str, Any], Recorder]
) -> None:
    context = Announced(tmp_path, "drain", 3)
    assert train_loop(CONFIG, context, make_feed(), Recorder(), Features()) == unbroken[1]
    assert {path.name for path in tmp_path.iterdir()} == {checkpoint_name(images) for images in (4, 6, 8, 12)}


def test_an_end_announced_at_the_last_step_or_in_a_bad_row_keeps_nothing_more(
    tmp_path: Path, unbroken: tuple[Path, dict[str, Any], Recorder]
) -> None:
    context = Announced(tmp_path / "last", "stop", 6)
    assert train_loop(CONFIG, context, make_feed(), Recorder(), Features()) == unbroken[1]
    with pytest.raises(Interrupted, match="after 10 images; checkpoint images_000000000008 is kept"):
        train_loop(HEALING, Announced(tmp_path / "row", "stop", 5), make_feed(nan_at=BAD), Recorder(), Features())


def test_workers_whose_weights_differ_stop_the_run(tmp_path: Path) -> None:
    class Drifted(LocalContext):
        def same_everywhere(self, value: Tensor) -> bool:
            return False

    context = Drifted(tmp_path, workers=OneWorker())
    with pytest.raises(TrainingFailed, match="the workers' weights differ after 0 images"):
        train_loop(CONFIG, context, make_feed(), Recorder(), Features())


def test_a_checkpoint_of_another_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        run_in(tmp_path, feed=make_feed(stop_at=6))
    other = replace(CONFIG, loss=replace(CONFIG.loss, weight_tv=0.5))
    with pytest.raises(ValueError, match=r"weight_tv: 0\.02 -> 0\.5"):
        run_in(tmp_path, other)


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


def test_the_memory_of_the_gpu_is_the_most_since_the_last_time_and_its_use_is_there_where_it_can_be_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    peaks = [3e9, 1e9]
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: peaks[0])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: peaks.pop(0))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "utilization", lambda device: 97)
    first = _system(torch.device("cuda"))
    assert first["system/gpu_utilization_percentage"] == 97

    def no_nvml(device: torch.device) -> int:
        raise RuntimeError("cuda driver can't be loaded, is cuda enabled?")

    monkeypatch.setattr(torch.cuda, "utilization", no_nvml)
    found = [first, _system(torch.device("cuda"))]
    assert [one["system/gpu_memory_gb"] for one in found] == [3.0, 1.0], "a large step does not hide those after it"
    assert found[0].keys() - found[1].keys() == {"system/gpu_utilization_percentage"}


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


def test_the_texture_of_a_validation_is_that_of_all_workers_images_together() -> None:
    model, size = TMAD(CONFIG.model, seed=1), 4
    whole = make_batch(999, size=size)

    class Half(LocalContext):
        """One of two workers; what the other one gives is known beforehand."""

        def __init__(self, others: list[Any]) -> None:
            super().__init__(Path(), workers=OneWorker())
            self.given: list[Any] = []
            self._others = others

        def everyones(self, value: Any) -> list[Any]:
            self.given.append(value)
            return [value, *self._others]

    def share(rows: slice) -> Batch:
        return Batch(
            whole.image_id[rows], *(getattr(whole, name)[rows] for name in ("image", "mask", "pool_yx", "cells", "mix"))
        )

    second = Half([])
    validate(model, "joint", [share(slice(2, size))], second)
    together, _ = validate(model, "joint", [share(slice(0, 2))], Half(second.given))
    alone, _ = validate(model, "joint", [whole], LocalContext(Path(), workers=OneWorker()))
    # A pixel may be rounded otherwise in a batch of another size.
    expected = pytest.approx(alone["val/swd_hole_truthscaled"], rel=1e-3)
    assert together["val/swd_hole_truthscaled"] == expected
    half, _ = validate(model, "joint", [share(slice(0, 2))], LocalContext(Path(), workers=OneWorker()))
    assert half["val/swd_hole_truthscaled"] != expected
    coarse, _ = validate(model, "coarse", [whole], LocalContext(Path(), workers=OneWorker()))
    assert "val/swd_hole_truthscaled" not in coarse
