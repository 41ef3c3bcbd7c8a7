"""jobs/inpaint.py killed at random moments, its actors and its raylet too: real processes; the results are those of a
job in one go, byte for byte, and the ledger names every input once.

Locally and on S3, which fails on and off. `TMAD_SOAK_S=300` goes on for so many seconds, each round with another seed,
from `TMAD_SOAK_SEED` on, and has more killed.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import storage
from pipeline.inpaint import run
from pipeline.inpaint.config import InpaintConfig
from pipeline.inpaint.run import inpaint_all
from pipeline.report.pictures import png_bytes
from tests.conftest import ROOT
from tests.jobs.processes import Job
from tests.pipeline.test_inpaint_batch import MASK, fill_here, jpeg
from tests.tmad.tiny import make_image

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]

COUNT = 40
IMAGES = {
    f"{'town' if number % 2 else 'sea'}/{number:02d}.{'png' if number % 3 else 'jpg'}": (
        png_bytes(make_image(number)) if number % 3 else jpeg(make_image(number), quality=90)
    )
    for number in range(COUNT)
} | {"broken.png": png_bytes(make_image(0))[:900]}
SOAK_S = float(os.environ.get("TMAD_SOAK_S", 0))


def inpaint_job(log: Path, place: str, out: str, model: Path) -> Job:
    """jobs/inpaint.py with two actors, two images a task."""
    options = {"input": f"{place}/i", "mask-from": "one", "masks": f"{place}/one.png", "output": out}
    options |= {"model": model, "num-actors": 2, "cpus-per-actor": 1, "images-per-task": 2}
    named = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    return Job(log, [sys.executable, ROOT / "jobs" / "inpaint.py", *named])


@pytest.fixture
def start(tmp_path: Path, model_folder: Path) -> Iterator[Callable[[str, str], Job]]:
    jobs: list[Job] = []

    def begin(place: str, out: str) -> Job:
        jobs.append(inpaint_job(tmp_path / f"log-{len(jobs)}", place, out, model_folder))
        return jobs[-1]

    yield begin
    for job in jobs:
        job.kill()


def content(out: str) -> dict[str, bytes]:
    """The results, without the ledger; hidden files too where the output is local."""
    if storage.is_remote(out):
        found = {key: storage.read_bytes(storage.join(out, key)) for key in storage.list_files(out)}
    else:
        files = (path for path in Path(out).rglob("*") if path.is_file())
        found = {str(path.relative_to(out)): path.read_bytes() for path in files}
    found.pop("ledger.parquet")
    return found


def check(out: str, expected: dict[str, bytes], said: str) -> None:
    assert content(out) == expected, said
    assert ".cc:" not in said, "what Ray's C++ says is not for users"
    rows = pq.read_table(pa.BufferReader(storage.read_bytes(f"{out}/ledger.parquet"))).to_pylist()
    assert sorted(row["input"] for row in rows) == sorted(IMAGES)
    assert {row["input"]: row["bytes"] for row in rows if row["status"] == "done"} == {
        key: len(data) for key, data in expected.items()
    }
    assert [row["input"] for row in rows if row["status"] != "done"] == ["broken.png"]


@pytest.fixture
def expected(tmp_path: Path, model_folder: Path) -> dict[str, bytes]:
    """What a job in one go leaves, made without Ray."""
    place = tmp_path / "whole"
    for key, data in IMAGES.items():
        storage.write_atomic(f"{place}/i/{key}", data)
    storage.write_atomic(f"{place}/one.png", MASK)
    config = InpaintConfig(
        input=f"{place}/i", mask_from="one", masks=f"{place}/one.png", output=f"{place}/out", model=str(model_folder)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "_fill_all", fill_here)
        assert inpaint_all(config).done == COUNT
    return content(f"{place}/out")


def files_of(out: str) -> int:
    return sum(not key.startswith("ledger") for key in storage.file_sizes(out)) if storage.exists(out) else 0


@pytest.mark.parametrize(
    "where",
    ["local", pytest.param("s3", marks=pytest.mark.skipif(not SOAK_S, reason="takes minutes: set TMAD_SOAK_S"))],
)
def test_whatever_is_killed_nothing_is_lost_and_nothing_differs(where, start, expected, tmp_path, request) -> None:
    faulty = request.getfixturevalue("faulty") if where == "s3" else None
    place = f"{request.getfixturevalue('bucket')}" if where == "s3" else str(tmp_path / "whole")
    if where == "s3":
        for key, data in IMAGES.items():
            storage.write_atomic(f"{place}/i/{key}", data)
        storage.write_atomic(f"{place}/one.png", MASK)
    end = time.monotonic() + SOAK_S
    number = first = int(os.environ.get("TMAD_SOAK_SEED", 0))
    while number == first or time.monotonic() < end:
        rng, out, killed = random.Random(number), f"{place}/out-{number}", []
        # The driver (all of it), the raylet, an actor under a job that goes on; quickly, S3 has the driver alone.
        kinds = ["", "raylet/raylet", "MapWorker"] if where == "local" or SOAK_S else ["", "MapWorker"]
        for name in kinds:
            if faulty is not None:
                faulty.answer("SlowDown", method="GET", target=f"/i/.*{rng.randrange(10)}", times=3)
                faulty.reset(method="PUT", target=f"/out-{number}/.*{rng.randrange(10)}", times=2)
                faulty.truncate(200, target=f"/i/.*{rng.randrange(10)}", times=2)
            job = start(place, out)
            done = rng.randrange(1, COUNT * (1 + len(killed)) // (1 + len(kinds)))
            # Earlier rounds may have left that many: then as soon as there is something to kill.
            if not job.wait_for(
                lambda job=job, name=name, out=out, done=done: files_of(out) >= done and job.processes(name)
            ):
                break
            if name:
                assert job.send(signal.SIGKILL, name) > 0
            killed.append(name or "driver")
            if name == "MapWorker":
                break
            time.sleep(rng.uniform(0, 1) if name else 0)
            job.kill()
        code, said = job.end()
        if code not in (0, 3):
            code, said = start(place, out).end()
        assert code == 3, (killed, said)
        assert "1 failed" in said
        check(out, expected, f"{killed}\n{said}")
        number += 1
