"""`tmad web` over HTTP: forms in, files out, and what is said to everything that cannot be answered."""

from __future__ import annotations

import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
from PIL import Image

from tests.tmad.tiny import make_image
from tmad.checkpoint import load_model
from tmad.files import fill_file, open_file
from tmad.inpaint import Inpainter

pytest.importorskip("python_multipart", reason="the extra `web` is not installed")

from pipeline.service.config import WebConfig
from pipeline.service.http import make_app
from pipeline.service.web import Queue, serve
from pipeline.service.work import Answer, Refused, Request, fill
from pipeline.service.worker import Worker
from tests.pipeline.served import Site, served

MASK = np.zeros((64, 64), np.uint8)
MASK[20:40, 10:35] = 255


def encoded(picture: np.ndarray | Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    (Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture).save(file, kind, **options)
    return file.getvalue()


PHOTO = encoded(make_image(0, 64))


@dataclass
class Stub:
    """In a worker's place: it fills at once, or when it is let."""

    inpainter: Inpainter
    let: threading.Event = field(default_factory=threading.Event)
    began: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))

    def fill(self, request: Request, gone: Callable[[], bool]) -> Answer:
        self.began.release()
        while not self.let.wait(0.01):
            if gone():
                raise Refused(499, "gone", "nobody waited")
        return fill(self.inpainter, request, max_pixels=1_000_000)


@pytest.fixture(scope="module")
def worker(model_folder: Path) -> Stub:
    stub = Stub(Inpainter(load_model(model_folder)))
    stub.let.set()
    return stub


@pytest.fixture(scope="module")
def site(worker: Stub) -> Iterator[Site]:
    queue = Queue(worker, max_waiting=1)
    with served(
        make_app(queue.fill, state=queue.state, max_bytes=100_000, max_pixels=1_000_000, loopback=True)
    ) as made:
        yield made


def ask(site: Site, photo: bytes = PHOTO, mask: bytes | None = None, **fields: str) -> requests.Response:
    files = {"photo": ("a.png", photo)} | ({} if mask is None else {"mask": ("m.png", mask)})
    return requests.post(f"{site}/fill", files=files, data=fields, timeout=60)


def test_a_form_gives_the_file_that_the_command_writes(site: Site, model_folder: Path) -> None:
    answer = ask(site, mask=encoded(MASK))
    assert answer.status_code == 200, answer.text
    expected = fill_file(Inpainter.load(model_folder, policy="original"), open_file(PHOTO), MASK, image_id="a.png")
    assert answer.content == expected.data
    assert answer.headers["content-type"] == "image/png"
    assert answer.headers["content-disposition"] == 'inline; filename="a_filled.png"'
    assert json.loads(answer.headers["x-tmad"])["hole_fraction"] == pytest.approx(500 / 4096)


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "TIFF"])
def test_format_and_metadata_of_the_photograph_stay(site: Site, kind: str) -> None:
    exif = Image.Exif()
    exif[0x010F] = "a camera"
    answer = ask(site, encoded(make_image(0, 64), kind, exif=exif), encoded(MASK))
    assert answer.status_code == 200, answer.text
    made = Image.open(io.BytesIO(answer.content))
    assert made.format == kind
    assert made.getexif()[0x010F] == "a camera"


def test_boxes_colour_and_growth_of_the_hole_are_fields(site: Site) -> None:
    boxes = ask(site, boxes="[[10, 20, 25, 20]]")
    assert boxes.content == ask(site, mask=encoded(MASK)).content
    assert boxes.content == ask(site, mask=encoded(255 - MASK), mask_hole="black").content
    assert ask(site, boxes="[[12, 22, 21, 16]]", dilate="2").content == boxes.content
    large = Image.fromarray(MASK).resize((128, 128), Image.Resampling.NEAREST)
    assert ask(site, mask=encoded(large), scale_masks="true").content == boxes.content


