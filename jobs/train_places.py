"""Train T-MAD on a prepared set, or straight from photographs, on any number of workers.

First the coarse network alone, then everything jointly.

Examples:
  # the two workers of a laptop, on sets made with jobs/prepare.py
  python jobs/train_places.py --preset demo --data.train data/train --data.val data/val --name first
  # without a preset: a worker on each GPU that is there, in bfloat16, else one on this machine's processors
  python jobs/train_places.py --data.train data/train --data.val data/val --name mine
  # straight from photographs, no training set prepared; the options after --data.images. are those of jobs/prepare.py
  python jobs/train_places.py --data.images.source photos/train --data.images.mask rectangle --data.val data/val
  # the same with a preset, whose own training set is taken back
  python jobs/train_places.py --preset demo --data.train None --data.images.source photos/train --data.val data/val
  # the paper's settings for free-form holes, on a cluster (from the folder that holds jobs/)
  ray job submit --working-dir . -- python jobs/train_places.py --preset places --name places
      --runs s3://bucket/runs --data.train s3://bucket/places/train --data.val s3://bucket/places/val
  # a run once more, with another seed
  python jobs/train_places.py --config runs/first/config.json --name second --seed 1
  # before anything is scheduled: the plan, the time it takes at a stated rate, or at the one measured where this runs
  # on the device that is asked for, and whether all that it needs is there
  python jobs/train_places.py --preset celebahq --name faces --dry-run --images-per-s 60
  # fine-tuning of a registered model
  python jobs/train_places.py --preset celebahq --name faces --init-from models:/tmad@champion
  # joint training from the coarse network of another run
  python jobs/train_places.py --preset places --name joint --init-from runs/coarse --init-networks coarse
      --schedule.coarse-images 0

The same command with the same --name continues a run that was stopped.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pipeline.config import RunConfig
from pipeline.presets import PRESETS, fitted
from pipeline.runs.cli import parse, run_job

log = logging.getLogger(__name__)


def main(argv: Sequence[str]) -> int:
    """Parse *argv* and train; returns the exit code."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--images-per-s", type=float)
    known, rest = first.parse_known_args(list(argv))
    command = parse(RunConfig, rest, PRESETS, prog="python jobs/train_places.py", description=__doc__ or "")
    if known.images_per_s is not None and (not command.dry_run or known.images_per_s <= 0):
        raise ValueError("--images-per-s is an option of --dry-run, a rate above 0 from which the duration is computed")
    # Ray and MLflow take seconds to import; --help and a wrong option should not.
    if not chooses_machine(rest):
        command = replace(command, config=on_this_machine(command.config, rest))
    if command.dry_run:
        from pipeline.train.preflight import preflight

        found = preflight(command.config, images_per_s=known.images_per_s)
        print(command.resolved())
        print(found.text(), file=sys.stderr)
        return 0 if found.ok else 1
    from pipeline.train.launch import train

    train(command.config)
    return 0


def chooses_machine(argv: Sequence[str]) -> bool:
    """Whether the options say themselves where to train: by a preset, a file, or settings of workers."""
    options = {option.split("=", 1)[0].replace("_", "-") for option in argv}
    own = ("num-workers", "use-gpu", "no-use-gpu", "cpus-per-worker", "gpus-per-worker")
    return bool(options & {"--preset", "--config", *(f"--workers.{name}" for name in own)})


def on_this_machine(config: RunConfig, argv: Sequence[str]) -> RunConfig:
    """*config* on all that is there, and a line that says so; settings named in *argv* stay."""
    from pipeline.runs.cluster import available, joined, shown

    there = available()
    made = fitted(config, there)
    options = {option.split("=", 1)[0].replace("_", "-") for option in argv}
    if "--precision" in options:
        made = replace(made, precision=config.precision)
    if "--loss.gp-every" in options:
        made = replace(made, loss=replace(made.loss, gp_every=config.loss.gp_every))
    if "--schedule.batch-images" in options:
        made = replace(made, schedule=config.schedule, optim=config.optim)
    if "--optim.lr" in options:
        made = replace(made, optim=config.optim)
    workers = made.workers
    where = f"{workers.num_workers} GPUs" if workers.use_gpu else f"{made.threads} threads of the CPU, without a GPU"
    log.info(
        "%s has %s: training on %s in %s, %d images a step at a rate of %g; --preset, or --workers. and the options "
        "beside them, choose otherwise",
        "the cluster" if joined() else "this machine", shown(there), where, made.precision,
        made.schedule.batch_images, made.optim.lr,
    )  # fmt: skip
    return made


if __name__ == "__main__":
    run_job(main)
