"""The whole path on this machine: photographs, prepared sets, training, evaluation, registered model, inpainting."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pipeline.demo.run import DemoConfig, run_demo
from pipeline.runs.cli import parse, run_job
from pipeline.storage import check_place

DESCRIPTION = """
Train a small T-MAD on photographs that ship inside scikit-image and scikit-learn, and show what it does with others.

Nothing is downloaded. A second call keeps what is there and continues where the first one stopped. The end names the
report, the metrics and the command that opens MLflow.

Examples:
  python jobs/demo.py
  python jobs/demo.py --out somewhere/else
  python jobs/demo.py --training smoke --out try
"""


def main(argv: Sequence[str]) -> int:
    """Parse, run the demo, print where to look; returns the exit code."""
    command = parse(DemoConfig, argv, prog="demo.py", description=DESCRIPTION)
    check_place(command.config.out)
    if command.dry_run:
        print(command.resolved())
        return 0
    print(run_demo(command.config).message())
    return 0


if __name__ == "__main__":
    run_job(main)
