"""A proxy before an HTTP server that misbehaves as a test tells it to: errors, resets, silence, bodies cut short.

It stands between the code under test and a real S3 server and speaks plain HTTP/1.1. Requests go on as they came, the
Host header too, which the signature covers. A fault strikes the next requests that it matches and is spent after them;
without a fault the proxy only counts.
"""

from __future__ import annotations

import http.client
import re
import socket
import struct
import threading
from collections import Counter
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Literal
from urllib.parse import quote, unquote, urlsplit

STATUS_OF = {
    "AccessDenied": 403,
    "ExpiredToken": 400,
    "InternalError": 500,
    "InvalidAccessKeyId": 403,
    "NoSuchBucket": 404,
    "ServiceUnavailable": 503,
    "SignatureDoesNotMatch": 403,
    "SlowDown": 503,
}
"""S3's error codes that a test may have answered, and their status."""

FOR_EVER = 10**9


@dataclass
class Fault:
    """What happens to the next *times* requests that match *method* and *target*, a pattern searched in path?query."""

    kind: Literal["answer", "reset", "swallow", "hang", "delay", "truncate", "vanish"]
    method: str
    target: str
    times: int
    code: str = ""
    """`answer`: S3's error code."""
    seconds: float = 0.0
    """`delay`: before the answer begins."""
    after: int = 0
    """`truncate`: bytes of the body that are sent; its whole length is announced."""
    key: str = ""
    """`vanish`: path of the object that is deleted once a listing has named it."""


