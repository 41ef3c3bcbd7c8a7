"""How Ray Data is used here: a list of small tasks in, a stream of Arrow tables out, a task at a time.

Tasks are plain values that name what to read; the tables hold encoded images, never decoded ones.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data
from ray.exceptions import RayTaskError

from pipeline.errors import TMADError

BLOCK_BYTES = 8 * 2**20
"""Rows are handed on in blocks of about this size."""


def run_tasks(
    tasks: Sequence[dict[str, Any]],
    function: Callable[[dict[str, Any]], pa.Table],
    *,
    num_cpus: float,
    at_once: int | None = None,
    in_order: bool = False,
    buffer_bytes: int | None = None,
    max_ray_tasks: int = 10_000,
) -> ray.data.Dataset:
    """A lazy data set of the tables that *function* makes of each task (a JSON object).

    *num_cpus* processors are asked for by each running task, *at_once* of them run at most (none = as many as there
    are processors). *in_order*: rows come in the order of the tasks, otherwise as they are finished. *buffer_bytes* of
    the object store are used at most for what was made and not yet taken. Beyond *max_ray_tasks*, several tasks are run
    one after the other in one of Ray's, which keeps its bookkeeping small.
    """
    items = [{"task": json.dumps(task)} for task in tasks]
    blocks = min(len(items), max_ray_tasks)
    dataset = ray.data.from_items(items, override_num_blocks=blocks).map_batches(
        partial(_run, function=function),
        batch_size=1,
        batch_format="numpy",
        num_cpus=num_cpus,
        compute=None if at_once is None else ray.data.TaskPoolStrategy(size=min(at_once, blocks)),
    )
    dataset.context.enable_progress_bars = False
    dataset.context.print_on_execution_start = False
    # Ray's default of 128 MiB delays the first batch until so much is read, and a few such blocks fill the store.
    dataset.context.target_max_block_size = BLOCK_BYTES
    options = dataset.context.execution_options
    options.preserve_order = in_order
    if buffer_bytes is not None:
        options.resource_limits = options.resource_limits.copy(object_store_memory=buffer_bytes)
    # Ray Data says on the console that its bars are off and that a run is over; our own lines say what matters.
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
    logging.getLogger("ray.data._internal.execution.streaming_executor").setLevel(logging.WARNING)
    return dataset


def iterate(dataset: ray.data.Dataset, **options: Any) -> Iterator[Any]:
    """`dataset.iter_batches(**options)`; what a task raised comes out as itself instead of Ray's report about it."""
    try:
        yield from dataset.iter_batches(**options)
    except RayTaskError as error:
        if isinstance(error.cause, (TMADError, ValueError)):
            raise error.cause from None
        raise


def _run(block: dict[str, np.ndarray], *, function: Callable[[dict[str, Any]], pa.Table]) -> Iterator[pa.Table]:
    for task in block["task"]:
        yield function(json.loads(task))
