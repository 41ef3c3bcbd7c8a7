"""jobs/prepare.py killed at random moments, stopped, and started twice: real processes.

Their shards are made in the job's process, as a start of Ray is most of the time that such a test takes. The soaks have
Ray in them; the first goes on for `TMAD_SOAK_S`, killing the same job several times, each round with another seed, from
`TMAD_SOAK_SEED` on.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline import storage
from pipeline.data.prepare import PrepareConfig, prepare
from pipeline.data.schema import MANIFEST_NAME
from pipeline.errors import FolderInUse
from pipeline.runs.lease import LEASE_NAME
from tests.conftest import ROOT, SOAK_S
from tests.jobs.processes import Job, Moment
from tests.pipeline.test_contract import run_here
from tests.pipeline.test_plan import photo, write
from tmad.config import MemoryConfig

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

SETTINGS = {"crop_size": 64, "patch_size": 16, "images_per_shard": 2, "max_bad_fraction": 0.9}
PHOTOS = {f"{number:02d}.png": photo(number) for number in range(12)}
PHOTOS |= {f"copy-{number}.png": PHOTOS[f"{number:02d}.png"] for number in (1, 4, 7, 8)}
PHOTOS |= {"broken.png": PHOTOS["00.png"][:900], "d.png": photo(20), "e.png": photo(21)}
SHARDS = -(-len(PHOTOS) // SETTINGS["images_per_shard"])
KINDS = ["tree", "tar", "parquet", "list", "tree on s3"]
WITH_RAY = pytest.mark.parametrize(
    "with_ray", [False, pytest.param(True, marks=pytest.mark.soak)], ids=["in one process", "with Ray"]
)

INLINE = """
from pytest import MonkeyPatch
from jobs.prepare import main
from pipeline.runs.cli import run_job
from tests.pipeline.test_contract import run_here

