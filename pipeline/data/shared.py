"""Reading for several workers: each portion of the order is read once, whichever of them comes first.

All workers train on parts of the same batches, and shuffled windows spread over many row groups, so each would read
nearly everything. A reader, an actor that only keeps references, starts the task for a portion when the first worker
asks for it; the task leaves one table for each of them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from ray.exceptions import ObjectLostError

from pipeline.data.tasks import TASK_RETRIES, own_errors

_FORGOTTEN_AFTER = 1000
"""Portions behind the newest one, after which one that a worker never came for is given up."""
_REPEATS = 3
"""Times a worker asks again for a table that went with a process or node."""

Read = Callable[[dict[str, Any]], pa.Table]


class PortionReader:
    """Starts the reading of portions and hands out the workers' tables. An actor; make it with `start_reader`."""

    def __init__(self) -> None:
        self._reading: object = None
        self._tables: dict[int, list[Any]] = {}
        self._came: dict[int, set[int]] = {}
        self._batons: list[Any] = []

    def take(
        self, reading: object, number: int, portion: dict[str, Any], read: Read, rank: int, share: dict[str, int]
    ) -> list[Any]:
        """A list with the reference to the table of *rank*.

        *reading* names the sequence that *number* counts in; another one than before ends that, as its workers are
        gone. *share*: `start`, `batch` and `world_size` as `read_shares` takes them. As many portions are read at once
        as there are workers, two at least.
        """
        world_size = share["world_size"]
        if reading != self._reading:
            self._reading, self._tables, self._came = reading, {}, {}
            self._batons = [None] * max(2, world_size)
        if number not in self._tables:
            slot = number % len(self._batons)
            task = _read_shares.options(num_returns=world_size + 1)
            *tables, self._batons[slot] = task.remote(portion, read, share, self._batons[slot])
            self._tables[number], self._came[number] = tables, set()
        table = self._tables[number][rank]
        self._came[number].add(rank)
        if len(self._came[number]) == world_size:
            self._forget(number)
        self._forget(number - _FORGOTTEN_AFTER)
        return [table]

    def _forget(self, number: int) -> None:
        self._tables.pop(number, None)
        self._came.pop(number, None)


def start_reader() -> Any:
    """A `PortionReader` that lives as long as the process that asked for it, and is started again where it dies."""
    return ray.remote(PortionReader).options(num_cpus=0, max_restarts=-1, max_task_retries=-1).remote()


def shared_tables(
    reader: Any,
    portions: Iterable[dict[str, Any]],
    read: Read,
    *,
    seed: int,
    rank: int,
    ahead: int,
    **share: int,
) -> Iterator[pa.Table]:
    """The rows of *rank*, portion by portion, at most *ahead* portions early; *read* gives all rows of one.

    *share*: `start`, `batch` and `world_size` as `read_shares` takes them. All workers must go through the same
    *portions*. What reading raised comes out as itself.
    """
    reading = (seed, *sorted(share.items()))
    pending: deque[tuple[tuple[Any, ...], Any]] = deque()
    with own_errors():
        for number, portion in enumerate(portions):
            asked = (reading, number, portion, read, rank, share)
            pending.append((asked, reader.take.remote(*asked)))
            if len(pending) > ahead:
                yield _table(reader, *pending.popleft())
        while pending:
            yield _table(reader, *pending.popleft())


def _table(reader: Any, asked: tuple[Any, ...], answer: Any) -> pa.Table:
    for _ in range(_REPEATS):
        try:
            return ray.get(ray.get(answer)[0])
        except ObjectLostError:  # its owner, the reader, died after it had answered
            answer = reader.take.remote(*asked)
    return ray.get(ray.get(answer)[0])


def read_shares(portion: dict[str, Any], read: Read, share: dict[str, int]) -> list[pa.Table]:
    """The rows of each rank: of every `batch` positions from `start` on, `world_size` equal parts."""
    table = read(portion)
    places = portion["position"] - share["start"] + np.arange(len(table))
    ranks = places % share["batch"] // (share["batch"] // share["world_size"])
    return [table.filter(pa.array(ranks == rank)) for rank in range(share["world_size"])]


def _shares_and_baton(portion: dict[str, Any], read: Read, share: dict[str, int], baton: None) -> tuple[Any, ...]:
    return (*read_shares(portion, read, share), None)


_read_shares: Any = ray.remote(num_cpus=0, scheduling_strategy="SPREAD", max_retries=TASK_RETRIES)(_shares_and_baton)
