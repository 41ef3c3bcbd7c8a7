"""Trainings that are told to end, and two of one name, as users start them: in processes of their own, by signals."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest
import ray

from pipeline.config import from_json
from pipeline.errors import FolderInUse
from pipeline.runs.lease import LEASE_NAME
from pipeline.tracking import read_json_lines
from pipeline.train.launch import train
from pipeline.train.log_relay import relayed_logs
from pipeline.train.preemption import signals_stop
from tests.conftest import ROOT
from tests.jobs.processes import Job, small_sets

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

OPTIONS = ["--preset", "smoke", "--tracking.uri", "none", "--workers.num-workers", "1", "--schedule.batch-images", "2"]
# No checkpoint is due before the end.
OPTIONS += ["--schedule.coarse-images", "400000", "--schedule.checkpoint-every-images", "400000"]
OPTIONS += ["--schedule.log-every-images", "2", "--schedule.validate-every-images", "400000"]


class Training:
    """A run in *place*, begun and gone on with as often as it takes."""

    def __init__(self, place: Path, name: str) -> None:
        self.name, self.folder = name, place / "runs" / name
        self._log = place / f"log-{name}"
        self._command = [sys.executable, ROOT / "jobs" / "train_places.py", *OPTIONS, "--name", name]
        self._command += ["--data.train", place / "train", "--data.val", place / "val", "--runs", place / "runs"]
        self._starts = 0

    def start_and_reach(self, steps: int) -> Job:
        before = self.images()
        self._starts += 1
        job = Job(self._log.with_name(f"{self._log.name}-{self._starts}"), self._command)
        assert job.wait_for(lambda: self.images() >= before + 2 * steps, every_s=0.1), job.said()
        return job

    def images(self) -> int:
        rows = read_json_lines(str(self.folder / "metrics.jsonl"))
        return rows[-1]["step"] if rows else 0

    def checkpoints(self) -> list[int]:
        return sorted(int(path.name.split("_")[1]) for path in (self.folder / "checkpoints").glob("images_*"))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_sets(tmp_path_factory.mktemp("stopped"))


def test_ctrl_c_keeps_a_last_checkpoint_and_a_second_job_of_the_name_is_refused(place: Path) -> None:
    training = Training(place, "stopped")
    job = training.start_and_reach(2)

    with pytest.raises(FolderInUse, match=rf"{training.folder}: process {job.process.pid} on .*name another"):
        train(from_json((training.folder / "config.json").read_text()))
    assert job.process.poll() is None

    # A terminal sends it to all processes of the foreground.
    os.killpg(job.process.pid, signal.SIGINT)
    code, said = job.end()
    assert code == 130, said
    assert "Ctrl-C: a last checkpoint, within 30 s; a second one ends the job at once" in said
    told = r" E stopped by SIGINT after \d+ images; checkpoint images_\d+ is kept; "
    assert re.search(told + "the same command with --name stopped continues where it stopped$", said.strip()), said
    assert "Traceback" not in said
    assert training.checkpoints()[-1] >= 4, said
    assert not (training.folder / LEASE_NAME).exists()


def test_the_first_signal_asks_the_workers_for_a_checkpoint_and_a_second_one_or_the_end_of_the_grace_period_ends_all(
    ray_session: None, caplog: pytest.LogCaptureFixture
) -> None:
    # Under `nohup` the tests' own is ignored, and then a job's is.
    outside = signal.signal(signal.SIGHUP, before := signal.default_int_handler)
    with relayed_logs() as relay:

        def stopped_twice() -> None:
            with signals_stop(relay, 60) as stop:
                assert not ray.get(relay.stopped_by.remote())
                os.kill(os.getpid(), signal.SIGHUP)
                assert stop.number == signal.SIGHUP
                assert ray.get(relay.stopped_by.remote()) == signal.SIGHUP
                os.kill(os.getpid(), signal.SIGTERM)
                pytest.fail("the second signal did not end it")

        def stopped_for_too_long() -> None:
            with signals_stop(relay, 0.2):
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(30)
                pytest.fail("the grace period did not end it")

        for ended in (stopped_twice, stopped_for_too_long):
            with pytest.raises(KeyboardInterrupt):
                ended()
    assert "closed terminal: a last checkpoint, within 60 s; a second one ends the job at once" in caplog.text
    assert signal.signal(signal.SIGHUP, outside) == before


@pytest.mark.soak
def test_a_training_that_goes_on_is_ended_at_once_by_a_second_signal(place: Path) -> None:
    training = Training(place, "stopped twice")
    job = training.start_and_reach(2)
    os.killpg(job.process.pid, signal.SIGINT)
    assert job.end()[0] == 130
    kept = training.checkpoints()[-1]
    job = training.start_and_reach(1)
    assert f"continuing after {kept:,} images" in job.said()
    began = time.monotonic()
    os.killpg(job.process.pid, signal.SIGHUP)
    assert job.wait_for(lambda: "closed terminal: a last checkpoint" in job.said())
    os.killpg(job.process.pid, signal.SIGINT)
    code, said = job.end()
    # Where the second comes too late, the first has ended it.
    assert (code, said.splitlines()[-1].split(";")[0][9:]) in (
        (130, "E stopped by SIGINT"),
        (129, f"E stopped by SIGHUP after {training.images():,} images"),
    ), said
    assert time.monotonic() - began < 25
    assert "Traceback" not in said
    assert not (training.folder / LEASE_NAME).exists()