class FaultyProxy:
    """`with FaultyProxy(server_url) as proxy`: a server at `proxy.url` that hands on to *server_url*.

    `requests` counts what came in by (method, path without query), faults included.
    """

    def __init__(self, upstream: str) -> None:
        parts = urlsplit(upstream)
        self.upstream = (parts.hostname or "", parts.port or 80)
        self.requests: Counter[tuple[str, str]] = Counter()
        self.failures: list[str] = []
        """What the proxy itself could not do; `heal` complains of it."""
        self._faults: list[Fault] = []
        self._lock = threading.Lock()
        self.released = threading.Event()
        """Set by `heal` and at the end; whoever is kept waiting waits for it."""
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.proxy = self
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), name="faulty-proxy")

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> FaultyProxy:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.released.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def answer(self, code: str, *, method: str = ".*", target: str = "", times: int = FOR_EVER) -> None:
        """Answer with S3's error *code* and its status instead of asking the server."""
        self._add(Fault("answer", method, target, times, code=code))

    def reset(self, *, method: str = ".*", target: str = "", times: int = FOR_EVER) -> None:
        """Read the request, then reset the connection."""
        self._add(Fault("reset", method, target, times))

    def swallow(self, *, method: str = ".*", target: str = "", times: int = FOR_EVER) -> None:
        """Hand the request on, then reset the connection instead of answering."""
        self._add(Fault("swallow", method, target, times))

    def hang(self, *, method: str = ".*", target: str = "", times: int = FOR_EVER) -> None:
        """Read the request and never answer."""
        self._add(Fault("hang", method, target, times))

    def delay(self, seconds: float, *, method: str = ".*", target: str = "", times: int = FOR_EVER) -> None:
        """Answer *seconds* late."""
        self._add(Fault("delay", method, target, times, seconds=seconds))

    def truncate(self, after: int, *, method: str = "GET", target: str = "", times: int = FOR_EVER) -> None:
        """Announce the whole length, send *after* bytes of the body and close."""
        self._add(Fault("truncate", method, target, times, after=after))

    def vanish(self, bucket: str, key: str) -> None:
        """Delete the object as soon as it has been listed, before the listing is handed back."""
        self._add(Fault("vanish", "GET", r"\?.*list-type=2", 1, key=f"/{bucket}/{key}"))

    def heal(self) -> None:
        """Forget all faults and counts; let go whom a fault keeps waiting."""
        with self._lock:
            self.released.set()
            self.released = threading.Event()
            self._faults.clear()
            self.requests.clear()
            failures, self.failures = self.failures, []
        assert not failures, failures

    def seen(self, method: str = ".*", path: str = "") -> int:
        """How many requests came whose method and path match."""
        with self._lock:
            counts = self.requests.items()
            return sum(n for (verb, where), n in counts if re.fullmatch(method, verb) and re.search(path, where))

    def unspent(self) -> int:
        """How many times faults of a limited number are still to strike: 0 where a test met all that it asked for."""
        with self._lock:
            return sum(fault.times for fault in self._faults if fault.times < FOR_EVER // 2)

    def _add(self, fault: Fault) -> None:
        with self._lock:
            self._faults.append(fault)

    def take(self, method: str, target: str) -> Fault | None:
        """Count a request; the first fault that it meets, one time less of it left."""
        with self._lock:
            self.requests[method, unquote(target.split("?")[0])] += 1
            for fault in self._faults:
                matches = re.fullmatch(fault.method, method) and re.search(fault.target, unquote(target))
                if matches and fault.times > 0 and fault.kind != "vanish":
                    fault.times -= 1
                    return fault
        return None

    def listed(self, target: str, signature: str, body: bytes) -> None:
        """Delete what was to vanish and stands in the listing *body*, in the name of who asked for it."""
        with self._lock:
            found = [
                fault
                for fault in self._faults
                if fault.kind == "vanish"
                and fault.times > 0
                and re.search(fault.target, target)
                and f"<Key>{fault.key.split('/', 2)[2]}</Key>" in unquote(body.decode())
            ]
            for fault in found:
                fault.times -= 1
        for fault in found:
            connection = http.client.HTTPConnection(*self.upstream)
            connection.request("DELETE", quote(fault.key), headers={"Authorization": signature})
            if (status := connection.getresponse().status) != 204:
                self.failures.append(f"{fault.key} could not be deleted: {status}")
            connection.close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64
    proxy: FaultyProxy


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def _serve(self) -> None:
        proxy = self.server.proxy
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        released = proxy.released
        fault = proxy.take(self.command, self.path)
        if fault is not None and fault.kind == "reset":
            return self._reset()
        if fault is not None and fault.kind == "hang":
            released.wait()
            return self._reset()
        if fault is not None and fault.kind == "delay":
            released.wait(fault.seconds)
        if fault is not None and fault.kind == "answer":
            text = f"<Error><Code>{fault.code}</Code><Message>injected</Message><RequestId>1</RequestId></Error>"
            headers = [("Content-Type", "application/xml"), ("Content-Length", str(len(text)))]
            return self._send(STATUS_OF[fault.code], headers, text.encode())
        status, headers, answer = self._forward(body)
        if fault is not None and fault.kind == "swallow":
            return self._reset()
        if self.command == "GET":
            proxy.listed(self.path, self.headers.get("Authorization") or "", answer)
        if fault is not None and fault.kind == "truncate" and len(answer) > fault.after:
            self.close_connection = True
            answer = answer[: fault.after]
        self._send(status, headers, answer)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _serve

    def _forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection(*self.server.proxy.upstream)
        connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            if name.lower() not in ("connection", "expect"):
                connection.putheader(name, value)
        connection.endheaders(body)
        response = connection.getresponse()
        answer = response.read()
        kept = [
            (name, value)
            for name, value in response.getheaders()
            if name.lower() not in ("connection", "transfer-encoding", "content-length")
        ]
        # A HEAD announces the length of a body that it does not send.
        length = response.getheader("Content-Length") or str(len(answer))
        connection.close()
        return response.status, [*kept, ("Content-Length", length)], answer

    def _send(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _reset(self) -> None:
        """Close so that the client sees a reset instead of an end."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def handle(self) -> None:
        """Serve one connection; that the other side hangs up is no news here."""
        try:
            super().handle()
        except (ConnectionError, ValueError):
            self.close_connection = True

    def finish(self) -> None:
        """Leave without complaint where the connection is gone."""
        try:
            super().finish()
        except (OSError, ValueError):
            self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""
