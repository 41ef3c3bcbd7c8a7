"""The page of `tmad web` in a real browser: strokes, boxes, masks, fill, undo, compare, save, keys, a telephone."""

from __future__ import annotations

import base64
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import make_photo
from tests.pipeline.browser import CHROMIUM, DRIVER, Browser, browser
from tests.pipeline.served import served
from tmad.checkpoint import load_model
from tmad.inpaint import Inpainter

if CHROMIUM is None or DRIVER is None:
    pytest.skip("chromium and chromedriver are not on PATH (apt: chromium chromium-driver)", allow_module_level=True)
pytest.importorskip("python_multipart", reason="the extra `web` is not installed")

from pipeline.service.http import make_app
from pipeline.service.web import Queue
from pipeline.service.work import Answer, Request, fill

TOKEN = "a-token-of-the-test"
HEIGHT, WIDTH = 240, 320
CONTROL, SPACE, LEFT, RIGHT, DOWN = "\ue009", " ", "\ue012", "\ue014", "\ue015"


class _Here:
    def __init__(self, model_folder: Path) -> None:
        self.inpainter = Inpainter(load_model(model_folder))

    def fill(self, request: Request, _: object) -> Answer:
        return fill(self.inpainter, request, max_pixels=1_000_000)


@pytest.fixture(scope="module")
def site(model_folder: Path) -> Iterator[str]:
    queue = Queue(_Here(model_folder), max_waiting=2)
    app = make_app(queue.fill, state=queue.state, max_bytes=2_000_000, max_pixels=1_000_000, token=TOKEN, loopback=True)
    with served(app) as address:
        yield address


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as made:
        yield made


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.jpg"
    exif = Image.Exif()
    exif[0x010F] = "a camera"
    Image.fromarray(make_photo(3, HEIGHT, WIDTH)).save(path, quality=95, subsampling=0, exif=exif)
    return path


@pytest.fixture
def page(window: Browser, site: str, photo: Path) -> Browser:
    """The page with a photograph opened."""
    window.resize(1200, 900)
    window.open("about:blank")
    window.open(f"{site}/#token={TOKEN}")
    window.choose_file("#open", photo)
    window.until("return !document.getElementById('stage').hidden")
    return window


def place(page: Browser, x: float, y: float) -> tuple[float, float]:
    """Where the picture's pixel (x, y) is in the window."""
    box = page.run("const b = document.getElementById('paint').getBoundingClientRect(); return [b.x, b.y, b.width]")
    return box[0] + x * box[2] / WIDTH, box[1] + y * box[2] / WIDTH


def hole(page: Browser) -> np.ndarray:
    """(H, W) of what is marked, as it will be sent."""
    url = page.run(
        "return maskFile().then((file) => file && new Promise((done) => {"
        "const reader = new FileReader(); reader.onload = () => done(reader.result); reader.readAsDataURL(file); }))"
    )
    if url is None:
        return np.zeros((HEIGHT, WIDTH), np.uint8)
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))))[..., 0]


def saved(page: Browser) -> tuple[str, bytes]:
    """Name and bytes of the file that `Save` gives."""
    code = (
        "const save = document.getElementById('save'), reader = new FileReader(); return new Promise((done) => {"
        "reader.onload = () => done([save.download, reader.result]); reader.readAsDataURL(now.file); })"
    )
    name, url = page.run(code)
    return name, base64.b64decode(url.split(",")[1])


def fill_and_wait(page: Browser) -> None:
    page.click("#fill")
    page.until("return document.getElementById('status').textContent.includes('filled in')")


def picture(page: Browser, name: str) -> None:
    """Keep a picture of the page where SCREENSHOTS says."""
    if folder := os.environ.get("SCREENSHOTS"):
        page.screenshot(Path(folder) / f"{name}.png")


