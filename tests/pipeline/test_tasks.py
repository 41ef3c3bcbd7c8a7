"""Ray Data as this project uses it: order, and memory that stays bounded behind a slow reader."""

from __future__ import annotations

import time
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline.data.tasks import run_tasks

pytestmark = pytest.mark.ray


def large_tables(folder: Path):
    """A task that makes four megabytes and leaves a mark; not a module's function, so that it travels by value."""

    def make(task: dict) -> pa.Table:
        (folder / str(task["number"])).touch()
        return pa.table({"number": [task["number"]], "data": [bytes(4 * 2**20)]})

    return make


def test_rows_come_in_the_order_of_their_tasks_however_many_share_one_of_rays(ray_session, tmp_path):
    tasks = [{"number": number} for number in range(7)]
    dataset = run_tasks(tasks, large_tables(tmp_path), num_cpus=0, at_once=2, in_order=True, max_ray_tasks=3)
    found = [number for batch in dataset.iter_batches(batch_size=2) for number in batch["number"]]
    assert found == list(range(7))


def test_tasks_do_not_run_far_ahead_of_a_slow_reader(ray_session, tmp_path):
    tasks = [{"number": number} for number in range(60)]
    dataset = run_tasks(
        tasks,
        large_tables(tmp_path),
        num_cpus=0,
        at_once=2,
        in_order=True,
        buffer_bytes=16 * 2**20,
        max_ray_tasks=2,
    )
    batches = iter(dataset.iter_batches(batch_size=1, prefetch_batches=1))
    assert next(batches)["number"].tolist() == [0]
    time.sleep(2)
    ahead = len(list(tmp_path.iterdir()))
    assert ahead < 45
    assert sum(1 for _ in batches) == 59
