"""The service on Ray Serve: the command's files, in batches; replicas that die, champions that change, limits."""

from __future__ import annotations

import io
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
from PIL import Image

from pipeline.service.config import ServiceConfig
from pipeline.service.run import NEEDS
from pipeline.tracking import mlflow_client
from tests.tmad.tiny import MODEL, make_image, with_noise
from tmad.checkpoint import save_model
from tmad.files import fill_file, open_file
from tmad.inpaint import Inpainter
from tmad.model import TMAD

for package in NEEDS:
    pytest.importorskip(package, reason="the extra `serve` is not installed")

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]
Site = Callable[..., str]

MASK = np.zeros((64, 64), np.uint8)
MASK[20:40, 10:35] = 255
LARGE = [[16, 16, 700, 700]]


def encoded(picture: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return file.getvalue()


def ask(site: str, number: int = 0, side: int = 64, **fields: str) -> requests.Response:
    files = {"photo": (f"{number}.png", encoded(make_image(number, side)))}
    if not fields:
        files["mask"] = ("m.png", encoded(MASK))
    return requests.post(f"{site}/fill", files=files, data=fields, timeout=120)


def all_at_once(calls: list[Callable[[], requests.Response]]) -> list[requests.Response]:
    answers: list[Any] = [None] * len(calls)

    def one(place: int) -> None:
        answers[place] = calls[place]()

    threads = [threading.Thread(target=one, args=(place,)) for place in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


def until(true: Callable[[], Any], seconds: float = 60) -> Any:
    end = time.monotonic() + seconds
    while not (value := true()):
        assert time.monotonic() < end
        time.sleep(0.1)
    return value


@pytest.fixture(scope="module")
def serving(ray_session: None) -> Iterator[int]:
    from ray import serve

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    yield port
    serve.shutdown()


@pytest.fixture
def site(serving: int) -> Iterator[Site]:
    """Starts an application and gives its address."""
    from ray import serve

    from pipeline.service.replicas import application, build

    def start(token: str | None = None, **settings: Any) -> str:
        config = ServiceConfig(**settings)
        made = application(config, token=token) if token else build(settings)
        serve.run(made, name="tests", route_prefix="/tmad")
        return f"http://127.0.0.1:{serving}/tmad"

    yield start
    serve.delete("tests")


def replicas() -> list[Any]:
    """The processes that hold the model, as actors."""
    import ray
    from ray.util.state import list_actors

    try:
        found = [one for one in list_actors() if "Model" in one.class_name and one.state == "ALIVE"]
        return [ray.get_actor(one.name, namespace="serve") for one in found]
    except Exception:  # without a dashboard
        from ray._private.state import actors

        names = [
            one["Name"] for one in actors().values() if "Model" in one["ActorClassName"] and one["State"] == "ALIVE"
        ]
        return [ray.get_actor(name, namespace="serve") for name in names]


def test_many_at_once_get_the_files_that_the_command_writes(site: Site, model_folder: Path) -> None:
    address = site(model=str(model_folder), max_replicas=1, batch_wait_s=0.2)
    answers = all_at_once([lambda number=number: ask(address, number) for number in range(6)])  # type: ignore[misc]
    inpainter = Inpainter.load(model_folder)
    for number, answer in enumerate(answers):
        assert answer.status_code == 200, answer.text
        file = open_file(encoded(make_image(number, 64)))
        assert answer.content == fill_file(inpainter, file, MASK, image_id=f"{number}.png").data
    bad = ask(address, boxes="[[900, 1, 2, 2]]")
    assert (bad.status_code, bad.json()["reason"]) == (422, "box-outside")
    assert requests.get(f"{address}/-/healthz", timeout=60).text == "ok"
    assert "<title>T-MAD" in requests.get(f"{address}/", timeout=60).text


def test_what_a_dying_replica_has_in_hands_is_said_and_nothing_else_is_lost(site: Site, model_folder: Path) -> None:
    address = site(model=str(model_folder), min_replicas=2, max_replicas=2, max_batch=1)
    assert ask(address).status_code == 200
    stop = threading.Event()
    answers: list[requests.Response] = []

    def client(number: int) -> None:
        while not stop.is_set():
            answers.append(ask(address, number, 256, boxes="[[16, 16, 200, 200]]"))

    clients = [threading.Thread(target=client, args=(number,)) for number in range(3)]
    for thread in clients:
        thread.start()
    import ray

    until(lambda: len(answers) > 3)
    ray.kill(replicas()[0])
    before = len(answers)
    until(lambda: len(answers) > before + 10)
    stop.set()
    for thread in clients:
        thread.join()
    lost = [answer for answer in answers if answer.status_code != 200]
    assert len(lost) <= 3, "no more than what was in its hands"
    assert {(answer.status_code, answer.json()["reason"]) for answer in lost} <= {(503, "replica-died")}
    assert all(answer.headers["retry-after"] == "10" for answer in lost)
    until(lambda: len(replicas()) == 2)


def test_a_new_champion_answers_without_a_lost_request(
    site: Site, model_folder: Path, tracking_uri: str, tmp_path: Path
) -> None:
    client = mlflow_client(tracking_uri)
    client.create_registered_model("tests")
    save_model(with_noise(TMAD(MODEL, seed=9)), tmp_path / "second")
    for number, folder in enumerate((model_folder, tmp_path / "second"), start=1):
        client.create_model_version("tests", source=folder.as_uri())
        if number == 1:
            client.set_registered_model_alias("tests", "champion", "1")
    address = site(model="models:/tests@champion", tracking_uri=tracking_uri, refresh_s=0.5, max_replicas=1)
    first = ask(address)
    assert json.loads(first.headers["x-tmad"])["model"] == "models:/tests/1"
    client.set_registered_model_alias("tests", "champion", "2")
    answers = []

    def changed() -> bool:
        answers.append(ask(address))
        return json.loads(answers[-1].headers.get("x-tmad", '{"model": ""}'))["model"] == "models:/tests/2"

    until(changed)
    assert {answer.status_code for answer in answers} == {200}
    expected = Inpainter.load(tmp_path / "second").inpaint(make_image(0, 64), MASK, image_id="0.png")
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(answers[-1].content))), expected)


def test_too_many_too_late_and_without_token_are_told_so(site: Site, model_folder: Path) -> None:
    address = site(token="s3cret", model=str(model_folder), max_replicas=1, max_batch=1, max_waiting=1, max_s=3.0)
    assert ask(address).json()["reason"] == "no-token"
    head = {"Authorization": "Bearer s3cret"}
    files = {"photo": encoded(make_image(0, 768))}
    answers = all_at_once(
        [
            lambda: requests.post(
                f"{address}/fill", files=files, data={"boxes": json.dumps(LARGE)}, headers=head, timeout=120
            )
        ]
        * 8
    )
    reasons = {answer.status_code: answer.json()["reason"] for answer in answers if answer.status_code != 200}
    assert reasons.keys() <= {503, 504}
    assert reasons.get(503) == "too-many"


def test_a_setting_that_is_unknown_is_named() -> None:
    from pipeline.service.replicas import build

    with pytest.raises(ValueError, match="modle"):
        build({"modle": "builtin"})
