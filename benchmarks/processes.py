"""What a job and the processes below it use: memory and processor time, and Ray's store, watched from outside.

Memory is read from Linux's `/proc` a few times a second, the peak of each process from the kernel's own mark (VmHWM).
The store is asked for by the raylet's address, which stands on its command line.
"""

from __future__ import annotations

import os
import re
import secrets
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import ray
from ray._private.internal_api import get_state_from_address, node_stats
from ray._raylet import Config  # type: ignore[attr-defined]

SAMPLE_S = 0.25
"""Seconds between two looks."""

_TICKS = os.sysconf("SC_CLK_TCK")
_SERVICES = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
"""Processes of Ray's own that are named like its workers."""


@dataclass
class Usage:
    """What a process and those below it used, in bytes and seconds."""

    driver_rss: int = 0
    """Peak resident memory of the process itself, pages shared with others included."""
    worker_rss: int = 0
    """The same of the largest Ray worker."""
    driver_own: int = 0
    """Peak of the process's anonymous pages: without libraries and without the object store."""
    worker_own: int = 0
    """The same of the largest Ray worker."""
    all_own: int = 0
    """Peak of the sum over all processes, Ray's services too."""
    store_peak: int = 0
    """Largest number of bytes in Ray's object store at one look."""
    spilled: int = 0
    """Bytes for which the store had no room: spilled to disk, and laid out there from the start."""
    processor_s: float = 0.0
    """Processor time of all processes, as far as the last look saw it."""
    wall_s: float = 0.0
    """From the first look to the end."""
    looks: int = 0
    """How often everything was looked at."""
    store_looks: int = 0
    """How often Ray answered for its store."""


@dataclass
class Watch:
    """Looks at process *pid* and those below it; `usage` grows with every `look`."""

    pid: int
    usage: Usage = field(default_factory=Usage)
    _seconds: dict[int, float] = field(default_factory=dict)
    _raylet: tuple[str, int] | None = None

    def look(self) -> None:
        """Take one sample; a process that ends meanwhile is passed over."""
        usage, everything = self.usage, 0
        for pid in tree(self.pid):
            memory, command = _memory(pid), _command(pid)
            own = memory.get("RssAnon", 0)
            everything += own
            self._seconds[pid] = max(self._seconds.get(pid, 0.0), _own_seconds(pid))
            if pid == self.pid:
                usage.driver_rss = max(usage.driver_rss, memory.get("VmHWM", 0))
                usage.driver_own = max(usage.driver_own, own)
            elif command.startswith("ray::") and not command.startswith(_SERVICES):
                usage.worker_rss = max(usage.worker_rss, memory.get("VmHWM", 0))
                usage.worker_own = max(usage.worker_own, own)
            elif self._raylet is None and "raylet/raylet" in command:
                self._raylet = _address(command)
        usage.all_own = max(usage.all_own, everything)
        usage.processor_s = sum(self._seconds.values())
        usage.looks += 1
        self._look_at_store()

    def _look_at_store(self) -> None:
        if self._raylet is None:
            return
        try:
            store = node_stats(*self._raylet, include_memory_info=False).store_stats
        except Exception:  # Ray is not up yet, or no more; what gRPC raises then is nobody's interface
            return
        self.usage.store_peak = max(self.usage.store_peak, store.object_store_bytes_used)
        self.usage.spilled = max(self.usage.spilled, store.spilled_bytes_total + store.object_store_bytes_fallback)
        self.usage.store_looks += 1


def share_token() -> None:
    """Give this process, and those that it starts, one new token for their Rays, so that it may ask a job's store.

    Before Ray is started or joined.
    """
    os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
    Config.initialize("")  # Ray looked at the environment when it was imported


def run_watched(command: Sequence[str], *, log: Path, cwd: Path | None = None, may_fail: bool = False) -> Usage:
    """Run *command* in *cwd* and watch it until it ends. Raises `RuntimeError` with the end of *log* if it fails."""
    began = time.perf_counter()
    with log.open("wb") as output, subprocess.Popen(command, stdout=output, stderr=output, cwd=cwd) as job:
        watch = Watch(job.pid)
        while job.poll() is None:
            watch.look()
            time.sleep(SAMPLE_S)
    if job.returncode and not may_fail:
        raise RuntimeError(
            f"{' '.join(command)} ended with {job.returncode}: {log.read_text(errors='replace')[-2000:]}"
        )
    watch.usage.wall_s = time.perf_counter() - began
    return watch.usage


def processor_s(call: Callable[[], object], *, without: int) -> float:
    """Processor seconds that *call* takes here and in all processes below, except in process *without*.

    Those that end meanwhile count once their parent has seen it.
    """

    def spent() -> float:
        return sum(_own_seconds(pid, ended=True) for pid in tree(os.getpid()) if pid != without)

    before = spent()
    call()
    return spent() - before


def tree(root: int) -> list[int]:
    """*root* and all processes below it."""
    below: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit() and (fields := _stat(int(entry))):
            below.setdefault(int(fields[1]), []).append(int(entry))
    found = [root]
    for pid in found:
        found += below.get(pid, [])
    return found


def _stat(pid: int) -> list[str]:
    """Fields of `/proc/PID/stat` behind the command's name; none if the process has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return []


def _own_seconds(pid: int, *, ended: bool = False) -> float:
    """Processor seconds of the process, with *ended* those of the children that it has waited for too."""
    times = _stat(pid)[11 : 15 if ended else 13]
    return sum(map(int, times)) / _TICKS


def _memory(pid: int) -> dict[str, int]:
    """Bytes by the names that `/proc/PID/status` gives them."""
    try:
        text = Path(f"/proc/{pid}/status").read_text(errors="replace")
    except OSError:
        return {}
    return {name: 1024 * int(count) for name, count in re.findall(r"^(\w+):\s+(\d+) kB$", text, re.M)}


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def _address(raylet: str) -> tuple[str, int] | None:
    """Host and port at which the raylet of this command line answers; none while Ray is not up."""
    gcs = re.search(r"--gcs-address=(\S+)", raylet)
    if gcs is None or ray.is_initialized():
        return None
    try:
        # Closed at once: a client that outlives Ray's head ends its process.
        state = get_state_from_address(gcs.group(1))
        try:
            nodes = [node for node in state.node_table() if node["Alive"]]
        finally:
            state.disconnect()
    except Exception:  # as above
        return None
    return (nodes[0]["NodeManagerAddress"], nodes[0]["NodeManagerPort"]) if nodes else None