run_here(MonkeyPatch())
run_job(main)
"""


def prepare_job(log: Path, arguments: dict[str, str], out: str, *, with_ray: bool = True, **more: object) -> Job:
    """jobs/prepare.py on these settings."""
    options = {**SETTINGS, **arguments, "out": out, **more, "memory.pool_size": 12}
    named = [text for name, value in options.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    return Job(log, [sys.executable, *([ROOT / "jobs" / "prepare.py"] if with_ray else ["-c", INLINE]), *named])


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Job]]:
    jobs: list[Job] = []

    def begin(arguments: dict[str, str], out: str, **more: object) -> Job:
        jobs.append(prepare_job(tmp_path / f"log-{len(jobs)}", arguments, out, **more))
        return jobs[-1]

    yield begin
    for job in jobs:
        job.kill()


def content(folder: str) -> dict[str, bytes]:
    """All files, hidden ones too where the folder is local."""
    if storage.is_remote(folder):
        return {key: storage.read_bytes(storage.join(folder, key)) for key in storage.list_files(folder)}
    files = (path for path in Path(folder).rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture
def source(tmp_path: Path, request: pytest.FixtureRequest) -> Callable[[str], tuple[dict[str, str], str]]:
    """Settings that name a source of this kind, and a folder beside it."""

    def make(kind: str) -> tuple[dict[str, str], str]:
        folder = tmp_path / kind.replace(" ", "-")
        if kind == "tree on s3":
            place = f"{request.getfixturevalue('bucket')}/{folder.name}"
            for key, data in PHOTOS.items():
                storage.write_atomic(f"{place}/photos/{key}", data)
            return {"source": f"{place}/photos"}, place
        arguments = write(kind, folder, [PHOTOS])
        return arguments, str(folder)

    return make


def in_one_go(arguments: dict[str, str], out: str) -> dict[str, bytes]:
    with pytest.MonkeyPatch.context() as patch:
        run_here(patch)
        prepare(PrepareConfig(**{**SETTINGS, **arguments, "memory": MemoryConfig(pool_size=12)}, out=out))
    return content(out)


def moments(out: str, rng: random.Random) -> list[tuple[str, Moment]]:
    """When to kill: at the n-th file, after the last shard, in the midst of leaving copies out, before the manifest."""

    def files() -> set[str]:
        return storage.file_sizes(out).keys()

    count, copies, pause = rng.randrange(1, 3 * SHARDS), rng.randrange(4), rng.uniform(0, 0.1)
    first: dict[str, float] = {}

    def after(name: str, seconds: float, found: bool) -> bool:
        if found:
            first.setdefault(name, time.monotonic())
        return name in first and time.monotonic() >= first[name] + seconds

    def receipts() -> int:
        return sum(name.startswith("shards/") and name.endswith(".json") for name in files())

    def filtered() -> int:
        # A shard whose images are all left out, or all unreadable, has no file.
        return receipts() - sum(name.startswith("shards/") and name.endswith(".parquet") for name in files())

    return [
        (f"file {count}", lambda: len(files()) >= count),
        (f"{pause:.3f} s after the last shard", lambda: after("shards", pause, receipts() == SHARDS)),
        (f"after {copies} copies", lambda: receipts() == SHARDS and (filtered() >= copies or "report.html" in files())),
        ("the quarantine", lambda: "quarantine.jsonl" in files()),
        ("the report", lambda: "report.html" in files() or MANIFEST_NAME in files()),
    ]


def kill_until_done(start, arguments: dict[str, str], out: str, rng: random.Random, *, first: int) -> list[str]:
    """Run and kill, the first time at the moment number *first*, until a run ends by itself; the moments."""
    killed = []
    for round_ in range(20):
        job = start(arguments, out)
        name, moment = moments(out, rng)[first] if round_ == 0 else rng.choice(moments(out, rng))
        enough = round_ > 0 and rng.random() < 0.3
        if enough or not job.wait_for(moment):
            code, said = job.end()
            assert code == 0, (out, killed, said)
            return killed
        job.kill()
        killed.append(name)
    pytest.fail(f"not done after {killed}")


@pytest.mark.parametrize(("number", "kind"), list(enumerate(KINDS)), ids=KINDS)
def test_a_job_that_was_killed_leaves_what_the_next_one_completes_to_what_one_in_one_go_leaves(
    number, kind, start, source
):
    arguments, place = source(kind)
    whole = in_one_go(arguments, f"{place}/whole")
    assert {MANIFEST_NAME, "quarantine.jsonl", "report.json", "report.html", "plan.parquet"} <= whole.keys()
    assert whole["quarantine.jsonl"].count(b'"duplicate"') == 4
    assert whole["quarantine.jsonl"].count(b'"truncated"') == 1
    out = f"{place}/set"
    job = start(arguments, out, with_ray=False)
    name, moment = moments(out, random.Random(number + 1))[number]
    assert job.wait_for(moment), (name, job.said())
    job.kill()
    assert in_one_go(arguments, out) == whole, name


@pytest.mark.soak
def test_a_job_that_is_killed_again_and_again_leaves_what_one_in_one_go_leaves(start, source, ray_free_slots, capsys):
    places = {kind: source(kind) for kind in KINDS}
    whole = {kind: in_one_go(arguments, f"{place}/whole") for kind, (arguments, place) in places.items()}

    def attempt(number: int) -> tuple[str, list[str]]:
        kind, seed = KINDS[number % len(KINDS)], number
        arguments, place = places[kind]
        out = f"{place}/set-{number}"
        killed = kill_until_done(start, arguments, out, random.Random(seed), first=number % 5)
        files = content(out)
        assert files.keys() == whole[kind].keys(), (kind, killed)
        assert [name for name in files if files[name] != whole[kind][name]] == [], (kind, killed)
        if not storage.is_remote(out):
            shutil.rmtree(out)
        return kind, killed

    end = time.monotonic() + SOAK_S
    number = first = int(os.environ.get("TMAD_SOAK_SEED", 0))
    while number == first or time.monotonic() < end:
        with ThreadPoolExecutor(ray_free_slots) as pool:
            done = list(pool.map(attempt, range(number, number + len(KINDS))))
        number += len(KINDS)
        with capsys.disabled():
            print(number, *done, sep="\n  ")


@pytest.fixture
def ray_free_slots() -> int:
    """Embedded Rays that run side by side."""
    return max(2, (os.cpu_count() or 2) // 2)


@pytest.mark.parametrize("kind", ["tree", "tree on s3"])
def test_a_second_job_on_one_output_ends_at_once_and_the_first_is_undisturbed(kind, start, source):
    arguments, place = source(kind)
    out = f"{place}/set"
    # Stopped, it has the folder for as long as the second one takes, and is not missed for minutes.
    first = start(arguments, out, with_ray=False, lease_expiry_s=3600)
    assert first.wait_for(lambda: LEASE_NAME in storage.file_sizes(out))
    first.send(signal.SIGSTOP)
    with pytest.raises(FolderInUse, match=f"another job writes to {out}: process {first.process.pid} "):
        in_one_go(arguments, out)
    first.send(signal.SIGCONT)
    assert first.end()[0] == 0
    assert content(out) == in_one_go(arguments, f"{place}/whole")


@WITH_RAY
def test_a_job_that_was_stopped_for_too_long_ends_without_harm_to_the_one_that_took_over(
    with_ray, start, source, caplog
):
    arguments, place = source("tree")
    out = f"{place}/set"
    first = start(arguments, out, with_ray=with_ray, lease_expiry_s=2)
    assert first.wait_for(lambda: "shards/00000.json" in storage.file_sizes(out))
    first.send(signal.SIGSTOP)
    whole = in_one_go(arguments, f"{place}/whole")
    time.sleep(2)  # with a younger sign of life, the second job would be refused at once
    assert in_one_go(arguments, out) == whole
    assert "it is taken over if it gives none within" in caplog.text
    first.send(signal.SIGCONT)
    code, said = first.end()
    assert code == 1
    assert f"{LEASE_NAME} is gone; this job gave no sign of life for too long" in said
    assert content(out) == whole


@WITH_RAY
def test_a_job_that_is_ended_politely_leaves_no_lease(with_ray, start, source):
    arguments, place = source("tree")
    out = f"{place}/set"
    job = start(arguments, out, with_ray=with_ray)
    assert job.wait_for(lambda: "shards/00000.json" in storage.file_sizes(out))
    job.process.terminate()
    assert job.end()[0] == 143
    assert LEASE_NAME not in storage.file_sizes(out)
