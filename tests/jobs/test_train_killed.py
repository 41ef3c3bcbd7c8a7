"""A training on a cluster of three nodes that loses workers, nodes and its driver, and ends as if nothing had been.

The nodes are raylets of their own on this machine; what is killed is killed with SIGKILL. The last test goes on for
`TMAD_SOAK_S` with faults in random order at random moments, from `TMAD_SOAK_SEED` on, and prints what each one cost.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pipeline.tracking import read_json_lines
from tests.conftest import RAY_ENVIRONMENT, ROOT, SOAK_S
from tests.jobs.processes import Job, small_sets, training_workers

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.timeout(1800 + SOAK_S),
    pytest.mark.soak,
]

BATCH, CHECKPOINT = 4, 20
SCHEDULE = {"coarse-images": 40, "joint-images": 160, "batch-images": BATCH, "checkpoint-every-images": CHECKPOINT}
SCHEDULE |= {"log-every-images": BATCH, "validate-every-images": 100, "keep-checkpoints": 3}
OPTIONS = [text for name, value in SCHEDULE.items() for text in (f"--schedule.{name}", str(value))]
# One CPU a worker and a node: the two workers never share a node.
OPTIONS += ["--preset", "smoke", "--workers.cpus-per-worker", "1", "--workers.max-failures", "50"]
OPTIONS += ["--workers.threads", "1", "--tracking.uri", "none"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with prepared sets."""
    return small_sets(tmp_path_factory.mktemp("killed"))


class Nodes:
    """A cluster of one-CPU nodes, a head among them."""

    def __init__(self, folder: str) -> None:
        from ray.cluster_utils import Cluster

        self._folder = folder
        self._cluster = Cluster(initialize_head=True, head_node_args=self._arguments())
        for _ in range(2):
            self.add()

    def _arguments(self) -> dict[str, Any]:
        return {"num_cpus": 1, "object_store_memory": 100_000_000, "temp_dir": self._folder}

    @property
    def address(self) -> str:
        return str(self._cluster.address)

    def add(self) -> None:
        self._cluster.add_node(**self._arguments())

    def lose(self, raylet: int, *, replace: bool = True) -> None:
        """Kill the raylet and all else of its node, and put another node in its place."""
        os.kill(raylet, signal.SIGKILL)
        for node in list(self._cluster.worker_nodes):
            if node.all_processes["raylet"][0].process.pid == raylet:
                self._cluster.remove_node(node, allow_graceful=False)
        if replace:
            self.add()

    def lose_all_but_the_head(self) -> int:
        """As `lose`, without replacement; returns how many."""
        lost = [node.all_processes["raylet"][0].process.pid for node in self._cluster.worker_nodes]
        for raylet in lost:
            self.lose(raylet, replace=False)
        return len(lost)

    def end(self) -> None:
        self._cluster.shutdown()

    @property
    def head(self) -> int:
        """Process id of the head's raylet."""
        return int(self._cluster.head_node.all_processes["raylet"][0].process.pid)


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(prefix="tm") as folder:
        for name, value in RAY_ENVIRONMENT.items():
            patch.setenv(name, value)
        nodes = Nodes(folder)
        yield nodes
        nodes.end()


class Training:
    """A run of that name, begun and gone on with as often as it takes."""

    def __init__(self, place: Path, nodes: Nodes, name: str, *more: str) -> None:
        self.nodes, self.name = nodes, name
        self.folder = place / "runs" / name
        self._log = place / f"log-{name}"
        self._command = [sys.executable, ROOT / "jobs" / "train_places.py", *OPTIONS, "--name", name]
        self._command += ["--data.train", place / "train", "--data.val", place / "val", "--runs", place / "runs", *more]
        self._starts = 0
        self.job = self.start()

    def start(self) -> Job:
        """The command, once more."""
        self._starts += 1
        log = self._log.with_name(f"{self._log.name}-{self._starts}")
        self.job = Job(log, self._command, {"RAY_ADDRESS": self.nodes.address})
        return self.job

    def images(self) -> int:
        """Images of the newest step."""
        rows = read_json_lines(str(self.folder / "metrics.jsonl"))
        return rows[-1]["step"] if rows else 0

    def reach(self, images: int) -> None:
        assert self.job.wait_for(lambda: self.images() >= images), self.job.said()

    def went_on_at(self, times: int) -> int:
        """Images after which the run went on for the so manieth time since the driver started."""
        said = re.compile(r"continuing after ([\d,]+) images")
        assert self.job.wait_for(lambda: len(said.findall(self.job.said())) >= times), self.job.said()
        return int(said.findall(self.job.said())[times - 1].replace(",", ""))

    def finished(self) -> dict[str, Any]:
        code, said = self.job.end()
        assert code == 0, said
        found: dict[str, Any] = json.loads((self.folder / "finished.json").read_text())
        return found


def kill_worker(training: Training, rng: random.Random) -> None:
    os.kill(rng.choice(list(training_workers())), signal.SIGKILL)


def end_worker(training: Training, rng: random.Random) -> None:
    os.kill(rng.choice(list(training_workers())), signal.SIGTERM)


def lose_node(training: Training, rng: random.Random) -> None:
    raylets = set(training_workers().values()) - {training.nodes.head}
    training.nodes.lose(rng.choice(sorted(raylets)))


