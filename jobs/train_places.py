"""Train T-MAD on a prepared set, or straight from photographs, on any number of workers.

First the coarse network alone, then everything jointly.

Examples:
  # the two workers of a laptop, on sets made with jobs/prepare.py
  python jobs/train_places.py --preset demo --data.train data/train --data.val data/val --name first
  # straight from photographs, no training set prepared; the options after --data.images. are those of jobs/prepare.py
  python jobs/train_places.py --data.images.source photos/train --data.images.mask rectangle --data.val data/val
  # the same with a preset, whose own training set is taken back
  python jobs/train_places.py --preset demo --data.train None --data.images.source photos/train --data.val data/val
  # the paper's settings for free-form holes, on a cluster (from the folder that holds jobs/)
  ray job submit --working-dir . -- python jobs/train_places.py --preset places_freeform --name places
      --runs s3://bucket/runs --data.train s3://bucket/places/train --data.val s3://bucket/places/val
  # a run once more, with another seed
  python jobs/train_places.py --config runs/first/config.json --name second --seed 1

The same command with the same --name continues a run that was stopped.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pipeline.cli import parse, run_job
from pipeline.config import RunConfig
from pipeline.presets import PRESETS


def main(argv: Sequence[str]) -> None:
    """Parse *argv* and train."""
    command = parse(RunConfig, argv, PRESETS, prog="python jobs/train_places.py", description=__doc__ or "")
    # Ray and MLflow take seconds to import; --help and a wrong option should not.
    from pipeline.train.launch import plan, train

    if command.dry_run:
        print(command.resolved())
        print(plan(command.config), file=sys.stderr)
        return
    train(command.config)


if __name__ == "__main__":
    run_job(main)
