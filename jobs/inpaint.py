"""Fill the holes of a collection of images, on all machines of a Ray cluster or on this one."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pipeline import storage
from pipeline.inpaint.config import InpaintConfig
from pipeline.runs.cli import parse, run_job, with_model

SOME_FAILED = 3
"""Exit code of a job that came to its end and could not fill some inputs."""

DESCRIPTION = """
Fill the holes of a collection of images: a folder, tar files, Parquet or a list, by path or URI. Results keep the tree,
the names, the format and the metadata; every pixel outside the holes is bit-identical where the format is lossless.
--output gets ledger.parquet too: a row for each input, done, skipped or failed with its reason.

The same command again does only what is missing, or whose image or mask has changed; --dry-run reads the pairs of image
and mask and says what would be done. TMAD_MODEL saves naming the model.

Exit codes: 0 all is well, 3 some inputs failed (the ledger says which and why), 1 the job could not go on, 2 wrong
options.

Examples:
  python jobs/inpaint.py --input photos --masks masks --output filled --model runs/demo
  python jobs/inpaint.py --input photos --masks photos --mask-suffix _mask --output filled --model runs/demo/model
  python jobs/inpaint.py --input scans.tar --mask-from colour --mask-colour '#ff00ff' --output filled --model runs/demo
  python jobs/inpaint.py --input photos --mask-from boxes --masks boxes.json --dilate 8 --output filled --model m
  python jobs/inpaint.py --input s3://bucket/photos --masks s3://bucket/masks --output s3://bucket/filled \\
      --model models:/tmad@champion --tracking-uri http://mlflow:5000 --use-gpu

One picture, without Ray: tmad inpaint photo.jpg mask.png -o filled.jpg --model runs/demo
"""


def main(argv: Sequence[str]) -> int:
    """Parse, inpaint, print the counts; returns the exit code."""
    command = parse(InpaintConfig, with_model(argv), prog="inpaint.py", description=DESCRIPTION)
    # Ray takes seconds to import; --help and a wrong option should not.
    from pipeline.inpaint.ledger import LEDGER
    from pipeline.inpaint.run import check, inpaint_all
    from pipeline.runs.progress import by_reason

    if command.dry_run:
        print(command.resolved())
        for line in check(command.config):
            print(line, file=sys.stderr)
        return 0
    summary = inpaint_all(command.config)
    print(
        f"{summary.done} filled in {summary.seconds:.0f} s, {summary.kept} were settled before, "
        f"{summary.skipped} skipped, {summary.failed} failed"
        f"{f' ({by_reason(summary.reasons)})' if summary.reasons else ''}; "
        f"ledger: {storage.redact(command.config.output)}/{LEDGER}"
    )
    return SOME_FAILED if summary.failed else 0


if __name__ == "__main__":
    run_job(main)
