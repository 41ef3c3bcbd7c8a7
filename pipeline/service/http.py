"""The HTTP routes of page and service, independent of the backend.

`POST /fill` takes a form (`photo`, `mask` or `boxes`, the fields of `work.FIELDS`) and answers with the file, in the
photograph's format and with its metadata; a client that accepts `multipart/form-data` gets `picture` and `about`, the
places that texture was taken from. `POST /show` answers any picture as PNG, for browsers that do not know its format.
What is refused is a JSON object, `error` (a sentence) and `reason` (a word), with the status that fits.
"""

from __future__ import annotations

import hmac
import io
import json
import logging
import secrets
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from anyio import to_thread
from PIL import Image
from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HTTPRequest
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipeline.service.work import FIELDS, FILES, Answer, Refused, Request, read_request
from tmad.images import UnreadableImage, decode_image, to_rgb

PAGE = Path(__file__).parent / "page"
PAGE_FILES = {"": "index.html", "page.css": "page.css", "page.js": "page.js", "icon.svg": "icon.svg"}
SECURITY = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}
"""The page loads nothing from elsewhere, and nobody else may show it."""
LOOPBACK = ("localhost", "127.0.0.1", "::1")

Gone = Callable[[], Awaitable[bool]]
"""Whether whoever asked has left."""
Fill = Callable[[Request, Gone], Awaitable[Answer]]

log = logging.getLogger(__name__)


def make_app(
    fill: Fill,
    *,
    state: Callable[[], Awaitable[Mapping[str, Any]]],
    max_bytes: int,
    max_pixels: int,
    token: str | None = None,
    loopback: bool = False,
    page: bool = True,
) -> ASGIApp:
    """The application. *fill* answers a request or raises `Refused`; *state* is what `GET /state` says; *max_bytes*
    bounds a whole request, *max_pixels* a picture. With *token* everything but the page and `/-/healthz` wants it
    (`Authorization: Bearer`). *loopback*: only requests to this machine's own names are for us."""

    async def post_fill(http: HTTPRequest) -> Response:
        wants_about = "multipart/form-data" in http.headers.get("accept", "")
        files, fields = await _read_form(http, max_bytes)
        request = read_request(files, fields, candidates=wants_about)
        answered = await fill(request, http.is_disconnected)
        return _with_about(answered) if wants_about else _file(answered, request.name)

    async def post_show(http: HTTPRequest) -> Response:
        _check_length(http, max_bytes)
        data = await http.body()
        return Response(await to_thread.run_sync(_shown, data, max_pixels), media_type="image/png")

    async def get_state(_: HTTPRequest) -> Response:
        return JSONResponse(dict(await state()))

    async def healthy(_: HTTPRequest) -> Response:
        return Response("ok", media_type="text/plain")

    routes: list[BaseRoute] = [
        Route("/fill", post_fill, methods=["POST"]),
        Route("/show", post_show, methods=["POST"]),
        Route("/state", get_state),
        Route("/-/healthz", healthy),
    ]
    if page:
        routes += [Route(f"/{address}", _page_file(name)) for address, name in PAGE_FILES.items()]
    handlers: Any = {Refused: _refused, HTTPException: _http_error, Exception: _unexpected}
    open_paths = {"/-/healthz", *(f"/{address}" for address in PAGE_FILES)} if page else {"/-/healthz"}
    return _Guard(Starlette(routes=routes, exception_handlers=handlers), token, open_paths, loopback)


def new_token() -> str:
    """One that nobody guesses."""
    return secrets.token_urlsafe(24)


