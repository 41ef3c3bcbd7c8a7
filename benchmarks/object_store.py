"""An S3 server of this machine as a process of its own: moto's, over HTTP, with a meter before it.

The meter counts requests and bytes by bucket and kind, and can answer late, as a distant store does.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

METER = "/meter"
"""GET: counts since the last POST. POST with a number of seconds: forget them, and answer so much later from now on."""


class Meter:
    """WSGI application that counts what goes to *application* and comes from it."""

    def __init__(self, application: Callable[..., Iterable[bytes]]) -> None:
        self.application = application
        self.counts: Counter[str] = Counter()
        self.late_s = 0.0
        self.lock = threading.Lock()

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        """Answer one request."""
        if environ["PATH_INFO"] == METER:
            return self._own(environ, start_response)
        if self.late_s:
            time.sleep(self.late_s)
        bucket, _, key = environ["PATH_INFO"].lstrip("/").partition("/")
        kind = environ["REQUEST_METHOD"] if key else "LIST" if environ["REQUEST_METHOD"] == "GET" else "BUCKET"
        self._add(f"{bucket} {kind}", f"{bucket} bytes in", int(environ.get("CONTENT_LENGTH") or 0))

        def started(status: str, headers: list[tuple[str, str]], *more: Any) -> Any:
            length = {name.lower(): value for name, value in headers}.get("content-length", "0")
            if environ["REQUEST_METHOD"] != "HEAD":
                self._add("", f"{bucket} bytes out", int(length))
            return start_response(status, headers, *more)

        return self.application(environ, started)

    def _add(self, request: str, direction: str, size: int) -> None:
        with self.lock:
            if request:
                self.counts[request] += 1
            self.counts[direction] += size

    def _own(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        with self.lock:
            text = json.dumps(self.counts).encode()
            if environ["REQUEST_METHOD"] == "POST":
                self.counts.clear()
                self.late_s = float(environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"])))
        start_response("200 OK", [("Content-Type", "application/json"), ("Content-Length", str(len(text)))])
        return [text]


@dataclass(frozen=True)
class Traffic:
    """What one bucket was asked for."""

    requests: dict[str, int]
    """By kind: GET, HEAD, PUT, POST, DELETE of objects; LIST and BUCKET of the bucket itself."""
    read: int
    """Bytes that came out of it."""
    written: int
    """Bytes that went in."""

    @property
    def all_requests(self) -> int:
        """Of whatever kind."""
        return sum(self.requests.values())


@dataclass(frozen=True)
class ObjectStore:
    """A running server."""

    address: str
    pid: int

    def make_bucket(self, name: str) -> str:
        """A new bucket's URI."""
        self._ask(f"/{name}", "PUT")
        return f"s3://{name}"

    def reset(self, *, late_s: float = 0.0) -> None:
        """Count from nothing again; answer *late_s* seconds later from now on."""
        self._ask(METER, "POST", str(late_s).encode())

    def traffic(self, bucket: str) -> Traffic:
        """Since `reset`."""
        counts = {
            name.removeprefix(f"{bucket} "): count
            for name, count in json.loads(self._ask(METER, "GET")).items()
            if name.startswith(f"{bucket} ")
        }
        read, written = counts.pop("bytes out", 0), counts.pop("bytes in", 0)
        return Traffic(counts, read=read, written=written)

    def _ask(self, path: str, method: str, body: bytes | None = None) -> bytes:
        with urllib.request.urlopen(urllib.request.Request(self.address + path, body, method=method), timeout=60) as it:
            return bytes(it.read())


@contextmanager
def running(folder: Path) -> Iterator[ObjectStore]:
    """A server, its log in *folder*, and the environment of this process and those that it starts pointing to it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    settings = {
        "AWS_ENDPOINT_URL": address,
        "AWS_ACCESS_KEY_ID": "benchmark",
        "AWS_SECRET_ACCESS_KEY": "not-a-secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    log = folder / "object-store.log"
    command = [sys.executable, "-m", "benchmarks.object_store", str(port)]
    root = Path(__file__).resolve().parent.parent
    with log.open("wb") as output, subprocess.Popen(command, stdout=output, stderr=output, cwd=root) as server:
        try:
            store = ObjectStore(address, server.pid)
            _wait(store, server, log)
            yield store
        finally:
            server.terminate()
            for name, value in before.items():
                os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)


def _wait(store: ObjectStore, server: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + 90
    while time.monotonic() < end and server.poll() is None:
        try:
            store.reset()
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
        else:
            return
    raise RuntimeError(f"the object store did not start: {log.read_text(errors='replace')[-2000:]}")


def serve(port: int) -> None:
    """Serve until the process is ended."""
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
    from werkzeug.serving import run_simple

    class Quiet(MotoRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
            """Say nothing."""

    application = Meter(DomainDispatcherApplication(create_backend_app))
    run_simple("127.0.0.1", port, application, threaded=True, request_handler=Quiet)


if __name__ == "__main__":
    serve(int(sys.argv[1]))
