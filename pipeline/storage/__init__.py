"""Paths and URIs: every read and write of files outside a process goes through here, by fsspec.

A *uri* is a local path, `file://...` or any scheme that fsspec knows (`s3://`, `gs://`, `memory://`, ...). Keys are
relative paths with forward slashes and can never leave the folder they are relative to. A file written here is there
wholly or not at all, and one read here is whole. What passes is waited for, within bounds (`storage/s3.py`); what ends
a job names the place and the cause and never shows credentials.
"""

from __future__ import annotations

import atexit
import errno
import itertools
import json
import logging
import os
import random
import re
import shutil
import stat
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import fsspec
from fsspec.implementations.local import LocalFileSystem
from fsspec.spec import AbstractBufferedFile

from pipeline import observe
from pipeline.errors import MissingInput, StorageFailed, TMADError
from pipeline.storage import s3

logger = logging.getLogger(__name__)

PART_BYTES = 32 * 2**20
"""Remote files are read in parts of this size, each of which is repeated by itself if it does not arrive whole."""

_PART_READERS = 4
_WRITE_PART_BYTES = 50 * 2**20  # s3fs writes larger files in parts of this size
_MAX_PAUSE_S = 20.0
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{32}\.tmp")  # as `write_atomic` names them

_NOBODYS_FAULT = (*(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ESTALE, errno.ENOTCONN, errno.EMFILE, errno.ENFILE),)
"""A disk or quota that is full, a disk that went away: no property of the file that is read or written."""

_SECRET_VARIABLES = (
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AZURE_STORAGE_KEY",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "RAY_AUTH_TOKEN",
)
# The second form is a password with slashes in it, as AWS makes them; a port is none.
_USER_INFO = re.compile(r"(?<=://)(?:[^/\s@]+@|[^/\s@:]+:(?!\d+/)[^\s@]+@)")
_SECRET_FIELD = re.compile(
    r"(?i)\b([\w.-]*(?:secret|token|password|passwd|signature|credential|access_?key|api_?key)[\w.-]*|sig)"
    r"(\s*[=:]\s*[\"']?)([^\s&\"',;]+)"
)


class UnsafeName(ValueError):
    """A key that is no relative path with forward slashes: one of a collection is left out for this reason."""


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


elsewhere: list[bool] = []
"""Not empty while a command line is looked at for where it will be submitted to (`runs.cli.parse_elsewhere`)."""


