"""Promotion: the alias moves to a version that is measurably better, and to no other; two at once leave one."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.errors import ModelNotFound, NotPromoted
from pipeline.models.registry import register_model
from pipeline.promotion.promote import PREVIOUS_TAG, VERDICT_TAG, PromoteConfig, promote, roll_back
from pipeline.tracking import Tracker, mlflow_client
from tests.pipeline.conftest import SetMaker
from tests.tmad.tiny import MODEL
from tmad.checkpoint import load_model, save_model
from tmad.model import TMAD

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Model artifacts by quality: the output is a constant, nearer to the pictures' mean or farther from it."""
    made = {}
    for name, value in (("worst", 1.0), ("bad", 0.85), ("good", 0.2)):
        model = TMAD(MODEL, seed=1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1e-3)
            model.coarse.layers[-1].bias.fill_(value)
        made[name] = tmp_path_factory.mktemp(name) / "model"
        save_model(model, made[name])
    return made


Register = Callable[[str], int]


@pytest.fixture
def register(folders: dict[str, Path], tracking_uri: str) -> Register:
    def make(quality: str) -> int:
        run_id = Tracker.create(tracking_uri, "tests", quality)
        assert run_id is not None
        return register_model(folders[quality], tracking_uri=tracking_uri, run_id=run_id, name="tests")

    return make


@pytest.fixture
def settings(make_set: SetMaker, tracking_uri: str, tmp_path: Path) -> dict[str, Any]:
    return {
        "name": "tests",
        "data": make_set(6),
        "tracking_uri": tracking_uri,
        "out": str(tmp_path / "promotions"),
        "not_worse": ("ssim_full=0.5",),
        "num_pictures": 2,
        "resamples": 200,
    }


def champion(tracking_uri: str) -> int:
    return int(mlflow_client(tracking_uri).get_model_version_by_alias("tests", "champion").version)


@pytest.mark.usefixtures("measured_here")
def test_a_better_version_is_promoted_with_its_comparison_and_can_be_rolled_back(
    register: Register, settings: dict[str, Any], tracking_uri: str
) -> None:
    assert (register("bad"), register("good")) == (1, 2)
    assert champion(tracking_uri) == 1, "a newer version does not take the alias by itself"
    decision = promote(PromoteConfig(**settings))
    assert (decision.version, decision.previous, champion(tracking_uri)) == (2, 1, 2)
    psnr = decision.comparisons[0]
    assert psnr.low is not None
    assert 0 < psnr.low <= psnr.gain <= psnr.high
    assert psnr.gain == pytest.approx(psnr.candidate - psnr.champion)
    evaluated = json.loads((Path(settings["out"]) / "tests/v2-against-v1/v2/report.json").read_text())
    difference = evaluated["against"]["differences"]["tmad"]["psnr_hole"]
    assert (psnr.gain, psnr.low, psnr.high) == tuple(difference[end] for end in ("mean", "low", "high"))
    assert (evaluated["resamples"], evaluated["confidence"]) == (200, 0.95)

    client = mlflow_client(tracking_uri)
    for version in ("1", "2"):
        run_id = client.get_model_version("tests", version).run_id
        names = {one.path.rsplit("/", 1)[-1] for one in client.list_artifacts(run_id, "promotion/v2-against-v1")}
        assert names == {"report.html", "comparison.json", "pictures.png"}
    assert client.get_model_version("tests", "2").tags[PREVIOUS_TAG] == "1"

    assert roll_back(PromoteConfig(**settings, rollback=True)).version == champion(tracking_uri) == 1
    assert client.get_model_version("tests", "2").tags[VERDICT_TAG] == "rolled back to version 1"
    with pytest.raises(NotPromoted, match="version 1 of tests was not promoted over another one"):
        roll_back(PromoteConfig(**settings, rollback=True))


@pytest.mark.usefixtures("measured_here")
def test_a_worse_version_is_refused_with_metric_and_interval(
    register: Register, settings: dict[str, Any], tracking_uri: str
) -> None:
    register("good")
    register("bad")
    with pytest.raises(NotPromoted, match=r"psnr_hole has to be better, its gain is -\d.*interval -\d.* over 6 images"):
        promote(PromoteConfig(**settings))
    assert champion(tracking_uri) == 1
    comparison = json.loads((Path(settings["out"]) / "tests" / "v2-against-v1" / "comparison.json").read_text())
    assert (comparison["verdict"], comparison["rule"][0]["met"]) == ("refused", False)
    verdict = mlflow_client(tracking_uri).get_model_version("tests", "2").tags[VERDICT_TAG]
    assert "not promoted over version 1" in verdict


@pytest.mark.usefixtures("measured_here")
def test_a_better_version_that_does_not_reach_the_margin_is_refused(
    register: Register, settings: dict[str, Any], tracking_uri: str
) -> None:
    register("bad")
    register("good")
    with pytest.raises(NotPromoted, match="psnr_hole has to be better by more than 50"):
        promote(PromoteConfig(**{**settings, "better": ("psnr_hole=50",)}))
    assert champion(tracking_uri) == 1


