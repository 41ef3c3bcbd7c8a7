"""Every job and every end: Ctrl-C, SIGTERM, a closed terminal, a lost cluster, a full disk; the code and
the one line of each, and what the same command then leaves.

Each job is ended in the middle of its work, again and again, and leaves what one leaves that nothing has happened to.
That is a soak, but for one job ended once.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from jobs.inpaint import main as inpaint_main
from pipeline.data.schema import MANIFEST_NAME
from pipeline.models.registry import register_model
from pipeline.report.pictures import png_bytes
from pipeline.runs.lease import LEASE_NAME
from pipeline.tracking import Tracker, mlflow_client
from tests.conftest import RAY_ENVIRONMENT, ROOT
from tests.jobs.conftest import CallJob
from tests.jobs.processes import Job, Moment, small_sets
from tests.pipeline.test_inpaint_batch import fill_here
from tests.tmad.tiny import MODEL, make_image, make_mask
from tmad.checkpoint import save_model
from tmad.model import TMAD

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1500)]

SIGNALS = {"Ctrl-C": (signal.SIGINT, 130), "SIGTERM": (signal.SIGTERM, 143), "closed terminal": (signal.SIGHUP, 129)}
BIN = Path(sys.executable).parent


@dataclass
class Asked:
    """A job on its own places."""

    command: list[object]
    step: Callable[[], int]
    """How far it is, in files that it has written; it grows to the end."""
    left: Callable[[], object]
    """What it leaves, as it may be compared."""
    leased: Path
    steps: int = 1
    """So many more than before have to be there before it is ended."""

    def moment(self) -> Moment:
        """When this job, begun now, is in the middle of its work."""
        before = self.step()
        return lambda: self.step() >= before + self.steps


def count(folder: Path, pattern: str) -> Callable[[], int]:
    return lambda: sum(1 for _ in folder.glob(pattern))


def without_times(text: str) -> object:
    """A report without what differs from run to run."""
    loose = ("seconds", "mlflow_run_id", "parent", "name", "images_per_s", "versions", "when")

    def plain(value: object) -> object:
        if isinstance(value, dict):
            return {key: plain(one) for key, one in value.items() if not any(part in key for part in loose)}
        return [plain(one) for one in value] if isinstance(value, list) else value

    return plain(json.loads(text))


def files_of(folder: Path, *skipped: str) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(skipped or ("ledger",))
    }


@dataclass
class Place:
    """What all jobs read."""

    folder: Path
    model: Path
    database: str

    def job(self, name: str, *arguments: object) -> list[object]:
        return [sys.executable, ROOT / "jobs" / f"{name}.py", *arguments]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tracking_template: Path) -> Place:
    folder = small_sets(tmp_path_factory.mktemp("ends"))
    for number in range(20):
        target = folder / "many" / f"{number:02}.png"
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(png_bytes(make_image(number)))
    (folder / "one.png").write_bytes(png_bytes(make_mask() * 255))
    save_model(TMAD(MODEL, seed=1), folder / "model")
    shutil.copy(tracking_template, folder / "mlflow.db")
    database = f"sqlite:///{folder}/mlflow.db"
    for seed in (1, 2):
        save_model(TMAD(MODEL, seed=seed), folder / f"version-{seed}")
        run_id = Tracker.create(database, "tests", str(seed))
        assert run_id is not None
        register_model(folder / f"version-{seed}", tracking_uri=database, run_id=run_id, name="ends")
    mlflow_client(database).set_registered_model_alias("ends", "champion", "1")
    return Place(folder, folder / "model", database)


def prepare(place: Place, out: Path) -> Asked:
    options = ["--source", place.folder / "many", "--out", out, "--crop-size", 64, "--patch-size", 16]
    options += ["--images-per-shard", 1, "--memory.pool-size", 12]
    left = lambda: (out / MANIFEST_NAME).exists() and files_of(out)  # noqa: E731
    return Asked(place.job("prepare", *options), count(out, "shards/*.json"), left, out)


def inpaint(place: Place, out: Path) -> Asked:
    options = ["--input", place.folder / "many", "--mask-from", "one", "--masks", place.folder / "one.png"]
    options += ["--output", out, "--model", place.model, "--num-actors", 1, "--images-per-task", 1]
    return Asked(place.job("inpaint", *options), count(out, "*.png"), lambda: files_of(out, "ledger"), out)


def evaluate(place: Place, out: Path) -> Asked:
    options = ["--data", place.folder / "large-val", "--out", out, "--model", place.model, "--images-per-task", 1]
    options += ["--methods", "tmad", "patchmatch", "--num-workers", 1, "--resamples", 50, "--num-pictures", 1]
    options += ["--limit", 12]
    if not (place.folder / "large-val").exists():
        asked = prepare(place, place.folder / "large-val")
        command = [*map(str, asked.command), "--split", "val"]
        subprocess.run(command, check=True, env={**os.environ, **RAY_ENVIRONMENT}, capture_output=True)
    left = lambda: (out / "report.json").exists() and without_times((out / "report.json").read_text())  # noqa: E731
    return Asked(place.job("evaluate", *options), count(out, "per_image/*.parquet"), left, out)


SMOKE = ["--preset", "smoke"]


def train(place: Place, out: Path) -> Asked:
    options = [*SMOKE, "--name", "run", "--runs", out, "--data.train", place.folder / "train"]
    options += ["--data.val", place.folder / "val", "--workers.num-workers", 1, "--tracking.uri", "none"]
    options += ["--schedule.batch-images", 2, "--schedule.coarse-images", 80, "--schedule.log-every-images", 2]
    options += ["--schedule.checkpoint-every-images", 4, "--schedule.keep-checkpoints", 1000]
    folder = out / "run"

    def left() -> object:
        ended = folder / "finished.json"
        return ended.exists() and json.loads(ended.read_text())["model_digest"]

    return Asked(place.job("train_places", *options), count(folder, "checkpoints/images_*"), left, folder)


def sweep(place: Place, out: Path) -> Asked:
    options = [*SMOKE, "--name", "study", "--run.runs", out, "--run.data.train", place.folder / "train"]
    options += ["--run.data.val", place.folder / "val", "--run.workers.num-workers", 1, "--trials", 2]
    options += ["--run.tracking.uri", "none", "--max-concurrent", 1, "--no-stop-early"]
    options += ["--run.schedule.batch-images", 2, "--run.schedule.checkpoint-every-images", 2]
    options += ["--run.schedule.keep-checkpoints", 1000, "--run.schedule.joint-images", 24]
    folder = out / "study"

    def left() -> object:
        ended = folder / "summary.json"
        return ended.exists() and [one["metrics"] for one in json.loads(ended.read_text())["trials"]]

    return Asked(place.job("sweep", *options), count(folder, "trials/*/checkpoints/images_*"), left, folder)


def ablate(place: Place, out: Path) -> Asked:
    options = [*SMOKE, "--study", "blending", "--name", "study", "--run.runs", out]
    options += ["--run.data.train", place.folder / "train", "--run.data.val", place.folder / "val"]
    options += ["--run.workers.num-workers", 1, "--run.tracking.uri", "none", "--max-concurrent", 1]
    options += ["--run.schedule.batch-images", 2, "--run.schedule.checkpoint-every-images", 2]
    options += ["--run.schedule.keep-checkpoints", 1000, "--run.schedule.joint-images", 24]
    folder = out / "study-blending"

    def left() -> object:
        ended = folder / "summary.json"
        return ended.exists() and [one["metrics"] for one in json.loads(ended.read_text())["rows"]]

    return Asked(place.job("ablate", *options), count(folder, "trials/*/checkpoints/images_*"), left, folder)


def promote(place: Place, out: Path) -> Asked:
    evaluate(place, place.folder / "unused")  # its set
    alias = f"a{out.name.replace('-', '')}"
    mlflow_client(place.database).set_registered_model_alias("ends", alias, "1")
    options = ["--name", "ends", "--alias", alias, "--data", place.folder / "large-val", "--out", out]
    options += ["--tracking-uri", place.database, "--better", "psnr_hole", "--not-worse", "l1_hole_pct=100"]
    options += ["--confidence", 0.6]  # of two untrained versions on 20 images the second is better by so little

    def left() -> object:
        compared = out / "ends" / "v2-against-v1" / "comparison.json"
        held = mlflow_client(place.database).get_registered_model("ends").aliases[alias]
        return compared.exists() and (held, without_times(compared.read_text()))

    # Of each version: 20 images, 16 a part.
    return Asked(place.job("promote", *options), count(out / "ends", "*/v*/per_image/*.parquet"), left, out / "ends")


def demo(place: Place, out: Path) -> Asked:
    options = ["--out", out, "--training", "smoke", "--train-crops", 2, "--val-crops", 1]

    def left() -> object:
        told = out / "demo" / "metrics.json"
        return told.exists() and without_times(told.read_text())["evaluation"]["methods"]  # type: ignore[index,call-overload]

    parts = ["demo-data/*/shards/*.json", "demo/checkpoints/images_*", "demo/inpaint/results/*", "demo/evaluation/*/*"]
    step = lambda: sum(count(out, part)() for part in parts)  # noqa: E731
    return Asked(place.job("demo", *options), step, left, out / "demo")


JOBS = {one.__name__: one for one in (prepare, inpaint, evaluate, train, sweep, ablate, promote, demo)}


def jobs(*names: str) -> pytest.MarkDecorator:
    """A soak of each of these jobs."""
    return pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.soak) for name in names])


def run_to_its_end(asked: Asked, log: Path, environment: dict[str, str] | None = None) -> str:
    job = Job(log, asked.command, environment)
    code, said = job.end()
    assert code == 0, said
    return said


def check_end(job: Job, asked: Asked, code: int) -> str:
    """What a user sees of an end: the code, no traceback, one line at the end, nothing held."""
    ended, said = job.end()
    assert ended == code, said
    assert "Traceback" not in said, said
    assert ".cc:" not in said, "what Ray's C++ says is not for users"
    assert not (asked.leased / LEASE_NAME).exists(), said
    return said.strip().splitlines()[-1]


def test_an_inpainting_job_with_its_actors_is_ended_by_sigterm_and_goes_on_to_what_one_in_one_go_leaves(
    place: Place, tmp_path: Path, call_job: CallJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, whole = inpaint(place, tmp_path / "out"), inpaint(place, tmp_path / "whole")
    job = Job(tmp_path / "log", asked.command)
    assert job.wait_for(asked.moment()), job.said()
    job.process.terminate()
    assert "the same command" in check_end(job, asked, 143)
    monkeypatch.setattr("pipeline.inpaint.run._fill_all", fill_here)
    for one in (asked, whole):
        code, _, said = call_job(inpaint_main, *one.command[2:])
        assert code == 0, said
    assert asked.left() == whole.left()


@jobs(*JOBS)
def test_a_job_that_is_stopped_ends_with_the_code_and_goes_on_to_what_one_in_one_go_leaves(
    name: str, place: Place, tmp_path: Path
) -> None:
    out = tmp_path / f"{name}-out"
    asked = JOBS[name](place, out)
    for number, (event, (kind, code)) in enumerate(SIGNALS.items()):
        job = Job(tmp_path / f"log-{number}", asked.command)
        came = job.wait_for(asked.moment(), every_s=0.02)
        assert came, f"{name} ended before {event}: {job.said()}"
        assert name == "demo" or (asked.leased / LEASE_NAME).exists(), "it holds what it writes to"
        # A terminal sends to all processes of the foreground; `kill` to one.
        job.process.send_signal(kind) if kind == signal.SIGTERM else os.killpg(job.process.pid, kind)
        last = check_end(job, asked, code)
        assert "the same command" in last, (event, last)
        assert name == "inpaint" or not asked.left(), (event, "it says that it is finished")
    run_to_its_end(asked, tmp_path / "log-last")
    whole = JOBS[name](place, tmp_path / f"{name}-whole")
    run_to_its_end(whole, tmp_path / "log-whole")
    assert asked.left() == whole.left()
    if name == "promote":
        assert str(asked.left()[0]) == "2", "the second version won"  # type: ignore[index]


NO_TOKEN = {"RAY_AUTH_MODE": "disabled"}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[tuple[str, Job]]:
    """The address of a cluster of one machine, and its processes."""
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="tm", ignore_cleanup_errors=True) as folder:
        command = [BIN / "ray", "start", "--head", "--block", "--num-cpus", 4, "--port", port, "--temp-dir", folder]
        command += ["--object-store-memory", 200_000_000, "--disable-usage-stats", "--include-dashboard", "false"]
        head = Job(tmp_path / "log-head", command, NO_TOKEN)
        assert head.wait_for(lambda: "Ray runtime started" in head.said(), every_s=0.1), head.said()
        yield f"127.0.0.1:{port}", head
        head.kill()


@jobs(*(name for name in JOBS if name != "demo"))
def test_a_job_whose_cluster_is_lost_ends_within_a_minute_and_goes_on_elsewhere(
    name: str, place: Place, tmp_path: Path, cluster: tuple[str, Job]
) -> None:
    address, head = cluster
    asked = JOBS[name](place, tmp_path / f"{name}-out")
    job = Job(tmp_path / "log", asked.command, {"RAY_ADDRESS": address, **NO_TOKEN})
    assert job.wait_for(asked.moment(), every_s=0.02), job.said()
    began = time.monotonic()
    head.kill()
    ended, said = job.end()
    assert ended == 1, said
    assert "Traceback" not in said, said
    assert f"the Ray cluster at {address} is gone" in said.strip().splitlines()[-1], said
    assert time.monotonic() - began < 70
    run_to_its_end(asked, tmp_path / "log-last")
    assert asked.left()


@jobs("inpaint")
def test_a_job_whose_own_ray_is_lost_says_so_and_goes_on(name: str, place: Place, tmp_path: Path) -> None:
    asked = JOBS[name](place, tmp_path / f"{name}-out")
    job = Job(tmp_path / "log", asked.command)
    assert job.wait_for(lambda: "started Ray" in job.said(), every_s=0.02), job.said()
    began = time.monotonic()
    assert job.send(signal.SIGKILL, "gcs_server") == 1
    ended, said = job.end()
    assert (ended, "Traceback" in said) == (1, False), said
    assert re.search(r"the Ray of this job is gone .*; the same command continues where it stopped$", said.strip())
    assert time.monotonic() - began < 70
    run_to_its_end(asked, tmp_path / "log-last")


FULL = """
mount -t tmpfs -o size=200m none "$PLACE"
"$@"; echo "code $?" >&2
rm "$PLACE/filler"
echo "room again" >&2
"$@"; echo "code $?" >&2
"""


@jobs("prepare", "inpaint", "evaluate", "train", "sweep")
def test_a_job_on_a_full_disk_ends_with_one_line_and_goes_on_when_there_is_room(
    name: str, place: Place, tmp_path: Path
) -> None:
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-Urm", "true"], check=False).returncode:
        pytest.skip("no name spaces to mount a small disk in")
    disk = tmp_path / "disk"
    disk.mkdir()
    asked = JOBS[name](place, disk / "out" / name)
    script = FULL.replace("$PLACE", str(disk))
    job = Job(tmp_path / "log", ["unshare", "-Urm", "sh", "-c", script, *map(str, ["sh", *asked.command])])
    seen = Path(f"/proc/{job.process.pid}/root{disk}")
    assert job.wait_for(JOBS[name](place, seen / "out" / name).moment(), every_s=0.02), job.said()
    with contextlib.suppress(OSError), (seen / "filler").open("wb", buffering=0) as filler:
        while filler.write(bytes(4096)):  # until there is no space left
            pass
    _, said = job.end()
    first, second = said.split("room again")
    assert "code 1" in first.splitlines()[-1], said
    assert "Traceback" not in first, said
    assert "No space left on device" in first.splitlines()[-2], said
    assert "code 0" in second.splitlines()[-1], said
