"""Ray Data as this project uses it: order, and memory that stays bounded behind a slow reader."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline.data.tasks import run_ahead, run_tasks

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


def test_tables_made_ahead_come_in_order_so_many_at_once_and_no_more_are_made_early(ray_session, tmp_path):
    def make(task: dict) -> pa.Table:
        mark = tmp_path / f"running-{task['number']}"
        mark.touch()
        running = len(list(tmp_path.glob("running-*")))
        time.sleep(0.1 if task["number"] % 2 else 0.02)
        mark.unlink()
        (tmp_path / f"done-{task['number']}").touch()
        return pa.table({"number": [task["number"]], "running": [running]})

    made = run_ahead(({"number": number} for number in range(20)), make, at_once=2, ahead=5)
    tables = [next(made)]
    time.sleep(1.5)
    assert len(list(tmp_path.glob("done-*"))) == 6
    tables += made
    rows = [row for table in tables for row in table.to_pylist()]
    assert [row["number"] for row in rows] == list(range(20))
    assert max(row["running"] for row in rows) == 2


def test_a_process_that_dies_is_replaced_and_its_task_run_again(ray_session, tmp_path):
    def make(task: dict) -> pa.Table:
        mark = tmp_path / "killed"
        if task["number"] == 3 and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return pa.table({"number": [task["number"]]})

    made = run_ahead([{"number": number} for number in range(8)], make, at_once=2, ahead=4)
    assert [table["number"][0].as_py() for table in made] == list(range(8))
    assert (tmp_path / "killed").exists()
