"""One job at a time in a folder, with real processes: at the same time, killed, stopped, ended politely."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline import storage
from pipeline.errors import FolderInUse
from pipeline.runs.lease import LEASE_NAME, Holder, lease_folder
from tests.conftest import ROOT
from tests.jobs.processes import hear_interrupts

HOLD = """
import sys, time
from pipeline.runs.lease import lease_folder

folder, expiry_s, hold_s, name = sys.argv[1:]
with lease_folder(folder, expiry_s=float(expiry_s)) as lease:
    print("held", flush=True)
    time.sleep(float(hold_s))
    lease.write(name, b"")
"""
AS_A_JOB = f"from pipeline.runs.cli import run_job\nrun_job(lambda _: exec({HOLD!r}))"


@pytest.fixture(params=["here", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "set") if request.param == "here" else f"{request.getfixturevalue('bucket')}/set"


@pytest.fixture
def hold() -> Iterator:
    """Starts a process that holds a folder for some seconds and then writes to it."""
    started: list[subprocess.Popen[str]] = []

    def start(
        folder: str, *, expiry_s: float = 60, hold_s: float = 60, name: str = "x", code: str = HOLD
    ) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", code, folder, str(expiry_s), str(hold_s), name]
        pipe = subprocess.PIPE
        started.append(
            subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True, preexec_fn=hear_interrupts)
        )
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def holder_of(folder: str) -> Holder:
    return Holder(**json.loads(storage.read_bytes(storage.join(folder, LEASE_NAME))))


def until_held(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"


def change_holder(folder: str, **changes: object) -> None:
    """The lease as it would be if its holder were another."""
    changed = dataclasses.asdict(dataclasses.replace(holder_of(folder), **changes))
    storage.write_atomic(storage.join(folder, LEASE_NAME), json.dumps(changed).encode())


def test_a_second_job_is_told_at_once_who_has_the_folder_and_the_lease_is_gone_at_the_end(folder, hold):
    with lease_folder(folder) as lease:
        began = time.monotonic()
        with pytest.raises(FolderInUse) as caught, lease_folder(folder):
            pytest.fail("two jobs in one folder")
        assert time.monotonic() - began < 2
        for part in (folder, f"process {os.getpid()} on", "since 20", "last sign of life", "name another folder"):
            assert part in caught.value.message
        out, error = hold(folder).communicate(timeout=60)
        assert out == ""
        assert f"another job writes to {folder}: process {os.getpid()}" in error
        lease.write("content", b"1")
    assert storage.file_sizes(folder) == {"content": 1}


def test_whoever_waits_has_the_folder_when_its_holder_has_ended(tmp_path, hold):
    alive = hold(str(tmp_path), hold_s=2, name="theirs")
    until_held(alive)
    with lease_folder(str(tmp_path), wait_s=60) as lease:
        assert alive.wait(60) == 0
        lease.write("ours", b"")
    assert storage.file_sizes(str(tmp_path)).keys() == {"theirs", "ours"}


@pytest.mark.parametrize("left", ["nothing", "an expired lease"])
def test_of_jobs_that_start_together_one_has_the_folder(folder, left):
    if left == "an expired lease":
        expired = Holder("1", "elsewhere", 1, "", since=0, sign=0, expiry_s=0.1)
        storage.write_atomic(storage.join(folder, LEASE_NAME), json.dumps(dataclasses.asdict(expired)).encode())
    start, end = threading.Barrier(6), threading.Barrier(6)

    def job(_: int) -> bool:
        start.wait(30)
        try:
            with lease_folder(folder) as lease:
                end.wait(30)
                lease.check()
                return True
        except FolderInUse:
            end.wait(30)
            return False

    with ThreadPoolExecutor(6) as pool:
        assert sorted(pool.map(job, range(6))) == [False] * 5 + [True]


def test_the_lease_of_a_killed_process_is_taken_over_at_once_and_what_it_had_begun_is_removed(folder, hold):
    killed = hold(folder)
    until_held(killed)
    killed.kill()
    killed.wait()
    assert holder_of(folder).pid == killed.pid
    if storage.is_remote(folder):
        left = None
    else:
        left = Path(folder) / "shards" / f".00000.parquet.{'0a' * 16}.tmp"
        left.parent.mkdir()
        left.touch()
    began = time.monotonic()
    with lease_folder(folder):
        assert time.monotonic() - began < 4
        assert holder_of(folder).pid == os.getpid()
        assert left is None or not left.exists()


@pytest.mark.parametrize("changes", [{"process": "another boot/another namespace/1"}, {"process": ""}])
def test_of_a_process_of_another_machine_the_number_says_nothing_and_silence_is_waited_for(
    tmp_path, hold, caplog, changes
):
    killed = hold(str(tmp_path), expiry_s=2)
    until_held(killed)
    killed.kill()
    killed.wait()
    change_holder(str(tmp_path), sign=time.time(), **changes)
    with (
        pytest.raises(FolderInUse, match="takes over 2 s after the last sign"),
        lease_folder(str(tmp_path)),
    ):
        pytest.fail("taken from a job that may be alive")
    time.sleep(1)
    began = time.time()
    with lease_folder(str(tmp_path)):
        assert 0.8 < time.time() - began < 4
    assert "it is taken over if it gives none within" in caplog.text
    assert "taking over" in caplog.text


def test_a_number_that_another_process_has_by_now_is_no_sign_of_life(tmp_path, hold):
    killed = hold(str(tmp_path))
    until_held(killed)
    killed.kill()
    killed.wait()
    change_holder(str(tmp_path), pid=os.getppid(), sign=time.time())
    with lease_folder(str(tmp_path)):
        pass


def test_a_holder_whose_clock_is_behind_is_not_taken_for_dead(folder, hold):
    alive = hold(folder, expiry_s=3)
    until_held(alive)
    change_holder(folder, process="elsewhere", sign=time.time() - 3600)
    with pytest.raises(FolderInUse), lease_folder(folder):
        pytest.fail("taken from a job that is alive")


def test_a_job_that_was_stopped_for_too_long_ends_without_a_write(folder, hold):
    stopped = hold(folder, expiry_s=1, hold_s=2.5, name="stale")
    until_held(stopped)
    stopped.send_signal(signal.SIGSTOP)
    time.sleep(1)
    with lease_folder(folder) as lease:
        stopped.send_signal(signal.SIGCONT)
        _, error = stopped.communicate(timeout=60)
        assert stopped.returncode == 1
        assert f"was taken over: process {os.getpid()}" in error
        assert "gave no sign of life for too long" in error
        lease.write("content", b"1")
    assert storage.file_sizes(folder) == {"content": 1}


def test_a_job_that_was_stopped_and_missed_by_nobody_goes_on(folder, hold):
    stopped = hold(folder, expiry_s=1, hold_s=2, name="content")
    until_held(stopped)
    stopped.send_signal(signal.SIGSTOP)
    time.sleep(2)
    stopped.send_signal(signal.SIGCONT)
    assert stopped.wait(timeout=60) == 0
    assert storage.file_sizes(folder).keys() == {"content"}


def test_a_write_that_was_under_way_when_its_job_was_stopped_does_not_land(tmp_path, hold, monkeypatch):
    """The check is passed, the data is on disk, and between that and the renaming another job takes the folder."""
    with lease_folder(str(tmp_path)) as lease:
        replace = os.replace

        def too_late(source: str, target: str) -> None:
            if target.endswith("shard"):
                change_holder(str(tmp_path), process="elsewhere", token="another")
                storage.remove_temporary(str(tmp_path))
            replace(source, target)

        monkeypatch.setattr(os, "replace", too_late)
        with pytest.raises(FolderInUse, match="was taken over"):
            lease.write("shard", b"stale")
    assert storage.file_sizes(str(tmp_path)).keys() == {LEASE_NAME}


def test_what_a_killed_worker_left_is_gone_at_the_end_of_the_job(tmp_path):
    with lease_folder(str(tmp_path)) as lease:
        lease.write("a/result", b"whole")
        (tmp_path / "a" / f".other.{'0' * 32}.tmp").write_bytes(b"half")
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["result"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_job_that_is_ended_politely_leaves_no_lease_and_no_folder(tmp_path, hold, number, code):
    ended = hold(str(tmp_path / "set"), code=AS_A_JOB)
    until_held(ended)
    ended.send_signal(number)
    assert ended.wait(timeout=60) == code
    assert not (tmp_path / "set").exists()


def test_a_lease_whose_put_succeeded_though_its_answer_was_lost_is_ones_own(faulty, bucket):
    faulty.swallow(method="PUT", target=LEASE_NAME, times=1)
    with lease_folder(f"{bucket}/set"):
        pass
    assert faulty.unspent() == 0
    assert storage.file_sizes(f"{bucket}/set") == {}


def test_a_lease_that_was_never_written_whole_is_nobodys(tmp_path):
    (tmp_path / LEASE_NAME).write_text('{"token": "1')
    with lease_folder(str(tmp_path)):
        pass


def test_signs_of_life_are_given_while_the_folder_is_held(folder):
    with lease_folder(folder, expiry_s=1.2):
        first = holder_of(folder)
        time.sleep(1)
        assert holder_of(folder).sign > first.sign
        assert holder_of(folder).since == first.since
