"""`tmad serve`: the application on Ray Serve, started once, with a model of the registry."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
from PIL import Image

from pipeline.tracking import mlflow_client
from tests.tmad.tiny import MODEL, make_image, with_noise
from tmad.checkpoint import load_model, save_model
from tmad.files import fill_file, open_file
from tmad.inpaint import Inpainter
from tmad.model import TMAD

pytest.importorskip("mmh3", reason="the extra `serve` is not installed")

from ray import serve

from pipeline.service.application import NAME, application, build
from pipeline.service.config import ServiceConfig

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(300)]

TOKEN = {"Authorization": "Bearer s3cret"}
MAX_WAITING = 4


def encoded(picture: np.ndarray, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, kind)
    return file.getvalue()


MASK = np.zeros((64, 64), np.uint8)
MASK[20:40, 10:35] = 255
PHOTO, HOLE = encoded(make_image(0, 64)), encoded(MASK)
LONG = encoded(make_image(0, 640), "JPEG"), encoded(np.pad(np.full((440, 440), 255, np.uint8), 100))
"""A fill of most of a second."""


@dataclass(frozen=True)
class Service:
    """The application as a client and as its registry see it."""

    address: str
    models: list[Path]
    """The artifacts of versions 1 and 2."""
    tracking_uri: str

    def ask(self, photo: bytes = PHOTO, mask: bytes = HOLE, **fields: str) -> requests.Response:
        files = {"photo": ("a.png", photo), "mask": ("m.png", mask)}
        return requests.post(f"{self.address}/fill", files=files, data=fields, headers=TOKEN, timeout=60)

    def make_champion(self, version: int) -> None:
        mlflow_client(self.tracking_uri).set_registered_model_alias("tmad", "champion", str(version))

    def expected(self, version: int, photo: bytes = PHOTO, seed: int = 0) -> bytes:
        inpainter = Inpainter(load_model(self.models[version - 1]), policy="crop", seed=seed)
        return fill_file(inpainter, open_file(photo), MASK // 255, image_id="a.png").data


@pytest.fixture(scope="module")
def service(ray_session: None, tracking_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("service")
    database = folder / "mlflow.db"
    database.write_bytes(tracking_template.read_bytes())
    client = mlflow_client(uri := f"sqlite:///{database}")
    client.create_registered_model("tmad")
    models = [folder / "first", folder / "second"]
    for seed, model in enumerate(models):
        save_model(with_noise(TMAD(MODEL, seed=seed)), model)
        client.create_model_version("tmad", source=model.as_uri())
    client.set_registered_model_alias("tmad", "champion", "1")
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port}, logging_config={"log_level": "WARNING"})
    config = ServiceConfig(
        model="models:/tmad@champion",
        tracking_uri=uri,
        max_mb=1,
        max_pixels=1_000_000,
        max_waiting=MAX_WAITING,
        min_replicas=2,
        cpus=0.5,
        batch_size=2,
        look_s=0.2,
    )
    serve.run(build(config, token="s3cret"), name=NAME)
    yield Service(f"http://127.0.0.1:{port}", models, uri)
    serve.shutdown()


def replicas() -> list[int]:
    """The processes that fill."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # ended meanwhile
            if b"ServeReplica:tmad:model" in path.read_bytes():
                found.append(int(path.parent.name))
    return found


def test_pictures_of_several_clients_are_what_each_would_be_alone(service: Service) -> None:
    photos = {number: encoded(make_image(number, 64)) for number in range(4)}
    with ThreadPoolExecutor(4) as clients:
        answers = clients.map(lambda number: service.ask(photos[number], seed=str(number)), photos)
    for (number, photo), answer in zip(photos.items(), answers, strict=True):
        assert answer.status_code == 200, answer.text
        assert answer.content == service.expected(1, photo, seed=number)
        assert json.loads(answer.headers["x-tmad"])["model"] == "models:/tmad/1"
    webp = service.ask(encoded(make_image(0, 64), "WEBP"))
    assert Image.open(io.BytesIO(webp.content)).format == "WEBP"


