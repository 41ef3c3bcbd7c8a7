"""The way of a user with a cluster: `ray start`, `ray job submit` from another folder, everything on S3 and in MLflow,
whose server is away for a while."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline import storage
from pipeline.tracking import mlflow_client, read_json_lines
from tests.conftest import ROOT
from tests.jobs.processes import Job, small_sets

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.soak,
]

EVERY = 4
SCHEDULE = {"coarse-images": 20, "joint-images": 140, "checkpoint-every-images": 20, "log-every-images": EVERY}
SCHEDULE |= {"validate-every-images": 80}
BIN = Path(sys.executable).parent
# The command line of jobs does not send a token by itself; the cluster of a test needs none.
CLUSTER = {"RAY_AUTH_MODE": "disabled", "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def answers(address: str) -> bool:
    try:
        urllib.request.urlopen(address, timeout=5).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


class MLflow:
    """A tracking server in a process of its own."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._port = folder, free_port()
        self.uri = f"http://127.0.0.1:{self._port}"
        self.start()

    def start(self) -> None:
        store, files = f"sqlite:///{self._folder}/mlflow.db", str(self._folder / "artifacts")
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", self._port]
        command += ["--workers", 1, "--backend-store-uri", store, "--artifacts-destination", files]
        self.job = Job(self._folder / "log", command)
        assert self.job.wait_for(lambda: answers(f"{self.uri}/health")), self.job.said()

    def stop(self) -> None:
        self.job.kill()


@pytest.fixture
def mlflow(tmp_path: Path, tracking_template: Path) -> Iterator[MLflow]:
    folder = tmp_path / "mlflow"
    folder.mkdir()
    shutil.copy(tracking_template, folder / "mlflow.db")
    server = MLflow(folder)
    yield server
    server.stop()


@pytest.fixture
def dashboard(tmp_path: Path, bucket: str) -> Iterator[str]:
    """The address of a cluster, begun after the bucket's environment was set."""
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="tm", ignore_cleanup_errors=True) as folder:
        command = [BIN / "ray", "start", "--head", "--block", "--num-cpus", 4, "--port", free_port()]
        command += ["--dashboard-port", port, "--temp-dir", folder, "--object-store-memory", 200_000_000]
        command += ["--dashboard-agent-listen-port", free_port(), "--disable-usage-stats"]
        head = Job(tmp_path / "log-head", command, CLUSTER)
        address = f"http://127.0.0.1:{port}"
        assert head.wait_for(lambda: answers(f"{address}/api/version")), head.said()
        yield address
        head.kill()


def test_a_submitted_job_trains_from_s3_to_s3_and_a_server_that_was_away_lacks_no_metric(
    tmp_path: Path, bucket: str, mlflow: MLflow, dashboard: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets = small_sets(tmp_path / "sets")
    for which in ("train", "val"):
        storage.upload_folder(sets / which, f"{bucket}/{which}")
    command = [BIN / "ray", "job", "submit", "--address", dashboard, "--working-dir", ROOT, "--"]
    command += ["python", "jobs/train_places.py", "--preset", "smoke", "--name", "far"]
    command += [text for name, value in SCHEDULE.items() for text in (f"--schedule.{name}", str(value))]
    command += ["--data.train", f"{bucket}/train", "--data.val", f"{bucket}/val", "--runs", f"{bucket}/runs"]
    command += ["--tracking.uri", mlflow.uri]
    monkeypatch.chdir(tmp_path)
    job = Job(tmp_path / "log-job", command, CLUSTER, folder=tmp_path)
    checkpoints = f"{bucket}/runs/far/checkpoints"

    def kept(images: int) -> bool:
        name = f"images_{images:012d}/manifest.json"
        return storage.exists(f"{checkpoints}/{name}")

    assert job.wait_for(lambda: kept(40), every_s=0.5), job.said()
    mlflow.stop()
    assert job.wait_for(lambda: kept(100), every_s=0.5), job.said()
    mlflow.start()
    code, said = job.end()
    assert code == 0, said

    finished = json.loads(storage.read_bytes(f"{bucket}/runs/far/finished.json"))
    assert storage.exists(f"{finished['model']}/model.safetensors")
    rows = read_json_lines(f"{bucket}/runs/far/metrics.jsonl")
    client = mlflow_client(mlflow.uri)
    (experiment,) = client.search_experiments(filter_string="name = 'smoke'")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_id, run.info.status) == (finished["mlflow_run_id"], "FINISHED")
    for name in ("loss/total", "rate/images_per_s", "val/coarse_psnr_hole"):
        there = sorted((point.step, point.value) for point in client.get_metric_history(run.info.run_id, name))
        assert there == sorted((row["step"], row[name]) for row in rows if name in row)
    steps = [point.step for point in client.get_metric_history(run.info.run_id, "loss/total")]
    assert sorted(steps) == list(range(EVERY, 161, EVERY))
    assert client.get_model_version_by_alias("tmad-smoke", "champion").run_id == run.info.run_id
