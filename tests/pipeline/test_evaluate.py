"""Evaluation on a prepared set: tables that repeat, pictures, a page without outside resources."""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from pipeline.errors import MissingInput, ModelNotFound
from pipeline.evaluate import EvaluateConfig, Evaluation, classical_fill, evaluate, picture_row
from pipeline.report import Report, picture_grid
from pipeline.tracking import Tracker, mlflow_client
from tests.pipeline.conftest import SetMaker
from tests.tmad.tiny import make_image, make_mask
from tmad.checkpoint import load_model, model_digest
from tmad.inpaint import Inpainter
from tmad.metrics import MEASURES, measure

FILES = ["per_image.csv", "per_image.parquet", "pictures.png", "report.html", "summary.json"]


def run(model_folder: Path, data: str, out: Path, **settings: object) -> Evaluation:
    return evaluate(EvaluateConfig(model=str(model_folder), data=data, out=str(out), **settings))  # type: ignore[arg-type]


def test_an_evaluation_writes_tables_pictures_and_a_page(
    model_folder: Path, make_set: SetMaker, tmp_path: Path
) -> None:
    result = run(model_folder, make_set(3), tmp_path / "out", num_pictures=2)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == FILES
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary == json.loads(json.dumps(result.summary))
    assert list(summary["methods"]) == ["tmad", "coarse", "classical"]
    assert summary["images"] == 3
    assert summary["model_digest"] == model_digest(model_folder)
    assert summary["mean_hole_fraction"] == pytest.approx(make_mask().mean())
    assert set(summary["methods"]["tmad"]["measures"]) == set(MEASURES)
    assert summary["measures"]["psnr_hole"]["better"] == "higher"
    assert [caption for caption, _ in result.pictures] == ["photo-0.png#0, hole 22%", "photo-2.png#0, hole 22%"]
    assert Image.open(tmp_path / "out" / "pictures.png").width > 6 * 192


def test_each_row_is_the_measure_of_the_inpainters_own_result(
    model_folder: Path, make_set: SetMaker, tmp_path: Path
) -> None:
    run(model_folder, make_set(2), tmp_path, methods=("tmad", "coarse"))
    rows = pq.read_table(tmp_path / "per_image.parquet").to_pylist()
    assert [(row["image_id"], row["method"]) for row in rows] == [
        (f"photo-{index}.png#0", method) for index in range(2) for method in ("tmad", "coarse")
    ]
    image, mask = make_image(1), make_mask()
    own = Inpainter(load_model(model_folder))(image, mask, image_id="photo-1.png#0")
    for row, output in ((rows[2], np.asarray(own.output)), (rows[3], own.coarse)):
        expected = measure(output, image, mask)
        assert {name: row[name] for name in expected} == expected
    table = list(csv.DictReader(io.StringIO((tmp_path / "per_image.csv").read_text())))
    assert [row["method"] for row in table] == [row["method"] for row in rows]
    assert float(table[2]["psnr_hole"]) == rows[2]["psnr_hole"]


def test_means_are_means_of_the_rows(model_folder: Path, make_set: SetMaker, tmp_path: Path) -> None:
    result = run(model_folder, make_set(3), tmp_path, methods=("tmad",))
    values = [row["psnr_hole"] for row in result.rows]
    assert result.means["tmad"]["psnr_hole"] == pytest.approx(np.mean(values))


def test_a_repeated_evaluation_gives_the_same_figures(model_folder: Path, make_set: SetMaker, tmp_path: Path) -> None:
    data = make_set(2)
    first, second = (run(model_folder, data, tmp_path / name, methods=("tmad",)) for name in "ab")
    assert first.means == second.means


def test_the_limit_takes_the_first_images_of_the_set(model_folder: Path, make_set: SetMaker, tmp_path: Path) -> None:
    data = make_set(3)
    few = run(model_folder, data, tmp_path / "a", methods=("tmad",), limit=1)
    assert few.summary["images"] == 1
    assert {row["image_id"] for row in few.rows} == {"photo-0.png#0"}