@pytest.mark.usefixtures("measured_here")
def test_an_equal_version_is_refused(register: Register, settings: dict[str, Any], tracking_uri: str) -> None:
    register("good")
    register("good")
    with pytest.raises(NotPromoted, match="it has the weights of version 1"):
        promote(PromoteConfig(**settings))
    assert champion(tracking_uri) == 1


@pytest.mark.usefixtures("measured_here")
def test_a_version_whose_results_are_equal_is_refused_whatever_its_weights(
    folders: dict[str, Path], register: Register, settings: dict[str, Any], tmp_path: Path, tracking_uri: str
) -> None:
    register("good")
    # Other weights, by so little that every pixel is the same.
    model = load_model(folders["good"])
    with torch.no_grad():
        model.coarse.layers[-1].bias.add_(1e-7)
    folders["twin"] = tmp_path / "twin"
    save_model(model, folders["twin"])
    register("twin")
    with pytest.raises(NotPromoted, match=r"gain is \+0, interval \+0 to \+0"):
        promote(PromoteConfig(**settings))
    assert champion(tracking_uri) == 1


@pytest.mark.usefixtures("measured_here")
def test_a_version_with_weights_that_are_not_finite_is_refused(
    folders: dict[str, Path], register: Register, settings: dict[str, Any], tmp_path: Path, tracking_uri: str
) -> None:
    register("bad")
    model = TMAD(MODEL, seed=1)
    with torch.no_grad():
        model.psnet.output.bias.fill_(float("nan"))
    folders["broken"] = tmp_path / "broken"
    save_model(model, folders["broken"])
    register("broken")
    with pytest.raises(NotPromoted, match=r"the candidate, has weights that are not finite: psnet\.output"):
        promote(PromoteConfig(**settings))
    assert champion(tracking_uri) == 1


@pytest.mark.usefixtures("measured_here")
def test_a_version_whose_file_is_missing_is_refused_and_tagged(
    register: Register, settings: dict[str, Any], tracking_uri: str
) -> None:
    register("bad")
    register("good")
    artifacts = Path(tracking_uri.removeprefix("sqlite:///")).parent / "mlartifacts"
    client = mlflow_client(tracking_uri)
    run_id = client.get_model_version("tests", "2").run_id
    (lost,) = artifacts.glob(f"{run_id}/**/model.safetensors")
    lost.unlink()
    with pytest.raises(NotPromoted, match=r"the candidate, cannot be loaded: .*model\.safetensors"):
        promote(PromoteConfig(**settings))
    assert champion(tracking_uri) == 1
    assert "cannot be loaded" in client.get_model_version("tests", "2").tags[VERDICT_TAG]


def test_two_promotions_at_once_leave_the_better_one(
    register: Register, settings: dict[str, Any], tracking_uri: str
) -> None:
    for quality in ("worst", "bad", "good"):
        register(quality)
    rule = {**settings, "not_worse": ("ssim_full=0.9",), "num_pictures": 1}
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(promote, PromoteConfig(**rule, version=version)) for version in (2, 3)]
    refused = [one.exception() for one in both]
    assert champion(tracking_uri) == 3
    client = mlflow_client(tracking_uri)
    over = {version: client.get_model_version("tests", version).tags.get(PREVIOUS_TAG) for version in ("2", "3")}
    # Whoever came second was compared with the first one's result.
    if refused == [None, None]:
        assert over == {"2": "1", "3": "2"}
    else:
        assert isinstance(refused[0], NotPromoted)
        assert refused[1] is None
        assert over == {"2": None, "3": "1"}
        assert "not promoted over version 3" in str(refused[0])


def test_names_that_are_not_there_and_rules_without_sense_are_refused(tracking_uri: str) -> None:
    with pytest.raises(ModelNotFound, match="no model is registered as nobody; registered models: none"):
        promote(PromoteConfig(name="nobody", tracking_uri=tracking_uri))
    with pytest.raises(ValueError, match=r"no metric is called 'psnr_hol'; did you mean psnr_hole"):
        PromoteConfig(better=("psnr_hol",))
    with pytest.raises(ValueError, match="better must name a metric"):
        PromoteConfig(better=())
    with pytest.raises(ValueError, match="name psnr_hole twice"):
        PromoteConfig(better=("psnr_hole",), not_worse=("psnr_hole=0.1",))
    with pytest.raises(ValueError, match="a margin is 0 or more"):
        PromoteConfig(better=("psnr_hole=-1",))


@pytest.mark.usefixtures("measured_here")
def test_no_file_of_the_promotion_is_left_outside_its_folder(
    register: Register, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    register("bad")
    register("good")
    promote(PromoteConfig(**settings))
    assert list(elsewhere.iterdir()) == []


@pytest.mark.usefixtures("measured_here")
def test_a_version_without_a_champion_to_beat_has_to_be_sound_alone(
    register: Register, settings: dict[str, Any], tracking_uri: str
) -> None:
    register("good")
    mlflow_client(tracking_uri).delete_registered_model_alias("tests", "champion")
    assert promote(PromoteConfig(**settings)).previous is None
    assert champion(tracking_uri) == 1
    with pytest.raises(NotPromoted, match="version 1 of tests has the alias champion already"):
        promote(PromoteConfig(**settings))
