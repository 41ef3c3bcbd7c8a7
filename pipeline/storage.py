"""Paths and URIs: every read and write of files outside a process goes through here, by fsspec.

A *uri* is a local path, `file://...` or any scheme that fsspec knows (`s3://`, `gs://`, `memory://`, ...). Keys are
relative paths with forward slashes and can never leave the folder they are relative to. A file written here is there
wholly or not at all. Messages never show credentials.
"""

from __future__ import annotations

import atexit
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem

from pipeline.errors import MissingInput, StorageFailed

Result = TypeVar("Result")

_SECRET_VARIABLES = (
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AZURE_STORAGE_KEY",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "RAY_AUTH_TOKEN",
)
_USER_INFO = re.compile(r"(?<=://)[^/\s@]+@")
_SECRET_FIELD = re.compile(
    r"(?i)\b([\w.-]*(?:secret|token|password|passwd|signature|credential|access_?key|api_?key)[\w.-]*)"
    r"(\s*[=:]\s*[\"']?)([^\s&\"',;]+)"
)


def redact(text: str) -> str:
    """*text* (a URI or a message) without user names, passwords, keys, tokens and signatures."""
    for name in _SECRET_VARIABLES:
        value = os.environ.get(name, "")
        if len(value) >= 6:
            text = text.replace(value, "***")
    text = _USER_INFO.sub("***@", text)
    return _SECRET_FIELD.sub(r"\1\2***", text)


def is_remote(uri: str) -> bool:
    """True if *uri* is not on a local file system of this machine."""
    return "://" in uri and not uri.startswith(("file://", "local://"))


def absolute(uri: str) -> str:
    """*uri* as any process on any working directory understands it: local paths become absolute, `~` is expanded."""
    if "://" in uri:
        return uri.rstrip("/") if is_remote(uri) else os.path.abspath(re.sub(r"^\w+://", "", uri))
    return os.path.abspath(os.path.expanduser(uri))


def join(uri: str, *keys: str) -> str:
    """The URI of *keys* below the folder *uri*. Raises `ValueError` if a key would leave that folder."""
    for key in keys:
        if not key or key.startswith("/") or "\\" in key or "\0" in key or "://" in key:
            raise ValueError(f"a key must be a relative path with forward slashes, got {key!r} below {redact(uri)}")
        if any(part in ("", ".", "..") for part in key.split("/")):
            raise ValueError(f"a key must not contain empty parts, '.' or '..', got {key!r} below {redact(uri)}")
    return "/".join([uri.rstrip("/"), *keys])


def file_system(uri: str) -> tuple[Any, str]:
    """The fsspec file system of *uri* and the path in it. Raises `StorageFailed` for an unknown or uninstalled one."""
    # A cached listing would hide what other workers have written since.
    options = {"use_listings_cache": False} if is_remote(uri) else {}
    try:
        return fsspec.core.url_to_fs(absolute(uri), **options)
    except (ValueError, ImportError) as error:
        raise StorageFailed(f"cannot open storage for {redact(uri)}: {redact(str(error))}") from error


def exists(uri: str) -> bool:
    """True if there is a file or a folder at *uri*."""
    fs, path = file_system(uri)
    return bool(_guard(uri, "look up", lambda: fs.exists(path)))


def size(uri: str) -> int | None:
    """Bytes of the file at *uri*, none if there is no such file."""
    fs, path = file_system(uri)
    try:
        return int(_guard(uri, "look up", lambda: fs.info(path))["size"])
    except MissingInput:
        return None


def read_bytes(uri: str) -> bytes:
    """The whole file. Raises `MissingInput` if it is not there, `StorageFailed` for any other trouble."""
    fs, path = file_system(uri)
    return bytes(_guard(uri, "read", lambda: fs.cat_file(path)))


def read_range(uri: str, start: int, length: int) -> bytes:
    """*length* bytes of the file from byte *start*, by one request. Raises as `read_bytes`, and `StorageFailed` if the
    file ends before them."""
    if length == 0:
        return b""
    fs, path = file_system(uri)
    data = bytes(_guard(uri, "read", lambda: fs.cat_file(path, start=start, end=start + length)))
    if len(data) != length:
        raise StorageFailed(
            f"cannot read {redact(uri)}: bytes {start} to {start + length} were asked for and {len(data)} came; "
            "was it replaced meanwhile?"
        )
    return data


