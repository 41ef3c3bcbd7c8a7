"""A worker process that fills pictures one by one and is killed on timeout or when the client has gone."""

from __future__ import annotations

import multiprocessing
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from pipeline.errors import TMADError
from pipeline.service.work import Answer, Refused, Request, fill, refusal, too_long

LOOK_S = 0.2
"""Seconds between two looks at whether somebody still waits."""


class Worker:
    """The model in a process of its own: what one picture takes, in memory or time, ends with it."""

    def __init__(self, model: Path, *, device: str, max_pixels: int, max_s: float, **options: Any) -> None:
        """*model*: the folder of an artifact; *options* are an `Inpainter`'s. Raises `ValueError` or `TMADError` if it
        cannot be loaded."""
        self._settings = {"model": model, "device": device, "max_pixels": max_pixels, **options}
        self._max_s = max_s
        self._alone = threading.Lock()
        self._start()
        self._ready()

    def fill(self, request: Request, gone: Callable[[], bool] = lambda: False) -> Answer:
        """The answer to *request*; *gone* says that nobody waits for it any more. Raises `Refused`."""
        with self._alone:
            if not self._process.is_alive():
                self._restart()
            self._ready()
            self._connection.send(request)
            deadline = time.monotonic() + self._max_s
            while not self._connection.poll(LOOK_S):
                late = time.monotonic() > deadline
                if late or gone():
                    self._restart()
                    raise too_long(self._max_s) if late else Refused(499, "gone", "nobody waited for it any more")
            try:
                answer = self._connection.recv()
            except (EOFError, OSError):
                self._restart()
                message = "the process ended on this picture, most likely for want of memory; mark less of it"
                raise Refused(500, "worker-died", message) from None
        if isinstance(answer, Exception):
            raise answer
        assert isinstance(answer, Answer), "the worker sends answers and errors"
        return answer

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.join()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs, self._settings), daemon=True)
        self._process.start()
        theirs.close()
        self._loading = True

    def _ready(self) -> None:
        if self._loading:
            try:
                loaded = self._connection.recv()
            except (EOFError, OSError):
                raise TMADError("the process that fills pictures ended while it loaded the model") from None
            if isinstance(loaded, Exception):
                raise loaded
            self._loading = False

    def _restart(self) -> None:
        """Leave the next request a fresh process; it loads while nobody may need it yet."""
        self.close()
        self._start()


def _work(connection: Connection, settings: dict[str, Any]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that answers requests, which ends this one
    import warnings

    from tmad.files import allow_pixels
    from tmad.inpaint import Inpainter

    warnings.simplefilter("ignore", UserWarning)  # what they say stands in the answer's notes
    max_pixels = settings.pop("max_pixels")
    try:
        allow_pixels(max_pixels)
        inpainter = Inpainter.load(**settings)
    except Exception as error:
        connection.send(error)
        return
    connection.send("ready")
    while True:
        try:
            request = connection.recv()
        except EOFError:
            return
        try:
            connection.send(fill(inpainter, request, max_pixels=max_pixels))
        except Exception as error:
            connection.send(refusal(error))
