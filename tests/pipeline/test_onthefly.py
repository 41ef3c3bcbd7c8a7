"""Training straight from photographs: the batches of the prepared set, and what takes the place of unusable images."""

from __future__ import annotations

import io
import logging
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from PIL import Image

from pipeline.data import order
from pipeline.data.batches import training_batches
from pipeline.data.collection import ImagesConfig
from pipeline.data.onthefly import PORTION_RECORDS, LiveSet, Tally, open_photographs, share
from pipeline.data.prepare import PrepareConfig, prepare
from pipeline.data.schema import Record, read_records
from pipeline.data.user_masks import MaskReader
from pipeline.errors import MissingInput, StorageFailed, TooManyBadImages
from pipeline.storage import join, write_atomic
from tests.conftest import make_photo
from tests.pipeline.test_batches import assert_equal, ids, joined
from tmad.batch import Batch
from tmad.config import MemoryConfig

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]

PATCHES: dict[str, Any] = {"patch_size": 16, "memory": MemoryConfig(pool_size=12)}
RUN: dict[str, Any] = {"seed": 5, "batch_images": 4, "num_cells": 9, "patch_size": 16}
CROPS: dict[str, Any] = {"crop_size": 64, "short_side": (64, 100), "images_per_shard": 4, "row_group_rows": 5}


def live_set(source: Path | str, **settings: Any) -> LiveSet:
    photographs = open_photographs(ImagesConfig(source=str(source), **{**CROPS, **settings}), **PATCHES)
    return share(photographs, photographs.manifest())


def prepared_set(source: Path | str, out: Path, **settings: Any) -> str:
    prepare(PrepareConfig(source=str(source), out=str(out), **{**CROPS, **settings}, **PATCHES))
    return str(out)


@pytest.fixture(scope="module")
def masks(tmp_path_factory: pytest.TempPathFactory, photo_folder: Path) -> Path:
    """Two masks for each photograph, of its size: `sea/00/0.png` and `sea/00/1.png`."""
    folder = tmp_path_factory.mktemp("masks")
    for number, photo in enumerate(sorted(photo_folder.rglob("*.*"))):
        place = folder / photo.relative_to(photo_folder).with_suffix("")
        place.mkdir(parents=True)
        for variant in range(2):
            mask = np.zeros(Image.open(photo).size[::-1], np.uint8)
            mask[40 + 10 * variant :: 7, 30 + number :: 5] = 255
            Image.fromarray(mask).save(place / f"{variant}.png")
    return folder


FAMILY = {"crops_per_image": 2, "masks_per_image": 3}
PAIRED = {"mask_from": "paired", "masks_per_image": 2, "encoding": "png"}
RANDOM = {"mask_from": "random", "masks_per_image": 3}


@pytest.fixture(scope="module", params=[FAMILY, PAIRED, RANDOM], ids=["family", "paired", "random"])
def both(request, ray_session, photo_folder, masks, tmp_path_factory) -> tuple[str, LiveSet]:
    """The same photographs prepared and not, with several crops and holes each."""
    settings = dict(request.param)
    if "mask_from" in settings:
        settings["masks"] = str(masks)
    out = tmp_path_factory.mktemp("sets") / "prepared"
    return prepared_set(photo_folder, out, **settings), live_set(photo_folder, **settings)


