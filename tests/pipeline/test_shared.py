"""One reader for several workers: every portion read once, and the batches that workers by themselves would see."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import ray

from pipeline.data.batches import training_batches
from pipeline.data.prepare import PrepareConfig, prepare
from pipeline.data.shared import read_shares, shared_tables, start_reader
from pipeline.errors import CorruptSet
from tests.pipeline.test_batches import RUN, assert_equal
from tmad.config import MemoryConfig

pytestmark = pytest.mark.ray

SHARE = {"start": 0, "batch": 4, "world_size": 2}


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


def test_each_portion_is_read_once_whichever_worker_is_ahead(ray_session, tmp_path):
    reader, read = start_reader(), numbers(tmp_path)
    ranks = [shared_tables(reader, portions(8), read, seed=0, rank=rank, ahead=2, **SHARE) for rank in (0, 1)]
    found: list[list[int]] = [[], []]
    for turn in (0, 0, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 0, 1, 0, 1):
        found[turn] += next(ranks[turn])["number"].to_pylist()
    assert found == [of_rank(0, 800), of_rank(1, 800)]
    assert len(list(tmp_path.iterdir())) == 8


def test_no_more_portions_are_read_early_than_asked_for(ray_session, tmp_path):
    tables = shared_tables(start_reader(), portions(20), numbers(tmp_path), seed=0, rank=0, ahead=3, **SHARE)
    next(tables)
    assert len(list(tables)) == 19
    again = shared_tables(start_reader(), portions(20), numbers(tmp_path), seed=0, rank=0, ahead=3, **SHARE)
    before = len(list(tmp_path.iterdir()))
    first = [next(again) for _ in range(2)]
    assert len(first) == 2
    ray.get([ray.remote(lambda: None).remote() for _ in range(4)])
    assert len(list(tmp_path.iterdir())) - before <= 2 + 3


def test_workers_that_begin_anew_start_their_reading_from_its_beginning(ray_session, tmp_path):
    reader, read = start_reader(), numbers(tmp_path)
    begun = shared_tables(reader, portions(4), read, seed=0, rank=0, ahead=1, **SHARE)
    next(begun)
    other = {**SHARE, "world_size": 4}
    late = shared_tables(reader, portions(4), read, seed=0, rank=3, ahead=1, **other)
    assert list(itertools.chain(*(table["number"].to_pylist() for table in late))) == list(range(3, 400, 4))


def test_a_reader_that_dies_is_started_again_and_nothing_is_lost_or_doubled(ray_session, tmp_path):
    reader, read = start_reader(), numbers(tmp_path)
    ranks = [shared_tables(reader, portions(8), read, seed=0, rank=rank, ahead=2, **SHARE) for rank in (0, 1)]
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
        list(shared_tables(start_reader(), portions(2), read, seed=0, rank=0, ahead=1, **SHARE))
    assert type(caught.value) is CorruptSet


@pytest.mark.parametrize(("start", "world_size"), [(0, 2), (8, 4), (4, 1)])
def test_shares_are_equal_parts_of_every_batch_from_the_start_on(tmp_path, start, world_size):
    share = {"start": start, "batch": 8, "world_size": world_size}
    tables = read_shares({"position": 100}, numbers(tmp_path), share)
    whole = np.arange(100, 200)
    for rank, table in enumerate(tables):
        mine = [int(one) for one in whole if (one - start) % 8 // (8 // world_size) == rank]
        assert table["number"].to_pylist() == mine
