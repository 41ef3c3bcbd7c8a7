"""A page with a brush: open a photograph, paint over what should go, save the filled picture."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pipeline.runs.cli import parse, run_job, with_model
from pipeline.service.config import WebConfig

DESCRIPTION = """
A page on this machine: open or drop a photograph, paint over what should go, or mark boxes or take a mask file, fill,
compare, see where texture was taken from, save in the photograph's own format with its metadata. Nothing leaves the
machine. It prints the address to open and runs until Ctrl-C.

Needs: pip install 'tmad[web]'. At another address than this machine's own (--host) requests need a token.
TMAD_MODEL saves naming the model.

Examples:
  python jobs/web.py
  python jobs/web.py --model runs/first --port 8080
  TMAD_WEB_TOKEN=... python jobs/web.py --host 0.0.0.0
"""


def main(argv: Sequence[str]) -> int:
    """Parse, serve until Ctrl-C; returns the exit code."""
    command = parse(WebConfig, with_model(argv), prog="web.py", description=DESCRIPTION)
    if command.dry_run:
        print(command.resolved())
        return 0
    from pipeline.service.web import serve

    serve(command.config)
    return 0


if __name__ == "__main__":
    run_job(main)
