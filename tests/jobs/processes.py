"""Jobs as users start them, in processes of their own, and what is done to those."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
from PIL import Image

from pipeline.data.prepare import PrepareConfig, prepare
from pipeline.presets import smoke
from tests.conftest import RAY_ENVIRONMENT, ROOT, make_photo
from tests.pipeline.test_contract import run_here

Moment = Callable[[], object]


def hear_interrupts() -> None:
    """Before a program starts: Ctrl-C counts. Whoever runs the tests in the background has it ignored, and processes
    inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Job:
    """A command in a session of its own; *log* has what it says."""

    def __init__(
        self,
        log: Path,
        command: Sequence[object],
        environment: Mapping[str, str] | None = None,
        *,
        folder: Path = ROOT,
    ) -> None:
        self.log = log
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                [str(part) for part in command],
                stdout=file,
                stderr=file,
                cwd=folder,
                env={**os.environ, **RAY_ENVIRONMENT, **(environment or {})},
                start_new_session=True,
                preexec_fn=hear_interrupts,
            )

    def processes(self, name: str = "") -> list[int]:
        """Numbers of the session's processes whose command line or title has *name* in it."""
        found = []
        for entry in Path("/proc").iterdir():
            try:
                mine = entry.name.isdigit() and os.getsid(int(entry.name)) == self.process.pid
                if mine and name in (entry / "cmdline").read_bytes().decode(errors="replace"):
                    found.append(int(entry.name))
            except (ProcessLookupError, FileNotFoundError):
                continue
        return found

    def send(self, number: signal.Signals, name: str = "") -> int:
        """Send a signal to those processes, to all without *name*; how many there were. Ray's workers have process
        groups of their own."""
        processes = self.processes(name)
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, number)
        return len(processes)

    def kill(self) -> None:
        """Kill all of it; the parent first, so that it can say nothing more."""
        self.process.kill()
        self.send(signal.SIGKILL)
        self.process.wait()

    def wait_for(self, moment: Moment, *, every_s: float = 0.01) -> bool:
        """True when *moment* has come, false if the job ended before it."""
        while not moment():
            if self.process.poll() is not None:
                return False
            time.sleep(every_s)
        return True

    def said(self) -> str:
        """All that it said so far."""
        return self.log.read_text()

    def end(self) -> tuple[int, str]:
        """Exit code and what it said."""
        code = self.process.wait(timeout=400)
        return code, self.said()


def workers_of_ray(kind: str) -> dict[int, int]:
    """Process ids of Ray's workers of this kind whose raylet is a child of this process, each with that of its
    raylet."""
    parents: dict[int, int] = {}
    names: dict[int, str] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
            names[int(folder.name)] = (folder / "cmdline").read_text()
        except OSError:
            continue
    ours = {pid: parent for pid, parent in parents.items() if parents.get(parent) == os.getpid()}
    return {pid: ours[pid] for pid in sorted(ours) if names[pid].startswith(f"ray::{kind}")}


def training_workers() -> dict[int, int]:
    """`workers_of_ray`, those of Ray Train."""
    return workers_of_ray("RayTrainWorker")


def small_sets(folder: Path) -> Path:
    """*folder* with prepared sets `train` and `val` of ten and four crops of 32 pixels, for the preset `smoke`."""
    model = smoke().model
    for which, count, first in (("train", 10, 0), ("val", 4, 100)):
        photos = folder / "photos" / which
        photos.mkdir(parents=True)
        for number in range(count):
            Image.fromarray(make_photo(first + number, 40, 48)).save(photos / f"{number}.png")
        with pytest.MonkeyPatch.context() as patch:
            run_here(patch)
            config = PrepareConfig(
                source=str(photos),
                out=str(folder / which),
                crop_size=32,
                patch_size=model.patch_size,
                memory=model.memory,
                images_per_shard=4,
                row_group_rows=2,
            )
            prepare(config)
    return folder
