"""Object storage of this machine: an S3-compatible server, a bucket in it, and a proxy that misbehaves before it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults import FaultyProxy


@pytest.fixture(scope="session")
def object_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of an S3-compatible server of this machine, started once a session."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("object-store") / "log"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with log.open("wb") as output, subprocess.Popen(command, stdout=output, stderr=output) as server:
        try:
            address = f"http://127.0.0.1:{port}"
            _wait_for(f"{address}/moto-api/data.json", server, log)
            yield address
        finally:
            server.terminate()


def _wait_for(address: str, server: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + 90
    while time.monotonic() < end and server.poll() is None:
        try:
            urllib.request.urlopen(address, timeout=5).close()
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
        else:
            return
    pytest.fail(f"the object store did not start: {log.read_text()}")


@pytest.fixture
def bucket(object_store: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URI of an empty bucket, reached as a user reaches any S3-compatible endpoint."""
    for name, value in {
        "AWS_ENDPOINT_URL": object_store,
        "AWS_ACCESS_KEY_ID": "tests",
        "AWS_SECRET_ACCESS_KEY": "not-a-secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    _forget_clients_of_other_endpoints()
    name = uuid.uuid4().hex
    urllib.request.urlopen(urllib.request.Request(f"{object_store}/{name}", method="PUT"), timeout=60).close()
    return f"s3://{name}"


@pytest.fixture(scope="session")
def _proxy(object_store: str) -> Iterator[FaultyProxy]:
    with FaultyProxy(object_store) as proxy:
        yield proxy


@pytest.fixture
def faulty(_proxy: FaultyProxy, bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """What stands between this process and the server; *bucket* is reached through it."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", _proxy.url)
    _forget_clients_of_other_endpoints()
    _proxy.heal()
    yield _proxy
    _proxy.heal()


@pytest.fixture
def faulty_cluster(faulty: FaultyProxy, ray_session: None) -> FaultyProxy:
    """As *faulty*, for Ray's workers too."""
    settings = {
        "endpoint_url": faulty.url,
        "region": "us-east-1",
        "aws_access_key_id": "tests",
        "aws_secret_access_key": "not-a-secret",
    }
    lines = ["[default]", *(f"{name} = {value}" for name, value in settings.items())]
    Path(os.environ["AWS_CONFIG_FILE"]).write_text("\n".join(lines))
    return faulty


_endpoints: list[str] = []


def _forget_clients_of_other_endpoints() -> None:
    """fsspec keeps a client for each set of arguments; the endpoint that the environment names is none of them."""
    if _endpoints != (now := [os.environ["AWS_ENDPOINT_URL"]]):
        forget_clients()
        _endpoints[:] = now


def forget_clients() -> None:
    """The next use of S3 reads the environment again."""
    from s3fs import S3FileSystem

    S3FileSystem.clear_instance_cache()
