"""One worker of Ray Train: sets up, reads its share, runs the loop."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import partial
from typing import Any

import ray
import ray.data
import torch

from pipeline import observe
from pipeline.config import RunConfig, from_json
from pipeline.data.batches import evaluation_batches, training_batches
from pipeline.data.coarse_results import CoarseResults
from pipeline.data.onthefly import LiveSet, Tally
from pipeline.errors import CheckpointNotKept, CheckpointsDamaged, Interrupted
from pipeline.models.pretrained import load_perceptual
from pipeline.runs.cli import configure_logging
from pipeline.tracking import Tracker
from pipeline.train.context import RayContext, TrainContext
from pipeline.train.log_relay import RelayHandler
from pipeline.train.loop import Feed, train_loop
from tmad.batch import Batch
from tmad.step import NonFiniteLoss

MAX_RECORD_TASKS = 16
"""Of one worker, unless told otherwise: each is a process, and what they make is kept in memory."""


def work(job: dict[str, Any]) -> dict[str, Any]:
    """One worker from start to end, in Ray Train's process; *job* as `launch.train` makes it.

    Returns the loop's summary, `{"failed": cause}` where a restart would only fail again, or `{"interrupted": why}`
    where none is wanted.
    """
    config = from_json(job["config"])
    context = RayContext(job["checkpoints"], job["relay"], job["lease"])
    _set_up_logging(config, context, job["relay"])
    torch.set_num_threads(config.threads)
    if context.device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = config.workers.tf32
    first = context.rank == 0
    tracker = Tracker(
        job["tracking_uri"] if first else None,
        job["run_id"] if first else None,
        jsonl=job["metrics"] if first else None,
        background=True,
        exported_as=config.name if first else None,
    )
    observe.count("first_worker_start", int(first))
    perceptual = load_perceptual(config, job["weights"])
    with tracker:
        try:
            feed = data_feed(config, context, job["live"], job["reader"])
            return train_loop(config, context, feed, tracker, perceptual, job["initial"], job["best"])
        # All workers stop alike, and would again after a restart: a result, so that Ray does not retry.
        except (NonFiniteLoss, CheckpointNotKept) as error:
            return {"failed": str(error)}
        except CheckpointsDamaged as error:
            return {"damaged": error.details["damaged"], "failed": error.message}
        except Interrupted as error:
            if error.details["restart"]:
                raise
            return {"interrupted": error.message}


def data_feed(config: RunConfig, context: TrainContext, live: LiveSet | None = None, reader: Any = None) -> Feed:
    """This worker's share of the prepared sets, or of the photographs *live* and the prepared validation set; *reader*
    as `training_batches` takes it."""
    train = live or config.data.training_set
    assert train is not None, "photographs are trained on as a live set"
    tally = Tally(live.config) if live else None
    place: dict[str, Any] = {"rank": context.rank, "world_size": context.world_size}
    # A set may have been prepared with a larger memory.
    place["pool_size"] = config.model.memory.pool_size
    if config.data.coarse_from is not None:
        place["coarse"] = CoarseResults(config.data.coarse_from)
    schedule = config.schedule

    def training(start_images: int) -> Iterator[Batch]:
        return training_batches(
            train,
            seed=config.seed,
            batch_images=schedule.batch_images,
            total_images=schedule.total_images,
            start_images=start_images,
            num_cells=schedule.patches_per_image,
            patch_size=config.model.patch_size,
            flip=config.data.flip,
            record_tasks=record_tasks(config) if live else 1,
            tally=tally,
            reader=reader,
            pinned=context.device.type == "cuda",
            **place,
        )

    validation = partial(
        evaluation_batches,
        config.data.validation_set,
        batch_images=schedule.batch_images,
        limit=schedule.validation_images,
        **place,
    )
    if tally is None:
        return Feed(training=training, validation=validation)
    return Feed(training=training, validation=validation, counts=lambda: {"data/replaced": float(tally.replaced)})


def record_tasks(config: RunConfig) -> int:
    """Tasks that make records for each worker at once, as `workers.record_tasks` says."""
    workers = config.workers
    free = ray.cluster_resources().get("CPU", 0.0) - workers.num_workers * workers.cpus_per_worker
    return workers.record_tasks or min(max(1, int(free / workers.num_workers)), MAX_RECORD_TASKS)


def _set_up_logging(config: RunConfig, context: TrainContext, lines: Any) -> None:
    configure_logging(config.name or "", context.rank)
    relay = RelayHandler(lines, f"worker {context.rank}: " if context.rank else "")
    for ours in ("tmad", "pipeline"):
        logger = logging.getLogger(ours)
        logger.addHandler(relay)
        # What all workers would say alike, the first one says.
        logger.setLevel(logging.INFO if context.rank == 0 else logging.WARNING)
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    ray.data.DataContext.get_current().enable_progress_bars = False
