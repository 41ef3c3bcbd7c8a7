"""Measure a model on an evaluation set: tables with intervals, pictures and a page, beside other methods."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pipeline import storage
from pipeline.data.schema import read_manifest
from pipeline.evaluation.config import EvaluateConfig
from pipeline.evaluation.evaluate import Evaluated, check, evaluate
from pipeline.evaluation.external import export_inputs
from pipeline.runs.cli import parse, run_job

DESCRIPTION = """
Measure a model on a prepared set, beside classical fills and the results of other methods. Crops and masks are those
stored in the set: the same model on the same set gives the same figures, on any number of workers.

Writes into --out: report.html (tables and pictures, one file), report.md, report.json, per_image/ (Parquet), results/
and pictures.png. Stopped at any moment, the same command continues where it stopped. See docs/evaluation.md.

Examples:
  python jobs/evaluate.py --model runs/demo --data data/val --out runs/demo/evaluation
  python jobs/evaluate.py --model models:/tmad@champion --tracking-uri sqlite:///runs/mlflow.db --limit 500
  python jobs/evaluate.py --model s3://bucket/runs/places/model --data s3://bucket/places/val --methods tmad coarse
  python jobs/evaluate.py --data data/val --export inputs
  python jobs/evaluate.py --model runs/first --external lama=results/lama --coarse-from deepfill=results/deepfill
  python jobs/evaluate.py --model runs/second --out runs/second/evaluation --against runs/first/evaluation
  python jobs/evaluate.py --model runs/first --fid.network inception --lpips.network vgg16
"""


def main(argv: Sequence[str]) -> int:
    """Parse, evaluate, print the means of the metrics that the paper's tables hold; returns the exit code."""
    command = parse(EvaluateConfig, argv, prog="evaluate.py", description=DESCRIPTION)
    if command.dry_run:
        print(command.resolved())
        for line in check(command.config):
            print(line, file=sys.stderr)
        return 0
    if (out := command.config.export) is not None:
        count = export_inputs(command.config.data, out, manifest=read_manifest(command.config.data))
        print(f"{count} images and masks: {storage.redact(out)}")
        return 0
    print(_shown(evaluate(command.config)))
    print(f"report: {storage.redact(command.config.out)}/report.html")
    return 0


def _shown(result: Evaluated) -> str:
    names = ("l1_hole_pct", "psnr_hole", "ssim_full", "swd_hole")
    lines = [f"{'':42}" + "".join(f"{name:>14}" for name in names)]
    for method, entry in result.summary["methods"].items():
        if entry["not_measured"]:
            lines.append(f"{entry['title']:42}  not measured: {entry['not_measured']}")
            continue
        values = (result.means[method].get(name) for name in names)
        cells = (f"{'–' if value is None else format(value, '.3f'):>14}" for value in values)
        lines.append(f"{entry['title']:42}" + "".join(cells))
    return "\n".join(lines)


if __name__ == "__main__":
    run_job(main)
