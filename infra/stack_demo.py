"""The demo's photographs through every job, each submitted to the stack's Ray cluster as to any other.

    python infra/stack_demo.py

Uses the stack that runs (`python infra/stack.py`), or starts one and ends it. Settings are those of the preset `smoke`:
it shows that storage, tracking, cluster and jobs work together, in a minute or two, and learns nothing of use.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from infra.stack import BUCKET, FOLDER, ROOT, Stack, StackFailed, ended_by_signals, running
from pipeline import storage
from pipeline.demo.photographs import write_photographs
from pipeline.demo.run import write_examples

PLACE = f"s3://{BUCKET}"
MODEL = "models:/tmad-smoke@champion"
SMALL = ["--crop-size", "64", "--short-side", "64", "128", "--patch-size", "8", "--memory.pool-size", "8"]

JOBS: dict[str, list[str]] = {
    "prepare train": ["prepare.py", "--source", f"{PLACE}/photographs/train", "--out", f"{PLACE}/train", *SMALL],
    "prepare val": [
        *("prepare.py", "--split", "val", "--source", f"{PLACE}/photographs/val", "--out", f"{PLACE}/val", *SMALL),
        *("--crops-per-image", "2", "--against", f"{PLACE}/train"),
    ],
    "train": [
        *("train_places.py", "--preset", "smoke", "--name", "stack-demo", "--runs", f"{PLACE}/runs"),
        *("--data.train", f"{PLACE}/train", "--data.val", f"{PLACE}/val"),
        # More than half of a node each, so that Ray places them on two of them.
        *("--workers.cpus-per-worker", "2", "--workers.threads", "1"),
    ],
    "evaluate": ["evaluate.py", "--model", MODEL, "--data", f"{PLACE}/val", "--out", f"{PLACE}/evaluation"],
    "inpaint": [
        *("inpaint.py", "--model", MODEL, "--input", f"{PLACE}/examples/images"),
        *("--masks", f"{PLACE}/examples/masks", "--output", f"{PLACE}/filled"),
    ],
}
"""What is submitted, in this order."""

RESULTS = ("train/manifest.json", "runs/stack-demo/finished.json", "evaluation/report.html", "filled/ledger.parquet")
"""What has to lie in the bucket at the end."""


def submit(arguments: list[str]) -> int:
    """Run a job on the cluster that the environment names, with its output here; returns its exit code."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--working-dir", ".", "--"]
    script, *options = arguments
    return subprocess.run([*command, "python", f"jobs/{script}", *options], cwd=ROOT).returncode


def bring_photographs() -> None:
    """The demo's photographs, and three of them with a mask each, into the bucket."""
    with tempfile.TemporaryDirectory(prefix="tmad-") as temporary:
        folder = Path(temporary)
        write_photographs(folder / "photographs")
        write_examples(folder / "photographs" / "val", folder / "examples")
        for part in ("photographs", "examples"):
            storage.upload_folder(folder / part, f"{PLACE}/{part}")


@contextlib.contextmanager
def stack_environment(folder: Path, separate_hosts: bool) -> Iterator[None]:
    """The variables of the running stack in this process, or of one that ends with the block."""
    if (there := running(folder)) is not None:
        os.environ.update(there)
        yield
        return
    with Stack(folder, separate_hosts=separate_hosts) as stack:
        os.environ.update(stack.environment)
        yield


def main() -> int:
    """Run every job; print seconds and where the results lie; 1 as soon as one of them fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="that of the stack")
    parser.add_argument("--separate-hosts", action="store_true", help="each node in a network namespace; needs root")
    arguments = parser.parse_args()
    folder = arguments.folder
    seconds: dict[str, float] = {}
    began = time.monotonic()

    def done(stage: str) -> None:
        nonlocal began
        seconds[stage] = time.monotonic() - began
        began = time.monotonic()

    try:
        with ended_by_signals(), stack_environment(folder, arguments.separate_hosts):
            done("stack up")
            bring_photographs()
            done("photographs")
            for stage, command in JOBS.items():
                print(f"── {stage}", flush=True)
                if submit(command) != 0:
                    print(f"{stage} failed; the stack's logs are in {folder}", file=sys.stderr)
                    return 1
                done(stage)
            missing = [name for name in RESULTS if not storage.exists(f"{PLACE}/{name}")]
    except KeyboardInterrupt:
        return 130
    except StackFailed as error:
        print(error, file=sys.stderr)
        return 1
    if missing:
        print(f"not in {PLACE}: {', '.join(missing)}", file=sys.stderr)
        return 1
    print(f"\nThe stack's demo took {sum(seconds.values()):.0f} s:")
    print("\n".join(f"  {stage:<14}{value:7.1f} s" for stage, value in seconds.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
