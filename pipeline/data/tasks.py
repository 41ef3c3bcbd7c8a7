"""Ray Data for the data plane: a list of small tasks in, a stream of Arrow tables out.

Tasks are plain values that name what to read; the tables hold encoded images, never decoded ones.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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
    num_gpus: float = 0,
    in_order: bool = False,
    max_ray_tasks: int = 10_000,
    at_once: int | None = None,
    runtime_env: dict[str, Any] | None = None,
) -> ray.data.Dataset:
    """A lazy data set of the tables that *function* makes of each task (a JSON object).

    *num_cpus* processors and *num_gpus* GPUs are asked for by each running task, of which *at_once* run at a time (none
    = as many as there is room for), in processes with this *runtime_env*. *in_order*: rows come in the order of the
    tasks, otherwise as they are finished. Beyond *max_ray_tasks*, several tasks are run one after the other in one of
    Ray's, which keeps its bookkeeping small.
    """
    options: dict[str, Any] = {"runtime_env": runtime_env} if runtime_env else {}
    return quiet(
        _tasks(tasks, max_ray_tasks).map_batches(
            _over_blocks(function),
            batch_size=1,
            batch_format="numpy",
            num_cpus=num_cpus,
            num_gpus=num_gpus or None,
            compute=ray.data.TaskPoolStrategy(size=at_once) if at_once else None,
            **options,
        ),
        in_order=in_order,
    )


def run_on_actors(
    tasks: Sequence[dict[str, Any]],
    worker: type,
    arguments: tuple[Any, ...],
    *,
    size: int,
    num_cpus: float | None,
    num_gpus: float | None = None,
    max_ray_tasks: int = 10_000,
) -> ray.data.Dataset:
    """As `run_tasks`, on *size* actors: `worker(*arguments)` is made once in each and called with tasks as JSON, a
    block `{"task": [...]}`, for the tables of each. A lost actor is replaced and its task run again."""
    return quiet(
        _tasks(tasks, max_ray_tasks).map_batches(
            worker,
            fn_constructor_args=arguments,
            compute=ray.data.ActorPoolStrategy(size=size),
            batch_size=1,
            batch_format="numpy",
            num_cpus=num_cpus,
            num_gpus=num_gpus,
        )
    )


def _tasks(tasks: Sequence[dict[str, Any]], most: int) -> ray.data.Dataset:
    items = [{"task": json.dumps(task)} for task in tasks]
    return ray.data.from_items(items, override_num_blocks=min(len(items), most))


def quiet(dataset: ray.data.Dataset, *, in_order: bool = False) -> ray.data.Dataset:
    """The same, with blocks of `BLOCK_BYTES` and without Ray Data's own words on the console."""
    dataset.context.enable_progress_bars = False
    dataset.context.print_on_execution_start = False
    # Otherwise it wraps what a function raises, and on the way here loses what it wrapped.
    dataset.context.raise_original_map_exception = True
    # Ray's default of 128 MiB delays the first batch until so much is read, and a few such blocks fill the store.
    dataset.context.target_max_block_size = BLOCK_BYTES
    dataset.context.execution_options.preserve_order = in_order
    # Ray Data says on the console that its bars are off and that a run is over; our own lines say what matters.
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
    logging.getLogger("ray.data._internal.execution.streaming_executor").setLevel(logging.WARNING)
    return dataset


@contextmanager
def own_errors() -> Iterator[None]:
    """What a task raised comes out as itself instead of Ray's report about it."""
    try:
        yield
    except RayTaskError as error:
        if isinstance(error.cause, (TMADError, ValueError)):
            raise error.cause from None
        raise


def iterate(dataset: ray.data.Dataset | ray.data.DataIterator, **options: Any) -> Iterator[Any]:
    """`dataset.iter_batches(**options)`; what a task raised comes out as itself instead of Ray's report about it."""
    with own_errors():
        yield from dataset.iter_batches(**options)


def _over_blocks(
    function: Callable[[dict[str, Any]], pa.Table],
) -> Callable[[dict[str, np.ndarray]], Iterator[pa.Table]]:
    def run(block: dict[str, np.ndarray]) -> Iterator[pa.Table]:
        for task in block["task"]:
            yield function(json.loads(task))

    run.__name__ = getattr(function, "func", function).__name__  # Ray's dashboard calls the operator so
    return run