def test_an_image_of_nothing_but_hole_is_left_out_and_listed(
    model_folder: Path, make_set: SetMaker, tmp_path: Path
) -> None:
    masks = [make_mask(), np.ones((64, 64), dtype=np.uint8)]
    result = run(model_folder, make_set(2, masks=masks), tmp_path, methods=("tmad",))
    assert result.summary["failed"] == {"photo-1.png#0": "all-hole"}
    assert result.summary["images"] == 1
    assert "all-hole" in (tmp_path / "report.html").read_text()


def test_an_empty_hole_gives_no_value_rather_than_a_perfect_one(
    model_folder: Path, make_set: SetMaker, tmp_path: Path
) -> None:
    masks = [make_mask(), np.zeros((64, 64), dtype=np.uint8)]
    result = run(model_folder, make_set(2, masks=masks), tmp_path, methods=("tmad",))
    entry = result.summary["methods"]["tmad"]
    assert result.rows[1]["psnr_hole"] is None
    assert entry["without_value"]["psnr_hole"] == 1
    assert entry["measures"]["psnr_hole"] == result.rows[0]["psnr_hole"]
    assert entry["at_cap"]["psnr_full"] == 1
    assert pq.read_table(tmp_path / "per_image.parquet")["psnr_hole"].null_count == 1


def test_results_reach_the_mlflow_run(
    model_folder: Path, make_set: SetMaker, tmp_path: Path, tracking_uri: str
) -> None:
    run_id = Tracker.create(tracking_uri, "tests", "evaluated")
    result = run(
        model_folder, make_set(1), tmp_path, methods=("tmad", "coarse"), tracking_uri=tracking_uri, mlflow_run=run_id
    )
    client = mlflow_client(tracking_uri)
    metrics = client.get_run(run_id).data.metrics
    assert metrics["evaluation/tmad/psnr_hole"] == result.means["tmad"]["psnr_hole"]
    names = {artifact.path for artifact in client.list_artifacts(run_id, "evaluation")}
    assert {"evaluation/report.html", "evaluation/summary.json", "evaluation/pictures.png"} <= names


def test_without_scikit_image_the_message_says_what_to_do(
    model_folder: Path, make_set: SetMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "skimage.restoration", None)
    with pytest.raises(ValueError, match=r"pip install 'tmad\[demo\]', or leave it out with --methods tmad coarse"):
        run(model_folder, make_set(1), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    run(model_folder, str(tmp_path / "set"), tmp_path / "out", methods=("tmad",))


def test_wrong_settings_are_refused_by_name(model_folder: Path, make_set: SetMaker, tmp_path: Path) -> None:
    data = make_set(1)
    with pytest.raises(ValueError, match="mask_variant must be below 1, the masks per image"):
        run(model_folder, data, tmp_path, methods=("tmad",), mask_variant=1)
    with pytest.raises(ValueError, match="methods must name at least one of tmad, coarse, classical"):
        run(model_folder, data, tmp_path, methods=())
    with pytest.raises(ValueError, match="methods"):
        run(model_folder, data, tmp_path, methods=("tmda",))
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="no CUDA device here"):
            run(model_folder, data, tmp_path, methods=("tmad",), use_gpu=True)
    with pytest.raises(MissingInput):
        run(model_folder, str(tmp_path / "gone"), tmp_path, methods=("tmad",))
    with pytest.raises(ModelNotFound):
        run(tmp_path / "gone", data, tmp_path, methods=("tmad",))


def test_the_classical_fill_continues_a_gradient_and_leaves_valid_pixels_alone() -> None:
    image = np.repeat(np.arange(64, dtype=np.uint8)[None, :, None] * 3 + 20, 64, axis=0).repeat(3, axis=2)
    mask = make_mask()
    filled = classical_fill()(np.where(mask[..., None] > 0, np.uint8(0), image), mask)
    assert filled.dtype == np.uint8
    assert np.abs(filled.astype(int) - image).max() <= 3
    assert np.array_equal(filled[mask == 0], image[mask == 0])


