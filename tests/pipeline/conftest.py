"""What the tests of `pipeline` share: MLflow in one SQLite file, a tiny model artifact, a small prepared set, S3."""

from __future__ import annotations

import hashlib
import io
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import storage
from pipeline.data.schema import RECORD_SCHEMA, Manifest, Shard, pack_mask
from pipeline.report import png_bytes
from pipeline.tracking import mlflow_client
from tests.tmad.tiny import MODEL, make_image, make_mask
from tmad.checkpoint import save_model
from tmad.model import TMAD

SetMaker = Callable[..., str]


@pytest.fixture(scope="session")
def tracking_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database with its tables made, which takes MLflow seconds, and nothing in it."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    mlflow_client(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def tracking_uri(tracking_template: Path, tmp_path: Path) -> str:
    """A tracking URI of its own for each test."""
    path = tmp_path / "tracking" / "mlflow.db"
    path.parent.mkdir()
    shutil.copy(tracking_template, path)
    return f"sqlite:///{path}"


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The artifact of an untrained tiny model; not to be written to."""
    folder = tmp_path_factory.mktemp("artifact") / "model"
    save_model(TMAD(MODEL, seed=3), folder)
    return folder


@pytest.fixture
def make_set(tmp_path: Path) -> SetMaker:
    """Writes a prepared set of PNG crops in one shard and returns its folder."""

    def make(num_images: int = 3, *, side: int = 64, masks: list[np.ndarray] | None = None, name: str = "set") -> str:
        folder = tmp_path / name
        rows = []
        for index in range(num_images):
            mask = make_mask(side) if masks is None else masks[index]
            rows.append(
                {
                    "image_id": f"photo-{index}.png#0",
                    "image": png_bytes(make_image(index, side)),
                    "height": side,
                    "width": side,
                    "masks": [pack_mask(mask)],
                    "pool_yx": [[0, 0]],
                    "hole_fraction": [float(mask.mean())],
                    "label": None,
                    "source": {"key": f"photo-{index}.png", "size": 1, "sha256": "0"},
                }
            )
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows, schema=RECORD_SCHEMA), buffer, row_group_size=2)
        (folder / "shards").mkdir(parents=True)
        (folder / "shards" / "00000.parquet").write_bytes(buffer.getvalue())
        digest = hashlib.sha256(buffer.getvalue()).hexdigest()
        shard = Shard("shards/00000.parquet", num_images, len(buffer.getvalue()), digest, "a", "z")
        settings = {"masks_per_image": 1, "crop_size": side, "patch_size": 16, "mask": "rectangle"}
        manifest = Manifest(settings, [shard], num_images, num_images, {}, num_images, row_group_rows=2)
        (folder / "manifest.json").write_text(manifest.to_json())
        return str(folder)

    return make


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
    uri = f"s3://{uuid.uuid4().hex}"
    files, path = storage.file_system(uri)
    files.mkdir(path)
    return uri
