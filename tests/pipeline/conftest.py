"""What the tests of `pipeline` share: MLflow in one SQLite file, a tiny model artifact, a small prepared set, and
trainings without processes of their own."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import multiprocessing
import shutil
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from torch.multiprocessing.spawn import start_processes as start_forks

from pipeline.data.schema import RECORD_SCHEMA, Manifest, Shard, pack_mask
from pipeline.report.pictures import png_bytes
from pipeline.tracking import mlflow_client
from tests.tmad.tiny import MODEL, make_image, make_mask
from tmad.checkpoint import save_model
from tmad.model import TMAD

SetMaker = Callable[..., str]


@pytest.fixture(scope="session")
def tracking_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database with its tables made, which takes MLflow seconds, and nothing in it."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    mlflow_client(f"sqlite:///{path}", make=True).search_experiments()
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


@contextlib.contextmanager
def loop_in_this_process() -> Iterator[None]:
    """In this block `train` runs its loop here, as Ray Train's local mode does, in a process group of one: all that a
    worker is, but for the processes, which take 25 s to start. Not for what Ray Train itself does when a worker fails,
    and the checkpoints are in no list of its controller's."""
    import torch.distributed as dist
    from ray.train import ScalingConfig

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    group |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in group.items():
            patch.setenv(name, value)
        patch.setattr("pipeline.train.launch.ScalingConfig", lambda **_: ScalingConfig(num_workers=0))
        # What it logs is logged here already, and would come back through the relay for ever.
        patch.setattr("pipeline.train.worker._set_up_logging", lambda *_: None)
        try:
            yield
        finally:
            if dist.is_initialized():  # Ray leaves it where the loop raised
                dist.destroy_process_group()


@pytest.fixture
def in_this_process(ray_session: None) -> Iterator[None]:
    """`loop_in_this_process` for a test."""
    with loop_in_this_process():
        yield


@pytest.fixture
def measured_here(ray_session: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an evaluation's tasks do with images is done here, one after the other. Not for what Ray does: tasks side by
    side, in any order, again after a loss."""
    import ray

    def measure(
        job: Any, files: dict[str, Any], tasks: Sequence[Any], function: Callable[..., pa.Table], **_: Any
    ) -> Iterator[Any]:
        kept = ray.put(files)
        for task in tasks:
            # As a task travels: tuples become lists.
            yield from function(json.loads(json.dumps(asdict(task))), files=kept, job=job)["made"].to_pylist()

    for module in ("measure", "pictures"):
        monkeypatch.setattr(f"pipeline.evaluation.{module}.on_workers", measure)


def start_processes(function: Callable[..., None], *args: object, count: int) -> None:
    """Call *function* with its number and *args* in *count* processes, and wait. They are forks of one that has
    imported what a worker imports, which takes most of the time of a process of its own."""
    multiprocessing.set_forkserver_preload(["pytest", "torch._dynamo", "pipeline.train.worker"])
    start_forks(function, args=args, nprocs=count, start_method="forkserver")


@pytest.fixture
def make_set(tmp_path: Path) -> SetMaker:
    """`write_set` below a folder of the test."""

    def make(num_images: int = 3, *, name: str = "set", **options: Any) -> str:
        return write_set(tmp_path / name, num_images, **options)

    return make


def write_set(folder: Path, num_images: int = 3, *, side: int = 64, masks: list[np.ndarray] | None = None) -> str:
    """A prepared set of PNG crops in one shard, as preparation would write it; returns its folder."""
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
