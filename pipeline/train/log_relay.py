"""Relays workers' log lines to the driver, and the driver's stop signal to the workers.

Ray can copy the workers' whole stderr to the driver, but with a prefix on each line and among notes of its own. Here
only records of our loggers travel, through a small actor; the rest stays in Ray's session logs on the worker's machine.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.observe import logs

INTERVAL_S = 0.5
"""Seconds between the looks of the driver for new lines."""

log = logging.getLogger(__name__)


class Lines:
    """Log lines on their way, in order, and the signal that stops the driver; a Ray actor."""

    def __init__(self) -> None:
        self._lines: list[tuple[int, str, dict[str, Any]]] = []
        self._signal = 0

    def add(self, level: int, message: str, place: dict[str, Any]) -> None:
        """One line of a worker, and where that was (`pipeline.observe.logs.place`)."""
        self._lines.append((level, message, place))

    def take(self) -> list[tuple[int, str, dict[str, Any]]]:
        """Lines that were not taken yet."""
        lines, self._lines = self._lines, []
        return lines

    def stop(self, number: int) -> None:
        """Signal *number* stops the driver."""
        self._signal = number

    def stopped_by(self) -> int:
        """Its number; 0 before any has come."""
        return self._signal


class RelayHandler(logging.Handler):
    """Sends records to a `Lines` actor without waiting; *prefix* tells the workers apart."""

    def __init__(self, lines: Any, prefix: str = "") -> None:
        super().__init__()
        self._lines = lines
        self._prefix = prefix

    def emit(self, record: logging.LogRecord) -> None:
        """Send *record*; an actor that is gone is no reason to stop."""
        self._lines.add.remote(record.levelno, self._prefix + self.format(record), logs.place())


@contextlib.contextmanager
def relayed_logs() -> Iterator[Any]:
    """Give the actor that workers send to; until the end of the block a thread logs here what arrives there."""
    # On the driver's machine, as another one may be lost, and without a processor of its own: it must not take one from
    # the workers.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor: Any = ray.remote(num_cpus=0)(Lines)
    lines = actor.options(scheduling_strategy=here).remote()
    over = threading.Event()

    def copy() -> None:
        while True:
            last = over.wait(INTERVAL_S)
            try:
                for level, message, place in ray.get(lines.take.remote(), timeout=30):
                    log.log(level, "%s", message, extra={"place": place})
            except RayError:
                return  # Ray itself is gone; whoever waits for the training hears of it
            if last:
                return

    thread = threading.Thread(target=copy, name="relay-logs", daemon=True)
    thread.start()
    try:
        yield lines
    finally:
        over.set()
        thread.join(timeout=60)
        ray.kill(lines)