@contextmanager
def open_file(uri: str, *, read_ahead: int = 0) -> Iterator[IO[bytes]]:
    """The file at *uri* for reading in places. What storage raises inside the block becomes `MissingInput` or
    `StorageFailed`. *read_ahead*: bytes fetched from remote storage at a time, for one that is read forwards."""
    fs, path = file_system(uri)
    cache = {"block_size": read_ahead, "cache_type": "readahead"} if read_ahead else {"cache_type": "none"}
    with _own_errors(uri, "read"), fs.open(path, "rb", **(cache if is_remote(uri) else {})) as file:
        yield file


def fingerprint(uri: str) -> str:
    """A text that changes when the file at *uri* is replaced, without reading it: of its size, time or tag."""
    fs, path = file_system(uri)
    return str(_guard(uri, "look up", lambda: fs.ukey(path)))


def write_atomic(uri: str, data: bytes) -> None:
    """Write the file wholly or not at all, replacing an older one; folders are made.

    Local: a temporary file in the same folder, flushed to disk, then renamed. Object stores: a single put.
    """
    fs, path = file_system(uri)
    if not isinstance(fs, LocalFileSystem):
        _guard(uri, "write", lambda: fs.pipe_file(path, data))
        return
    folder, name = os.path.split(path)
    temporary = os.path.join(folder, f".{name}.{uuid.uuid4().hex}.tmp")

    def write() -> None:
        os.makedirs(folder, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            if os.path.exists(temporary):
                os.unlink(temporary)

    _guard(uri, "write", write)


def remove(uri: str) -> None:
    """Delete one file; it is no error if it is not there."""
    fs, path = file_system(uri)
    try:
        _guard(uri, "delete", lambda: fs.rm_file(path))
    except MissingInput:
        return


def list_files(uri: str, suffixes: Sequence[str] = ()) -> list[str]:
    """Keys of all files below the folder *uri*, sorted by code point, hidden ones (`.name`) left out.

    *suffixes*: lower-case endings to keep, matched without regard to case; none = all files. Raises `MissingInput` if
    there is no such folder or if it is a file.
    """
    fs, path = file_system(uri)
    if not exists(uri):
        raise MissingInput(f"there is no folder {redact(uri)}")
    if _guard(uri, "look up", lambda: fs.isfile(path)):
        raise MissingInput(f"{redact(uri)} is a file; a folder is needed here")
    root = path.rstrip("/") + "/"
    found = _guard(uri, "list", lambda: fs.find(path))
    keys = (name[len(root) :] for name in found if name.startswith(root))
    visible = (key for key in keys if not any(part.startswith(".") for part in key.split("/")))
    return sorted(key for key in visible if not suffixes or key.lower().endswith(tuple(suffixes)))


def local_copy(uri: str) -> Path:
    """The folder (or file) *uri* as a local path: itself where it is local, else a download that this process removes
    when it ends. Raises `MissingInput` if it is not there."""
    if not exists(uri):
        raise MissingInput(f"there is nothing at {redact(uri)}")
    if not is_remote(uri):
        return Path(absolute(uri))
    fs, path = file_system(uri)
    folder = Path(tempfile.mkdtemp(prefix="tmad-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    if fs.isfile(path):
        target = folder / path.rsplit("/", 1)[-1]
        target.write_bytes(read_bytes(uri))
        return target
    for key in list_files(uri):
        target = folder / key
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(read_bytes(join(uri, key)))
    return folder


def upload_folder(local: str | Path, uri: str) -> None:
    """Copy every visible file below *local* to the folder *uri*, each one atomically, in the order of their keys."""
    for key in list_files(str(local)):
        write_atomic(join(uri, key), (Path(local) / key).read_bytes())


def _guard(uri: str, verb: str, call: Callable[[], Result]) -> Result:
    """Run *call*; what storage raises becomes an error of ours."""
    with _own_errors(uri, verb):
        result = call()
    return result


@contextmanager
def _own_errors(uri: str, verb: str) -> Iterator[None]:
    """What storage raises inside becomes an error of ours that names the place and hides credentials."""
    try:
        yield
    except FileNotFoundError as error:
        raise MissingInput(f"cannot {verb} {redact(uri)}: it is not there") from error
    except (OSError, ValueError, ImportError) as error:
        cause = f"{type(error).__name__}: {error}"
        raise StorageFailed(f"cannot {verb} {redact(uri)}: {redact(cause)}") from None
