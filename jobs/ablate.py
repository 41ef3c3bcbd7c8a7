"""Repeat one of the paper's ablations: the variants, trained alike, in the paper's table or figure beside ours.

Examples:
  # Table IV (N_c = 1, 2, 4, 6 and W-Sum) at the scale of the demo, on its photographs (make demo prepares them)
  python jobs/ablate.py --study candidates --preset demo --run.workers.num-workers 1
  # Fig. 7, Fig. 8, Fig. 9
  python jobs/ablate.py --study relativistic --preset demo --seeds 3
  python jobs/ablate.py --study blending --preset celebahq --run.data.train s3://bucket/celebahq/train
      --run.data.val s3://bucket/celebahq/val --run.runs s3://bucket/runs --init-from s3://bucket/runs/coarse
  python jobs/ablate.py --study mask_size --preset demo

The same command continues an ablation that was stopped.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pipeline import storage
from pipeline.runs.cli import parse, run_job


def main(argv: Sequence[str]) -> int:
    """Parse *argv* and train the variants; returns the exit code."""
    from pipeline.sweep.ablate import ABLATE_PRESETS, AblateConfig, ablate, check

    command = parse(AblateConfig, argv, ABLATE_PRESETS, prog="python jobs/ablate.py", description=__doc__ or "")
    if command.dry_run:
        print(command.resolved())
        for line in check(command.config):
            print(line, file=sys.stderr)
        return 0
    done, table = ablate(command.config)
    print(table)
    print(f"report: {storage.redact(done.folder)}/report.html")
    return 0


if __name__ == "__main__":
    run_job(main)