def test_who_asks_for_it_gets_the_places_of_the_texture(site: Site) -> None:
    files = {"photo": ("a.png", PHOTO), "mask": ("m.png", encoded(MASK))}
    answer = requests.post(f"{site}/fill", files=files, headers={"Accept": "multipart/form-data"}, timeout=60)
    boundary = answer.headers["content-type"].split("boundary=")[1]
    _, about, picture, end = answer.content.split(f"--{boundary}".encode())
    told = json.loads(about.split(b"\r\n\r\n", 1)[1])
    assert told["patch_size"] == 16
    assert [y < 40 and y + 16 > 20 and x < 35 and x + 16 > 10 for y, x in told["cells"]] == [True] * 6
    assert np.array(told["candidates"]).shape == (6, 2, 2)
    assert picture.split(b"\r\n\r\n", 1)[1].removesuffix(b"\r\n") == ask(site, mask=encoded(MASK)).content
    assert end == b"--\r\n"


@pytest.mark.parametrize(
    ("photo", "mask", "fields", "status", "reason", "said"),
    [
        (b"no picture", MASK, {}, 422, "not-an-image", "photo: not-an-image: 10 bytes"),
        (b"", MASK, {}, 422, "empty-file", "photo: empty-file"),
        (PHOTO[:400], MASK, {}, 422, "truncated", "photo: truncated"),
        (encoded(np.zeros((1001, 1000), np.uint8)), MASK, {}, 413, "too-large", "1000x1001 pixels, at most 1000000"),
        (PHOTO, MASK[:50], {}, 422, "size-mismatch", "mask is 50x64 (height x width), the image is 64x64"),
        (PHOTO, MASK * 0, {}, 422, "no-hole", "nothing in it is white"),
        (PHOTO, MASK * 0 + 255, {}, 422, "all-hole", "nothing but hole"),
        (PHOTO, MASK // 8, {}, 422, "faint-mask", "none above 127"),
        (PHOTO, b"none", {}, 422, "not-an-image", "mask: not-an-image"),
        (PHOTO, None, {}, 400, "no-mask", "either a file `mask`"),
        (PHOTO, MASK, {"boxes": "[[1,1,2,2]]"}, 400, "no-mask", "either a file `mask`"),
        (PHOTO, None, {"boxes": "[[1, 1, 2"}, 400, "wrong-field", "boxes must be [[left, top, width, height], ...]"),
        (PHOTO, None, {"boxes": f"[[1, 1, 2, 1{'0' * 400}]]"}, 400, "wrong-field", "boxes must be"),
        (PHOTO, None, {"boxes": "[[90, 1, 2, 2]]"}, 422, "box-outside", "lies outside of the image"),
        (PHOTO, MASK, {"dilate": "-1"}, 400, "wrong-field", "whole number from 0 to 1000, got '-1'"),
        (PHOTO, MASK, {"format": "gif"}, 400, "wrong-field", "format must be same or png, got 'gif'"),
        (PHOTO, MASK, {"colour": "red"}, 400, "unknown-field", "there is no colour; there are photo, mask, boxes"),
    ],
)
@pytest.mark.filterwarnings("ignore::tmad.inpaint.EmptyMaskWarning")  # a process of its own ignores them
def test_what_cannot_be_filled_is_one_sentence_with_its_status(
    site: Site, photo: bytes, mask: Any, fields: dict[str, str], status: int, reason: str, said: str
) -> None:
    answer = ask(site, photo, encoded(mask) if isinstance(mask, np.ndarray) else mask, **fields)
    told = answer.json()
    assert (answer.status_code, told["reason"]) == (status, reason), told
    assert said in told["error"]
    assert "\n" not in told["error"]


def test_requests_that_are_no_form_or_too_long_are_not_read(site: Site) -> None:
    assert requests.post(f"{site}/fill", data=b"x" * 10, timeout=60).status_code == 415
    long = requests.post(f"{site}/fill", files={"photo": b"x" * 100_000}, timeout=60)
    assert (long.status_code, long.json()["reason"]) == (413, "too-large")
    assert requests.post(f"{site}/fill", data=iter([b"x"]), timeout=60).status_code == 411
    assert requests.get(f"{site}/fill", timeout=60).status_code == 405
    assert requests.get(f"{site}/../../web.py", timeout=60).status_code == 404


def test_pages_of_other_sites_and_names_that_lead_here_are_turned_away(site: Site) -> None:
    other = requests.get(f"{site}/", headers={"Sec-Fetch-Site": "cross-site"}, timeout=60)
    assert (other.status_code, other.json()["reason"]) == (403, "other-site")
    rebound = requests.get(f"{site}/", headers={"Host": "rebound.example"}, timeout=60)
    assert (rebound.status_code, rebound.json()["reason"]) == (421, "wrong-host")
    page = requests.get(f"{site}/", timeout=60)
    assert page.status_code == 200
    assert "default-src 'none'" in page.headers["content-security-policy"]


def test_formats_that_browsers_do_not_know_are_shown_as_png(site: Site) -> None:
    image = make_image(0, 64)
    shown = requests.post(f"{site}/show", data=encoded(image, "TIFF"), timeout=60)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(shown.content))), image)
    assert requests.post(f"{site}/show", data=b"no", timeout=60).status_code == 422