@pytest.mark.parametrize("start", [0, 10])
def test_batches_are_those_of_the_prepared_set_bit_for_bit(both, start, monkeypatch):
    # Several windows an epoch, so that the order between and within them counts.
    monkeypatch.setattr(order, "WINDOW_RECORDS", 8)
    prepared, live = both
    total = 2 * live.manifest.records + 4
    expected = list(training_batches(prepared, total_images=total, start_images=start, **RUN))
    assert ids(expected) != sorted(ids(expected))
    alone = list(training_batches(live, total_images=total, start_images=start, **RUN))
    place = {"total_images": total, "start_images": start, "world_size": 2}
    ranks = [list(training_batches(live, rank=rank, **place, **RUN)) for rank in range(2)]
    assert len(expected) == len(alone) == len(ranks[0]) == len(ranks[1]) == -(-(total - start) // 4)
    for one, other, first, second in zip(expected, alone, *ranks, strict=True):
        assert_equal(one, other)
        assert_equal(one, joined([first, second]))


def test_a_run_longer_than_a_stretch_of_tasks_keeps_the_order(photo_folder, tmp_path):
    total = 5 * PORTION_RECORDS
    expected = training_batches(prepared_set(photo_folder, tmp_path / "set"), total_images=total, **RUN)
    for one, other in zip(
        expected, training_batches(live_set(photo_folder), total_images=total, record_tasks=1, **RUN), strict=True
    ):
        assert_equal(one, other)


# What is made, and what not


def test_only_the_hole_and_the_crop_that_are_asked_for_are_made(photo_folder, masks, monkeypatch):
    live = live_set(photo_folder, mask_from="random", masks=str(masks), masks_per_image=8, crops_per_image=4)
    read = []
    monkeypatch.setattr(
        MaskReader, "_read", lambda self, name, read_it=MaskReader._read: read.append(name) or read_it(self, name)
    )
    made = []
    monkeypatch.setattr("pipeline.data.records._encode", lambda crop, config: made.append(crop) or b"")
    photographs = ray.get(live.photographs)
    row = photographs.record(4 * 2 + 3, 1, MaskReader(photographs.masks))
    assert row["image_id"] == f"{photographs.keys[2]}#3"
    assert (len(read), len(made)) == (2, 1)


# Images that cannot be used

SMALL: dict[str, Any] = {"masks_per_image": 2, "encoding": "png"}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Twelve photographs, `00.png` to `11.png`, that a test may spoil."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(12):
        Image.fromarray(make_photo(number, 64, 64)).save(folder / f"{number:02d}.png")
    return folder


def order_of_keys(live: LiveSet, total: int) -> list[str]:
    return [image_id.split("#")[0] for image_id in ids(training_batches(live, total_images=total, **RUN))]


def test_the_next_usable_image_of_the_window_takes_the_place_of_one_that_cannot_be_used(photos, caplog):
    whole = order_of_keys(live_set(photos, **SMALL), 24)
    live = live_set(photos, **SMALL)
    # Two neighbours in the first epoch's order and its last image: the search goes on, and round.
    bad = {whole[3]: b"no picture", whole[4]: b"", whole[11]: None}
    for key, data in bad.items():
        (photos / key).unlink() if data is None else (photos / key).write_bytes(data)
    tally = Tally(live.config)
    with caplog.at_level(logging.WARNING):
        batches = list(training_batches(live, total_images=24, tally=tally, **RUN))
    seen = [image_id.split("#")[0] for image_id in ids(batches)]
    for first in (0, 12):
        own = whole[first : first + 12]
        expected = [next(key for key in own[place:] + own if key not in bad) for place in range(12)]
        assert seen[first : first + 12] == expected
    assert (tally.looked, tally.replaced) == (24, 6)
    assert tally.reasons == {"not-an-image": 2, "empty-file": 2, "missing": 2}
    told = [record.getMessage() for record in caplog.records if "cannot be used" in record.getMessage()]
    assert sorted(line.split()[0] for line in told) == sorted(bad)
    assert any("not-an-image" in line for line in told)


def test_what_replaces_an_image_does_not_depend_on_the_number_of_workers_or_the_start(photos):
    (photos / "03.png").write_bytes(b"no picture")
    (photos / "07.png").write_bytes(b"no picture")
    live = live_set(photos, **SMALL)
    alone = list(training_batches(live, total_images=36, **RUN))
    place = {"total_images": 36, "start_images": 8, "world_size": 2}
    ranks = [list(training_batches(live, rank=rank, **place, **RUN)) for rank in range(2)]
    for one, first, second in zip(alone[2:], *ranks, strict=True):
        assert_equal(one, joined([first, second]))


def test_other_images_keep_every_bit_when_one_is_replaced(photos):
    whole = {batch.image_id[0]: batch for batch in one_by_one(live_set(photos, **SMALL))}
    (photos / "05.png").write_bytes(b"no picture")
    for batch in one_by_one(live_set(photos, **SMALL)):
        assert_equal(batch, whole[batch.image_id[0]])


def one_by_one(live: LiveSet) -> list[Batch]:
    return list(training_batches(live, total_images=12, **{**RUN, "batch_images": 1}))


@pytest.mark.parametrize(
    ("settings", "spoil", "reason"),
    [
        ({"min_side": 60}, make_photo(1, 50, 50), "too-small"),
        ({}, make_photo(1, 64, 300), "too-narrow"),
        ({"mask_from": "alpha"}, make_photo(1, 64, 64), "no-mask"),
    ],
    ids=["too small", "too narrow", "no mask"],
)
def test_reasons_are_those_of_the_preparation(photos, tmp_path, settings, spoil, reason):
    if "mask_from" in settings:
        for path in photos.iterdir():
            alpha = np.full((64, 64), 255, np.uint8)
            alpha[20:30, 30:40] = 0
            Image.fromarray(np.dstack([np.asarray(Image.open(path)), alpha])).save(path)
    Image.fromarray(spoil).save(photos / "05.png")
    settings = {"images_per_shard": 12, "encoding": "png", **settings}
    live = live_set(photos, **settings)
    tally = Tally(live.config)
    seen = {
        batch.image_id[0]: batch
        for batch in training_batches(live, total_images=12, tally=tally, **{**RUN, "batch_images": 1})
    }
    assert tally.reasons == {reason: 1}
    stored: dict[str, Record] = {
        record.image_id: record for record in read_records(prepared_set(photos, tmp_path / "set", **settings))
    }
    assert seen.keys() == stored.keys() == {f"{number:02d}.png#0" for number in range(12) if number != 5}


def test_too_many_unusable_images_end_the_run_after_a_hundred(photos):
    for number in range(3):
        (photos / f"{number:02d}.png").write_bytes(b"no picture")
    live = live_set(photos, max_bad_fraction=0.2, **SMALL)
    assert len(list(training_batches(live, total_images=96, **RUN))) == 24
    message = (
        r"(\d+) of (\d+) images looked at cannot be used, more than data.images.max_bad_fraction=0.2 .*not-an-image"
    )
    with pytest.raises(TooManyBadImages, match=message) as caught:
        list(training_batches(live, total_images=400, **RUN))
    assert caught.value.details["reasons"].keys() == {"not-an-image"}
    assert list(
        training_batches(replace(live, config=replace(live.config, max_bad_fraction=0.3)), total_images=400, **RUN)
    )


def test_a_window_without_a_usable_image_is_an_error_and_no_endless_search(photos):
    for path in photos.iterdir():
        path.write_bytes(b"no picture")
    with pytest.raises(TooManyBadImages, match=r"none of the 12 images that are shuffled together .*12 not-an-image"):
        list(training_batches(live_set(photos, max_bad_fraction=1.0, **SMALL), total_images=4, **RUN))


# Places


def test_a_listing_that_changes_has_another_digest_and_a_place_that_changes_has_not(photos, tmp_path):
    digest = live_set(photos).manifest.digest
    moved = shutil.copytree(photos, tmp_path / "moved")
    assert live_set(moved).manifest.digest == digest
    assert live_set(moved, max_bad_fraction=0.5).manifest.digest == digest
    assert live_set(moved, quality=90).manifest.digest != digest
    (moved / "00.png").rename(moved / "0.png")
    assert live_set(moved).manifest.digest != digest


def test_masks_that_are_paired_otherwise_have_another_digest(photo_folder, masks, tmp_path):
    settings = {"mask_from": "paired"}
    before = live_set(photo_folder, masks=str(masks), **settings).manifest.digest
    moved = shutil.copytree(masks, tmp_path / "masks")
    assert live_set(photo_folder, masks=str(moved), **settings).manifest.digest == before
    next(moved.rglob("1.png")).unlink()
    assert live_set(photo_folder, masks=str(moved), **settings).manifest.digest != before


def test_photographs_in_object_storage_give_the_same_and_an_outage_replaces_none(photos, bucket, faulty_cluster):
    for path in photos.iterdir():
        write_atomic(join(f"{bucket}/photos", path.name), path.read_bytes())
    remote = live_set(f"{bucket}/photos", **SMALL)
    here = training_batches(live_set(photos, **SMALL), total_images=12, **RUN)
    for one, other in zip(here, training_batches(remote, total_images=12, **RUN), strict=True):
        assert_equal(one, other)
    faulty_cluster.answer("InvalidAccessKeyId", target="photos/05.png")
    # The question for the reason, which the answer to a HEAD lacks.
    faulty_cluster.answer("InvalidAccessKeyId", target=r"\?(?!.*prefix).*max-keys=1\b")
    tally = Tally(remote.config)
    with pytest.raises(StorageFailed, match=r"photos/05.png: .* refused the credentials"):
        list(training_batches(remote, total_images=12, tally=tally, **RUN))
    assert tally.replaced == 0


def test_every_kind_of_source_and_a_column_of_masks_can_be_trained_on(photos, tmp_path):
    mask = np.zeros((64, 64), np.uint8)
    mask[20:30, 30:40] = 255
    buffer = io.BytesIO()
    Image.fromarray(mask).save(buffer, "png")
    rows = [
        {"name": path.name, "picture": path.read_bytes(), "hole": buffer.getvalue()}
        for path in sorted(photos.iterdir())
    ]
    table, archive, names = tmp_path / "photos.parquet", tmp_path / "photos.tar", tmp_path / "names.txt"
    pq.write_table(pa.Table.from_pylist(rows), table, row_group_size=4)
    with tarfile.open(archive, "w") as opened:
        opened.add(photos, arcname=".")
    names.write_text("\n".join(row["name"] for row in rows))
    columns = {"image_column": "picture", "key_column": "name"}
    expected = one_by_one(live_set(photos))
    for source, settings in ((archive, {}), (names, {"root": str(photos)}), (table, columns)):
        for one, other in zip(expected, one_by_one(live_set(source, **settings)), strict=True):
            assert_equal(one, other)
    masked = {**columns, "mask_from": "column", "mask_column": "hole"}
    prepared = prepared_set(table, tmp_path / "set", **masked)
    batches = training_batches(prepared, total_images=12, **{**RUN, "batch_images": 1})
    for one, other in zip(batches, one_by_one(live_set(table, **masked)), strict=True):
        assert_equal(one, other)


def test_a_source_that_is_not_there_is_named(tmp_path):
    with pytest.raises(MissingInput, match="nowhere"):
        live_set(tmp_path / "nowhere")
