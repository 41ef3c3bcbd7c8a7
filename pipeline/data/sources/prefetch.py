"""Prefetching: the next images are requested while one is decoded.

On storage that answers after 30 ms a task would else wait longer than it computes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

from pipeline.data.sources.base import Source
from pipeline.errors import TMADError

RUNS_AHEAD = 4
"""Requests under way at once, and as many answers that wait: of at most `tar.RUN_BYTES` each, or of one file."""


def read_ahead(source: Source, keys: Sequence[str]) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """Each of *keys*, in order, with a call that gives its file or raises what `source.read` raises."""
    runs = source.runs(keys)
    if runs is None:
        for key in keys:
            yield key, partial(source.read, key)
        return
    pending: deque[tuple[Sequence[str], Future[list[bytes]]]] = deque()
    pool = ThreadPoolExecutor(RUNS_AHEAD, thread_name_prefix="read-ahead")
    try:
        for run in runs:
            pending.append((run, pool.submit(source.read_run, run)))
            if len(pending) > RUNS_AHEAD:
                yield from _answers(source, *pending.popleft())
        while pending:
            yield from _answers(source, *pending.popleft())
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _answers(
    source: Source, run: Sequence[str], future: Future[list[bytes]]
) -> Iterator[tuple[str, Callable[[], bytes]]]:
    error = future.exception()
    if error is None:
        for key, data in zip(run, future.result(), strict=True):
            yield key, partial(_given, data)
    elif len(run) == 1 or not isinstance(error, TMADError):
        yield run[0], partial(_raise, error)
    else:
        # One of them is the cause: each is asked for by itself, so that it is known which.
        yield from ((key, partial(source.read, key)) for key in run)


def _raise(error: BaseException) -> bytes:
    raise error


def _given(data: bytes) -> bytes:
    return data
