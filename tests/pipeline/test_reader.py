"""Rows read ahead: in order, bounded, every portion once for all workers, whatever dies meanwhile."""

from __future__ import annotations

import itertools
import os
import signal
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import ray

from pipeline.data.batches import training_batches
from pipeline.data.collection import ImagesConfig
from pipeline.data.onthefly import open_photographs, share
from pipeline.data.prepare import PrepareConfig, prepare
from pipeline.data.reader import ordered_tables, read_shares, start_reader
from pipeline.errors import CorruptSet
from tests.pipeline.test_batches import RUN, assert_equal
from tmad.config import MemoryConfig

pytestmark = pytest.mark.ray

SHARE = {"start": 0, "batch": 4, "world_size": 2, "at_once": 2}
ALONE = {"rank": 0, "start": 0, "batch": 1, "world_size": 1, "at_once": 2, "ahead": 4}


@pytest.fixture(scope="module")
def prepared(ray_session, photo_folder, tmp_path_factory) -> str:
    """A dozen records in three shards."""
    config = PrepareConfig(
        source=str(photo_folder),
        out=str(tmp_path_factory.mktemp("sets") / "prepared"),
        crop_size=64,
        patch_size=16,
        memory=MemoryConfig(pool_size=12),
        images_per_shard=4,
    )
    prepare(config)
    return config.out


def numbers(folder: Path):
    """A reading of a hundred numbered rows that leaves a mark; not a module's function, so that it travels by value."""

    def read(portion: dict) -> pa.Table:
        (folder / f"{portion['position']}-{np.random.randint(2**31)}").touch()
        return pa.table({"number": np.arange(portion["position"], portion["position"] + 100)})

    return read


def portions(count: int) -> list[dict]:
    return [{"position": 100 * number} for number in range(count)]


