"""Submit a job to a cluster, after checking its settings, places, token, upload size and commit."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pipeline.runs.cli import parse, parse_elsewhere, run_job
from pipeline.runs.submit import SubmitConfig

DESCRIPTION = """
Sends a job to the dashboard of a Ray cluster, as `ray job submit` does, but first looks at what it would fail of there:
options and values, relative places, the token (RAY_AUTH_TOKEN or ~/.ray/auth_token, which is sent), the size of the
upload, and whether the code is that of its commit, which the run records. The job and its options come last.

Examples:
  python jobs/submit.py --address http://HEAD:8265 train --preset places --name places --runs s3://bucket/runs
      --data.train s3://bucket/places/train --data.val s3://bucket/places/val
  python jobs/submit.py --no-wait prepare --source s3://bucket/photos --out s3://bucket/sets/train
"""

SENT = {
    **{name: name for name in ("prepare", "train_places", "sweep", "ablate", "promote", "evaluate", "inpaint")},
    "train": "train_places",
    "train-places": "train_places",
}
"""Names of the jobs that a cluster runs -> module."""


def main(argv: Sequence[str]) -> int:
    """Check and submit; returns the exit code."""
    place = next((number for number, text in enumerate(argv) if text in SENT), len(argv))
    if place == len(argv) and not {"-h", "--help"} & set(argv):
        raise ValueError(f"name a job and its options after those of submit: {', '.join(SENT)}")
    command = parse(SubmitConfig, list(argv[:place]), prog="submit.py", description=DESCRIPTION)
    module, arguments = SENT[argv[place]], list(argv[place + 1 :])
    parse_elsewhere(import_module(f"jobs.{module}").main, arguments)
    if command.dry_run:
        print(f"{command.config.dashboard}: python jobs/{module}.py {shlex.join(arguments)}")
        return 0
    from pipeline.runs.submit import submit

    return submit(command.config, module, arguments)


if __name__ == "__main__":
    run_job(main)
