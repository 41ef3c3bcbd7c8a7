"""A service that fills pictures over HTTP, on Ray Serve: replicas, batches, autoscaling."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pipeline.cli import parse, run_job, with_model
from pipeline.service.config import ServeConfig

DESCRIPTION = """
Answer POST /fill, a form with a photograph and a mask, with the filled file, in the photograph's format. Starts Ray on
this machine, or joins the cluster of RAY_ADDRESS, and runs until Ctrl-C. The page of `tmad web` is at the root.

Needs: pip install 'tmad[serve]'. At another address than this machine's own (--host) requests need a token.
On Kubernetes: infra/kubernetes/service.yaml.

Examples:
  python jobs/serve.py
  curl -F photo=@photo.jpg -F mask=@mask.png http://127.0.0.1:8000/fill -o filled.jpg
  python jobs/serve.py --model models:/tmad@champion --tracking-uri http://mlflow:5000 --use-gpu --max-replicas 2
  TMAD_WEB_TOKEN=... python jobs/serve.py --host 0.0.0.0 --cpus 4
"""


def main(argv: Sequence[str]) -> int:
    """Parse, serve until Ctrl-C; returns the exit code."""
    command = parse(ServeConfig, with_model(argv), prog="serve.py", description=DESCRIPTION)
    if command.dry_run:
        print(command.resolved())
        return 0
    from pipeline.service.run import serve

    serve(command.config)
    return 0


if __name__ == "__main__":
    run_job(main)