def submitted() -> bool:
    """Whether `ray job submit` started this process, in a copy of the uploaded folder, where nothing lasts, or a
    command line is looked at for it."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ or bool(elsewhere)


def absolute(uri: str) -> str:
    """*uri* as any process on any working directory understands it: local paths become absolute, `~` is expanded."""
    if "://" in uri:
        return uri.rstrip("/") if is_remote(uri) else os.path.abspath(re.sub(r"^\w+://", "", uri))
    return os.path.abspath(os.path.expanduser(uri))


def join(uri: str, *keys: str) -> str:
    """The URI of *keys* below the folder *uri*. Raises `UnsafeName` if a key would leave that folder, or is no name
    that every system here can write: names come from disks and buckets, which allow nearly anything."""
    for key in keys:
        if not key or key.startswith("/") or "\\" in key or "\0" in key or "://" in key:
            raise UnsafeName(f"a key must be a relative path with forward slashes, got {key!r} below {redact(uri)}")
        if any(part in ("", ".", "..") for part in key.split("/")):
            raise UnsafeName(f"a key must not contain empty parts, '.' or '..', got {key!r} below {redact(uri)}")
    return "/".join([uri.rstrip("/"), *keys])


def file_system(uri: str) -> tuple[Any, str]:
    """The fsspec file system of *uri* and the path in it. Raises `StorageFailed` for an unknown or uninstalled one, and
    for an S3 URI with credentials in it, which would travel into every record of where data came from."""
    # A cached listing would hide what other workers have written since.
    options: dict[str, Any] = {"use_listings_cache": False} if is_remote(uri) else {}
    patience = s3.Patience.of_environment()
    if on_s3 := uri.startswith(s3.SCHEMES):
        if redact(uri).startswith(("s3://***@", "s3a://***@")):
            raise StorageFailed(
                f"{redact(uri)} has credentials in it; s3://bucket/key is expected, and the credentials in "
                "AWS_PROFILE, in AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or in ~/.aws/credentials",
                kind="request",
            )
        options["config_kwargs"] = patience.client_settings()
    try:
        fs, path = _opened(absolute(uri), options)
    except (ValueError, ImportError) as error:
        raise StorageFailed(f"cannot open storage for {redact(uri)}: {redact(str(error))}") from None
    if on_s3:
        # s3fs repeats what botocore has repeated: 25 attempts for one request, 125 for a file.
        fs.retries = 1
    return fs, path


def _opened(uri: str, options: dict[str, Any]) -> tuple[Any, str]:
    """fsspec's own `url_to_fs`, which takes `::` in a file's name for a chain of file systems."""
    scheme, _, rest = uri.partition("://")
    if not is_remote(uri):
        return LocalFileSystem(), uri
    if "::" in rest and "::" not in scheme:
        fs = fsspec.filesystem(scheme, **options)
        return fs, fs._strip_protocol(uri)
    return fsspec.core.url_to_fs(uri, **options)


def for_ray(uri: str) -> tuple[str, Any]:
    """*uri* as Ray takes it, path and file system: ours where it is remote, so that Ray reaches S3 with the same
    endpoint and patience as everything here."""
    if not is_remote(uri):
        return absolute(uri), None
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    fs, path = file_system(uri)
    return path, PyFileSystem(FSSpecHandler(fs))


def exists(uri: str) -> bool:
    """True if there is a file or a folder at *uri*."""
    return _info(uri) is not None if is_remote(uri) else os.path.exists(absolute(uri))


def size(uri: str) -> int | None:
    """Bytes of the file at *uri*, `None` if there is no such file."""
    found = _info(uri)
    return int(found["size"]) if found and found["type"] == "file" else None


def _info(uri: str) -> dict[str, Any] | None:
    # Not `fs.exists`: for a bucket it takes refused credentials and a silent server for an absence.
    fs, path = file_system(uri)
    try:
        with _own_errors(uri, "look up"):
            return dict(fs.info(path, **_bounded(fs)))
    except MissingInput:
        return None


def read_bytes(uri: str) -> bytes:
    """The whole file, of the size that storage says it has. Raises `MissingInput` if it is not there, `StorageFailed`
    for any other trouble."""
    if not is_remote(uri):
        with _own_errors(uri, "read"):
            return _read_local(uri)
    fs, path = file_system(uri)
    # Nearly all that is read from S3 is small: without asking for its size first, that is half the requests.
    begin = _begin(uri) if uri.startswith(s3.SCHEMES) else b""
    if 0 < len(begin) < PART_BYTES:
        return begin
    with _own_errors(uri, "read"):
        info = fs.info(path, **_bounded(fs))
    if info["type"] != "file":
        raise MissingInput(f"cannot read {redact(uri)}: it is a folder")
    if info["size"] is None:
        return bytes(_patiently(uri, lambda: fs.cat_file(path, **_bounded(fs))))
    total = int(info["size"])
    parts = [(start, min(PART_BYTES, total - start)) for start in range(len(begin), total, PART_BYTES)]
    with ThreadPoolExecutor(_PART_READERS, thread_name_prefix="read") as pool:
        return begin + b"".join(pool.map(lambda part: read_range(uri, *part), parts))


def read_json(uri: str) -> Any:
    """The value of the JSON file at *uri*, none if there is no such file."""
    return json.loads(read_bytes(uri)) if exists(uri) else None


def _read_local(uri: str) -> bytes:
    # A pipe would be waited for without end, and some devices have none.
    number = os.open(absolute(uri), os.O_RDONLY | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise MissingInput(f"cannot read {redact(uri)}: it is no file")
    with open(number, "rb") as file:
        return file.read()


def _begin(uri: str) -> bytes:
    """Up to `PART_BYTES` of an S3 object by one request, which has the server's length or is repeated; none of one that
    is empty or not there."""
    fs, path = file_system(uri)
    try:
        return _patiently(uri, lambda: bytes(fs.cat_file(path, start=0, end=PART_BYTES, **_bounded(fs))))
    except MissingInput:
        return b""
    except StorageFailed as error:
        if "InvalidRange" in error.message:
            return b""  # S3 has no first byte of an empty object
        raise


def read_range(uri: str, start: int, length: int) -> bytes:
    """*length* bytes of the file from byte *start*, by one request. Raises as `read_bytes`, and `StorageFailed` if the
    file ends before them."""
    if length == 0:
        return b""
    fs, path = file_system(uri)

    def read() -> bytes:
        data = bytes(fs.cat_file(path, start=start, end=start + length, **_bounded(fs)))
        if len(data) != length:
            there = fs.info(path, **_bounded(fs))["size"]
            if there is not None and there < start + length:
                raise StorageFailed(
                    f"cannot read {redact(uri)}: bytes {start} to {start + length} were asked for and {len(data)} "
                    f"came, it ends at {there}; was it replaced meanwhile?",
                    kind="incomplete",
                )
            raise s3.CutShort(f"bytes {start} to {start + length} were asked for and {len(data)} came")
        return data

    return _patiently(uri, read)


@contextmanager
def open_file(uri: str, *, read_ahead: int = 0) -> Iterator[IO[bytes]]:
    """The file at *uri* for reading in places. What storage raises inside the block becomes `MissingInput` or
    `StorageFailed`. *read_ahead*: bytes fetched from remote storage at a time, for one that is read forwards."""
    with (
        _own_errors(uri, "read"),
        open_remote(uri, read_ahead) if is_remote(uri) else open(absolute(uri), "rb") as file,
    ):
        yield file


def open_remote(uri: str, read_ahead: int = 0) -> IO[bytes]:
    """The file at *uri* for reading in places, each read by `read_range` and hence whole. Not s3fs' own: told to repeat
    nothing, that one hands on a body cut short as an error."""
    length = size(uri)
    if length is None:
        raise MissingInput(f"cannot read {redact(uri)}: it is not there")
    cache = "readahead" if read_ahead else "none"
    return _RemoteFile(None, uri, block_size=read_ahead or PART_BYTES, cache_type=cache, size=length)


class _RemoteFile(AbstractBufferedFile):
    def _fetch_range(self, start: int, end: int) -> bytes:
        return read_range(self.path, start, end - start)


def write_atomic(uri: str, data: bytes, *, ready: Callable[[], None] | None = None) -> None:
    """Write the file wholly or not at all, replacing an older one; folders are made.

    Local: a temporary file in the same folder, flushed to disk, then renamed. Object stores: a single put. *ready* is
    called before the renaming, or the put, and may stop it with an error.
    """
    fs, path = file_system(uri)
    ready = ready or (lambda: None)
    if not isinstance(fs, LocalFileSystem):
        ready()
        with _own_errors(uri, "write"):
            fs.pipe_file(path, data, **_bounded(fs, 1 + len(data) // _WRITE_PART_BYTES))
        return
    folder, name = os.path.split(path)
    # A part of the name: the whole may be as long as a name can be.
    temporary = os.path.join(folder, f".{name[:40]}.{uuid.uuid4().hex}.tmp")
    with _own_errors(uri, "write"):
        os.makedirs(folder, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            ready()
            os.replace(temporary, path)
        finally:
            if os.path.exists(temporary):
                os.unlink(temporary)


def check_room(uri: str, count: float, what: str, option: str) -> str:
    """How *count* bytes of *what* fit into what is free where the folder *uri* is or is going to be, in words.

    Raises `StorageFailed` if they do not, which names the *option* that chooses the place. Remote storage does not say.
    """
    needed = f"about {mb(max(0.0, count))} of {what}"
    if is_remote(uri):
        return f"{needed}; {redact(uri)} does not say what is free"
    free = shutil.disk_usage(check_place(uri)).free
    if count > free:
        raise StorageFailed(
            f"not enough room in {redact(uri)}: {needed} are to come, {mb(free)} are free; make room there or "
            f"choose another place with {option}",
            kind="full",
        )
    return f"{needed}, {mb(free)} are free in {redact(uri)}"


def check_place(uri: str) -> Path:
    """The folder on this machine in which the local *uri* is, or can be made. Raises `StorageFailed` if it cannot."""
    place = Path(absolute(uri))
    there = next(one for one in (place, *place.parents) if os.path.lexists(one))
    if not there.is_dir():
        what = "a link to nothing" if there.is_symlink() and not there.exists() else "a file"
        raise StorageFailed(f"{place} cannot be a folder: {there} is {what}; choose another place")
    if not os.access(there, os.W_OK | os.X_OK):
        raise StorageFailed(f"nothing can be written to {there}: choose another place, or its permissions")
    return there


def mb(count: float) -> str:
    """*count* bytes in MB or GB, for people."""
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


def remove_temporary(uri: str) -> None:
    """Delete what writers to the local folder *uri* have left that were killed; remote storage keeps nothing of theirs.
    A writer that was only suspended fails when it resumes."""
    if is_remote(uri):
        return
    for folder, _, names in os.walk(absolute(uri)):
        for name in filter(_TEMPORARY.fullmatch, names):
            remove(os.path.join(folder, name))


def create(uri: str, data: bytes) -> bool:
    """Write the file if there is none, and say whether it was written; folders are made.

    Of several writers at once one succeeds on local file systems, and on S3 where the server honours `If-None-Match`.
    Elsewhere each may believe that it did, and one of their files stays.
    """
    fs, path = file_system(uri)
    with _own_errors(uri, "write"):
        try:
            if isinstance(fs, LocalFileSystem):
                os.makedirs(os.path.dirname(path), exist_ok=True)
                with open(path, "xb") as file:
                    file.write(data)
            else:
                fs.pipe_file(path, data, mode="create", **_bounded(fs))
        except FileExistsError:
            return False
        except Exception as error:
            if s3.error_code(error) == "ConditionalRequestConflict":
                return False
            if s3.error_code(error) != "NotImplemented":
                raise
            fs.pipe_file(path, data, **_bounded(fs))
    return True


def remove(uri: str) -> None:
    """Delete one file; it is no error if it is not there."""
    fs, path = file_system(uri)
    with suppress(MissingInput), _own_errors(uri, "delete"):
        fs.rm_file(path, **_bounded(fs))


def remove_folder(uri: str) -> None:
    """Delete everything below the folder *uri*, in no particular order; it is no error if it is not there."""
    if exists(uri):
        fs, path = file_system(uri)
        with _own_errors(uri, "delete"):
            fs.rm(path, recursive=True)


def file_sizes(uri: str) -> dict[str, int]:
    """Bytes of every file below the folder *uri* by its key, by one listing, hidden ones left out; none if there is no
    such folder."""
    return {key: int(info["size"] or 0) for key, info in _listed(uri).items()}


@dataclass(frozen=True)
class Listed:
    """A file as a listing shows it."""

    size: int
    version: str
    """A text that changes when the file is replaced."""
    link: bool = False
    """A symbolic link to a folder, which is not followed."""
    special: bool = False
    """A pipe, a socket or a device."""


def listing(uri: str) -> dict[str, Listed]:
    """All files below the folder *uri* by their keys, by one listing, hidden ones (`.name`) left out, in the order of
    code points. Links to folders are among them and not followed. Names that are no UTF-8 are shown with backslashes,
    which `join` refuses. Raises `MissingInput` if there is no such folder or if it is a file."""
    found = _listed(uri)
    if not found:
        if (info := _info(uri)) is None:
            raise MissingInput(f"there is no folder {redact(uri)}")
        if info["type"] == "file":
            raise MissingInput(f"{redact(uri)} is a file; a folder is needed here")
    return {
        key: Listed(
            *(int(info["size"] or 0), _version(info)),
            link=bool(info.get("islink")) and os.path.isdir(info["name"]),
            special=info["type"] == "other" and not info.get("islink"),
        )
        for key, info in sorted(found.items())
    }


def list_files(uri: str, suffixes: Sequence[str] = ()) -> list[str]:
    """The keys of `listing`. *suffixes*: lower-case endings to keep, matched without regard to case; default: all."""
    return [key for key in listing(uri) if not suffixes or key.lower().endswith(tuple(suffixes))]


def names_in(uri: str) -> list[str]:
    """Names of the files and folders in the folder *uri* itself, sorted; none if it is not there."""
    fs, path = file_system(uri)
    try:
        with _own_errors(uri, "list"):
            found = fs.ls(path, detail=False)
    except MissingInput:
        return []
    return sorted(_printable(name.rstrip("/").rsplit("/", 1)[-1]) for name in found)


def version(uri: str) -> str:
    """That of `listing`, of one file; empty if it is not there."""
    return _version(found) if (found := _info(uri)) else ""


def _version(info: Mapping[str, Any]) -> str:
    stamp = next((info[name] for name in ("ETag", "etag", "mtime", "LastModified", "created") if info.get(name)), "")
    return f"{info.get('size')} {stamp}"


def _listed(uri: str) -> dict[str, Any]:
    """What file systems know of the visible files below *uri*, by key."""
    fs, path = file_system(uri)
    root = path.rstrip("/") + "/"
    with _own_errors(uri, "list"):
        found = fs.find(path, detail=True)
    # An object whose name ends with a slash stands for a folder; Arrow writes such, and so does Ray for checkpoints.
    inside = {name: info for name, info in found.items() if name.startswith(root) and not name.endswith("/")}
    keys = {_printable(name[len(root) :]): info for name, info in inside.items()}
    return {key: info for key, info in keys.items() if not any(map(is_hidden, key.split("/")))}


def _printable(name: str) -> str:
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def is_hidden(part: str) -> bool:
    """Whether a file or folder of this name is hidden. Steps to another folder are not: such a name is left out by
    whoever reads it, with its reason."""
    return part.startswith(".") and part not in (".", "..")


def local_copy(uri: str) -> Path:
    """The folder (or file) *uri* as a local path: itself where it is local, else a download that this process removes
    when it ends. Raises `MissingInput` if it is not there."""
    if not exists(uri):
        raise MissingInput(f"there is nothing at {redact(uri)}")
    if not is_remote(uri):
        return Path(absolute(uri))
    folder = Path(tempfile.mkdtemp(prefix="tmad-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    if size(uri) is not None:
        target = folder / uri.rsplit("/", 1)[-1]
        target.write_bytes(read_bytes(uri))
        return target
    for key in list_files(uri):
        target = folder / key
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(read_bytes(join(uri, key)))
    return folder


def upload_folder(local: str | Path, uri: str, *, last: str = "") -> None:
    """Copy every visible file below *local* to the folder *uri*, each one atomically, in the order of their keys, but
    the one with the key *last* when all others are there."""
    for key in sorted(list_files(str(local)), key=lambda key: key == last):
        write_atomic(join(uri, key), (Path(local) / key).read_bytes())


@contextmanager
def _own_errors(uri: str, verb: str) -> Iterator[None]:
    """What storage raises inside becomes an error of ours that names the place and the cause and hides credentials.

    The original is not kept as its cause: its text may hold a signed address, and a log would show it.
    """
    known: TMADError
    try:
        yield
        return
    except TMADError:
        raise
    except Exception as error:
        failed = f"cannot {verb} {redact(uri)}"
        if is_remote(uri) and (cause := _cause(uri, error)) is not None:
            made = MissingInput if cause.kind == "bucket" else StorageFailed
            known = made(f"{failed}: {redact(cause.words)}", kind=cause.kind)
        elif isinstance(error, FileNotFoundError | NotADirectoryError):
            known = MissingInput(f"{failed}: it is not there")
        elif isinstance(error, OSError | ValueError | ImportError):
            kind = "full" if isinstance(error, OSError) and error.errno in _NOBODYS_FAULT else "other"
            known = StorageFailed(f"{failed}: {redact(f'{type(error).__name__}: {error}')}", kind=kind)
        else:
            raise
    raise known from None


def _cause(uri: str, error: Exception) -> s3.Cause | None:
    """Why remote storage failed. A HEAD is refused without a reason, so S3 is asked once more for one."""
    fs, path = file_system(uri)
    bucket = path.split("/")[0]
    if uri.startswith(s3.SCHEMES) and s3.needs_code(error):
        try:
            fs.call_s3("list_objects_v2", Bucket=bucket, MaxKeys=1, **_bounded(fs))
        except Exception as reason:
            # Whatever this says of the bucket, only of the credentials it is sure to be the same.
            said = s3.cause_of(reason, bucket=bucket, endpoint=s3.endpoint_of(fs, reason), attempts=1)
            if said is not None and said.kind == "credentials":
                return said
    attempts = s3.Patience.of_environment().attempts
    return s3.cause_of(error, bucket=bucket, endpoint=s3.endpoint_of(fs, error), attempts=attempts)


def _bounded(fs: Any, parts: int = 1) -> dict[str, float]:
    """The bound of one call, for file systems that take one."""
    return {"timeout": s3.Patience.of_environment().total_s * parts} if getattr(fs, "async_impl", False) else {}


def _patiently(uri: str, read: Callable[[], bytes]) -> bytes:
    """Run *read* again while what it reads arrives cut short, with exponential pauses and full jitter."""
    patience = s3.Patience.of_environment()
    deadline = time.monotonic() + patience.total_s

    with _own_errors(uri, "read"):
        for number in itertools.count(1):
            try:
                return read()
            except Exception as error:
                pause = random.uniform(0, min(_MAX_PAUSE_S, 2.0 ** (number - 1)))
                late = number == patience.attempts or time.monotonic() + pause >= deadline
                if late or not s3.passes(error):
                    raise
                observe.count("storage_repeat")
                logger.info("%s arrived cut short, attempt %d of %d", redact(uri), number, patience.attempts)
                time.sleep(pause)
    raise AssertionError("it is read, or an error is raised")
