"""A sweep without its trials: the space and what it refuses, points, outcomes, figures, a restart."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.config import DataConfig, PerceptualConfig, RunConfig
from pipeline.errors import SweepFailed
from pipeline.evaluation.pictures import centred_hole
from pipeline.presets import places, smoke
from pipeline.report.page import Drawing, _templates
from pipeline.storage.whole import whole_files
from pipeline.sweep.ablate import AblateConfig, Row, as_sweep, scale, table
from pipeline.sweep.config import SWEEP_PRESETS, SweepConfig
from pipeline.sweep.figures import bars, front, parallel_coordinates
from pipeline.sweep.launch import _has_records, _Rungs, room
from pipeline.sweep.plan import _rate_here, expected_images
from pipeline.sweep.space import DOMAINS, GROUPS, Choice, LogRange, apply, make_space, sample
from pipeline.sweep.studies import STUDIES
from pipeline.sweep.summary import chance
from pipeline.sweep.trial import Job, decode, encode, trial_run
from pipeline.sweep.trials import Trial, importance, pareto, read_trial, winner
from tests.pipeline.conftest import SetMaker
from tests.tmad.tiny import MODEL
from tmad.config import LossConfig

TABLE_II = {
    "loss.weight_hole": 6,
    "loss.weight_valid": 1,
    "loss.weight_l1": 1,
    "loss.weight_gan_patch": 0.05,
    "loss.weight_perceptual": 0.02,
    "loss.weight_tv": 0.02,
    "loss.weight_gan_global": 0.02,
}


def make_trial(number: int, status: str = "finished", point: dict[str, Any] | None = None, **metrics: float) -> Trial:
    history = [{"images": 8, **metrics}] if metrics else []
    return Trial(number, f"t{number}", point or {}, status, 8, metrics, history, 1.0, None, None)  # type: ignore[arg-type]


def test_the_weights_are_those_of_table_ii_with_the_papers_value_in_the_middle_of_a_log_range() -> None:
    assert set(GROUPS["weights"]) == TABLE_II.keys()
    for name, value in TABLE_II.items():
        domain = DOMAINS[name]
        assert isinstance(domain, LogRange)
        assert math.sqrt(domain.low * domain.high) == pytest.approx(value)
        assert getattr(LossConfig(), name.removeprefix("loss.")) == value


def test_words_name_groups_settings_ranges_and_choices() -> None:
    space = make_space(
        ["weights", "optim.lr=1e-5..1e-3", "optim.betas=[0.5,0.999],[0,0.9]", "loss.patch_region=cell,hole"], places()
    )
    assert list(space)[:7] == list(TABLE_II)
    assert space["optim.lr"] == LogRange(1e-5, 1e-3)
    assert space["optim.betas"] == Choice(((0.5, 0.999), (0, 0.9)))
    assert space["loss.patch_region"] == Choice(("cell", "hole"))
    assert make_space(["schedule.patches_per_image=16..64"], places())["schedule.patches_per_image"].at(0.5) == 32


def test_a_weight_without_effect_leaves_its_group_and_is_refused_by_name() -> None:
    off = replace(places(), perceptual=PerceptualConfig(features="off"))
    assert "loss.weight_perceptual" not in make_space(["weights"], off)
    with pytest.raises(ValueError, match=r"loss\.weight_perceptual has no effect, as perceptual\.features is off"):
        make_space(["loss.weight_perceptual"], off)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "space is empty: nothing is named; groups: weights, rates"),
        (["loss.weight_tv=0.1"], "space is empty: there is one point in it"),
        (["loss.weigth_tv"], "no setting 'loss.weigth_tv'; did you mean loss.weight_tv"),
        (["wieghts"], "did you mean weights"),
        (["loss.weight_tv=1..0.1"], "from a number above 0 to a larger one"),
        (["loss.weight_tv=0..1"], "above 0 .*list them"),
        (["loss.weight_tv=a..b"], "a range is two numbers"),
        (["loss.weight_tv=-1,1"], "loss.weight_tv = -1 cannot be trained"),
        (["loss.weight_tv", "weights"], "loss.weight_tv is named twice"),
        (["loss.weight_tv=1,1"], "1 stands there twice"),
        (["weights=1..2"], "weights is a group"),
        (["schedule.batch_images"], "has no range of its own; give one"),
        (["model.retrieval.num_candidates=1,500"], "= 500 cannot be trained: .*pool_size must be at least"),
    ],
)
def test_spaces_that_are_empty_contradictory_or_unknown_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_space(words, places())


@pytest.mark.parametrize(
    ("objectives", "message"),
    [
        (("psnr",), "no objective is called 'psnr'.*There are psnr_hole, l1_hole_pct"),
        (("loss/total",), "a weighted loss moves with its weights"),
        ((), "must name one or more of"),
        (("psnr_hole", "psnr_hole"), "each once"),
    ],
)
def test_objectives_are_measures_of_the_validation_and_no_loss(objectives: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SweepConfig(run=smoke(), objectives=objectives)


def test_every_preset_of_training_is_one_of_sweeps() -> None:
    assert all(make().run.name is None for make in SWEEP_PRESETS.values())


def test_points_are_seeded_spread_evenly_and_do_not_depend_on_their_number() -> None:
    space = make_space(["weights"], places())
    points = sample(space, 16, seed=3)
    assert sample(space, 5, seed=3) == points[:5]
    assert sample(space, 5, seed=4) != points[:5]
    for name, domain in space.items():
        assert isinstance(domain, LogRange)
        eighths = [int(8 * math.log(point[name] / domain.low) / math.log(domain.high / domain.low)) for point in points]
        assert sorted(eighths[:8]) == list(range(8)), "one point in each eighth of the axis"


def test_a_point_is_applied_through_tunes_encoding_and_the_winner_is_a_preset() -> None:
    point = {"loss.weight_l1": 0.25, "optim.betas": (0.0, 0.9), "model.retrieval.num_candidates": 6, "seed": 3}
    run = apply(places(), decode(encode(point)))
    assert (run.loss.weight_l1, run.optim.betas, run.model.retrieval.num_candidates, run.seed) == (
        0.25,
        (0.0, 0.9),
        6,
        3,
    )
    assert apply(run, {}) == run
    with pytest.raises(ValueError, match=r"unknown setting in RunConfig: loss\.weight_x"):
        apply(run, {"loss.weight_x": 1})


def test_trials_share_the_coarse_network_report_every_validation_and_register_nothing() -> None:
    from pipeline.config import to_json

    job = Job("/sweep", to_json(smoke()), "/sweep/coarse", ("psnr_hole",), "sqlite:////sweep/mlflow.db", "abc")
    run = trial_run(job, {"loss.weight_l1": 2.0}, "t1")
    assert (run.name, run.runs, run.init_from, run.init_networks) == ("t1", "/sweep/trials", "/sweep/coarse", "coarse")
    assert run.schedule.coarse_images == 0
    assert run.schedule.checkpoint_every_images == run.schedule.validate_every_images
    assert (run.tracking.register, run.tracking.parent_run) == (False, "abc")


def test_the_winner_is_the_best_finished_trial_by_the_first_objective() -> None:
    trials = [
        make_trial(1, psnr_hole=20.0, swd_hole_truthscaled=50.0),
        make_trial(2, "stopped early", psnr_hole=30.0, swd_hole_truthscaled=10.0),
        make_trial(3, psnr_hole=21.0, swd_hole_truthscaled=60.0),
        make_trial(4, psnr_hole=19.0, swd_hole_truthscaled=70.0),
        make_trial(5, "failed"),
    ]
    best = winner(trials, "psnr_hole")
    lowest = winner(trials, "swd_hole_truthscaled")
    assert best is not None
    assert lowest is not None
    assert (best.number, lowest.number) == (3, 1)
    assert [one.number for one in pareto(trials, ("psnr_hole", "swd_hole_truthscaled"))] == [1, 3]
    assert winner(trials[1:2], "psnr_hole") is None


def test_importance_finds_the_setting_that_matters_and_its_direction() -> None:
    trials = [
        make_trial(n, point={"loss.weight_l1": 10.0**n, "loss.weight_tv": float((7 * n) % 5)}, l1_hole_pct=9.0 - n)
        for n in range(1, 9)
    ]
    found = importance(trials, "l1_hole_pct")
    assert found["loss.weight_l1"] == pytest.approx(1)
    assert abs(found["loss.weight_tv"]) < 0.5
    assert importance(trials[:2], "l1_hole_pct") == {}


def test_a_correlation_is_never_said_to_be_chance_below_a_value_that_none_can_have() -> None:
    assert {chance(trials) for trials in (1, 2, 3, 5)} >= {"With 3 trials any value may be chance."}
    for trials in range(1, 200):
        assert all(abs(float(value)) < 1 for value in re.findall(r"-?\d\.\d", chance(trials)))
    assert chance(17) == "With 17 trials, values between -0.5 and 0.5 may be chance."


def drawn(figure: Drawing) -> str:
    """As it stands in a page."""
    template = '{% import "parts.html" as parts %}{{ parts.drawing(figure, "") }}'
    return _templates().from_string(template).render(figure=figure)


def test_figures_hold_every_trial_and_escape_what_they_show() -> None:
    space = {"loss.weight_l1": LogRange(0.1, 10.0), "loss.patch_region": Choice(("<cell>", "hole"))}
    trials = [
        make_trial(n, point={"loss.weight_l1": 0.1 * 10**n, "loss.patch_region": "<cell>"}, psnr_hole=20.0 + n,
                   swd_hole_truthscaled=50.0 - n)
        for n in range(2)
    ]  # fmt: skip
    lines, dots, rows = (
        drawn(figure)
        for figure in (
            parallel_coordinates(trials, space, "psnr_hole"),
            front(trials, "psnr_hole", "swd_hole_truthscaled"),
            bars({"a": 0.5, "b": -1.0}, "label"),
        )
    )
    assert (lines.count("<polyline"), dots.count("<circle")) == (2, 2)
    assert "<cell>" not in lines + dots
    assert "&lt;cell&gt;" in lines
    assert "+0.50" in rows


def test_a_trial_is_read_from_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "trials" / "a"
    folder.mkdir(parents=True)
    (folder / "point.json").write_text('{"loss.weight_l1": 2.0}')
    rows = [{"step": 4, "time_s": 10.0, "val/psnr_hole": 12.0}, {"step": 8, "time_s": 13.0, "val/psnr_hole": 14.0}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    trial = read_trial(str(tmp_path), 1, "a")
    assert (trial.status, trial.images, trial.metrics, trial.seconds) == ("stopped early", 8, {"psnr_hole": 14.0}, 3.0)
    (folder / "error.json").write_text('{"error": "ValueError: no"}')
    assert (read_trial(str(tmp_path), 1, "a").status, read_trial(str(tmp_path), 1, "a").error) == (
        "failed",
        "ValueError: no",
    )
    (folder / "finished.json").write_text('{"images": 8}')
    assert read_trial(str(tmp_path), 1, "a").status == "finished"


def test_rungs_know_after_a_restart_what_trials_had_reported_before(tmp_path: Path) -> None:
    for name, value in (("a", 20.0), ("b", 30.0)):
        folder = tmp_path / "trials" / name
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").write_text(json.dumps({"step": 4, "time_s": 0.0, "val/psnr_hole": value}) + "\n")
    new = SimpleNamespace(trial_id="c")
    report = {"images": 4, "psnr_hole": 22.0}
    decisions = []
    for before in (("a", "b"), ()):
        rungs = _Rungs(str(tmp_path), "psnr_hole", max_t=32, grace_period=4, reduction_factor=2)
        for name in before:
            rungs.on_trial_add(None, SimpleNamespace(trial_id=name))
        rungs.on_trial_add(None, new)
        decisions.append(rungs.on_trial_result(None, new, report))
    assert decisions == ["STOP", "CONTINUE"]


def test_as_many_trials_as_fit_leave_a_processor_for_data() -> None:
    config = replace(SWEEP_PRESETS["smoke"](), trials=100)
    workers = replace(config.run.workers, num_workers=1, cpus_per_worker=0.5)
    config = replace(config, run=replace(config.run, workers=workers))
    assert room(config, {"CPU": 4.0}) == 5
    assert room(replace(config, max_concurrent=2), {"CPU": 4.0}) == 2
    gpus = replace(config, run=replace(config.run, workers=replace(workers, use_gpu=True, gpus_per_worker=0.25)))
    assert room(gpus, {"CPU": 64.0, "GPU": 2.0}) == 8


def test_expected_images_count_what_each_rung_lets_through() -> None:
    config = replace(SWEEP_PRESETS["smoke"](), trials=9, reduction=3, first_rung_images=4)
    # Nine trials for 4 images, three for 8 more (to 12), one for the last 4 of 16.
    assert config.run.schedule.joint_images == 16
    assert expected_images(config) == 9 * 4 + 3 * 8 + 1 * 4


def test_studies_are_runs_that_differ_in_what_they_study_alone() -> None:
    for name, study in STUDIES.items():
        _, points, labels = as_sweep(AblateConfig(study=name, run=smoke(), seeds=2))  # type: ignore[arg-type]
        assert labels == [*study.variants] * 2
        for point in points:
            assert isinstance(apply(smoke(), point), RunConfig)
    assert [point.get("model.retrieval.num_candidates") for point in STUDIES["candidates"].variants.values()] == [
        1, 2, 4, 6, None
    ]  # fmt: skip


def test_the_papers_figures_stand_beside_ours() -> None:
    rows = [Row("W-Sum", {"psnr_hole": 20.0}, {"psnr_hole": 1.0})]
    text = table(rows, STUDIES["candidates"]).text()
    assert "16.872" in text
    assert "20 ±0.5" in text


def test_a_hole_of_half_the_side_is_a_quarter_of_the_image() -> None:
    mask = centred_hole(64, 64, share=0.5)
    assert mask.sum() == 64 * 64 / 4
    assert mask[32, 32] == 1


def test_an_ablation_says_where_its_coarse_network_comes_from() -> None:
    config = AblateConfig(study="blending", run=smoke())
    images = f"{smoke().schedule.coarse_images} images coarse network alone, shared"
    assert images in scale(config, STUDIES["blending"])
    given = scale(replace(config, init_from="s3://bucket/runs/coarse"), STUDIES["blending"])
    assert "the coarse network of s3://bucket/runs/coarse, shared" in given
    assert "coarse network alone" not in given


def test_the_rate_of_trials_is_measured_with_the_features_that_their_losses_use(make_set: SetMaker) -> None:
    run = replace(
        smoke(),
        model=MODEL,
        loss=replace(smoke().loss, weight_perceptual=0.02),
        perceptual=PerceptualConfig(features="untrained", convolutions=(1,)),
        data=DataConfig(train=make_set(), val=make_set(name="val")),
    )
    assert _rate_here(run) > 0


def test_tunes_records_are_replaced_whole_and_damaged_ones_are_refused_instead_of_a_new_sweep(tmp_path: Path) -> None:
    assert not _has_records(str(tmp_path / "nowhere"))
    path = tmp_path / "experiment_state-2026-01-01_00-00-00.json"
    files = whole_files()
    for state in ({"trials": [1]}, {"trials": [1, 2]}):
        with files.open_output_stream(str(path)) as stream:
            stream.write(json.dumps(state).encode()[:9])
            assert not path.exists() or json.loads(path.read_text()) == {"trials": [1]}, "half of it is there"
            stream.write(json.dumps(state).encode()[9:])
        assert json.loads(path.read_text()) == state
    assert _has_records(str(tmp_path))
    path.write_bytes(path.read_bytes()[:9])
    with pytest.raises(SweepFailed, match=r"is damaged.*delete .* to train all of them again"):
        _has_records(str(tmp_path))
