"""The order's rows, read ahead by tasks of Ray: each portion once, whichever of the workers comes first.

All workers train on parts of the same batches, and shuffled windows spread over many row groups, so each by itself
would read nearly everything. A reader starts the task for a portion when the first worker asks for it; the task leaves
one table for each of them. For one worker the reader is an object, for several an actor that only keeps references.

Not Ray Data: what was tried, measured and not measured is in docs/decisions/022-ray.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from ray.exceptions import ObjectLostError

from pipeline.data.sources import prefetch
from pipeline.data.tasks import own_errors

TASK_RETRIES = 3
"""Runs of a task whose process was lost, after the first."""
_FORGOTTEN_AFTER = 1000
"""Portions behind the newest one, after which one that a worker never came for is given up."""
_REPEATS = 3
"""Times a worker asks again for a table that went with a process or node."""

Read = Callable[[dict[str, Any]], pa.Table]
"""All rows of a portion, in order."""


class Reader:
    """Starts the reading of portions and hands out the workers' tables."""

    def __init__(self) -> None:
        self._reading: object = None
        self._tables: dict[int, dict[int, Any]] = {}
        self._waiting: dict[int, set[int]] = {}
        self._batons: list[Any] = []

    def take(
        self, reading: object, number: int, portion: dict[str, Any], read: Read, rank: int, share: dict[str, Any]
    ) -> list[Any]:
        """A list with the reference to the table of *rank*.

        *reading* names the sequence that *number* counts in; another one than before ends that, as its workers are
        gone. *share* as `ordered_tables` makes it.
        """
        at_once, ranks = share["at_once"], share["ranks"]
        if reading != self._reading:
            self._reading, self._tables, self._waiting, self._batons = reading, {}, {}, [None] * at_once
        if number not in self._tables:
            # Whoever has the baton of its slot may run. Tasks ask for no processor, so they cannot starve where
            # training holds them all.
            slot = number % at_once
            task: Any = _shares_and_baton.options(num_returns=len(ranks) + 1)
            *tables, self._batons[slot] = task.remote(portion, read, share, self._batons[slot])
            self._tables[number], self._waiting[number] = dict(zip(ranks, tables, strict=True)), set(ranks)
        table = self._tables[number][rank]
        self._waiting[number].discard(rank)
        for done in (number - _FORGOTTEN_AFTER, *([] if self._waiting[number] else [number])):
            self._tables.pop(done, None)
            self._waiting.pop(done, None)
        return [table]


def start_reader() -> Any:
    """A `Reader` for several workers, which lives as long as the process that asked for it, and is started again where
    it dies."""
    return ray.remote(Reader).options(num_cpus=0, max_restarts=-1, max_task_retries=-1).remote()


def ordered_tables(
    portions: Iterable[dict[str, Any]],
    read: Read,
    *,
    rank: int,
    start: int,
    batch: int,
    world_size: int,
    at_once: int,
    ahead: int,
    reader: Any = None,
    seed: int = 0,
) -> Iterator[pa.Table]:
    """The rows of *rank*, portion by portion, at most *ahead* portions early; what reading raised comes out as itself.

    Of every *batch* positions from *start* on, *world_size* ranks have equal parts. *at_once* portions are read at a
    time. With a *reader* (`start_reader`) all ranks must go through the same *portions*; without, this one reads alone.
    """
    ranks = list(range(world_size)) if reader else [rank]
    share = {"start": start, "batch": batch, "world_size": world_size, "ranks": ranks, "at_once": at_once}
    reading = (seed, start, batch, world_size)
    take = reader.take.remote if reader else Reader().take
    asked = ((reading, number, portion, read, rank, share) for number, portion in enumerate(portions))
    with own_errors():
        for question, answer in prefetch.ahead(((one, take(*one)) for one in asked), ahead):
            for left in reversed(range(_REPEATS + 1)):
                try:
                    (table,) = ray.get(answer) if reader else answer
                    rows = ray.get(table)
                    break
                except ObjectLostError:  # its owner, the reader, died after it had answered
                    if not left:
                        raise
                    answer = take(*question)
            yield rows


def read_shares(portion: dict[str, Any], read: Read, share: dict[str, Any]) -> list[pa.Table]:
    """The rows of each of the `ranks`: of every `batch` positions from `start` on, `world_size` equal parts."""
    table = read(portion)
    places = portion["position"] - share["start"] + np.arange(len(table))
    ranks = places % share["batch"] // (share["batch"] // share["world_size"])
    return [table.filter(pa.array(ranks == rank)) for rank in share["ranks"]]


@ray.remote(num_cpus=0, scheduling_strategy="SPREAD", max_retries=TASK_RETRIES)
def _shares_and_baton(portion: dict[str, Any], read: Read, share: dict[str, Any], baton: None) -> tuple[Any, ...]:
    return (*read_shares(portion, read, share), None)