def of_rank(rank: int, stop: int) -> list[int]:
    """Positions of a rank, written out."""
    return [place for place in range(stop) if place % 4 // 2 == rank]


def test_workers_with_one_reader_see_what_they_see_without(prepared):
    for rank in range(2):
        place = {"rank": rank, "world_size": 2, "start_images": 6, "total_images": 3000, **RUN}
        alone, shared = (list(training_batches(prepared, **place, reader=one)) for one in (None, start_reader()))
        assert len(alone) == len(shared) == 749
        for one, other in zip(alone, shared, strict=True):
            assert_equal(one, other)


def test_records_that_are_made_on_the_way_are_made_once_for_all_workers(prepared, photo_folder):
    config = ImagesConfig(source=str(photo_folder), crop_size=64, images_per_shard=4)
    photographs = open_photographs(config, patch_size=16, memory=MemoryConfig(pool_size=12))
    live, reader = share(photographs, photographs.manifest()), start_reader()
    for rank in range(2):
        place = {"rank": rank, "world_size": 2, "start_images": 6, "total_images": 100, **RUN}
        pairs = zip(training_batches(prepared, **place), training_batches(live, **place, reader=reader), strict=True)
        for one, other in pairs:
            assert_equal(one, other)


def test_each_portion_is_read_once_whichever_worker_is_ahead(ray_session, tmp_path):
    reader, read = start_reader(), numbers(tmp_path)
    ranks = [ordered_tables(portions(8), read, rank=rank, ahead=2, reader=reader, **SHARE) for rank in (0, 1)]
    found: list[list[int]] = [[], []]
    for turn in (0, 0, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 0, 1, 0, 1):
        found[turn] += next(ranks[turn])["number"].to_pylist()
    assert found == [of_rank(0, 800), of_rank(1, 800)]
    assert len(list(tmp_path.iterdir())) == 8


def test_no_more_portions_are_read_early_than_asked_for(ray_session, tmp_path):
    tables = ordered_tables(portions(20), numbers(tmp_path), rank=0, ahead=3, reader=start_reader(), **SHARE)
    next(tables)
    assert len(list(tables)) == 19
    again = ordered_tables(portions(20), numbers(tmp_path), rank=0, ahead=3, reader=start_reader(), **SHARE)
    before = len(list(tmp_path.iterdir()))
    first = [next(again) for _ in range(2)]
    assert len(first) == 2
    ray.get([ray.remote(lambda: None).remote() for _ in range(4)])
    assert len(list(tmp_path.iterdir())) - before <= 2 + 3


def test_workers_that_begin_anew_start_their_reading_from_its_beginning(ray_session, tmp_path):
    reader, read = start_reader(), numbers(tmp_path)
    begun = ordered_tables(portions(4), read, rank=0, ahead=1, reader=reader, **SHARE)
    next(begun)
    other = {**SHARE, "world_size": 4}
    late = ordered_tables(portions(4), read, rank=3, ahead=1, reader=reader, **other)
    assert list(itertools.chain(*(table["number"].to_pylist() for table in late))) == list(range(3, 400, 4))


def test_a_reader_that_dies_is_started_again_and_nothing_is_lost_or_doubled(ray_session, tmp_path):
    reader, read = start_reader(), numbers(tmp_path)
    ranks = [ordered_tables(portions(8), read, rank=rank, ahead=2, reader=reader, **SHARE) for rank in (0, 1)]
    found: list[list[int]] = [[], []]
    for part in range(8):
        for rank in (0, 1):
            if (part, rank) in ((2, 1), (5, 0)):
                ray.kill(reader, no_restart=False)
            found[rank] += next(ranks[rank])["number"].to_pylist()
    assert found == [of_rank(0, 800), of_rank(1, 800)]


def test_what_reading_raises_comes_out_as_itself(prepared, tmp_path):
    def read(portion: dict) -> pa.Table:
        raise CorruptSet("the shard 00001 cannot be read")

    with pytest.raises(CorruptSet, match="the shard 00001 cannot be read") as caught:
        list(ordered_tables(portions(2), read, rank=0, ahead=1, reader=start_reader(), **SHARE))
    assert type(caught.value) is CorruptSet


@pytest.mark.parametrize(("start", "world_size"), [(0, 2), (8, 4), (4, 1)])
def test_shares_are_equal_parts_of_every_batch_from_the_start_on(tmp_path, start, world_size):
    share = {"start": start, "batch": 8, "world_size": world_size, "ranks": range(world_size)}
    tables = read_shares({"position": 100}, numbers(tmp_path), share)
    whole = np.arange(100, 200)
    for rank, table in enumerate(tables):
        mine = [int(one) for one in whole if (one - start) % 8 // (8 // world_size) == rank]
        assert table["number"].to_pylist() == mine


def test_tables_made_ahead_come_in_order_so_many_at_once_and_no_more_are_made_early(ray_session, tmp_path):
    def make(portion: dict) -> pa.Table:
        mark = tmp_path / f"running-{portion['position']}"
        mark.touch()
        running = len(list(tmp_path.glob("running-*")))
        time.sleep(0.1 if portion["position"] % 2 else 0.02)
        mark.unlink()
        (tmp_path / f"done-{portion['position']}").touch()
        return pa.table({"number": [portion["position"]], "running": [running]})

    made = ordered_tables(({"position": number} for number in range(20)), make, **{**ALONE, "ahead": 5})
    tables = [next(made)]
    time.sleep(1.5)
    assert len(list(tmp_path.glob("done-*"))) == 6
    tables += made
    rows = [row for table in tables for row in table.to_pylist()]
    assert [row["number"] for row in rows] == list(range(20))
    assert max(row["running"] for row in rows) == 2


def test_a_process_that_dies_is_replaced_and_its_task_run_again(ray_session, tmp_path):
    def make(portion: dict) -> pa.Table:
        mark = tmp_path / "killed"
        if portion["position"] == 3 and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return pa.table({"number": [portion["position"]]})

    made = ordered_tables([{"position": number} for number in range(8)], make, **ALONE)
    assert [table["number"][0].as_py() for table in made] == list(range(8))
    assert (tmp_path / "killed").exists()