def test_what_cannot_be_answered_is_one_sentence(service: Service) -> None:
    assert requests.get(f"{service.address}/-/healthz", timeout=60).text == "success"
    assert requests.get(f"{service.address}/state", headers=TOKEN, timeout=60).json() == {"model": "models:/tmad/1"}
    refused = {
        "not-an-image": service.ask(b"no picture"),
        "too-large": service.ask(encoded(np.zeros((1001, 1000), np.uint8))),
        "no-hole": service.ask(mask=encoded(MASK * 0)),
        "all-hole": service.ask(mask=encoded(MASK * 0 + 255)),
        "no-token": requests.post(f"{service.address}/fill", files={"photo": PHOTO}, timeout=60),
        "no-form": requests.post(f"{service.address}/fill", data=b"x", headers=TOKEN, timeout=60),
    }
    statuses = {"too-large": 413, "no-token": 401, "no-form": 415}
    for reason, answer in refused.items():
        assert (answer.status_code, answer.json()["reason"]) == (statuses.get(reason, 422), reason)
        assert "\n" not in answer.json()["error"]
    long = service.ask(os.urandom(2**20))
    assert (long.status_code, long.json()["reason"]) == (413, "too-large")


def test_more_than_may_wait_are_asked_to_come_again(service: Service) -> None:
    # Two replicas have two batches of two in hand, `MAX_WAITING` wait; a fill takes longer than all take to ask.
    with ThreadPoolExecutor(32) as clients:
        answers = list(clients.map(lambda _: service.ask(*LONG), range(32)))
    statuses = Counter(one.status_code for one in answers)
    assert statuses[200] >= MAX_WAITING
    assert statuses[503] > 0
    assert statuses[200] + statuses[503] == 32
    refused = [one for one in answers if one.status_code == 503]
    assert {one.json()["reason"] for one in refused} == {"too-many"}
    assert {one.headers["retry-after"] for one in refused} == {"10"}


class Load:
    """Clients that ask one request after the other."""

    def __init__(self, service: Service, clients: int) -> None:
        self.answers: list[requests.Response] = []
        self._service, self._end = service, threading.Event()
        self._threads = [threading.Thread(target=self._ask) for _ in range(clients)]

    def _ask(self) -> None:
        while not self._end.is_set():
            self.answers.append(self._service.ask())

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join(60)


def version_of(answer: requests.Response) -> str:
    return str(json.loads(answer.headers["x-tmad"])["model"])


def test_a_new_champion_takes_over_and_no_request_is_dropped(service: Service) -> None:
    with Load(service, 2) as load:
        while len(load.answers) < 4:
            time.sleep(0.05)
        service.make_champion(2)
        end = time.monotonic() + 60
        while Counter(version_of(one) for one in load.answers[-8:])["models:/tmad/2"] < 8:
            assert time.monotonic() < end
            time.sleep(0.1)
    assert {one.status_code for one in load.answers} == {200}
    filled = {(version_of(one), one.content) for one in load.answers}
    assert filled == {(f"models:/tmad/{number}", service.expected(number)) for number in (1, 2)}


def computed_s(process: int) -> float:
    """Processor time."""
    user, system = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def test_a_lost_replica_loses_what_it_held_and_says_so(service: Service) -> None:
    before = {process: computed_s(process) for process in replicas()}
    with ThreadPoolExecutor(1) as client:
        held = client.submit(service.ask, *LONG)
        while not (victims := [one for one, since in before.items() if computed_s(one) - since > 0.2]):
            time.sleep(0.01)
        with Load(service, 3) as load:
            os.kill(victims[0], signal.SIGKILL)
            while len(load.answers) < 10:
                time.sleep(0.05)
    lost = [held.result(), *(one for one in load.answers if one.status_code != 200)]
    assert len(lost) <= 4
    assert {(one.status_code, one.json()["reason"], one.headers["retry-after"]) for one in lost} == {
        (503, "replica-died", "10")
    }


def test_an_application_needs_a_token_and_settings_that_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TMAD_WEB_TOKEN", raising=False)
    with pytest.raises(ValueError, match="set TMAD_WEB_TOKEN"):
        application({"model": "builtin"})
    with pytest.raises(ValueError, match="max_replica"):
        application({"max_replica": 3, "open": True})
    assert isinstance(application({"open": True}), serve.Application)
