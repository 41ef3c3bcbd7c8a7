"""The training input: the same sequence for any number of workers, from any start, every image once an epoch."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import fields
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pipeline.data import order
from pipeline.data.batches import evaluation_batches, training_batches
from pipeline.data.fetch import ROWS, read_pieces, with_draws
from pipeline.data.order import chunks, pieces
from pipeline.data.prepare import PrepareConfig, prepare
from pipeline.data.schema import Manifest, Shard, pack_mask, read_manifest, read_records
from pipeline.errors import ConfigMismatch, CorruptSet
from tmad.batch import Batch, collate, make_sample
from tmad.config import MemoryConfig
from tmad.draws import draw
from tmad.patches import cut
from tmad.rng import numpy_generator

pytestmark = pytest.mark.ray

TENSORS = [field.name for field in fields(Batch)[1:] if field.name != "filled"]
RUN = {"seed": 5, "batch_images": 4, "num_cells": 9, "patch_size": 16}


@pytest.fixture(scope="module")
def prepared(ray_session, photo_folder, tmp_path_factory) -> str:
    """22 records (11 photographs, two crops each) in three shards and six row groups, two masks each."""
    out = tmp_path_factory.mktemp("sets") / "prepared"
    photos = tmp_path_factory.mktemp("eleven") / "photos"
    shutil.copytree(photo_folder, photos)
    next(photos.rglob("*.png")).unlink()
    config = PrepareConfig(
        source=str(photos),
        out=str(out),
        crop_size=64,
        short_side=(64, 100),
        patch_size=16,
        memory=MemoryConfig(pool_size=12),
        crops_per_image=2,
        masks_per_image=2,
        images_per_shard=4,
        row_group_rows=5,
        encoding="png",
    )
    assert prepare(config).records == 22
    return str(out)


def ids(batches) -> list[str]:
    return [image_id for batch in batches for image_id in batch.image_id]


def assert_equal(one: Batch, other: Batch) -> None:
    assert one.image_id == other.image_id
    for name in TENSORS:
        assert torch.equal(getattr(one, name), getattr(other, name)), name


def joined(parts: list[Batch]) -> Batch:
    tensors = [torch.cat([getattr(part, name) for part in parts]) for name in TENSORS]
    return Batch(ids(parts), *tensors)


def test_two_workers_together_see_what_one_sees(prepared):
    alone = list(training_batches(prepared, total_images=48, **RUN))
    ranks = [list(training_batches(prepared, total_images=48, rank=rank, world_size=2, **RUN)) for rank in range(2)]
    assert len(alone) == len(ranks[0]) == len(ranks[1]) == 12
    for whole, first, second in zip(alone, *ranks, strict=True):
        assert len(first) == len(second) == 2
        assert_equal(whole, joined([first, second]))


@pytest.mark.parametrize("start", [4, 24, 40, 7])
def test_a_run_that_goes_on_sees_what_an_unbroken_one_would_have_seen(prepared, start):
    unbroken = list(training_batches(prepared, total_images=67, **{**RUN, "batch_images": 1}))
    resumed = list(training_batches(prepared, total_images=67, start_images=start, **RUN))
    assert len(resumed) == -(-(67 - start) // 4)
    for number, batch in enumerate(resumed[:-1]):
        first = start + 4 * number
        assert_equal(batch, joined(unbroken[first : first + 4]))


def test_a_finished_run_has_no_batch_left(prepared):
    assert list(training_batches(prepared, total_images=20, start_images=20, **RUN)) == []


def test_every_epoch_holds_every_image_once_in_another_order(prepared):
    seen = ids(training_batches(prepared, total_images=66, **{**RUN, "batch_images": 2}))
    epochs = [seen[start : start + 22] for start in (0, 22, 44)]
    stored = [record.image_id for record in read_records(prepared)]
    assert all(sorted(epoch) == sorted(stored) for epoch in epochs)
    assert len({tuple(epoch) for epoch in [*epochs, stored]}) == 4
    other = ids(training_batches(prepared, total_images=22, **{**RUN, "batch_images": 2, "seed": 6}))
    assert other != epochs[0]


def test_epochs_take_turns_with_the_masks_and_use_their_own_memory(prepared):
    records = {record.image_id: record for record in read_records(prepared)}
    sequence = training_batches(prepared, total_images=66, flip=False, **{**RUN, "batch_images": 1})
    for position, batch in enumerate(sequence):
        record, variant = records[batch.image_id[0]], position // 22 % 2
        assert np.array_equal(batch.mask[0, 0].numpy(), record.mask(variant))
        assert np.array_equal(batch.pool_yx[0].numpy(), record.pool(variant))
        assert np.array_equal(batch.image[0].permute(1, 2, 0).numpy(), record.pixels())


def test_image_mask_and_memory_are_flipped_together(prepared):
    turned = 0
    plain = training_batches(prepared, total_images=22, flip=False, **{**RUN, "batch_images": 1})
    mixed = training_batches(prepared, total_images=22, flip=True, **{**RUN, "batch_images": 1})
    for one, other in zip(plain, mixed, strict=True):
        assert one.image_id == other.image_id
        if torch.equal(one.image, other.image):
            assert torch.equal(one.mask, other.mask)
            continue
        turned += 1
        assert torch.equal(one.image.flip(-1), other.image)
        assert torch.equal(one.mask.flip(-1), other.mask)
        windows = [cut(batch.image.float(), batch.pool_yx, 16) for batch in (one, other)]
        assert torch.equal(windows[0].flip(-1), windows[1])
    assert 5 <= turned <= 17


def test_what_tasks_draw_and_threads_decode_is_the_sample_of_its_key(prepared):
    records = {record.image_id: record for record in read_records(prepared)}
    sequence = training_batches(prepared, total_images=44, **{**RUN, "batch_images": 1})
    for position, batch in enumerate(sequence):
        record, epoch = records[batch.image_id[0]], position // 22
        rng = numpy_generator(RUN["seed"], "sample", record.image_id, epoch)
        hole, memory = record.mask(epoch % 2), record.pool(epoch % 2)
        sample = make_sample(
            record.image_id, record.pixels(), hole, memory, patch_size=16, num_cells=9, rng=rng, flip=True
        )
        assert_equal(batch, collate([sample]))


@pytest.mark.parametrize(
    ("height", "width", "said"),
    [
        (32, 128, r"record .* cannot be decoded \(the image is \(64, 64\), room was made for"),
        (80, 64, r"record .* has a mask of 512 bytes, 80 x 64 pixels need 640"),
    ],
)
def test_a_picture_or_mask_that_is_not_of_its_records_size_is_named(prepared, tmp_path, height, width, said):
    folder = tmp_path / "set"
    shutil.copytree(prepared, folder)
    (shard, *_) = sorted(folder.glob("shards/*.parquet"))
    table = pq.read_table(shard)
    for name, side in (("height", height), ("width", width)):
        table = table.set_column(table.column_names.index(name), name, pa.array([side] * len(table), pa.int32()))
    pq.write_table(table, shard, row_group_size=5)
    with pytest.raises(CorruptSet, match=said):
        list(evaluation_batches(str(folder), batch_images=4))


def test_draws_differ_from_epoch_to_epoch(prepared):
    seen: dict[str, list[torch.Tensor]] = {}
    for batch in training_batches(prepared, total_images=44, **{**RUN, "batch_images": 1}):
        seen.setdefault(batch.image_id[0], []).append(batch.mix)
    assert all(len(mixes) == 2 and not torch.equal(*mixes) for mixes in seen.values())


def test_batches_have_the_shapes_and_types_of_the_contract(prepared):
    batch = next(iter(training_batches(prepared, total_images=4, **RUN)))
    assert (batch.image.shape, batch.image.dtype) == ((4, 3, 64, 64), torch.uint8)
    assert (batch.mask.shape, batch.mask.dtype) == ((4, 1, 64, 64), torch.uint8)
    assert (batch.pool_yx.shape, batch.pool_yx.dtype) == ((4, 12, 2), torch.int64)
    assert (batch.cells.shape, batch.cells.dtype) == ((4, 9), torch.int64)
    assert (batch.mix.shape, batch.mix.dtype) == ((4, 10), torch.float32)


def test_evaluation_sees_the_first_records_as_they_are_stored(prepared):
    alone = list(evaluation_batches(prepared, batch_images=4, limit=10))
    records = list(read_records(prepared, limit=10))
    assert [len(batch) for batch in alone] == [4, 4, 2]
    assert ids(alone) == [record.image_id for record in records]
    whole = joined(alone)
    assert np.array_equal(whole.image[3].permute(1, 2, 0).numpy(), records[3].pixels())
    assert np.array_equal(whole.mask[3, 0].numpy(), records[3].mask(0))
    assert whole.cells.shape == (10, 16)
    assert all(sorted(cells.tolist()) == list(range(16)) for cells in whole.cells)
    ranks = [ids(evaluation_batches(prepared, batch_images=4, limit=10, rank=rank, world_size=2)) for rank in range(2)]
    assert sorted(ranks[0] + ranks[1]) == sorted(ids(alone))
    assert_equal(joined(list(evaluation_batches(prepared, batch_images=4, limit=10))), whole)


def test_a_smaller_memory_is_the_first_windows_of_the_prepared_one(prepared):
    whole = next(training_batches(prepared, total_images=4, **RUN))
    part = next(training_batches(prepared, total_images=4, pool_size=5, **RUN))
    assert whole.pool_yx.shape[1] == 12
    assert torch.equal(part.pool_yx, whole.pool_yx[:, :5])
    assert torch.equal(part.cells, whole.cells), "nothing else differs"
    first = next(evaluation_batches(prepared, batch_images=4, pool_size=5))
    assert first.pool_yx.shape[1] == 5


def test_a_wrong_share_rank_or_patch_size_is_refused(prepared):
    with pytest.raises(ValueError, match=r"must be a multiple of their number \(3\), got 4"):
        next(training_batches(prepared, total_images=8, world_size=3, **RUN))
    with pytest.raises(ValueError, match=r"rank must lie in \[0, world_size = 2\), got 2"):
        next(training_batches(prepared, total_images=8, rank=2, world_size=2, **RUN))
    with pytest.raises(ConfigMismatch, match="was prepared for patch_size 16, the model has 32"):
        training_batches(prepared, total_images=8, **{**RUN, "patch_size": 32})


def test_a_shard_that_is_gone_is_named(prepared, tmp_path):
    folder = tmp_path / "set"
    shutil.copytree(prepared, folder)
    (folder / "shards/00001.parquet").unlink()
    (portion,) = chunks(read_manifest(str(folder)), seed=0, start=0, stop=22)
    with pytest.raises(CorruptSet, match=r"the shard .*shards/00001.parquet cannot be read"):
        read_pieces(portion, folder=str(folder))
    with pytest.raises(CorruptSet, match=r"the shard .*shards/00001.parquet cannot be read") as caught:
        list(training_batches(str(folder), total_images=24, **RUN))
    assert type(caught.value) is CorruptSet


# The order itself


def big_manifest(shards: int = 40, rows: int = 1000, crop_size: int = 256, size: int = 20_000_000) -> Manifest:
    files = [Shard(f"shards/{number:05d}.parquet", rows, size, "", "", "") for number in range(shards)]
    return Manifest({"masks_per_image": 1, "crop_size": crop_size}, files, 0, 0, {}, shards * rows, row_group_rows=64)


def test_windows_of_a_large_set_are_bounded_and_cover_an_epoch():
    manifest = big_manifest()
    epoch = list(pieces(manifest, seed=0, start=0, stop=manifest.records))
    assert sum(piece.stop - piece.start for piece in epoch) == manifest.records
    assert max(piece.stop for piece in epoch) <= order.window_records(manifest) + 64
    groups = Counter(group[:2] for piece in epoch for group in piece.groups)
    assert len(groups) == 40 * 16
    assert set(groups.values()) == {1}
    assert len({file for file, _, _ in epoch[0].groups}) > 20


def test_windows_hold_fewer_records_where_records_are_large():
    assert order.window_records(big_manifest(crop_size=256)) == 2048
    assert order.window_records(big_manifest(crop_size=64)) == order.WINDOW_RECORDS
    assert order.window_records(big_manifest(crop_size=10_000)) == 64


def test_the_order_does_not_depend_on_how_well_images_compress():
    sets = [big_manifest(size=size) for size in (1_000_000, 10**12)]
    epochs = [list(pieces(manifest, seed=0, start=0, stop=manifest.records)) for manifest in sets]
    assert epochs[0] == epochs[1]


def test_a_start_in_the_middle_of_a_window_keeps_its_end():
    manifest = big_manifest()
    whole = list(pieces(manifest, seed=0, start=0, stop=90_000))
    late = list(pieces(manifest, seed=0, start=41_234, stop=90_000))
    assert late[1:] == whole[-len(late) + 1 :]
    first = whole[-len(late)]
    assert (late[0].seed, late[0].groups, late[0].stop) == (first.seed, first.groups, first.stop)
    assert sum(piece.stop - piece.start for piece in late) == 90_000 - 41_234


def test_small_sets_are_read_several_epochs_at_a_time():
    manifest = big_manifest(shards=1, rows=50)
    parts = list(chunks(manifest, seed=0, start=0, stop=5000))
    assert [part["position"] for part in parts] == list(itertools.accumulate([0, 1050, 1050, 1050, 1050]))
    assert [len(part["pieces"]) for part in parts] == [21, 21, 21, 21, 16]


def test_reading_does_not_import_pytorch():
    code = "import sys, pipeline.data.fetch, pipeline.data.tasks; print(sorted({'torch'} & set(sys.modules)))"
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(("height", "width", "patch_size"), [(64, 48, 16), (36, 60, 12), (20, 28, 4)])
def test_draws_of_packed_holes_are_those_of_the_pixels(height, width, patch_size):
    rng = np.random.default_rng(0)
    masks = [(rng.random((height, width)) < 0.01).astype(np.uint8) for _ in range(12)]
    pools = [rng.integers(0, min(height, width) - patch_size, (5, 2)).astype(np.int16) for _ in masks]
    rows = [
        {
            "image_id": f"{number}.jpg",
            "image": b"",
            "height": height,
            "width": width,
            "mask": pack_mask(mask),
            "pool_yx": pool.reshape(-1),
            "epoch": number % 3,
        }
        for number, (mask, pool) in enumerate(zip(masks, pools, strict=True))
    ]
    options = {"patch_size": patch_size, "num_cells": 9, "flip": True}
    table = with_draws(pa.Table.from_pylist(rows, schema=ROWS), seed=4, **options).to_pylist()
    mirrored = 0
    for row, mask, pool in zip(table, masks, pools, strict=True):
        one = draw(mask, pool, rng=numpy_generator(4, "sample", row["image_id"], row["epoch"]), **options)
        assert row["mirrored"] == one.mirrored
        assert bytes(row["mask"]) == pack_mask(one.mask)
        assert row["pool_yx"] == one.pool_yx.reshape(-1).tolist()
        assert row["cells"] == one.cells.tolist()
        assert np.array_equal(np.array(row["mix"], np.float32), one.mix)
        mirrored += one.mirrored
    assert 0 < mirrored < len(masks)


def test_the_record_whose_mask_is_cut_short_is_named():
    whole = {"image": b"", "height": 64, "width": 64, "mask": bytes(512), "pool_yx": [0, 0], "epoch": 0}
    rows = [{**whole, "image_id": "good"}, {**whole, "image_id": "short", "mask": bytes(100)}]
    with pytest.raises(CorruptSet, match=r"record short .* has a mask of 100 bytes, 64 x 64 pixels need 512"):
        with_draws(pa.Table.from_pylist(rows, schema=ROWS), seed=0, patch_size=16, num_cells=4, flip=False)
