"""Announced ends (signals, drained nodes), agreed on by all workers at the same step.

Three ends come with a warning: the job is stopped (a signal to its driver: Ctrl-C, a closed terminal, or SIGTERM as
`ray job stop` sends it), the process of a worker is (SIGTERM to it), or a machine is taken away (Ray drains it, as
providers of spot machines have it do). Each leaves the time for one more checkpoint, if the grace period is as long as
a step and a checkpoint. What comes without a warning repeats what was done since the checkpoint before.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import ray
import ray.train
from ray.exceptions import RayError
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend

from pipeline.runs.cli import given_up, interrupt

ASK_DRIVER_S = 1.0
"""Seconds between the questions of the first worker whether the driver was asked to stop."""

ASK_RAY_S = 10.0
"""Seconds between the questions of the workers to Ray whether one of their machines is being taken away."""

STOPS: dict[int, str] = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM", signal.SIGHUP: "closed terminal"}
"""Signals that stop a training, in words."""

Kind = Literal["stop", "restart", "drain"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Notice:
    """An end that was announced."""

    kind: Kind
    """`stop`: the run ends here; `restart`: this group of workers does, and Ray starts another one; `drain`: machines
    will be gone soon; until then training continues."""
    reason: str
    """In words."""


SILENCE, LOOK, TERMINATED, STOPPED = range(4)
"""What a worker has to tell the others, the most urgent last: nothing, that it is time to ask Ray, that its process was
told to end; above `STOPPED`, the number of the signal that stops the job."""

_terminated = threading.Event()


class NoticeBoard:
    """What one worker knows; *stop_asked* is the relay's actor, `None` on all workers but the first."""

    def __init__(self, stop_asked: Any) -> None:
        self._relay = stop_asked
        self._answer: Any = None
        self._signal = 0
        self._asked_driver_s = self._asked_ray_s = time.monotonic()
        self._told: set[str] = set()

    def own(self) -> int:
        """The most urgent that this worker has to tell."""
        now = time.monotonic()
        if self._relay is not None and (number := self._signal_to_driver(now)):
            return STOPPED + number
        if _terminated.is_set():
            return TERMINATED
        if self._relay is not None and now - self._asked_ray_s >= ASK_RAY_S:
            self._asked_ray_s = now
            return LOOK
        return SILENCE

    def meaning(self, found: int) -> Notice | None:
        """What the most urgent of all workers means; called by all of them with the same *found*."""
        if found > STOPPED:
            return Notice("stop", f"stopped by {signal.Signals(found - STOPPED).name}")
        if found == TERMINATED:
            return Notice("restart", "a worker was stopped by SIGTERM")
        if found != LOOK or (info := ray.train.get_preemption_info()) is None:
            return None
        new = set(info.preempted_node_ids) - self._told
        self._told |= new
        ranks = ", ".join(map(str, info.preempted_ranks))
        return Notice("drain", f"Ray announced the loss of the machine of workers {ranks}") if new else None

    def _signal_to_driver(self, now: float) -> int:
        if self._answer is None and now - self._asked_driver_s >= ASK_DRIVER_S:
            self._answer, self._asked_driver_s = self._relay.stopped_by.remote(), now
        if self._answer is not None and ray.wait([self._answer], timeout=0)[0]:
            answer, self._answer = self._answer, None
            # A relay that is gone has no word for us; Ray ends the workers of a driver that is.
            with contextlib.suppress(RayError):
                self._signal = self._signal or ray.get(answer)
        return self._signal


class NoticingTorchConfig(TorchConfig):
    """Ray Train's process group, in processes that notice SIGTERM instead of ending at once."""

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        """What Ray starts in the workers."""
        return _NoticingBackend


class _NoticingBackend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        super().on_start(worker_group, backend_config)
        # Ray runs the loop in a thread; handlers of signals belong to the main one, which this reaches.
        worker_group.execute(_notice_sigterm)


def _notice_sigterm() -> None:
    """The first SIGTERM is noted for the loop, the second one does what the first one did."""
    before = signal.getsignal(signal.SIGTERM)

    def handle(number: int, frame: Any) -> None:
        if _terminated.is_set() and callable(before):
            before(number, frame)
        _terminated.set()

    signal.signal(signal.SIGTERM, handle)


class Stop:
    """What the driver was told."""

    number: int | None = None
    """The signal that came first; `None` before any has."""


@contextlib.contextmanager
def signals_stop(relay: Any, grace_s: float) -> Iterator[Stop]:
    """In this block a signal of `STOPS` to the driver asks the workers, through *relay*, for a last checkpoint; after
    *grace_s*, or at the second signal, the process ends without one."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # signals are the business of whoever runs the main thread
        return

    def handle(number: int, _: Any) -> None:
        if stop.number is not None or not grace_s or given_up():
            interrupt(number)
        stop.number = number
        log.warning("%s: a last checkpoint, within %g s; a second one ends the job at once", STOPS[number], grace_s)
        relay.stop.remote(number)
        timer = threading.Timer(grace_s, os.kill, (os.getpid(), number))
        timer.daemon = True
        timers.append(timer)
        timer.start()

    timers: list[threading.Timer] = []
    # `nohup` has the terminal's end ignored, and a shell's background jobs Ctrl-C.
    heard = [number for number in STOPS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, handle) for number in heard}
    try:
        yield stop
    finally:
        for timer in timers:
            timer.cancel()
        for number, handler in before.items():
            signal.signal(number, handler)
