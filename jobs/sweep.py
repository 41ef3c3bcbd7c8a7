"""Search the settings of training: many short runs, compared by metrics that do not move with the loss weights.

Examples:
  # 16 points of the loss weights (Table II), on sets made with jobs/prepare.py, as many at once as there is room for
  python jobs/sweep.py --preset demo --name weights --run.data.train data/train --run.data.val data/val
      --run.workers.num-workers 1
  # what that would take, before anything is scheduled
  python jobs/sweep.py --preset demo --name weights --dry-run
  # two weights and the learning rate by Optuna, for distortion and texture at once, from a given coarse network
  python jobs/sweep.py --preset places --name front --search optuna --objectives psnr_hole swd_hole_truthscaled
      --space loss.weight_gan_patch loss.weight_l1=0.1..10 optim.lr --init-from runs/coarse
  # a long run with the winner's settings
  python jobs/train_places.py --config runs/weights/winner.json --name best

The same command with the same --name continues a sweep that was stopped.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pipeline import storage
from pipeline.runs.cli import parse, run_job
from pipeline.sweep.config import SWEEP_PRESETS, SweepConfig


def main(argv: Sequence[str]) -> int:
    """Parse *argv* and sweep; returns the exit code."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--images-per-s", type=float)
    known, rest = first.parse_known_args(list(argv))
    command = parse(SweepConfig, rest, SWEEP_PRESETS, prog="python jobs/sweep.py", description=__doc__ or "")
    if known.images_per_s is not None and (not command.dry_run or known.images_per_s <= 0):
        raise ValueError("--images-per-s goes with --dry-run and is above 0: the rate of one trial")
    # Ray and MLflow take seconds to import; --help and a wrong option should not.
    if command.dry_run:
        from pipeline.sweep.plan import plan

        print(command.resolved())
        print(plan(command.config, images_per_s=known.images_per_s), file=sys.stderr)
        return 0
    from pipeline.sweep.launch import sweep
    from pipeline.sweep.summary import table

    done = sweep(command.config)
    print(table(done.trials, list(done.trials[0].point), command.config.objectives).text())
    folder = storage.redact(done.folder)
    print(f"report: {folder}/report.html")
    print(f"winner: {folder}/winner.json, for jobs/train_places.py --config")
    return 0


if __name__ == "__main__":
    run_job(main)