def test_a_stroke_is_filled_and_the_rest_stays_with_format_and_metadata(page: Browser, photo: Path) -> None:
    page.stroke(place(page, 100, 120), place(page, 180, 120), place(page, 180, 150))
    picture(page, "stroke")
    marked = hole(page)
    assert set(np.unique(marked)) == {0, 255}
    assert marked[120, 100] == marked[150, 180] == 255
    assert 80 * 40 < (marked > 0).sum() < 110 * 50 + 50 * 50
    fill_and_wait(page)
    picture(page, "filled")
    name, data = saved(page)
    assert name == "photo_filled.jpg"
    made, before = Image.open(io.BytesIO(data)), Image.open(photo)
    assert (made.format, made.getexif()[0x010F]) == ("JPEG", "a camera")
    changed = np.abs(np.asarray(made).astype(int) - np.asarray(before)).max(axis=2)
    # JPEG's blocks have 8 pixels a side: beyond them nothing moves but by rounding.
    near = np.asarray(Image.fromarray(marked).resize((WIDTH // 8, HEIGHT // 8), Image.Resampling.BOX)) > 0
    near = np.kron(near, np.ones((8, 8), bool))
    assert changed[~near].max() <= 6
    assert changed[marked > 0].mean() > 2
    assert hole(page).max() == 0, "what is filled is no longer marked"


def test_pixels_of_a_png_outside_the_hole_are_equal(page: Browser, tmp_path: Path) -> None:
    original = make_photo(5, HEIGHT, WIDTH)
    Image.fromarray(original).save(tmp_path / "photo.png")
    page.choose_file("#open", tmp_path / "photo.png")
    page.until("return document.getElementById('status').textContent.startsWith('photo.png')")
    page.stroke(place(page, 60, 60), place(page, 120, 90))
    marked = hole(page) > 0
    fill_and_wait(page)
    made = np.asarray(Image.open(io.BytesIO(saved(page)[1])))
    assert np.array_equal(made[~marked], original[~marked])
    assert not np.array_equal(made[marked], original[marked])


def test_undo_takes_back_strokes_and_fills_one_after_the_other(page: Browser) -> None:
    assert page.run("return document.getElementById('undo').disabled")
    page.stroke(place(page, 60, 60), place(page, 100, 60))
    first = hole(page)
    page.stroke(place(page, 200, 160), place(page, 240, 160))
    both = hole(page)
    assert (both > 0).sum() > (first > 0).sum()
    fill_and_wait(page)
    page.click("#undo")
    assert np.array_equal(hole(page), both)
    assert not page.run("return document.getElementById('result').checkVisibility()")
    page.keys("z", holding=CONTROL)
    assert np.array_equal(hole(page), first)
    page.keys("z", holding=CONTROL)
    assert hole(page).max() == 0
    assert page.run("return document.getElementById('undo').disabled")


def test_eraser_box_size_and_mask_file(page: Browser, tmp_path: Path) -> None:
    page.click("input[value=box] + span")
    page.stroke(place(page, 50, 40), place(page, 150, 100))
    box = hole(page) > 0
    assert box[45:95, 55:145].all()
    assert abs(int(box.sum()) - 100 * 60) < 400
    page.click("input[value=eraser] + span")
    page.run("document.getElementById('size').value = 20")
    page.stroke(place(page, 100, 40), place(page, 100, 100))
    erased = hole(page) > 0
    assert not erased[50:90, 95:105].any()
    assert erased[50:90, 60:80].all()
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[200:220, 10:300] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    page.choose_file("#mask", tmp_path / "mask.png")
    page.until("return document.getElementById('status').textContent.includes('is marked')")
    assert np.array_equal(hole(page) > 0, erased | (mask > 0))
    Image.fromarray(mask[:50]).save(tmp_path / "small.png")
    page.choose_file("#mask", tmp_path / "small.png")
    page.until("return document.getElementById('status').className === 'wrong'")
    assert page.said() == f"The mask has {WIDTH} × 50 pixels, the photograph {WIDTH} × {HEIGHT}."


def test_the_result_is_compared_with_a_slider_and_shows_where_its_texture_came_from(page: Browser) -> None:
    page.stroke(place(page, 100, 100), place(page, 160, 100))
    fill_and_wait(page)
    page.run(
        "const slider = document.getElementById('compare'); slider.value = 40; slider.dispatchEvent(new Event('input'))"
    )
    assert page.run("return getComputedStyle(document.getElementById('after')).clipPath") == "inset(0px 0px 0px 40%)"
    page.hover(*place(page, 130, 100))
    page.until("return document.querySelectorAll('#marks rect').length === 3")  # the cell and its two candidates
    assert page.run("return document.querySelectorAll('#windows canvas').length") == 2
    picture(page, "texture")
    inside = page.run(
        "const [y, x] = now.about.candidates[markedCell.index][0];"
        "const canvas = document.createElement('canvas'); canvas.width = width; canvas.height = height;"
        "const at = canvas.getContext('2d'); at.drawImage(now.source, 0, 0);"
        "const shown = document.querySelector('#windows canvas').getContext('2d').getImageData(0, 0, 16, 16).data;"
        "return shown.every((value, i) => value === at.getImageData(x, y, 16, 16).data[i])"
    )
    assert inside, "what is shown beside is the window that is marked"
    page.hover(*place(page, 300, 230))
    page.until("return document.querySelectorAll('#marks rect').length === 0")


def test_the_keyboard_is_enough(page: Browser) -> None:
    page.run("document.getElementById('paint').focus()")
    page.keys(SPACE, *[RIGHT] * 3, SPACE)
    drawn = hole(page) > 0
    middle = drawn[HEIGHT // 2]
    assert middle[WIDTH // 2 : WIDTH // 2 + 60].all()
    page.keys("e", *[LEFT] * 3, SPACE, SPACE)
    assert not (hole(page) > 0)[HEIGHT // 2, WIDTH // 2]
    page.keys("b", "]", "]", *[DOWN] * 2, SPACE, SPACE)
    assert float(page.run("return document.getElementById('size').value")) == pytest.approx(40 * 1.25**2, abs=1)
    page.keys("f")
    page.until("return document.getElementById('status').textContent.includes('filled in')")


def test_it_fits_a_telephone(page: Browser) -> None:
    page.resize(390, 844)
    page.stroke(place(page, 100, 100), place(page, 160, 100))
    fill_and_wait(page)
    page.hover(*place(page, 130, 100))
    picture(page, "telephone")
    assert page.run("return document.documentElement.scrollWidth") <= 390
    small = page.run(
        "return [...document.querySelectorAll('button, .button, .tool span')].filter((one) => one.checkVisibility()"
        " && one.getBoundingClientRect().height < 43).map((one) => one.textContent)"
    )
    assert small == [], "fingers need 44 pixels"


def test_what_cannot_be_done_is_said_and_the_marks_stay(page: Browser, tmp_path: Path) -> None:
    page.click("#fill")
    assert page.said() == "Nothing is marked: paint over what should go."
    page.stroke(place(page, 100, 100), place(page, 160, 100))
    marked = hole(page)
    (tmp_path / "text.png").write_text("no picture")
    page.choose_file("#open", tmp_path / "text.png")
    page.until("return document.getElementById('status').className === 'wrong'")
    assert page.said().startswith("Not-an-image: 10 bytes")
    page.run("token = 'another'")
    page.click("#fill")
    page.until("return document.getElementById('status').textContent.includes('token')")
    assert np.array_equal(hole(page), marked)


def test_a_tiff_is_shown_filled_and_saved_as_tiff(page: Browser, tmp_path: Path) -> None:
    deep = make_photo(6, HEIGHT, WIDTH)
    Image.fromarray(deep).save(tmp_path / "scan.tif")
    page.choose_file("#open", tmp_path / "scan.tif")
    page.until("return document.getElementById('status').textContent.startsWith('scan.tif')")
    page.stroke(place(page, 100, 100), place(page, 160, 100))
    marked = hole(page) > 0
    fill_and_wait(page)
    name, data = saved(page)
    assert name == "scan_filled.tif"
    made = Image.open(io.BytesIO(data))
    assert made.format == "TIFF"
    assert np.array_equal(np.asarray(made)[~marked], deep[~marked])


def test_the_page_asks_nobody_else_and_the_token_leaves_the_address(page: Browser, site: str) -> None:
    page.stroke(place(page, 100, 100), place(page, 160, 100))
    fill_and_wait(page)
    entries = [json.loads(entry["message"])["message"] for entry in page.log("performance")]
    sent = [entry["params"] for entry in entries if entry["method"] == "Network.requestWillBeSent"]
    urls = {one["request"]["url"] for one in sent if one["documentURL"].startswith(site)}  # the browser has pages too
    assert f"{site}/fill" in urls
    assert [url for url in urls if not url.startswith((site, "blob:"))] == []
    assert page.run("return location.href") == f"{site}/"
    # What the server refused in other tests is there too, from the network; the policy and the code complain otherwise.
    severe = [entry for entry in page.log("browser") if entry["level"] == "SEVERE" and entry["source"] != "network"]
    assert severe == []
