"""Ray Data as this project uses it: order, and memory that stays bounded behind a slow reader."""

from __future__ import annotations

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
    dataset = run_tasks(tasks, large_tables(tmp_path), num_cpus=0, in_order=True, max_ray_tasks=3)
    found = [number for batch in dataset.iter_batches(batch_size=2) for number in batch["number"]]
    assert found == list(range(7))
