"""Fill the holes of a folder of images, on all machines of a Ray cluster or on this one."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pipeline import storage
from pipeline.cli import parse, run_job
from pipeline.predict import LEDGER, InpaintConfig, inpaint_folder

DESCRIPTION = """
Fill the holes of a folder of images. Masks are images of the same size, white = hole, paired by name: photos/a/b.jpg
with masks/a/b.png. Results keep the tree and the names and are PNG, so that every pixel outside the hole is
bit-identical to the input. --output gets ledger.jsonl too: one line an input, done, skipped or failed with its reason.

The same command again does only what is missing.

Examples:
  python jobs/inpaint.py --input photos --masks masks --output filled --model runs/demo
  python jobs/inpaint.py --input photos --masks masks --mask-suffix _mask --output filled --model runs/demo/model
  python jobs/inpaint.py --input s3://bucket/photos --masks s3://bucket/masks --output s3://bucket/filled \\
      --model models:/tmad@champion --tracking-uri http://mlflow:5000 --use-gpu --num-actors 8
"""


def main(argv: Sequence[str]) -> int:
    """Parse, inpaint, print the counts; returns the exit code."""
    command = parse(InpaintConfig, argv, prog="inpaint.py", description=DESCRIPTION)
    if command.dry_run:
        print(command.resolved())
        return 0
    summary = inpaint_folder(command.config)
    print(
        f"{summary.done} filled in {summary.seconds:.0f} s, {summary.kept} were there already, "
        f"{summary.skipped} skipped, {summary.failed} failed; "
        f"ledger: {storage.redact(command.config.output)}/{LEDGER}"
    )
    return 0


if __name__ == "__main__":
    run_job(main)
