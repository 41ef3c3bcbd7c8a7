"""jobs/inpaint.py killed at random moments, its actors and its raylet too: real processes; the results are those of a
job in one go, byte for byte, and the ledger names every input once.

The soak is on S3 too, which fails on and off, and goes on for `TMAD_SOAK_S`, each round with another seed, from
`TMAD_SOAK_SEED` on.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
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
from tests.conftest import ROOT, SOAK_S
from tests.jobs.processes import Job, workers_of_ray
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

INLINE = """
from jobs.inpaint import main
from pipeline.runs.cli import run_job
from pipeline.inpaint import run
from tests.pipeline.test_inpaint_batch import fill_here

run._fill_all = fill_here
run_job(main)
"""


def inpaint_job(log: Path, place: str, out: str, model: Path, *, with_ray: bool = True) -> Job:
    """jobs/inpaint.py with two actors, two images a task, or in one process."""
    options = {"input": f"{place}/i", "mask-from": "one", "masks": f"{place}/one.png", "output": out}
    options |= {"model": model, "num-actors": 2, "cpus-per-actor": 1, "images-per-task": 2}
    named = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    return Job(log, [sys.executable, *([ROOT / "jobs" / "inpaint.py"] if with_ray else ["-c", INLINE]), *named])


@pytest.fixture
def start(tmp_path: Path, model_folder: Path) -> Iterator[Callable[..., Job]]:
    jobs: list[Job] = []

    def begin(place: str, out: str, **more: bool) -> Job:
        jobs.append(inpaint_job(tmp_path / f"log-{len(jobs)}", place, out, model_folder, **more))
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


def test_a_job_that_is_killed_and_the_next_one_that_loses_an_actor_leave_what_one_in_one_go_leaves(
    start, expected, tmp_path, model_folder, ray_session
) -> None:
    place, out = str(tmp_path / "whole"), str(tmp_path / "out")
    job = start(place, out, with_ray=False)
    assert job.wait_for(lambda: files_of(out) >= 5), job.said()
    job.kill()
    before, killed = files_of(out), []

    def kill_an_actor() -> None:
        deadline = time.monotonic() + 120
        while not killed and time.monotonic() < deadline:
            if files_of(out) > before and (actors := list(workers_of_ray("MapWorker"))):
                os.kill(actors[0], signal.SIGKILL)
                killed.append(actors[0])
            time.sleep(0.01)

    killer = threading.Thread(target=kill_an_actor, daemon=True)
    killer.start()
    places = {"input": f"{place}/i", "mask_from": "one", "masks": f"{place}/one.png", "output": out}
    shape = {"num_actors": 2, "cpus_per_actor": 1, "images_per_task": 2}
    summary = inpaint_all(InpaintConfig(**places, model=str(model_folder), **shape))
    killer.join(timeout=10)
    assert killed
    # Three are a task there. The broken one may be settled too; rows of the task under way are lost.
    assert 3 <= summary.kept <= before + 1 < COUNT
    assert summary.failed == 1
    check(out, expected, str(summary))


@pytest.mark.soak
@pytest.mark.parametrize("where", ["local", "s3"])
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
        # The driver (all of it), the raylet, an actor under a job that goes on.
        kinds = ["", "raylet/raylet", "MapWorker"]
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
