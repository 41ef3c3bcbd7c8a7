"""The stack of plain processes is what it says: it starts, serves jobs, shows metrics, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra.network import Namespaces
from infra.stack import BUCKET, MARK, Stack, StackFailed, end_leftovers, marked, running
from pipeline import storage
from pipeline.tracking import Tracker, mlflow_client
from tests.s3 import forget_clients

ROOT = Path(__file__).resolve().parent.parent

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(400)]

WATCHED = """
import logging, sys, time
from pathlib import Path
from pipeline import observe
from pipeline.runs.cli import configure_logging
from pipeline.runs.cluster import start_ray
from pipeline.tracking import Tracker
configure_logging("watched", 0)
start_ray()
tracker = Tracker(None, None, exported_as="watched")
tracker.metrics({"rate/images_per_s": 12.5, "loss/total": 0.75, "bad_steps": 2}, 800)
observe.count("storage_repeat", 3)
logging.getLogger("pipeline.test").info("after the interval")
end = time.monotonic() + 150
while not Path(sys.argv[1]).exists() and time.monotonic() < end:
    time.sleep(0.2)
"""
"""Goes on until the file that it is given is there."""


class Running:
    """A stack in a process of its own, as `make stack` starts it; its nodes are hosts of their own where the machine
    allows it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        command = [sys.executable, str(ROOT / "infra" / "stack.py"), "--folder", str(folder)]
        if Namespaces.possible():
            command.append("--separate-hosts")
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        self.said = ""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said += line
            if line.startswith("Ctrl-C"):
                break
        else:
            pytest.fail(f"the stack did not start, code {self.process.wait()}: {self.said}")
        self.environment = running(folder) or {}


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    one = Running(tmp_path_factory.mktemp("stack"))
    yield one
    one.process.terminate()
    one.process.wait(60)


@pytest.fixture
def client(stack: Running, monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    """This process as a client of the stack."""
    for name, value in stack.environment.items():
        monkeypatch.setenv(name, value)
    forget_clients()
    yield stack
    forget_clients()


def test_storage_and_tracking_answer_under_the_addresses_that_it_prints(client: Running) -> None:
    storage.write_atomic(f"s3://{BUCKET}/here", b"bytes")
    assert storage.read_bytes(f"s3://{BUCKET}/here") == b"bytes"
    uri = client.environment["MLFLOW_TRACKING_URI"]
    run_id = Tracker.create(uri, "stack", "one")
    with Tracker(uri, run_id) as tracker:
        tracker.metrics({"loss/total": 1.0}, 8)
        tracker.artifact(b"{}", "config.json")
    assert run_id is not None
    assert mlflow_client(uri).get_run(run_id).data.metrics == {"loss/total": 1.0}
    # The server put it into the bucket: this process only talked to the server.
    assert [
        name for name in storage.list_files(f"s3://{BUCKET}/mlflow") if name.endswith(f"{run_id}/artifacts/config.json")
    ]


def test_a_submitted_job_shows_its_metrics_at_a_nodes_endpoint_and_logs_json(client: Running, tmp_path: Path) -> None:
    addresses = re.findall(r"Metrics, \S+ +(http\S+)", client.said)
    assert len(addresses) == 3, "a head and two workers"
    folder, seen = tmp_path / "job", str(tmp_path / "seen")
    folder.mkdir()
    (folder / "watched.py").write_text(WATCHED)
    variables = json.dumps({"env_vars": {"TMAD_LOG": "json", "PYTHONPATH": str(ROOT)}})
    submit = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--working-dir", str(folder)]
    command = [*submit, "--runtime-env-json", variables, "--", "python", "watched.py", seen]
    job = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    wanted = {
        r'ray_tmad_rate\{.*name="images_per_s".*run="watched".*\} 12.5',
        r'ray_tmad_loss\{.*name="total".*\} 0.75',
        r'ray_tmad_training\{.*name="bad_steps".*\} 2.0',
        r'ray_tmad_training\{.*name="images".*\} 800.0',
        r'ray_tmad_events_total\{.*event="storage_repeat".*\} 3.0',
    }
    missing, end = wanted, time.monotonic() + 150
    while missing and time.monotonic() < end and job.poll() is None:
        time.sleep(1)
        pages = "".join(urllib.request.urlopen(address, timeout=30).read().decode() for address in addresses)
        missing = {pattern for pattern in missing if not re.search(pattern, pages)}
    Path(seen).touch()
    output, _ = job.communicate(timeout=120)
    assert missing == set(), output.decode()
    line = next(line for line in output.decode().splitlines() if "after the interval" in line)
    said = json.loads(line)
    del said["time"]
    assert said == {
        "level": "info",
        "logger": "pipeline.test",
        "run": "watched",
        "rank": 0,
        "step": 800,
        "message": "after the interval",
    }
    assert job.returncode == 0


def test_a_second_stack_in_the_same_folder_is_refused_and_harms_nothing(client: Running) -> None:
    with pytest.raises(StackFailed, match="is running"), Stack(client.folder):
        pass
    assert running(client.folder) == client.environment
    assert storage.exists(f"s3://{BUCKET}")


def test_asked_to_end_it_leaves_no_process_and_no_addresses(stack: Running) -> None:
    assert len(marked(stack.folder)) > 5
    stack.process.send_signal(signal.SIGTERM)
    assert stack.process.wait(60) == 0
    assert marked(stack.folder) == []
    assert running(stack.folder) is None
    assert not (stack.folder / "environment.sh").exists()


def test_what_a_killed_stack_left_is_ended_and_nothing_else(tmp_path: Path) -> None:
    sleepers = [
        subprocess.Popen(["sleep", "60"], env={**os.environ, MARK: str(folder)}, start_new_session=True)
        for folder in (tmp_path, tmp_path / "another")
    ]
    try:
        assert marked(tmp_path) == [sleepers[0].pid]
        end_leftovers(tmp_path)
        assert sleepers[0].wait(10) == -signal.SIGKILL
        assert sleepers[1].poll() is None
    finally:
        for one in sleepers:
            one.kill()
            one.wait()