def kill_driver(training: Training, rng: random.Random) -> None:
    training.job.kill()


def kill_driver_and_workers_while_a_checkpoint_is_kept(training: Training, rng: random.Random) -> None:
    """At the moment when the folder of the next checkpoint appears."""
    folder = training.folder / "checkpoints"
    known = {path.name for path in folder.glob("images_*")}
    assert training.job.wait_for(lambda: bool({path.name for path in folder.glob("images_*")} - known))
    workers = list(training_workers())
    training.job.kill()
    for worker in workers:
        os.kill(worker, signal.SIGKILL)


def end_driver(training: Training, rng: random.Random) -> None:
    training.job.process.terminate()
    code, said = training.job.end()
    assert code == 143, said
    assert "stopped by SIGTERM after" in said
    assert f"the same command with --name {training.name} continues where it stopped" in said


@dataclass(frozen=True)
class Fault:
    """Something that happens to a training, and the most steps that may be repeated after it."""

    do: Callable[[Training, random.Random], None]
    ends_driver: bool
    repeats: int = CHECKPOINT // BATCH


FAULTS = [
    Fault(kill_worker, False),
    Fault(lose_node, False),
    Fault(kill_driver_and_workers_while_a_checkpoint_is_kept, True),
    Fault(end_worker, False, repeats=0),
    Fault(end_driver, True, repeats=0),
    Fault(kill_driver, True),
]


def suffer(training: Training, fault: Fault, at_images: int, times: int, rng: random.Random) -> tuple[int, int]:
    """Do *fault* when the run is at *at_images*; gives images when it went on, and steps that were repeated."""
    training.reach(at_images)
    fault.do(training, rng)
    if fault.ends_driver:
        training.job.process.wait(timeout=60)
        time.sleep(0.5)  # the workers of a driver that is gone are ended by Ray, a moment later
    before = training.images()
    if fault.ends_driver:
        training.start()
    on = training.went_on_at(times)
    # Told to end, it makes the step that it is in, and goes on behind what was seen.
    return on, max(0, before - on) // BATCH


@pytest.fixture(scope="module")
def unbroken(place: Path, nodes: Nodes) -> dict[str, Any]:
    """The same run with nothing in its way."""
    return Training(place, nodes, "unbroken").finished()


def run_with(faults: list[tuple[int, Fault]], training: Training, rng: random.Random) -> list[str]:
    """The run through all *faults*, each with its images; a line about each."""
    lines, times = [], 0
    for at_images, fault in faults:
        times = 1 if fault.ends_driver else times + 1
        on, repeated = suffer(training, fault, at_images, times, rng)
        lines.append(f"{fault.do.__name__} at {at_images}: went on after {on}, {repeated} steps repeated")
        assert repeated <= fault.repeats, lines
    return lines


def test_with_one_machine_left_a_run_goes_on_with_fewer_workers_from_its_newest_checkpoint(
    place: Path, nodes: Nodes, unbroken: dict[str, Any]
) -> None:
    training = Training(place, nodes, "elastic", "--workers.min-workers", "1")
    training.reach(50)
    assert len(training_workers()) == 2
    before = training.images()
    lost = nodes.lose_all_but_the_head()
    try:
        on = training.went_on_at(1)
        assert on >= before - before % CHECKPOINT
        training.reach(on + BATCH)
        assert len(training_workers()) == 1
        finished = training.finished()
    finally:
        for _ in range(lost):
            nodes.add()
    # The same run, but for the order in which one and two workers add up.
    assert finished["images"] == unbroken["images"]
    for name, value in unbroken["validation"].items():
        assert finished["validation"][name] == pytest.approx(value, rel=1e-3), name


def test_a_run_that_loses_workers_nodes_and_its_driver_ends_as_one_that_loses_nothing(
    place: Path, nodes: Nodes, unbroken: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    training = Training(place, nodes, "all-faults")
    moments = [(26 + 26 * number, fault) for number, fault in enumerate(FAULTS)]
    told = run_with(moments, training, random.Random(0))
    finished = training.finished()
    assert finished["model_digest"] == unbroken["model_digest"], told
    assert {**finished, **{name: unbroken[name] for name in ("name", "model", "best")}} == unbroken
    steps = [row["step"] for row in read_json_lines(str(training.folder / "metrics.jsonl"))]
    assert sorted(set(steps)) == list(range(BATCH, 201, BATCH))
    with capsys.disabled():
        print(*told, sep="\n")


def test_faults_at_random_moments_change_nothing(
    place: Path, nodes: Nodes, unbroken: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    end = time.monotonic() + SOAK_S
    seed = int(os.environ.get("TMAD_SOAK_SEED", 0))
    while time.monotonic() < end:
        rng = random.Random(seed)
        # Behind the last checkpoint of the list there must be one to come.
        moments = sorted(rng.sample(range(4, 170), rng.randint(1, 4)))
        training = Training(place, nodes, f"soak-{seed}")
        told = run_with([(at, rng.choice(FAULTS)) for at in moments], training, rng)
        assert training.finished()["model_digest"] == unbroken["model_digest"], told
        with capsys.disabled():
            print(f"seed {seed}", *told, sep="\n  ")
        seed += 1
