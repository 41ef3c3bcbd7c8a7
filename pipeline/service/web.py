"""`tmad web`: the page on this machine, with a queue and one worker process."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from pipeline.models import find_model, model_version
from pipeline.service.config import TOKEN, WebConfig
from pipeline.service.work import Answer, Refused, Request
from tmad.inpaint import check_device

log = logging.getLogger(__name__)


class Queue:
    """One picture at a time, in the order of arrival, behind a bounded queue."""

    def __init__(self, worker: Any, max_waiting: int) -> None:
        self._worker, self._max_waiting = worker, max_waiting
        self._turn = asyncio.Lock()
        self._here = 0

    async def fill(self, request: Request, gone: Any) -> Answer:
        """The worker's answer. Raises `Refused`: 503 if too many wait."""
        if self._here > self._max_waiting:
            raise Refused(503, "too-many", f"{self._here} pictures are before yours; try again in a minute")
        self._here += 1
        try:
            async with self._turn:
                if await gone():
                    raise Refused(499, "gone", "nobody waited for it any more")
                left = asyncio.Event()
                watch = asyncio.create_task(_watch(gone, left))
                try:
                    filled: Answer = await asyncio.to_thread(self._worker.fill, request, left.is_set)
                finally:
                    watch.cancel()
                return filled
        finally:
            self._here -= 1

    async def state(self) -> Mapping[str, Any]:
        """`here`: pictures that wait or are filled now."""
        return {"here": self._here}


async def _watch(gone: Any, left: asyncio.Event) -> None:
    while not await gone():
        await asyncio.sleep(0.5)
    left.set()


def serve(config: WebConfig) -> None:
    """Answer until Ctrl-C. Raises `ValueError` for an address that cannot be had, and what `find_model` raises."""
    if any(find_spec(name) is None for name in ("python_multipart", "starlette", "uvicorn")):
        raise ValueError("the page needs more packages: pip install 'tmad[web]'")
    import uvicorn

    from pipeline.service.http import make_app
    from pipeline.service.worker import Worker

    check_device(config.device)
    listening = listen(config.host, config.port)
    token, own = access(config.host)
    worker = Worker(
        find_model(config.model, tracking_uri=config.tracking_uri),
        device=config.device,
        policy=config.policy,
        max_pixels=config.max_pixels,
        max_s=config.max_s,
    )
    try:
        queue = Queue(worker, config.max_waiting)
        app = make_app(
            queue.fill,
            state=queue.state,
            max_bytes=config.max_mb * 2**20,
            max_pixels=config.max_pixels,
            token=token,
            loopback=own,
        )
        print(address(config.host, listening.getsockname()[1], token))
        name = model_version(config.model, tracking_uri=config.tracking_uri)
        print(f"model {name}; Ctrl-C ends it", flush=True)
        uvicorn.Server(uvicorn.Config(app, log_level="warning", server_header=False)).run(sockets=[listening])
    finally:
        worker.close()


def access(host: str) -> tuple[str | None, bool]:
    """The token for who listens at *host*, none where none is asked for, and whether *host* is this machine's own."""
    from pipeline.service.http import LOOPBACK, new_token

    own = host in LOOPBACK
    if not own:
        log.warning("without a proxy before it that speaks TLS, whoever reads along sees token and pictures")
    return os.environ.get(TOKEN) or (None if own else new_token()), own


def address(host: str, port: int, token: str | None) -> str:
    """What to open in a browser."""
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/" + (f"#token={token}" if token else "")


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there. Raises `ValueError` if it cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise ValueError(f"cannot listen at {host}, port {port}: {error.strerror}; choose another --port") from None
