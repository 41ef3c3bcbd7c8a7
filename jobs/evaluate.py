"""Measure a model on a prepared set: tables, pictures and a page, beside its coarse result and a classical fill."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pipeline import storage
from pipeline.cli import parse, run_job
from pipeline.evaluate import METHOD_TITLES, EvaluateConfig, Evaluation, evaluate

DESCRIPTION = """
Measure a model on a prepared set. The masks are those stored in the set: a repeated evaluation gives the same figures.

Writes into --out: report.html (tables and pictures, one file), summary.json, per_image.parquet, per_image.csv and
pictures.png.

Examples:
  python jobs/evaluate.py --model runs/demo --data data/val --out runs/demo/evaluation
  python jobs/evaluate.py --model models:/tmad@champion --tracking-uri sqlite:///runs/mlflow.db --limit 500
  python jobs/evaluate.py --model s3://bucket/runs/places/model --data s3://bucket/places/val --methods tmad coarse
"""


def main(argv: Sequence[str]) -> int:
    """Parse, evaluate, print the means of the measures that the paper's tables hold; returns the exit code."""
    command = parse(EvaluateConfig, argv, prog="evaluate.py", description=DESCRIPTION)
    if command.dry_run:
        print(command.resolved())
        return 0
    print(_shown(evaluate(command.config)))
    print(f"report: {storage.redact(command.config.out)}/report.html")
    return 0


def _shown(result: Evaluation) -> str:
    names = ("l1_hole_pct", "psnr_hole", "ssim_full", "swd_hole")
    lines = [f"{'':42}" + "".join(f"{name:>14}" for name in names)]
    for method, means in result.means.items():
        values = (means.get(name) for name in names)
        cells = (f"{'–' if value is None else format(value, '.3f'):>14}" for value in values)
        lines.append(f"{METHOD_TITLES[method]:42}" + "".join(cells))
    return "\n".join(lines)


if __name__ == "__main__":
    run_job(main)
