"""Photographs to a prepared set: Parquet shards of crops, holes and memory coordinates, and a manifest.

Examples:
  python jobs/prepare.py --source photos/train --out data/train
  python jobs/prepare.py --split val --source photos/val --out data/val --against data/train
  python jobs/prepare.py --source photos/train --out data/train --short-side 256 384 --crops-per-image 4
  python jobs/prepare.py --source s3://bucket/paris --out s3://bucket/sets/paris --mask rectangle \
      --memory.rule clean --memory.stride-divisor 2
  python jobs/prepare.py --split val --source lists/places365_val.txt \
      --root s3://bucket/places/val_256.tar/val_256 --expect places365-val --out s3://bucket/sets/places-val
  python jobs/prepare.py --source photos/train --mask-from paired --masks masks/train --mask-hole white --out data/train
  ray job submit --working-dir . -- python jobs/prepare.py --source s3://bucket/places --out s3://bucket/sets/places

A source is a folder of images, tar files, Parquet files or a text list of keys: docs/bring-your-own-data.md.
Stopped at any moment, the same command continues; new images extend the set. An image that cannot be used,
or is there twice, is left out and listed with its reason in quarantine.jsonl; report.html shows them, see
docs/data-contract.md.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pipeline.data.prepare import PrepareConfig, check, prepare
from pipeline.runs.cli import parse, run_job


def main(argv: Sequence[str] | None = None) -> None:
    """Prepare the set that *argv* asks for and print its manifest's digest and counts."""
    command = parse(PrepareConfig, argv, prog="prepare.py", description=__doc__ or "")
    if command.dry_run:
        print(command.resolved())
        for line in check(command.config):
            print(line, file=sys.stderr)
        return
    manifest = prepare(command.config)
    print(f"{command.config.out}: {manifest.records} records in {len(manifest.shards)} shards, {manifest.digest}")


if __name__ == "__main__":
    run_job(main)