def test_more_than_may_wait_are_asked_to_come_again_and_those_that_left_are_not_filled(
    site: Site, worker: Stub
) -> None:
    worker.let.clear()
    while worker.began.acquire(blocking=False):
        pass
    answers: list[requests.Response] = []
    waiting = [threading.Thread(target=lambda: answers.append(ask(site, mask=encoded(MASK)))) for _ in range(2)]
    try:
        for thread in waiting:
            thread.start()
        _until(lambda: requests.get(f"{site}/state", timeout=60).json() == {"here": 2})
        busy = ask(site, mask=encoded(MASK))
        assert (busy.status_code, busy.json()["reason"]) == (503, "too-many")
        assert busy.headers["retry-after"] == "10"
    finally:
        worker.let.set()
    for thread in waiting:
        thread.join(60)
    assert [answer.status_code for answer in answers] == [200, 200]
    worker.let.clear()
    try:
        with pytest.raises(requests.Timeout):
            requests.post(f"{site}/fill", files={"photo": PHOTO, "mask": encoded(MASK)}, timeout=0.5)
        # Whoever has left is not waited for: the place is free again.
        _until(lambda: requests.get(f"{site}/state", timeout=60).json() == {"here": 0})
    finally:
        worker.let.set()


def _until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_with_a_token_only_the_page_is_open(worker: Stub) -> None:
    queue = Queue(worker, max_waiting=1)
    app = make_app(queue.fill, state=queue.state, max_bytes=100_000, max_pixels=1_000_000, token="s3cret")
    with served(app) as site:
        assert requests.get(f"{site}/", timeout=60).status_code == 200
        assert requests.get(f"{site}/-/healthz", timeout=60).status_code == 200
        for headers in ({}, {"Authorization": "Bearer guess"}, {"Authorization": "Bearer s3cre\u00fc".encode()}):
            refused = requests.get(f"{site}/state", headers=headers, timeout=60)
            assert (refused.status_code, refused.json()["reason"]) == (401, "no-token")
            assert "s3cret" not in refused.text
        answer = requests.get(f"{site}/state", headers={"Authorization": "Bearer s3cret"}, timeout=60)
        assert answer.json() == {"here": 0}


def test_a_picture_that_takes_too_long_ends_and_the_next_one_is_filled(model_folder: Path) -> None:
    worker = Worker(model_folder, device="cpu", policy="original", max_pixels=1_000_000, max_s=60)
    try:
        request = Request(PHOTO, "a.png", encoded(MASK))
        expected = worker.fill(request).data
        with pytest.raises(Refused, match="photo: not-an-image"):
            worker.fill(Request(b"no", "a.png", encoded(MASK)))
        first = worker._process.pid
        large = Request(encoded(make_image(0, 512)), "b.png", boxes=((10, 10, 480, 480),))
        worker._max_s = 0
        with pytest.raises(Refused, match="it took more than 0 s") as late:
            worker.fill(large)
        assert late.value.status == 504
        worker._max_s = 60
        assert worker.fill(request).data == expected
        assert worker._process.pid != first
        with pytest.raises(Refused, match="the process ended on this picture") as died:
            worker.fill(large, gone=lambda: bool(worker._process.kill()))
        assert died.value.status == 500
        assert worker.fill(request).data == expected
    finally:
        worker.close()


def test_an_address_that_is_taken_is_one_sentence(site: Site) -> None:
    port = int(str(site).rsplit(":", 1)[1])
    with pytest.raises(ValueError, match=f"cannot listen at 127.0.0.1, port {port}: .*; choose another --port"):
        serve(WebConfig(port=port))
