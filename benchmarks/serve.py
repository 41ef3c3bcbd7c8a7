"""The service under load: requests a second and latency by clients, beside direct calls; a replica that is killed."""

from __future__ import annotations

import io
import os
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import requests
from PIL import Image

from benchmarks.harness import Options, Report, Table, ms, start
from benchmarks.scenes import picture
from pipeline.runs.cluster import start_ray
from pipeline.service.config import ServiceConfig
from pipeline.service.work import Request
from pipeline.service.worker import Worker
from tmad.builtin import builtin_model

DESCRIPTION = """
Fills JPEG files with a hole over a sixteenth of them, by processes that are called directly and by as many replicas of
the service, for 1, 4 and 16 clients that each ask one request after the other. Then a replica is killed while clients
ask.

Examples:
  python benchmarks/serve.py
  python benchmarks/serve.py --side 256 --seconds 10
  python benchmarks/serve.py --quick
"""


@dataclass(frozen=True, kw_only=True)
class ServeOptions(Options):
    """Options of this benchmark."""

    side: int = 512
    """Side of the pictures, pixels."""
    clients: tuple[int, ...] = (1, 4, 16)
    """Clients at a time, a row each."""
    seconds: float = 30.0
    """Of each row."""
    replicas: int = 0
    """Processes on both sides, a thread each; 0 = as many as this process may use processors."""


@dataclass(frozen=True)
class _Answer:
    ended: float
    seconds: float
    said: str
    """`filled`, or the reason of the refusal."""


def main(argv: Sequence[str]) -> int:
    """Measure and write the report; returns the exit code."""
    options = start(ServeOptions, argv, prog="serve.py", description=DESCRIPTION)
    report = Report("serve", "The service: requests a second, latency, a lost replica", options)
    side, seconds = (64, 1.0) if options.quick else (options.side, options.seconds)
    replicas = options.replicas or len(os.sched_getaffinity(0))
    photo = io.BytesIO()
    Image.fromarray(picture(side, "serve")).save(photo, "JPEG", quality=90)
    request = Request(photo.getvalue(), "a.jpg", boxes=((side // 4,) * 4,))
    # Processes that fill begin with it; replicas have one thread a CPU by themselves.
    os.environ["OMP_NUM_THREADS"] = "1"
    rows = [_direct(request, clients, replicas, seconds) for clients in options.clients]
    address = _start(replicas, max(options.clients))

    def ask() -> str:
        form = {"boxes": str([list(request.boxes[0])])}
        answer = requests.post(f"{address}/fill", files={"photo": photo.getvalue()}, data=form, timeout=300)
        return "filled" if answer.status_code == 200 else str(answer.json()["reason"])

    rows += [(f"service, {clients} clients", _load(ask, clients, seconds)) for clients in options.clients]
    note = f"{side} x {side}, hole {side // 4} x {side // 4}, {replicas} processes of one thread on both sides."
    header = ["", "requests/s", "ms, median", "ms, 95 %", "answers"]
    figures = {name: [vars(one) for one in answers] for name, answers in rows}
    report.add(Table("Beside direct calls", header, [_row(*row) for row in rows], note), figures, {})
    report.add(*_kill(ask, 4, seconds), {})
    report.write()
    return 0


def _direct(request: Request, clients: int, processes: int, seconds: float) -> tuple[str, list[_Answer]]:
    workers = [
        Worker(builtin_model(), device="cpu", max_pixels=50_000_000, max_s=300, policy="crop")
        for _ in range(min(clients, processes))
    ]
    turn = iter(range(10**9))

    def call() -> str:
        workers[next(turn) % len(workers)].fill(request)
        return "filled"

    try:
        return f"direct calls, {clients} clients", _load(call, clients, seconds)
    finally:
        for worker in workers:
            worker.close()


def _start(replicas: int, clients: int) -> str:
    """The address of a service that runs."""
    from ray import serve

    from pipeline.service.application import NAME, build

    os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")
    start_ray()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    config = ServiceConfig(min_replicas=replicas, max_replicas=replicas, max_waiting=clients, max_s=300)
    serve.run(build(config, token=None, loopback=True), name=NAME)
    return f"http://127.0.0.1:{port}"


def _load(call: Callable[[], str], clients: int, seconds: float) -> list[_Answer]:
    """The answers to *clients* that each ask again as soon as they have one, for *seconds*."""
    for _ in range(2):
        call()
    end = time.monotonic() + seconds

    def client(_: int) -> list[_Answer]:
        found = []
        while (began := time.monotonic()) < end:
            said = call()
            found.append(_Answer(time.monotonic(), time.monotonic() - began, said))
        return found

    with ThreadPoolExecutor(clients) as pool:
        return sorted((one for some in pool.map(client, range(clients)) for one in some), key=lambda one: one.ended)


def _row(name: str, answers: list[_Answer]) -> list[str]:
    lasted = answers[-1].ended - min(one.ended - one.seconds for one in answers)
    median, most = np.percentile([one.seconds for one in answers], [50, 95])
    said = ", ".join(f"{count} {what}" for what, count in Counter(one.said for one in answers).items())
    return [name, f"{len(answers) / lasted:.3g}", ms(float(median)), ms(float(most)), said]


def _kill(ask: Callable[[], str], clients: int, seconds: float) -> tuple[Table, dict[str, Any]]:
    """A replica is killed after a third of the time."""
    import ray
    from ray.util import list_named_actors

    def replicas() -> list[str]:
        names = [one["name"] for one in list_named_actors(all_namespaces=True)]
        return [name for name in names if name.startswith("SERVE_REPLICA::tmad#model#")]

    before = replicas()
    killed: list[float] = []

    def kill() -> None:
        ray.kill(ray.get_actor(before[0], namespace="serve"))
        killed.append(time.monotonic())

    timer = threading.Timer(seconds / 3, kill)
    timer.start()
    answers = _load(ask, clients, seconds)
    timer.join()
    back = time.monotonic()
    while len(replicas()) < len(before) and time.monotonic() < back + 60:
        time.sleep(0.1)
    after = [one for one in answers if one.ended > killed[0]]
    rows = [
        _row("before", [one for one in answers if one.ended <= killed[0]]),
        _row("after", after),
    ]
    lost = sum(one.said != "filled" for one in answers)
    note = (
        f"{clients} clients; one of {len(before)} replicas was killed. {lost} answers are errors; each request has one."
    )
    header = ["", "requests/s", "ms, median", "ms, 95 %", "answers"]
    return Table("A replica is killed", header, rows, note), {"answers": [vars(one) for one in answers]}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
