"""Give a registered version the alias `champion` if it is measurably better than the version that has it.

Both are measured on the same holes of the same images; the gain of each metric has an interval from a paired
bootstrap, and the rule asks for its unfavourable end.

Examples:
  # the newest version of tmad against the champion: better in psnr_hole, not worse in ssim_full and l1_hole_pct
  python jobs/promote.py --data data/val
  # a certain version, by a stricter rule
  python jobs/promote.py --name tmad-faces --version 7 --data s3://bucket/faces/val --out s3://bucket/promotions
      --better psnr_hole=0.1 swd_hole_truthscaled=1 --not-worse ssim_full=0.001
  # back to the version before
  python jobs/promote.py --name tmad-faces --rollback

Exit code 0: the alias moved. 1: it did not, and the last line says why.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pipeline import storage
from pipeline.promotion.promote import Decision, PromoteConfig, check, promote, roll_back
from pipeline.runs.cli import parse, run_job


def main(argv: Sequence[str]) -> int:
    """Parse *argv* and decide; returns the exit code."""
    command = parse(PromoteConfig, argv, prog="python jobs/promote.py", description=__doc__ or "")
    config = command.config
    if command.dry_run:
        print(command.resolved())
        for line in check(config):
            print(line, file=sys.stderr)
        return 0
    decision = roll_back(config) if config.rollback else promote(config)
    print(_shown(decision))
    print(f"models:/{decision.name}@{config.alias} is version {decision.version}")
    return 0


def _shown(decision: Decision) -> str:
    lines = []
    for one in decision.comparisons:
        interval = f", interval {one.low:+.4g} to {one.high:+.4g}" if one.low is not None else ""
        lines.append(
            f"{one.requirement.metric:24} {one.requirement}: gain {one.gain:+.4g}{interval}, {one.images} images"
        )
    if decision.folder is not None:
        lines.append(f"report: {storage.redact(decision.folder)}/report.html")
    return "\n".join(lines)


if __name__ == "__main__":
    run_job(main)
