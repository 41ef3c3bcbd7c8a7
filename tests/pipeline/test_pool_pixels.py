"""The windows' pixels in the shards: equal to what is cut, absent unless asked for, not read in training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from pipeline.data.batches import training_batches
from pipeline.data.fetch import read_pieces
from pipeline.data.order import chunks
from pipeline.data.prepare import PrepareConfig, prepare
from pipeline.data.schema import RECORD_SCHEMA, read_manifest, read_records
from tests.pipeline.test_batches import assert_equal
from tmad.config import MemoryConfig
from tmad.images import crop_scaled, decode_image, to_rgb
from tmad.patches import cut

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]

RUN: dict[str, Any] = {"seed": 5, "batch_images": 4, "num_cells": 9, "patch_size": 16}


SET: dict[str, Any] = {
    "crop_size": 64,
    "patch_size": 16,
    "memory": MemoryConfig(pool_size=9),
    "masks_per_image": 2,
    "images_per_shard": 8,
    "row_group_rows": 3,
}


def make(photos: Path, out: Path, **settings: Any) -> str:
    prepare(PrepareConfig(source=str(photos), out=str(out), **SET, **settings))
    return str(out)


@pytest.fixture(scope="module")
def sets(ray_session, photo_folder, tmp_path_factory) -> tuple[str, str]:
    """Twelve JPEG crops with two holes each, without and with the pixels of their windows."""
    folder = tmp_path_factory.mktemp("pool")
    return make(photo_folder, folder / "plain"), make(photo_folder, folder / "pixels", pool_pixels=True)


def test_pixels_are_the_windows_of_the_stored_crop(sets, photo_folder):
    records = list(read_records(sets[1], patches=True))
    assert len(records) == 12
    for record in records:
        image = torch.from_numpy(record.pixels().copy()).permute(2, 0, 1)[None]
        for variant in range(2):
            corners = torch.from_numpy(record.pool(variant).astype(np.int64))[None]
            expected = cut(image.float(), corners, 16)[0].permute(0, 2, 3, 1)
            assert record.patches(variant).shape == (9, 16, 16, 3)
            assert np.array_equal(record.patches(variant), expected.numpy())
    # Not those of the photograph, which the crop's JPEG is not equal to.
    original = to_rgb(decode_image((photo_folder / records[0].source["key"]).read_bytes()))
    assert not np.array_equal(crop_scaled(original, scaled=(64, 64), top=0, left=0, size=64), records[0].pixels())


def test_sets_differ_in_this_column_alone(sets):
    plain, pixels = ([pq.ParquetFile(file) for file in sorted(Path(one).glob("shards/*.parquet"))] for one in sets)
    for one, other in zip(plain, pixels, strict=True):
        assert one.schema_arrow.equals(RECORD_SCHEMA, check_metadata=True)
        assert other.schema_arrow.names == [*RECORD_SCHEMA.names, "pool_patches"]
        assert one.num_row_groups == other.num_row_groups
        assert one.read().equals(other.read(columns=RECORD_SCHEMA.names))
        assert [other.metadata.row_group(group).num_rows for group in range(other.num_row_groups)] == [
            one.metadata.row_group(group).num_rows for group in range(one.num_row_groups)
        ]
    manifests = [read_manifest(one) for one in sets]
    assert "pool_pixels" not in manifests[0].settings
    assert manifests[1].settings["pool_pixels"] is True
    assert manifests[0].digest != manifests[1].digest


def test_training_reads_the_same_from_both_and_not_this_column(sets):
    batches = [list(training_batches(one, total_images=24, **RUN)) for one in sets]
    for one, other in zip(*batches, strict=True):
        assert_equal(one, other)
    (portion,) = chunks(read_manifest(sets[1]), seed=0, start=0, stop=12)
    table = read_pieces(portion, folder=sets[1])
    assert "pool_patches" not in table.column_names


def test_the_pixels_stay_when_copies_are_left_out_afterwards(photo_folder, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for number, path in enumerate([*sorted(photo_folder.rglob("*.jpg"))[:3]] * 2):
        (photos / f"{number}.jpg").write_bytes(path.read_bytes())
    out = make(photos, tmp_path / "set", pool_pixels=True, max_bad_fraction=0.5)
    records = list(read_records(out, patches=True))
    assert [record.source["key"] for record in records] == ["0.jpg", "1.jpg", "2.jpg"]
    assert all(record.patches(1).shape == (9, 16, 16, 3) for record in records)


def test_pixels_that_were_not_asked_for_or_are_not_there_are_refused_with_the_way_to_get_them(sets):
    for record in (next(read_records(sets[1])), next(read_records(sets[0], patches=True))):
        with pytest.raises(ValueError, match="prepare with pool_pixels, and read with read_records"):
            record.patches()


def test_row_groups_that_would_be_too_large_are_refused():
    PrepareConfig(source="a", out="b", pool_pixels=True, masks_per_image=8)
    with pytest.raises(ValueError, match=r"row_group_rows must be at most 34, got 64: 30,720,000 bytes of windows"):
        PrepareConfig(source="a", out="b", pool_pixels=True, masks_per_image=100)
