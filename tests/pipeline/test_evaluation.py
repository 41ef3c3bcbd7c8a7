"""Evaluation of a prepared set: tables that repeat to the last digit, other methods on the same pixels, bad input."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
import torch
from PIL import Image

from pipeline import storage
from pipeline.data.schema import read_manifest
from pipeline.errors import CorruptSet, MissingInput, ModelNotFound, UnfitResults
from pipeline.evaluation.config import METHODS, EvaluateConfig
from pipeline.evaluation.evaluate import Evaluated, evaluate
from pipeline.evaluation.external import export_inputs
from pipeline.evaluation.measure import read_rows
from pipeline.tracking import Tracker, mlflow_client
from tests.faults import FaultyProxy
from tests.pipeline.conftest import SetMaker
from tests.tmad.tiny import MODEL, make_image, make_mask
from tmad.checkpoint import load_model, model_digest
from tmad.inpaint import Inpainter
from tmad.metrics import METRICS, measure

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]

ROOT = Path(__file__).resolve().parent.parent.parent
FAST: dict[str, object] = {"methods": ("tmad", "coarse"), "num_pictures": 0, "num_extremes": 0, "resamples": 50}


def run(model_folder: Path, data: str, out: Path, **settings: object) -> Evaluated:
    return evaluate(EvaluateConfig(model=str(model_folder), data=data, out=str(out), **{**FAST, **settings}))  # type: ignore[arg-type]


def table_of(out: Path) -> tuple[dict, list[dict]]:
    """What must not depend on how an evaluation was run: report.json and every row."""
    rows = [{name: value for name, value in row.items() if name != "part"} for row in read_rows(str(out)).to_pylist()]
    return json.loads((out / "report.json").read_text()), rows


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stand-ins for Inception and LPIPS, as TorchScript files."""

    class Means(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.float().mean(dim=(2, 3))

    class Distance(torch.nn.Module):
        def forward(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
            return (first - second).abs().mean(dim=(1, 2, 3))

    folder = tmp_path_factory.mktemp("scripts")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the published networks are TorchScript all the same
        for name, module in (("means.pt", Means()), ("distance.pt", Distance())):
            torch.jit.save(torch.jit.script(module), str(folder / name))
    return folder


def network(path: Path) -> dict[str, str]:
    return {"network": str(path), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


@pytest.fixture(scope="module")
def complete(
    model_folder: Path, scripts: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Evaluated, Path, str]:
    """One evaluation with everything in it, of three images; not to be written to."""
    base = tmp_path_factory.mktemp("evaluated")
    from tests.pipeline.conftest import write_set

    data = write_set(base / "set", 3)
    config = EvaluateConfig(
        model=str(model_folder),
        data=data,
        out=str(base / "out"),
        resamples=50,
        num_pictures=2,
        num_extremes=1,
        fid=network(scripts / "means.pt"),  # type: ignore[arg-type]
        lpips=network(scripts / "distance.pt"),  # type: ignore[arg-type]
    )
    return evaluate(config), base / "out", data


def test_an_evaluation_writes_tables_pictures_and_a_page(
    complete: tuple[Evaluated, Path, str], model_folder: Path
) -> None:
    result, out, data = complete
    summary = json.loads((out / "report.json").read_text())
    assert summary == json.loads(json.dumps(result.summary))
    assert set(summary["methods"]) == set(METHODS)
    assert summary["images"] == 3
    assert summary["model_digest"] == model_digest(model_folder)
    assert summary["data_digest"] == read_manifest(data).digest
    assert summary["mean_hole_fraction"] == pytest.approx(make_mask().mean())
    assert set(summary["methods"]["tmad"]["metrics"]) == set(METRICS)
    assert {"report.html", "report.md", "report.json", "pictures.png", "timing.json"} <= {
        one.name for one in out.iterdir()
    }
    assert sorted(path.name for path in (out / "results" / "tmad").iterdir()) == [f"photo-{n}.png" for n in range(3)]
    schema = pq.read_schema(out / "per_image" / "000000.parquet")
    assert schema.names[:4] == ["image_id", "key", "variant", "mask_family"]
    assert pq.read_table(out / "per_image").num_rows == 3 * len(
        json.loads((out / "timing.json").read_text())["seconds_per_image"]
    )


def test_each_row_is_the_measure_of_the_inpainters_own_result(
    complete: tuple[Evaluated, Path, str], model_folder: Path
) -> None:
    rows = {(row["image_id"], row["method"]): row for row in complete[0].rows.to_pylist()}
    image, mask = make_image(1), make_mask()
    own = Inpainter(load_model(model_folder))(image, mask, image_id="photo-1.png#0")
    kept = np.asarray(Image.open(complete[1] / "results" / "tmad" / "photo-1.png"))
    assert np.array_equal(kept, np.asarray(own.output))
    for method, output in (("tmad", np.asarray(own.output)), ("coarse", own.coarse)):
        expected = measure(output, image, mask, patch_size=MODEL.patch_size)
        row = rows["photo-1.png#0", method]
        assert {name: row[name] for name in expected} == expected
        difference = np.abs(output.astype(np.float32) - image.astype(np.float32)).mean() / 127.5
        assert row["lpips_full"] == pytest.approx(difference, rel=1e-5)


def test_means_are_means_of_the_rows_and_lie_in_their_intervals(complete: tuple[Evaluated, Path, str]) -> None:
    values = [row["psnr_hole"] for row in complete[0].rows.to_pylist() if row["method"] == "tmad"]
    entry = complete[0].summary["methods"]["tmad"]["metrics"]["psnr_hole"]
    assert entry["mean"] == pytest.approx(np.mean(values))
    assert min(values) <= entry["low"] <= entry["mean"] <= entry["high"] <= max(values)


def test_fid_is_the_closed_form_of_the_networks_features(complete: tuple[Evaluated, Path, str]) -> None:
    out = complete[1]
    truths = np.stack([make_image(index).mean(axis=(0, 1)) for index in range(3)])
    fills = np.stack(
        [np.asarray(Image.open(out / "results" / "tmad" / f"photo-{n}.png")).mean(axis=(0, 1)) for n in range(3)]
    )
    from scipy.linalg import sqrtm

    covariances = [np.cov(side, rowvar=False) for side in (truths, fills)]
    expected = np.square(truths.mean(0) - fills.mean(0)).sum() + np.trace(
        covariances[0] + covariances[1] - 2 * sqrtm(covariances[0] @ covariances[1] + 1e-9 * np.eye(3)).real
    )
    assert complete[0].means["tmad"]["fid_full"] == pytest.approx(expected, rel=2e-3)


def test_the_table_does_not_depend_on_workers_parts_chunks_or_threads(
    complete: tuple[Evaluated, Path, str], model_folder: Path, scripts: Path, tmp_path: Path
) -> None:
    _, out, data = complete
    evaluate(
        EvaluateConfig(
            model=str(model_folder),
            data=data,
            out=str(tmp_path / "out"),
            resamples=50,
            num_pictures=0,
            num_extremes=0,
            images_per_task=1,
            num_workers=3,
            cells_per_chunk=2,
            fid=network(scripts / "means.pt"),  # type: ignore[arg-type]
            lpips=network(scripts / "distance.pt"),  # type: ignore[arg-type]
        )
    )
    assert table_of(tmp_path / "out") == table_of(out)


def test_in_object_storage_that_fails_on_and_off_the_table_is_the_same(
    complete: tuple[Evaluated, Path, str],
    model_folder: Path,
    tmp_path: Path,
    bucket: str,
    faulty_cluster: FaultyProxy,
) -> None:
    _, out, data = complete
    for name, folder in (("set", data), ("model", model_folder), ("other", out / "results" / "tmad")):
        storage.upload_folder(folder, f"{bucket}/{name}")
    faulty_cluster.answer("SlowDown", method="GET", target="/set/shards/", times=2)
    faulty_cluster.reset(method="PUT", target="/out/parts/", times=2)
    faulty_cluster.answer("InternalError", method="PUT", target="/out/report.json", times=1)
    place = {"model": f"{bucket}/model", "data": f"{bucket}/set", "external": (f"other={bucket}/other",)}
    there = evaluate(EvaluateConfig(**place, **FAST, out=f"{bucket}/out"))  # type: ignore[arg-type]
    assert faulty_cluster.unspent() == 0
    here = run(model_folder, data, tmp_path / "out", external=(f"other={out / 'results' / 'tmad'}",))
    assert there.rows.equals(here.rows)
    assert there.summary["methods"] == here.summary["methods"]
    assert json.loads(storage.read_bytes(f"{bucket}/out/report.json")) == json.loads(json.dumps(there.summary))


JOB = """
import sys, json
from pipeline.evaluation.config import EvaluateConfig
from pipeline.evaluation.evaluate import evaluate
settings = json.loads(sys.argv[1])
evaluate(EvaluateConfig(**{**settings, "methods": tuple(settings["methods"])}))
"""


@pytest.mark.slow
def test_killed_with_other_threads_and_run_again_it_gives_the_same_table(
    model_folder: Path, make_set: SetMaker, tmp_path: Path
) -> None:
    data, out = make_set(6), tmp_path / "killed"
    settings = {"model": str(model_folder), "data": data, **FAST, "images_per_task": 1, "num_workers": 1}
    environment = {**os.environ, "OMP_NUM_THREADS": "3", "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    job = subprocess.Popen(
        [sys.executable, "-c", JOB, json.dumps({**settings, "out": str(out)})],
        env=environment, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 150
    while not list(out.glob("parts/*.json")) and time.monotonic() < deadline and job.poll() is None:
        time.sleep(0.02)
    os.kill(job.pid, signal.SIGKILL)
    job.wait()
    done = {path.name: path.stat().st_mtime_ns for path in out.glob("parts/*.json")}
    assert done, "no part was finished"
    assert not (out / "report.json").exists()
    run(model_folder, data, out, images_per_task=1)
    run(model_folder, data, tmp_path / "whole")
    assert {name: (out / "parts" / name).stat().st_mtime_ns for name in done} == done
    assert table_of(out) == table_of(tmp_path / "whole")


@pytest.mark.usefixtures("measured_here")
def test_the_same_command_again_measures_nothing_and_another_model_everything(
    model_folder: Path, make_set: SetMaker, tmp_path: Path
) -> None:
    data, out = make_set(2), tmp_path / "out"
    run(model_folder, data, out)
    first, before = table_of(out), (out / "parts" / "000000.json").stat().st_mtime_ns
    run(model_folder, data, out)
    assert (out / "parts" / "000000.json").stat().st_mtime_ns == before
    assert table_of(out) == first
    run(model_folder, data, out, seed=1)
    assert (out / "parts" / "000000.json").stat().st_mtime_ns != before


def test_what_lies_under_the_hole_reaches_no_method(complete: tuple[Evaluated, Path, str], model_folder: Path) -> None:
    from pipeline.evaluation.methods import Filler, table_rows

    data = complete[2]
    config = EvaluateConfig(model=str(model_folder), data=data)
    inpainter = Inpainter(load_model(model_folder))
    filler = Filler(table_rows(config), inpainter, {}, [], read_manifest(data), 0)
    image, mask = make_image(0), make_mask()
    other = np.where(mask[..., None] > 0, 255 - image, image)
    filled = [filler.fill(truth, mask, image_id="a", variant=0).outputs for truth in (image, other)]
    assert {"tmad", "coarse", "patchmatch", "biharmonic"} <= filled[0].keys()
    for name, output in filled[0].items():
        assert np.array_equal(output, filled[1][name]), name
        assert np.array_equal(output[mask == 0], image[mask == 0]), name


@pytest.mark.usefixtures("measured_here")
def test_other_methods_stand_in_the_table_and_psnet_behind_them(
    model_folder: Path, make_set: SetMaker, tmp_path: Path
) -> None:
    data = make_set(2)
    export_inputs(data, str(tmp_path / "in"), manifest=read_manifest(data))
    assert np.array_equal(np.asarray(Image.open(tmp_path / "in" / "masks" / "photo-0.png")) > 0, make_mask() > 0)
    half = tmp_path / "half"
    half.mkdir()
    for index in range(2):
        Image.fromarray(make_image(index) // 2).save(half / f"photo-{index}.webp", lossless=True)
    result = run(
        model_folder, data, tmp_path / "out", methods=("tmad",),
        external=(f"perfect={tmp_path / 'in' / 'truth'}",), coarse_from=(str(half),),
    )  # fmt: skip
    assert list(result.means) == ["tmad", "perfect", "half", "half+psnet"]
    assert result.means["perfect"]["psnr_hole"] == 100
    assert result.summary["methods"]["perfect"]["metrics"]["psnr_hole"]["at_cap"] == 2
    image, mask = make_image(1), make_mask()
    composite = np.where(mask[..., None] > 0, image // 2, image)
    own = Inpainter(load_model(model_folder))(image, mask, image_id="photo-1.png#0", filled=composite)
    rows = {(row["image_id"], row["method"]): row for row in result.rows.to_pylist()}
    assert rows["photo-1.png#0", "half"]["l1_hole_pct"] == measure(composite, image, mask)["l1_hole_pct"]
    assert rows["photo-1.png#0", "half+psnet"]["psnr_hole"] == measure(np.asarray(own.output), image, mask)["psnr_hole"]


@pytest.mark.usefixtures("measured_here")
def test_results_that_do_not_fit_are_listed_before_anything_is_run(
    model_folder: Path, make_set: SetMaker, tmp_path: Path
) -> None:
    data, folder = make_set(3), tmp_path / "lama"
    folder.mkdir()
    Image.fromarray(make_image(0)).save(folder / "photo-0.png")
    Image.fromarray(make_image(1, 32)).save(folder / "photo-1.png")
    Image.fromarray(make_image(1)).save(folder / "stranger.png")
    with pytest.raises(UnfitResults) as caught:
        run(model_folder, data, tmp_path / "out", external=(f"lama={folder}",))
    message = str(caught.value)
    assert "1 images of the set have no result: photo-2" in message
    assert "1 results are of another size: photo-1 (32x32, not 64x64)" in message
    assert "their truth is missing: stranger" in message
    assert caught.value.details["missing"] == ["photo-2"]
    assert not (tmp_path / "out" / "parts").exists()
    with pytest.raises(MissingInput, match=r"no image in .*, the results of empty"):
        run(model_folder, data, tmp_path / "out", external=(f"empty={tmp_path / 'nowhere'}",))


@pytest.mark.usefixtures("measured_here")
def test_an_image_of_nothing_but_hole_is_left_out_and_listed(
    model_folder: Path, make_set: SetMaker, scripts: Path, tmp_path: Path
) -> None:
    masks = [make_mask(), np.ones((64, 64), dtype=np.uint8), np.zeros((64, 64), dtype=np.uint8)]
    methods, fid = ("tmad", "patchmatch"), network(scripts / "means.pt")
    # A part with nothing in it is a part all the same.
    result = run(model_folder, make_set(3, masks=masks), tmp_path, methods=methods, images_per_task=1, fid=fid)
    assert result.summary["failed"] == {"photo-1.png#0": "all-hole"}
    assert result.summary["images"] == 2
    assert "all-hole" in (tmp_path / "report.html").read_text()
    # An empty hole gives no value rather than a perfect one.
    rows = [row for row in result.rows.to_pylist() if row["method"] == "tmad"]
    assert rows[1]["psnr_hole"] is None
    entry = result.summary["methods"]["tmad"]["metrics"]
    assert (entry["psnr_hole"]["images"], entry["psnr_hole"]["mean"]) == (1, rows[0]["psnr_hole"])
    assert entry["psnr_full"]["at_cap"] == 1


@pytest.mark.usefixtures("measured_here")
def test_a_network_that_cannot_be_had_is_a_row_that_says_why_and_the_run_goes_on(
    model_folder: Path, make_set: SetMaker, scripts: Path, tmp_path: Path
) -> None:
    pickled = tmp_path / "weights.pth"
    torch.save({"a": torch.zeros(1)}, pickled)
    result = run(
        model_folder, make_set(1), tmp_path / "out", methods=("tmad",),
        metrics=("psnr_hole", "fid_full", "kid_full", "lpips_full"),
        fid={"network": str(tmp_path / "gone.pt"), "sha256": "0" * 64}, lpips=network(pickled),
    )  # fmt: skip
    assert list(result.means["tmad"]) == ["psnr_hole"]
    reasons = {name: entry.get("not_measured", "") for name, entry in result.summary["metrics"].items()}
    assert "cannot be read" in reasons["fid_full"]
    assert "is no TorchScript file" in reasons["lpips_full"]
    text = (tmp_path / "out" / "report.html").read_text()
    assert "not measured: the network cannot be read" in text
    assert "not measured: the network cannot be read" in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.usefixtures("measured_here")
def test_wrong_settings_are_refused_by_name(model_folder: Path, make_set: SetMaker, tmp_path: Path) -> None:
    data = make_set(1)
    with pytest.raises(ValueError, match="mask_variant must be below 1, the masks per image"):
        run(model_folder, data, tmp_path, mask_variant=1)
    with pytest.raises(ValueError, match="methods must name at least one of tmad, coarse, blended, patchmatch"):
        run(model_folder, data, tmp_path, methods=())
    with pytest.raises(ValueError, match="no metric is called 'psnr'; did you mean psnr_"):
        run(model_folder, data, tmp_path, metrics=("psnr",))
    with pytest.raises(ValueError, match="needs sha256"):
        run(model_folder, data, tmp_path, fid={"network": "inception.pt"})
    with pytest.raises(ValueError, match="two methods are called lama"):
        run(model_folder, data, tmp_path, external=("lama=a", "lama=b"))
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="no CUDA device here"):
            run(model_folder, data, tmp_path, use_gpu=True)
    with pytest.raises(MissingInput):
        run(model_folder, str(tmp_path / "gone"), tmp_path)
    with pytest.raises(ModelNotFound):
        run(tmp_path / "gone", data, tmp_path)
    (Path(data) / "shards" / "00000.parquet").unlink()
    with pytest.raises(CorruptSet, match=r"00000\.parquet"):
        run(model_folder, data, tmp_path / "out")


@pytest.mark.usefixtures("measured_here")
def test_results_reach_the_mlflow_run(
    model_folder: Path, make_set: SetMaker, tmp_path: Path, tracking_uri: str
) -> None:
    run_id = Tracker.create(tracking_uri, "tests", "evaluated")
    result = run(model_folder, make_set(1), tmp_path, tracking_uri=tracking_uri, mlflow_run=run_id, num_pictures=1)
    client = mlflow_client(tracking_uri)
    metrics = client.get_run(run_id).data.metrics
    assert metrics["evaluation/tmad/psnr_hole"] == result.means["tmad"]["psnr_hole"]
    names = {artifact.path for artifact in client.list_artifacts(run_id, "evaluation")}
    assert {f"evaluation/{name}" for name in ("report.html", "report.md", "report.json", "pictures.png")} <= names


@pytest.mark.usefixtures("measured_here")
def test_two_reports_are_compared_image_by_image(
    complete: tuple[Evaluated, Path, str], model_folder: Path, make_set: SetMaker, tmp_path: Path
) -> None:
    _, out, data = complete
    from tests.tmad.tiny import MODEL
    from tmad.checkpoint import save_model
    from tmad.model import TMAD

    save_model(TMAD(MODEL, seed=4), tmp_path / "model")
    result = run(tmp_path / "model", data, tmp_path / "out", num_extremes=1, against=str(out))
    against = result.summary["against"]
    rows, others = (
        [row["psnr_hole"] for row in source.to_pylist() if row["method"] == "tmad"]
        for source in (result.rows, read_rows(str(out)))
    )
    differences = np.subtract(rows, others)
    entry = against["differences"]["tmad"]["psnr_hole"]
    assert entry["mean"] == pytest.approx(differences.mean())
    assert differences.min() <= entry["low"] <= entry["high"] <= differences.max()
    most = np.argsort(-np.abs(differences))[:2]
    assert [one["image_id"] for one in against["changed"]] == [f"photo-{index}.png#0" for index in most]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "T-MAD, the other" in page
    assert "## Against" in (tmp_path / "out" / "report.md").read_text()
    assert against["differences"]["tmad"]["swd_full"]["mean"] is not None
    fewer = run(tmp_path / "model", data, tmp_path / "fewer", limit=2, against=str(out)).summary["against"]
    assert fewer["images"] == 2
    assert fewer["differences"]["tmad"]["psnr_hole"]["mean"] == pytest.approx(differences[:2].mean())
    assert fewer["differences"]["tmad"]["swd_full"]["mean"] is None, "of other images"
    with pytest.raises(ValueError, match="another evaluation than out"):
        run(model_folder, data, tmp_path / "out", against=str(tmp_path / "out" / "report.json"))
    with pytest.raises(ValueError, match="only results of the same images and holes"):
        run(model_folder, make_set(1), tmp_path / "third", against=str(out))
    with pytest.raises(MissingInput, match="no evaluation in"):
        run(model_folder, data, tmp_path / "third", against=str(tmp_path / "nowhere"))
