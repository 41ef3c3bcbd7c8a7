"""The report page: nothing from outside, text that stays text, the best in bold; also in a browser, if there is one."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import jinja2
import numpy as np
import pytest
from PIL import Image

from pipeline.data.schema import Manifest
from pipeline.evaluation.config import EvaluateConfig
from pipeline.evaluation.methods import Filler, table_rows
from pipeline.evaluation.page import sections, tables
from pipeline.evaluation.parts import Job
from pipeline.evaluation.pictures import Choice, _show, candidates_sheet
from pipeline.report.page import Cell, Table, _templates, metrics_table, render
from pipeline.report.pictures import picture_grid, zoom_on
from tests.tmad.tiny import make_image, make_mask
from tmad.checkpoint import load_model
from tmad.inpaint import Inpainter
from tmad.metrics import METRICS

BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)


class References(HTMLParser):
    """Everything in a page that a browser would fetch or run, and the tags that are left open."""

    VOID = ("meta", "img", "br", "input")

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


def entry(mean: float | None, low: float | None = None, high: float | None = None) -> dict:
    return {"mean": mean, "low": low, "high": high, "images": 2}


@pytest.fixture(scope="module")
def evaluation(model_folder: Path) -> tuple[dict, list]:
    """A made-up table of two methods and one image that is really filled, with everything that is shown of it."""
    methods = {
        "tmad": {"psnr_hole": entry(20.5, 20.0, 21.0), "l1_hole_pct": entry(5.0, 4.5, 5.5), "swd_hole": entry(80.0)},
        "patchmatch": {
            "psnr_hole": entry(19.5, 19.0, 20.0),
            "l1_hole_pct": entry(4.0, 3.5, 4.5),
            "swd_hole": entry(90.0),
        },
    }
    titles = {"tmad": "T-MAD", "patchmatch": "PatchMatch", "telea": "Telea (OpenCV)"}
    names = [name for name in METRICS if name in ("psnr_hole", "l1_hole_pct", "swd_hole", "fid_full")]
    summary = {
        "model": "runs/first", "model_digest": "abc", "data": "data/val", "data_digest": "def", "images": 2,
        "mask": "brush", "mean_hole_fraction": 0.2, "resamples": 50, "confidence": 0.95, "networks": {}, "failed": {},
        "methods": {
            **{name: {"title": titles[name], "not_measured": None, "metrics": methods[name]} for name in methods},
            "telea": {"title": titles["telea"], "not_measured": "OpenCV is not installed", "metrics": {}},
        },
        "groups": {"hole": {"10% to 20%": {"images": 2, "methods": methods}}},
        "metrics": {name: {} for name in names}
        | {name: {"not_measured": "no network was given"} for name in ("fid_full", "kid_full")},
    }  # fmt: skip
    config = EvaluateConfig(model="runs/first", methods=("tmad", "coarse", "patchmatch"))
    manifest = Manifest({"masks_per_image": 1, "crop_size": 64}, [], 1, 1, {}, 1, row_group_rows=1)
    job = Job(config, manifest, table_rows(config), ("psnr_hole",), (0,), {}, "0")
    filler = Filler(job.rows, Inpainter(load_model(model_folder)), {}, [], manifest, 0)
    filled = filler.fill(make_image(0), make_mask(), image_id="a/<b>.png#0", variant=0)
    shown = [
        _show(Choice("a/<b>.png#0", 0, 0, why, 20.0, why == "spread"), filled, filler, job)
        for why in ("spread", "worst", "best")
    ]  # fmt: skip
    return summary, shown


@pytest.fixture(scope="module")
def page(evaluation: tuple[dict, list], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(render("evaluation.html", e=sections(*evaluation)))
    return path


def test_the_page_asks_for_nothing_from_outside_and_explains_each_metric(page: Path) -> None:
    text, found = page.read_text(), References()
    found.feed(text)
    assert found.outside == []
    assert found.open == []
    assert not re.search(r"url\(|@import", text)
    for name in ("psnr_hole", "l1_hole_pct", "fid_full"):
        assert name in found.text
        assert METRICS[name].formula in found.text
    assert "not measured: no network was given" in found.text
    assert "OpenCV is not installed" in found.text
    assert "20.00 to 21.00" in found.text


def test_the_page_shows_every_picture_retrieval_in_rank_order_and_growing_holes(
    page: Path, evaluation: tuple[dict, list]
) -> None:
    found = References()
    found.feed(page.read_text())
    shown = evaluation[1]
    pictures = sum(len(one.pictures) for one in shown)
    views = sum(len(images) for one in shown for _, _, images in one.retrieval)
    series = sum(len(cells) for one in shown for _, cells in one.series)
    assert len(shown[0].pictures) == 6
    assert len(shown[0].series) == 5
    assert found.images == pictures + views + series
    name, text, _ = shown[0].retrieval[0]
    assert name.startswith("cell at")
    assert re.search(r"1\. from \d+, \d+; 2\. from \d+, \d+$", text)


def test_a_retrieved_patch_is_cut_from_the_place_that_is_named(model_folder: Path) -> None:
    image, mask = make_image(0), make_mask()
    result = Inpainter(load_model(model_folder))(image, mask)
    whole = 0
    for patches, places in zip(result.candidates, result.candidates_yx, strict=True):
        for patch, (top, left) in zip(patches, places, strict=True):
            window = np.s_[top : top + 16, left : left + 16]
            assert np.array_equal(patch, result.coarse[window])
            whole += not mask[window].any()
    assert whole > 0


def test_the_candidates_sheet_shows_the_first_patch_of_each_cell_and_nothing_else_changes(model_folder: Path) -> None:
    image, mask = make_image(0)[:50, :60], make_mask()[:50, :60]
    result = Inpainter(load_model(model_folder))(image, mask)
    sheet = candidates_sheet(image, result)
    touched = np.zeros((64, 64), dtype=bool)
    for (top, left), patches in zip(result.cells_yx, result.candidates, strict=True):
        touched[top : top + 16, left : left + 16] = True
        shown = sheet[top : top + 16, left : left + 16]
        assert np.array_equal(shown, patches[0][: shown.shape[0], : shown.shape[1]])
    assert np.array_equal(sheet[~touched[:50, :60]], image[~touched[:50, :60]])


def test_the_markdown_has_the_same_figures(evaluation: tuple[dict, list]) -> None:
    text = render("evaluation.md", **tables(evaluation[0]))
    assert "| `psnr_hole`, dB, ↑ higher is better | **20.50** (20.00 to 21.00) | 19.50 (19.00 to 20.00) |" in text
    assert "| `fid_full, kid_full` | not measured: no network was given |  |" in text
    assert "- Telea (OpenCV): not measured: OpenCV is not installed" in text
    assert "| 10% to 20% | 2 | l1_hole_pct | 5.000 (4.500 to 5.500) | **4.000** (3.500 to 4.500) |" in text


def test_the_best_of_each_measure_is_bold_whichever_way_it_counts() -> None:
    table = metrics_table(
        {
            "a": {"psnr_hole": entry(20.0), "l1_hole_pct": entry(5.0)},
            "b": {"psnr_hole": entry(21.0), "l1_hole_pct": entry(6.0)},
            "c": {"psnr_hole": entry(None)},
        }
    )
    assert {str(row[0]): [str(cell) for cell in row[1:]] for row in table.rows} == {
        "`l1_hole_pct`, %, ↓ lower is better": ["**5.000**", "6.000", "–"],
        "`psnr_hole`, dB, ↑ higher is better": ["20.00", "**21.00**", "–"],
    }
    page = drawn("{{ parts.table(table) }}", table=table)
    assert re.findall(r'<td class="number">(.*?)</td>', page)[:2] == ["<strong>5.000</strong>", "6.000"]


def drawn(source: str, **values: object) -> str:
    """A part of a page."""
    return _templates().from_string('{% import "parts.html" as parts %}' + source).render(values)


def test_text_from_outside_cannot_become_markup() -> None:
    evil = "<script>1</script>"
    picture = np.zeros((2, 2, 3), dtype=np.uint8)
    text = drawn(
        "{{ parts.facts(facts) }}{{ parts.table(table) }}{{ parts.pictures(rows) }}{{ parts.gallery(figures) }}",
        facts={"<u>": "<img src=x>", evil: evil},
        table=Table([evil], [[Cell("<script>3", "<img src=x>")], [evil]], note=evil),
        rows=[(evil, {'a"b': picture})],
        figures=[(evil, evil, [picture, None])],
    )
    assert text.count("<img") == 2, "the pictures"
    assert "<script" not in text
    assert "<img src=x>" not in text
    assert 'a"b' not in text


def test_a_value_that_a_template_lacks_is_an_error() -> None:
    with pytest.raises(jinja2.UndefinedError, match="'e' is undefined"):
        render("evaluation.html")


def test_a_table_that_is_wider_than_a_phone_says_so() -> None:
    few, many = (drawn("{{ parts.table(table) }}", table=Table(["a"] * n, [[1] * n])) for n in (4, 5))
    assert 'class="scroll"' in few
    assert 'class="scroll wide"' in many


def test_the_zoom_is_the_smallest_square_around_the_hole() -> None:
    mask = np.zeros((100, 200), dtype=np.uint8)
    assert zoom_on(mask) is None
    mask[90:, 100:140] = 1
    top, left, side = zoom_on(mask, margin=0.05) or (0, 0, 0)
    assert side == pytest.approx(0.3)
    assert left == pytest.approx(0.45)
    assert top == pytest.approx(0.7), "moved inside the picture"
    mask[:] = 1
    assert zoom_on(mask) is None


def test_the_grid_shows_every_picture_and_refuses_floats() -> None:
    picture = np.full((10, 20, 3), (3, 200, 90), dtype=np.uint8)
    sheet = picture_grid([("one", {"a": picture, "b": picture}), ("two", {"a": picture})], cell_px=40)
    assert (sheet == (3, 200, 90)).all(axis=-1).sum() == 3 * 40 * 20
    with pytest.raises(ValueError, match="must be uint8"):
        picture_grid([("one", {"a": picture / 255})])
    with pytest.raises(ValueError, match="at least one row"):
        picture_grid([])


def browse(page: Path, folder: Path, *, width: int) -> tuple[Image.Image, str]:
    """A picture of the page in a real browser without network, and what the browser said."""
    picture = folder / f"{width}.png"
    assert BROWSER is not None
    run = subprocess.run(
        [
            BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr",
            "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={folder / 'profile'}",
            f"--log-net-log={folder / 'net.json'}", f"--window-size={width},3000", f"--screenshot={picture}",
            page.as_uri(),
        ],
        capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    return Image.open(picture).convert("RGB"), run.stderr


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on PATH")
@pytest.mark.slow
def test_a_browser_shows_the_page_without_errors_or_requests_at_both_widths(page: Path, tmp_path: Path) -> None:
    # Chromium's windows are 500 pixels wide at least: the phone is a frame of that page.
    frame = tmp_path / "phone.html"
    frame.write_text(f'<body style="margin:0"><iframe src="{page.as_uri()}" width=390 height=3000 style="border:0">')
    for target, width in ((page, 1280), (frame, 500)):
        picture, said = browse(target, tmp_path, width=width)
        assert "CONSOLE" not in said
        pixels = np.asarray(picture)
        assert pixels.std() > 20, "the page is not blank"
        colours = np.abs(pixels[..., 0].astype(int) - pixels[..., 2]) > 40
        assert colours.mean() > 0.002, "pictures are visible"
        if width == 500:
            assert (pixels[:, 392:] == 255).all(), "nothing sticks out of the phone"
        hosts = set(re.findall(r'"url":"(https?://[^"]*)"', (tmp_path / "net.json").read_text()))
        assert not [one for one in hosts if "google" not in one and "gvt" not in one]
