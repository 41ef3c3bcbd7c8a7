"""A service for programs: forms with a photograph and a mask in, filled files out, by replicas on Ray."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pipeline.runs.cli import parse, run_job, with_model
from pipeline.service.config import ServeConfig

DESCRIPTION = """
Answers requests as the page's service does (docs/page.md), without the page, by as many copies of the model as are
needed, on CPUs or GPUs, several pictures at a time. A new version behind models:/name@alias is taken over while it
runs. It starts Ray on this machine, or joins RAY_ADDRESS, and runs until Ctrl-C.

Needs: pip install 'tmad[serve]'. At another address than this machine's own (--host) requests need a token.
For a cluster that lasts, see docs/serve.md. TMAD_MODEL saves naming the model.

Examples:
  python jobs/serve.py
  python jobs/serve.py --model models:/tmad@champion --gpus 1 --max-replicas 4
  curl -F photo=@photo.jpg -F mask=@mask.png http://127.0.0.1:8000/fill -o filled.jpg
"""


def main(argv: Sequence[str]) -> int:
    """Parse, serve until Ctrl-C; returns the exit code."""
    command = parse(ServeConfig, with_model(argv), prog="serve.py", description=DESCRIPTION)
    if command.dry_run:
        print(command.resolved())
        return 0
    from pipeline.service.serve import serve

    serve(command.config)
    return 0


if __name__ == "__main__":
    run_job(main)
