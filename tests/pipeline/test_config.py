"""The run configuration: checked, repeated from JSON, compared, and made from a command line."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from jobs import train_places
from pipeline.config import (
    DataConfig,
    PerceptualConfig,
    RunConfig,
    ScheduleConfig,
    TrackingConfig,
    WorkersConfig,
    difference,
    digest,
    from_json,
    refusal,
    to_json,
)
from pipeline.data.collection import ImagesConfig
from pipeline.data.prepare_config import PrepareConfig
from pipeline.data.sources.partitions import PARTITIONS, PartitionName
from pipeline.errors import TMADError, one_line
from pipeline.presets import PRESETS, celebahq, fitted, paper, paris, places, places_rectangle, psnet, smoke
from pipeline.promotion.promote import PromoteConfig
from pipeline.runs.cli import parse, run_job
from pipeline.runs.cluster import shortage
from pipeline.sweep.config import SweepConfig
from pipeline.tracking import resolve_tracking_uri
from tmad.config import LossConfig, OptimConfig

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def _logging_as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_survives_json_unchanged(name: str) -> None:
    config = PRESETS[name]()
    assert from_json(to_json(config)) == config


def test_former_names_in_the_configuration_of_a_saved_run_are_read(caplog: pytest.LogCaptureFixture) -> None:
    config = PRESETS["psnet"]()
    text = to_json(replace(config, optim=replace(config.optim, lr_discriminators=3e-4)))
    former = text
    for now, then in {
        "lr_discriminators": "lr_critics",
        '"discriminators"': '"critics"',
        "coarse_from": "results",
        "best_metric": "best_measure",
    }.items():
        assert now in former
        former = former.replace(now, then)
    with caplog.at_level("INFO"):
        assert to_json(from_json(former)) == text
    assert "the setting results is called coarse_from now" in caplog.text
    with pytest.raises(ValueError, match="unknown setting in RunConfig: critics"):
        from_json(text.replace("{", '{"critics": {},', 1))


def test_a_misspelt_name_in_json_is_refused_with_the_near_one() -> None:
    values = json.loads(to_json(smoke()))
    values["schedule"]["batch_image"] = values["schedule"].pop("batch_images")
    with pytest.raises(ValueError, match=r"schedule\.batch_image \(did you mean batch_images"):
        from_json(json.dumps(values))


def test_broken_json_names_the_line() -> None:
    with pytest.raises(ValueError, match="line 2"):
        from_json('{\n"seed": }')


def test_a_batch_must_divide_among_the_workers() -> None:
    with pytest.raises(ValueError, match=r"batch_images must be a multiple of workers.num_workers \(3\), got 16"):
        RunConfig(workers=WorkersConfig(num_workers=3))


def test_training_and_validation_sets_must_differ() -> None:
    with pytest.raises(ValueError, match=r"data.train and data.val must be different"):
        RunConfig(data=DataConfig(train="a", val="a"))


def test_photographs_take_the_place_of_the_training_set_and_only_one_of_them_is_named() -> None:
    assert DataConfig().training_set == "data/train"
    assert DataConfig(images=ImagesConfig(source="photos")).training_set is None
    with pytest.raises(
        ValueError, match=r"data.train \('a'\) and data.images.source \('b'\) both say .*--data.train None"
    ):
        DataConfig(train="a", images=ImagesConfig(source="b"))
    argv = ["--preset", "demo", "--data.train", "None", "--data.images.source", "photos"]
    argv += ["--data.val", "data/val"]
    argv += ["--data.images.short-side", "256", "300"]
    config = parse(RunConfig, argv, PRESETS).config
    assert (config.data.training_set, config.data.images.short_side) == (None, (256, 300))
    assert from_json(to_json(config)) == config


def test_one_statement_names_training_and_validation_set() -> None:
    for train, val in (("s3://bucket/places/train", "s3://bucket/places/val"), ("sets/a", "sets/val"), ("a", "val")):
        assert DataConfig(train=train).validation_set == val
    assert DataConfig().validation_set == "data/val"
    argv = ["--preset", "places", "--data.train", "s3://bucket/other/train"]
    with pytest.raises(ValueError, match=r"validated on data/places/val, which goes with another training set"):
        parse(RunConfig, argv, PRESETS)
    assert (
        parse(RunConfig, [*argv, "--data.val", "None"], PRESETS).config.data.validation_set == "s3://bucket/other/val"
    )


def test_a_submitted_job_refuses_relative_places_and_says_what_to_write(monkeypatch: pytest.MonkeyPatch) -> None:
    everywhere = ["--runs", "s3://bucket/runs", "--data.train", "/shared/train"]
    assert parse(RunConfig, []).config.runs == "runs"
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    parse(RunConfig, everywhere)
    with pytest.raises(
        ValueError, match=r"s3://bucket/.* got --runs runs, --data\.train data/train, --data\.val data/val$"
    ):
        parse(RunConfig, [])
    with pytest.raises(ValueError, match=r"got --run\.runs runs$"):
        parse(SweepConfig, [f"--run.{word[2:]}" if word[0] == "-" else word for word in everywhere[2:]])
    with pytest.raises(ValueError, match=r"got --out runs/promotions, --data data/val$"):
        parse(PromoteConfig, [])
    with pytest.raises(ValueError, match=r"got --out sets/train$"):
        parse(PrepareConfig, ["--source", "s3://bucket/photos", "--out", "sets/train"])
    with pytest.raises(ValueError, match=r"relative .*sqlite:///runs/mlflow.db"):
        resolve_tracking_uri("sqlite:///runs/mlflow.db", "s3://bucket/runs")


def test_names_that_the_registry_would_refuse_after_training_are_refused_before_it() -> None:
    from mlflow.utils import validation

    names, aliases = ("tmad", "a.b-c_1"), ("champion", "a-b_1", "v1x")
    for name in (*names, "a/b", "a:b", "", " ", "..", "x' OR name != '", "a@b", "é"):
        for alias in (*aliases, "latest", "LATEST", "v1", "V12", "", "a b", "a/b", "a.b"):
            if name in names and alias in aliases:
                TrackingConfig(registered_name=name, alias=alias)
                PromoteConfig(name=name, alias=alias)
                validation._validate_model_name(name)
                validation._validate_model_alias_name(alias)
                validation._validate_model_alias_name_reserved(alias)
                continue
            with pytest.raises(ValueError, match=r"tracking\.(registered_name|alias) must be letters"):
                TrackingConfig(registered_name=name, alias=alias)
            with pytest.raises(ValueError, match=r"(name|alias) must be letters"):
                PromoteConfig(name=name, alias=alias)


def test_settings_of_photographs_without_photographs_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"crop_size, mask_from cannot be set without source: .*data.train.* has its own"
    ):
        ImagesConfig(crop_size=128, mask_from="alpha")


def test_crops_of_photographs_have_to_fit_the_models_patches() -> None:
    images = ImagesConfig(source="photos", crop_size=100)
    with pytest.raises(
        ValueError, match=r"data.images does not fit model: crop_size must be a multiple of .*\(32\), got 100"
    ):
        RunConfig(data=DataConfig(images=images))
    records = images.records(patch_size=20, memory=places_rectangle().model.memory)
    assert (records.patch_size, records.memory.rule) == (20, "clean")


def test_a_name_may_not_leave_its_folder() -> None:
    with pytest.raises(ValueError, match="name must be letters"):
        RunConfig(name="../other")


def test_a_run_trains_at_least_one_batch() -> None:
    with pytest.raises(ValueError, match="at least one batch"):
        ScheduleConfig(coarse_images=0, joint_images=0)


def test_perceptual_features_off_is_a_weight_of_zero_in_the_step() -> None:
    model = replace(smoke().model, patch_size=16)
    config = replace(smoke(), model=model, perceptual=PerceptualConfig(features="off"))
    assert config.loss.weight_perceptual > 0
    assert config.training.loss.weight_perceptual == 0
    assert replace(config, perceptual=PerceptualConfig()).training.loss == config.loss


def test_patches_too_small_for_vgg19_are_refused_where_it_is_used() -> None:
    with pytest.raises(ValueError, match=r"model\.patch_size must be at least 16, got 8"):
        _ = replace(smoke(), perceptual=PerceptualConfig()).training
    assert smoke().training.model.patch_size == 8


def test_difference_lists_every_changed_setting() -> None:
    changed = replace(smoke(), seed=1, optim=OptimConfig(lr=2e-4))
    assert difference(smoke(), changed) == [
        "seed: 0 -> 1",
        "optim.lr: 0.0001 -> 0.0002",
        "optim.ema_halflife_images: 8.0 -> 10000.0",
    ]


def test_machines_and_records_may_change_on_resume_but_not_what_is_learned() -> None:
    elsewhere = replace(smoke(), workers=WorkersConfig(num_workers=4), runs="other", name="again")
    assert refusal(smoke(), elsewhere) == []
    assert digest(smoke()) == digest(elsewhere)
    assert refusal(smoke(), replace(smoke(), seed=7)) == ["seed: 0 -> 7"]
    assert digest(smoke()) != digest(replace(smoke(), seed=7))


def test_rectangles_take_clean_windows_and_25_cells() -> None:
    config = places_rectangle()
    assert (config.model.memory.rule, config.model.memory_stride) == ("clean", 16)
    assert config.schedule.patches_per_image == 25


@pytest.mark.parametrize(
    ("preset", "partition"),
    [
        (places, "places365-standard-train"),
        (paper, "places365-standard-train"),
        (celebahq, "celeba-hq-deepfill-train"),
        (paris, "paris-streetview-train"),
    ],
)
def test_the_presets_of_the_paper_train_the_coarse_network_for_four_epochs(
    preset: Callable[[], RunConfig], partition: PartitionName
) -> None:
    config = preset()
    assert config.schedule.coarse_images == pytest.approx(4 * PARTITIONS[partition].images, rel=0.01)
    assert config.workers.num_workers == 4
    # Of Eq. 1, Table II has 6 and 1; the text has 5 and 0 for rectangles.
    free_form = preset in (paper, places)
    assert replace(config.loss, gp_every=1) == (
        LossConfig() if free_form else LossConfig(weight_hole=5.0, weight_valid=0.0)
    )
    if not free_form:
        assert (config.model, config.schedule.patches_per_image) == (places_rectangle().model, 25)


def test_the_papers_batch_is_a_preset_and_today_s_takes_the_same_images_in_larger_steps_at_a_higher_rate() -> None:
    own, now = paper(), places()
    assert (own.schedule.batch_images, own.optim, own.loss) == (16, OptimConfig(), LossConfig())
    assert (now.schedule.batch_images, now.optim.lr, now.loss.gp_every) == (128, 2.8e-4, 4)
    assert now.schedule.total_images == own.schedule.total_images
    assert psnet().schedule.joint_images == 160_000


@pytest.mark.parametrize(
    ("there", "expected"),
    [
        ({"CPU": 16.0, "GPU": 1.0}, (1, True, 15.0, "bf16", 32)),
        ({"CPU": 64.0, "GPU": 8.0}, (8, True, 7.0, "bf16", 256)),
        ({"CPU": 2.0, "GPU": 2.0}, (2, True, 1.0, "bf16", 64)),
        ({"CPU": 8.0, "GPU": 0.0}, (1, False, 7.0, "fp32", 16)),
        ({"CPU": 1.0}, (1, False, 1.0, "fp32", 16)),
    ],
)
def test_a_configuration_is_fitted_to_all_that_is_there(there: dict[str, float], expected: tuple) -> None:
    config = fitted(RunConfig(), there)
    workers = config.workers
    found = (
        workers.num_workers,
        workers.use_gpu,
        workers.cpus_per_worker,
        config.precision,
        config.schedule.batch_images,
    )
    assert found == expected
    assert config.optim.lr == pytest.approx(1e-4 * math.sqrt(config.schedule.batch_images / 16), rel=0.03)
    assert config.schedule.total_images == RunConfig().schedule.total_images


def trained_with(argv: list[str], monkeypatch: pytest.MonkeyPatch, gpus: int) -> RunConfig:
    """What the job would train."""
    got: list[RunConfig] = []
    monkeypatch.setattr("pipeline.runs.cluster.available", lambda: {"CPU": 16.0, "GPU": float(gpus)})
    monkeypatch.setattr("pipeline.train.launch.train", got.append)
    assert train_places.main(argv) == 0
    return got[0]


def test_without_a_preset_training_takes_what_the_machine_has_and_says_so_first(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        config = trained_with(["--data.train", "some/train"], monkeypatch, gpus=2)
    assert (config.workers.num_workers, config.workers.use_gpu, config.precision) == (2, True, "bf16")
    first = caplog.messages[0]
    assert first.startswith(
        "this machine has 16 CPU, 2 GPU: training on 2 GPUs in bf16, 64 images a step at a rate of 0.0002"
    )
    caplog.clear()
    with caplog.at_level("INFO"):
        config = trained_with(["--data.train", "some/train"], monkeypatch, gpus=0)
    assert (config.workers.num_workers, config.workers.use_gpu, config.precision) == (1, False, "fp32")
    assert "15 threads of the CPU, without a GPU in fp32" in caplog.messages[0]


def test_what_is_asked_for_stays_whatever_the_machine_has(monkeypatch: pytest.MonkeyPatch) -> None:
    named = ["--data.train", "some/train", "--precision", "fp32", "--schedule.batch-images=8", "--loss.gp-every", "2"]
    config = trained_with(named, monkeypatch, gpus=2)
    assert (config.precision, config.schedule.batch_images, config.optim.lr, config.loss.gp_every) == (
        "fp32",
        8,
        1e-4,
        2,
    )
    for argv in (["--workers.num-workers", "2"], ["--preset", "smoke"], ["--workers.no-use-gpu"]):
        config = trained_with([*argv, "--data.train", "x", "--data.val", "y"], monkeypatch, gpus=4)
        assert not config.workers.use_gpu
        assert config.precision == "fp32"


def test_single_settings_go_on_top_of_a_preset_and_are_read_by_type() -> None:
    command = parse(RunConfig, ["--preset", "smoke", "--optim.lr", "1e-5", "--loss.no-relativistic"], PRESETS)
    assert command.config.optim.lr == 1e-5
    assert command.config.loss.relativistic is False
    assert command.config.model == smoke().model
    assert command.dry_run is False


def test_the_file_of_an_earlier_run_repeats_it(tmp_path: Path) -> None:
    saved = tmp_path / "config.json"
    saved.write_text(to_json(replace(smoke(), name="first", seed=3)))
    command = parse(RunConfig, ["--config", str(saved), "--name", "second", "--dry-run"], PRESETS)
    assert command.config == replace(smoke(), name="second", seed=3)
    assert command.dry_run is True
    assert from_json(command.resolved()) == command.config


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--preset", "smok"], "unknown preset 'smok'; did you mean smoke?"),
        (["--preset", "smoke", "--config", "x.json"], "exclude each other"),
        (["--config", "nowhere.json"], "there is no nowhere.json"),
        (["--config", ""], "--config is empty"),
        (["--preset", ""], "--preset is empty"),
        (["--preset", "smoke", "--runs", ""], "--runs is empty; give a value, or leave the option out"),
        (["--preset", "smoke", "--data.train", "", "--data.val", "x"], "--data.train is empty"),
    ],
)
def test_a_wrong_start_is_one_clear_error(argv: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        parse(RunConfig, argv, PRESETS)


def test_an_unknown_option_ends_with_code_2_and_the_near_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse(RunConfig, ["--preset", "smoke", "--optim.lrr", "1"], PRESETS)
    assert stopped.value.code == 2
    assert "--optim.lr " in capsys.readouterr().err


def test_out_of_range_on_the_command_line_names_field_and_value(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(RunConfig, ["--preset", "smoke", "--schedule.batch-images", "5"], PRESETS)
    assert capsys.readouterr().err == (
        "schedule.batch_images must be a multiple of workers.num_workers (2), got 5: every worker takes an equal share "
        "of each batch; --help explains the options\n"
    )


@pytest.mark.parametrize(
    "text",
    ['{"a":' * 100_000, '{"seed": ' + "9" * 5000 + "}", "\0", '{"seed": 1, "seed": 2}'],
    ids=["deep", "long", "nul", "twice"],
)
def test_a_configuration_file_that_cannot_be_read_is_one_sentence(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"^--config: .*config\.json cannot be read: "):
        parse(RunConfig, ["--config", str(tmp_path / "config.json")], PRESETS)


@pytest.mark.parametrize("number", ["inf", "nan"])
@pytest.mark.parametrize("option", ["optim.lr", "workers.stop-grace-s", "tracking.wait-s", "data.images.max-aspect"])
def test_what_is_no_finite_number_is_refused(option: str, number: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(RunConfig, ["--preset", "smoke", f"--{option}", number], PRESETS)
    told = capsys.readouterr().err
    assert re.fullmatch(rf"{option.split('.')[-1].replace('-', '_')}: .*, got {number}; --help .*\n", told)


def _fail(error: Exception) -> None:
    raise error


@pytest.mark.usefixtures("_logging_as_before")
@pytest.mark.parametrize("error", [TMADError("too small"), ValueError("too\nsmall")])
def test_an_expected_error_is_one_line_and_exit_code_1(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        run_job(lambda argv: _fail(error), [])
    assert stopped.value.code == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].endswith("E too small")


@pytest.mark.usefixtures("_logging_as_before")
def test_debug_shows_where_an_error_came_from(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run_job(lambda argv: _fail(ValueError("bad")), ["--debug"])
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.usefixtures("_logging_as_before")
def test_an_unexpected_error_keeps_its_traceback() -> None:
    with pytest.raises(KeyError):
        run_job(lambda argv: _fail(KeyError("bug")), [])


def test_pydantic_errors_become_one_line() -> None:
    with pytest.raises(ValueError, match="patch_size") as caught:
        from_json('{"model": {"patch_size": 6}, "seed": -1}')
    line = one_line(caught.value)
    assert "\n" not in line
    assert "seed: Input should be greater than or equal to 0, got -1" in line


def test_a_shortage_names_what_is_missing() -> None:
    assert shortage({"CPU": 3, "GPU": 2}, {"CPU": 8.0, "GPU": 1.0}) == "1 GPU missing"
    assert shortage({"CPU": 3}, {"CPU": 3.0}) == ""


def test_a_dry_run_prints_configuration_and_plan_from_any_folder_and_fails_where_things_are_missing(
    tmp_path: Path,
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        cluster = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, str(ROOT / "jobs" / "train_places.py"), "--preset", "smoke", "--seed", "5", "--dry-run"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["RAY_ADDRESS"] = cluster
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stderr
    assert from_json(done.stdout) == replace(smoke(), seed=5)
    assert "6: 2 coarse (8 images), then 4 jointly (16 images)" in done.stderr
    assert f"no Ray cluster at {cluster} (RAY_ADDRESS): [Errno 111]" in done.stderr
    assert done.stderr.endswith("3 of 8 checks failed\n")
    assert list(tmp_path.iterdir()) == []