def test_the_candidates_picture_shows_the_first_patch_of_each_cell_and_nothing_else_changes(model_folder: Path) -> None:
    image, mask = make_image(0)[:50, :60], make_mask()[:50, :60]
    result = Inpainter(load_model(model_folder))(image, mask)
    row = picture_row(image, mask, result)
    assert list(row) == ["input", "mask", "coarse", "candidates", "result", "truth"]
    sheet = row["candidates"]
    touched = np.zeros((64, 64), dtype=bool)
    for (top, left), patches in zip(result.cells_yx, result.candidates, strict=True):
        touched[top : top + 16, left : left + 16] = True
        shown = sheet[top : top + 16, left : left + 16]
        assert np.array_equal(shown, patches[0][: shown.shape[0], : shown.shape[1]])
    assert np.array_equal(sheet[~touched[:50, :60]], image[~touched[:50, :60]])


class References(HTMLParser):
    """Everything in a page that a browser would fetch or run, and the tags that are left open."""

    VOID = ("meta", "img", "br")

    def __init__(self) -> None:
        super().__init__()
        self.outside: list[str] = []
        self.images = 0
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        if tag in ("script", "link", "iframe"):
            self.outside.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "srcset") and not (value or "").startswith("data:image/"):
                self.outside.append(f"{tag} {name}={value}")
        self.images += tag == "img"

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_asks_for_nothing_from_outside_and_explains_each_measure(
    model_folder: Path, make_set: SetMaker, tmp_path: Path
) -> None:
    run(model_folder, make_set(2), tmp_path, methods=("tmad", "coarse"))
    text = (tmp_path / "report.html").read_text()
    page = References()
    page.feed(text)
    assert page.outside == []
    assert page.open == []
    assert page.images == 2 * 6
    assert not re.search(r"url\(|@import", text)
    for name, entry in MEASURES.items():
        assert name in page.text
        assert entry.formula in page.text
        assert f"{entry.better} is better" in page.text


def test_the_best_of_each_measure_is_bold_whichever_way_it_counts() -> None:
    report = Report("x")
    report.measures(
        {
            "a": {"psnr_hole": 20.0, "l1_hole_pct": 5.0},
            "b": {"psnr_hole": 21.0, "l1_hole_pct": 6.0},
            "c": {"psnr_hole": None},
        }
    )
    rows = re.findall(r"<code>(\w+)</code>.*?</th>(.*?)</tr>", report.html())
    assert {name: re.findall(r"<td class='number'>(.*?)</td>", cells) for name, cells in rows} == {
        "l1_hole_pct": ["<strong>5.000</strong>", "6.000", "–"],
        "psnr_hole": ["20.00", "<strong>21.00</strong>", "–"],
    }


def test_text_from_outside_cannot_become_markup() -> None:
    report = Report("<script>1</script>", "<b>")
    report.heading("<i>")
    report.facts({"<u>": "<img src=x>"})
    report.pictures([("<script>2</script>", {'a"b': np.zeros((2, 2, 3), dtype=np.uint8)})])
    text = report.html()
    assert "<script" not in text
    assert "<img src=x>" not in text


def test_the_grid_shows_every_picture_and_refuses_floats() -> None:
    picture = np.full((10, 20, 3), (3, 200, 90), dtype=np.uint8)
    sheet = picture_grid([("one", {"a": picture, "b": picture}), ("two", {"a": picture})], cell_px=40)
    assert (sheet == (3, 200, 90)).all(axis=-1).sum() == 3 * 40 * 20
    with pytest.raises(ValueError, match="must be uint8"):
        picture_grid([("one", {"a": picture / 255})])
    with pytest.raises(ValueError, match="at least one row"):
        picture_grid([])
