"""Prefetching: the next images are requested while one is decoded.

On storage that answers after 30 ms a task would else wait longer than it computes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from typing import TypeVar

from pipeline.data.sources.base import Source
from pipeline.errors import TMADError

Item = TypeVar("Item")

RUNS_AHEAD = 4
"""Requests under way at once, and as many answers that wait: of at most `tar.RUN_BYTES` each, or of one file."""


def ahead(items: Iterable[Item], count: int) -> Iterator[Item]:
    """The same items, each taken when *count* others wait: what taking them begins is under way meanwhile."""
    pending: deque[Item] = deque()
    for item in items:
        pending.append(item)
        if len(pending) > count:
            yield pending.popleft()
    yield from pending


def read_ahead(source: Source, keys: Sequence[str]) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """Each of *keys*, in order, with a call that gives its file or raises what `source.read` raises."""
    if (runs := source.runs(keys)) is None:
        yield from ((key, partial(source.read, key)) for key in keys)
        return
    pool = ThreadPoolExecutor(RUNS_AHEAD, thread_name_prefix="read-ahead")
    try:
        for run, answer in ahead(((run, pool.submit(source.read_run, run)) for run in runs), RUNS_AHEAD):
            wait([answer])
            yield from ((key, partial(_file, source, run, answer, place)) for place, key in enumerate(run))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _file(source: Source, run: Sequence[str], answer: Future[list[bytes]], place: int) -> bytes:
    try:
        return answer.result()[place]
    except TMADError:
        if len(run) == 1:
            raise
        return source.read(run[place])  # one of them is the cause: asked for by itself, it is known which
