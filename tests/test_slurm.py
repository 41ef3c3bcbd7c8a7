"""The Slurm script under commands that behave as Slurm's and Ray's do, where it ends and where it goes on."""

from __future__ import annotations

import os
import re
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "infra" / "slurm" / "train.sh"

# A step gets one processor unless it says more, whatever the job has (Slurm 22.05 and newer). A signal
# to it reaches its command.
SRUN = """
cpus=1
while [ "${1#--}" != "$1" ]; do
    case $1 in --cpus-per-task=*) cpus=${1#*=} ;; esac
    shift
done
STEP_CPUS=$cpus exec "$@"
"""
SCONTROL = """
case $1 in
    show) printf 'one\\ntwo\\n' ;;
    requeue) say "requeue $2" ;;
esac
"""
# A node runs until it is told to end. A job is followed until it ends; one that is stopped keeps a checkpoint after a
# while, if its machines are still there and it is given the time.
RAY = """
case "$1 $2" in
    start*)
        asked=$(printf '%s\\n' "$@" | sed -n 's/^--num-cpus=//p')
        [ "$asked" -le "$STEP_CPUS" ] || say "node with $STEP_CPUS processors told to have $asked"
        touch "$STATE/node-$$"
        trap 'rm "$STATE/node-$$"; say "node ended"; exit 143' TERM
        while :; do sleep 0.05; done ;;
    "job list") [ "$(ls "$STATE" | grep -c node-)" -eq 2 ] ;;
    "job submit")
        say "submitted $(printf '%s\\n' "$@" | grep -A1 -x -e --submission-id | tail -1)"
        until [ -e "$STATE/ended" ]; do sleep 0.05; done
        exit "$(cat "$STATE/ended")" ;;
    "job stop")
        sleep 0.5
        nodes=$(ls "$STATE" | grep -c node-)
        [ "$nodes" -eq 2 ] && [ "${RAY_JOB_STOP_WAIT_TIME_S:-3}" -gt 60 ] && say "checkpoint kept by $5"
        echo 1 > "$STATE/ended" ;;
esac
"""


class Job:
    """The script in an allocation of two machines."""

    def __init__(self, folder: Path) -> None:
        self.state, self.log = folder / "state", folder / "log"
        self.state.mkdir()
        self.log.touch()
        programs = folder / "bin"
        programs.mkdir()
        (programs / "python").symlink_to(sys.executable)
        for name, text in {"srun": SRUN, "scontrol": SCONTROL, "ray": RAY, "hostname": "echo 10.0.0.1"}.items():
            path = programs / name
            path.write_text(f'#!/bin/bash\nsay() {{ echo "$1" >> "{self.log}"; }}\n{text}')
            path.chmod(path.stat().st_mode | stat.S_IXUSR)
        (programs / "activate").write_text(f'PATH="{programs}:$PATH"\n')
        slurm = {"JOB_ID": "77", "JOB_NUM_NODES": "2", "JOB_NODELIST": "n[1-2]", "CPUS_PER_TASK": "16"}
        environment = {**os.environ, **{f"SLURM_{name}": value for name, value in slurm.items()}}
        self.process = subprocess.Popen(
            ["bash", str(SCRIPT)],
            env={**environment, "VENV": str(folder), "STATE": str(self.state)},
            cwd=folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )

    def said(self) -> list[str]:
        return self.log.read_text().splitlines()

    def wait_for(self, moment: Callable[[], bool]) -> None:
        end = time.monotonic() + 60
        while not moment():
            assert time.monotonic() < end, self.said()
            assert self.process.poll() is None, self.said()
            time.sleep(0.02)


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


def test_before_the_time_is_over_a_last_checkpoint_is_kept_and_the_job_goes_into_the_queue_again(job: Job) -> None:
    job.wait_for(lambda: "submitted tmad-77-0" in job.said())
    job.process.send_signal(signal.SIGTERM)  # to the script alone, as B: says
    assert job.process.wait(60) == 143
    assert job.said() == [
        "submitted tmad-77-0",
        "checkpoint kept by tmad-77-0",
        "requeue 77",
        "node ended",
        "node ended",
    ]


@pytest.mark.parametrize("code", [0, 1])
def test_a_job_that_ends_by_itself_ends_the_nodes_and_is_not_begun_again(job: Job, code: int) -> None:
    job.wait_for(lambda: "submitted tmad-77-0" in job.said())
    (job.state / "ended").write_text(str(code))
    assert job.process.wait(60) == code
    assert job.said() == ["submitted tmad-77-0", "node ended", "node ended"]


def test_the_signal_comes_early_enough_for_what_is_waited_for() -> None:
    text = SCRIPT.read_text()
    (early,) = re.findall(r"^#SBATCH --signal=B:TERM@(\d+)", text, re.M)
    (wait,) = re.findall(r"^export RAY_JOB_STOP_WAIT_TIME_S=(\d+)", text, re.M)
    assert int(wait) + 30 <= int(early)