class _Guard:
    """What every request passes first: whose machine it names, from which page it comes, whether it has the token."""

    def __init__(self, app: ASGIApp, token: str | None, open_paths: set[str], loopback: bool) -> None:
        self.app, self.token, self.open_paths, self.loopback = app, token, open_paths, loopback

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)

        async def send_secure(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(SECURITY)
            await send(message)

        refused = self._trouble(scope)
        await (self.app if refused is None else _answer_to(refused))(scope, receive, send_secure)

    def _trouble(self, scope: Scope) -> Refused | None:
        headers = Headers(scope=scope)
        host = headers.get("host", "").rsplit(":", 1)[0] if "]" not in headers.get("host", "") else "::1"
        if self.loopback and host not in LOOPBACK:
            # Another site's name that leads to this machine: its page would be read as ours.
            return Refused(421, "wrong-host", f"this is for {', '.join(LOOPBACK)} alone, not for {host[:80]!r}")
        if headers.get("sec-fetch-site") in ("cross-site", "same-site"):
            return Refused(403, "other-site", "a page of another site may not ask")
        path = scope["path"].removeprefix(scope.get("root_path", "")) or "/"
        if self.token is None or path in self.open_paths:
            return None
        given = headers.get("authorization", "").removeprefix("Bearer ")
        if hmac.compare_digest(given.encode(), self.token.encode()):
            return None
        return Refused(401, "no-token", "this needs the token, as `Authorization: Bearer TOKEN`")


def _answer_to(refused: Refused) -> Response:
    headers = {"Retry-After": "10"} if refused.status == 503 else {}
    if refused.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse({"error": refused.message, "reason": refused.reason}, refused.status, headers)


async def _refused(_: HTTPRequest, error: Refused) -> Response:
    return _answer_to(error)


async def _http_error(_: HTTPRequest, error: HTTPException) -> Response:
    return JSONResponse({"error": error.detail, "reason": "http"}, error.status_code, error.headers)


async def _unexpected(_: HTTPRequest, error: Exception) -> Response:
    if not isinstance(error, ClientDisconnect):
        log.error("a request failed", exc_info=error)
    return JSONResponse({"error": "the service failed; its log says why", "reason": "failed"}, 500)


def _page_file(name: str) -> Callable[[HTTPRequest], Awaitable[Response]]:
    async def answer(_: HTTPRequest) -> Response:
        return FileResponse(PAGE / name, headers={"Cache-Control": "no-cache"})

    return answer


def _check_length(http: HTTPRequest, max_bytes: int) -> None:
    # The server holds a client to what it announces, so nothing larger can follow.
    length = http.headers.get("content-length", "")
    if not length.isdigit():
        raise Refused(411, "no-length", "the request must say its length (Content-Length)")
    if int(length) > max_bytes:
        limit = f"{max_bytes / 2**20:.0f} MiB"
        raise Refused(413, "too-large", f"the request has {int(length) / 2**20:.1f} MiB, at most {limit} are read")


async def _read_form(http: HTTPRequest, max_bytes: int) -> tuple[dict[str, tuple[str, bytes]], dict[str, str]]:
    _check_length(http, max_bytes)
    if not http.headers.get("content-type", "").startswith("multipart/form-data"):
        raise Refused(415, "no-form", "send a form (multipart/form-data) with a file `photo` and a file `mask`")
    files, fields = {}, {}
    async with http.form(max_files=len(FILES), max_fields=len(FIELDS) + len(FILES)) as form:
        for name, value in form.multi_items():
            if name in files or name in fields:
                raise Refused(400, "twice", f"{name} stands twice in the form")
            if isinstance(value, UploadFile):
                files[name] = (Path(value.filename or "").name, await value.read())
            else:
                fields[name] = value
    for name in FILES:
        if name in fields:
            raise Refused(400, "no-file", f"{name} must be sent as a file")
    return files, fields


def _shown(data: bytes, max_pixels: int) -> bytes:
    try:
        rgb = to_rgb(decode_image(data, max_pixels=max_pixels))
    except UnreadableImage as error:
        raise Refused(413 if error.reason == "too-large" else 422, error.reason, str(error)) from None
    buffer = io.BytesIO()
    Image.fromarray(rgb).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _file(answered: Answer, name: str) -> Response:
    about = json.dumps(answered.about)
    headers = {"X-Tmad": about, "Content-Disposition": f'inline; filename="{_filled_name(name)}"'}
    return Response(answered.data, media_type=_kind(answered), headers=headers)


def _with_about(answered: Answer) -> Response:
    boundary = secrets.token_hex(16)
    parts = (
        ("about", "application/json", json.dumps(answered.about).encode(), ""),
        ("picture", _kind(answered), answered.data, '; filename="picture"'),
    )
    body = b"".join(
        f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"{file}\r\nContent-Type: {kind}\r\n\r\n'.encode()
        + content
        + b"\r\n"
        for name, kind, content, file in parts
    )
    return Response(body + f"--{boundary}--\r\n".encode(), media_type=f"multipart/form-data; boundary={boundary}")


def _filled_name(name: str) -> str:
    """`photo_filled.jpg` for `photo.jpg`, in letters that a header can hold."""
    plain = "".join(letter if letter.isascii() and (letter.isalnum() or letter in "._- ") else "_" for letter in name)
    return f"{Path(plain).stem}_filled{Path(plain).suffix}"


def _kind(answered: Answer) -> str:
    return Image.MIME.get(answered.format, "application/octet-stream")
