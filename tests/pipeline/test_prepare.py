"""Photographs to a prepared set: what is in it, what is left out and why, and what happens when it is stopped."""

from __future__ import annotations

import io
import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.data import prepare as prepare_module
from pipeline.data import shards
from pipeline.data.prepare import PrepareConfig, prepare
from pipeline.data.records import RecordConfig, make_records
from pipeline.data.schema import RECORD_SCHEMA, pack_mask, read_manifest, read_records, unpack_mask
from pipeline.data.shards import ShardMaker, read_files
from pipeline.data.sources.tree import ImageTree
from pipeline.data.tasks import quiet
from pipeline.errors import (
    ConfigMismatch,
    CorruptSet,
    MissingInput,
    TooManyBadImages,
    UnfinishedSet,
    WrongVersion,
)
from pipeline.runs.lease import lease_folder
from tests.conftest import make_photo
from tests.pipeline.test_contract import run_here
from tests.tmad.test_images import bomb_png
from tmad.config import MemoryConfig
from tmad.images import UnreadableImage, decode_image, to_rgb
from tmad.memory import window_hole_counts

SMALL = {"crop_size": 64, "patch_size": 16, "memory": MemoryConfig(pool_size=20), "images_per_shard": 5}


def settings(source: Path | str, out: Path, **changes) -> PrepareConfig:
    return PrepareConfig(**{**SMALL, "source": str(source), "out": str(out), **changes})


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def png(array: np.ndarray, **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "png", **options)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def prepared(ray_session, photo_folder, tmp_path_factory) -> Path:
    """A set of twelve photographs, two crops and two holes each; not to be written to."""
    out = tmp_path_factory.mktemp("sets") / "prepared"
    prepare(settings(photo_folder, out, crops_per_image=2, masks_per_image=2, short_side=(64, 96)))
    return out


# One photograph


def test_masks_survive_as_bits():
    for height, width in [(64, 64), (5, 7), (1, 1)]:
        mask = np.random.default_rng(0).integers(0, 2, (height, width), dtype=np.uint8)
        bits = pack_mask(mask)
        assert len(bits) == -(-height * width // 8)
        assert np.array_equal(unpack_mask(bits, height, width), mask)


def test_a_record_depends_on_key_and_settings_alone():
    data = png(make_photo(0, 100, 120))
    config = RecordConfig(crop_size=64, patch_size=16, crops_per_image=2, masks_per_image=2, short_side=(64, 90))
    first, again = make_records("a/b.png", data, config), make_records("a/b.png", data, config)
    other = make_records("a/c.png", data, config)
    assert [row["image_id"] for row in first] == ["a/b.png#0", "a/b.png#1"]
    for name in ("image", "masks"):
        assert [row[name] for row in first] == [row[name] for row in again]
        assert [row[name] for row in first] != [row[name] for row in other]
    assert first[0]["image"] != first[1]["image"]
    assert first[0]["masks"][0] != first[0]["masks"][1]


def test_a_file_of_the_right_size_keeps_its_own_bytes():
    photo = make_photo(1, 64, 64)
    config = RecordConfig(crop_size=64, patch_size=16)
    assert make_records("x.png", png(photo), config)[0]["image"] == png(photo)
    grey = png(photo[..., 0])
    assert make_records("x.png", grey, config)[0]["image"] == grey


@pytest.mark.parametrize("why", ["turned", "transparent", "animated", "scaled", "deep"])
def test_a_file_that_needs_work_is_encoded_anew(why):
    photo = make_photo(1, 64, 64)
    exif = Image.Exif()
    exif[0x0112] = 6
    data = {
        "turned": lambda: png(photo, exif=exif),
        "transparent": lambda: png(np.dstack([photo, photo[..., :1]])),
        "animated": lambda: png(photo, save_all=True, append_images=[Image.fromarray(photo[::-1])]),
        "scaled": lambda: png(make_photo(1, 80, 64)),
        "deep": lambda: png(photo[..., 0].astype(np.uint16) * 257),
    }[why]()
    changes = {"short_side": (70, 70)} if why == "scaled" else {}
    (row,) = make_records("x.png", data, RecordConfig(crop_size=64, patch_size=16, encoding="png", **changes))
    decoded = decode_image(row["image"])
    assert (decoded.format, decoded.mode, decoded.size) == ("PNG", "RGB", (64, 64))
    if why == "transparent":
        assert np.array_equal(to_rgb(decoded), photo)
    if why == "deep":
        assert np.array_equal(to_rgb(decoded)[..., 0], photo[..., 0])


@pytest.mark.parametrize("encoding", ["jpeg", "png", "webp"])
def test_crops_are_stored_in_the_format_asked_for(encoding):
    config = RecordConfig(crop_size=64, patch_size=16, encoding=encoding)
    (row,) = make_records("x.png", png(make_photo(2, 100, 100)), config)
    assert decode_image(row["image"]).format == encoding.upper()


def test_images_too_small_to_be_enlarged_are_left_out():
    with pytest.raises(UnreadableImage, match="too-small: 40x31 pixels, the shorter side needs 32"):
        make_records("x.png", png(make_photo(0, 31, 40)), RecordConfig(crop_size=64, patch_size=16))
    (row,) = make_records("x.png", png(make_photo(0, 31, 40)), RecordConfig(crop_size=64, patch_size=16, min_side=31))
    assert decode_image(row["image"]).size == (64, 64)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"crop_size": 100}, r"crop_size must be a multiple of patch_size \(32\), got 100"),
        ({"short_side": (128, 300)}, r"short_side must rise from at least crop_size \(256\), got 128 to 300"),
        ({"mask": "boxes"}, "mask must be one of brush, .* got 'boxes'"),
        ({"memory": MemoryConfig(stride_divisor=3)}, r"memory.stride_divisor must divide patch_size \(32\), got 3"),
        ({"crops": 2}, "crops"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        PrepareConfig(source="x", out="y", **changes)


# A set


@pytest.mark.ray
def test_the_records_are_what_the_manifest_says(prepared, photo_folder):
    manifest = read_manifest(str(prepared))
    records = list(read_records(str(prepared)))
    assert (manifest.records, manifest.images_used, manifest.drops) == (24, 12, {})
    keys = sorted(str(path.relative_to(photo_folder)) for path in photo_folder.rglob("*.*"))
    assert [record.image_id for record in records] == [f"{key}#{crop}" for key in keys for crop in range(2)]
    assert [shard.rows for shard in manifest.shards] == [10, 10, 4]
    assert [shard.first_key for shard in manifest.shards] == [keys[0], keys[5], keys[10]]
    assert len(list(read_records(str(prepared), limit=11))) == 11
    for shard in manifest.shards:
        assert pq.read_schema(prepared / shard.file).equals(RECORD_SCHEMA, check_metadata=True)


@pytest.mark.ray
def test_masks_and_memory_of_every_variant_fit_together(prepared):
    for record in read_records(str(prepared)):
        assert record.pixels().shape == (64, 64, 3)
        for variant in range(2):
            mask, pool = record.mask(variant), record.pool(variant)
            assert record.hole_fraction[variant] == pytest.approx(mask.mean())
            assert 0 < mask.mean() < 1
            counts = window_hole_counts(mask, patch_size=16, stride=4)
            chosen = counts[pool[:, 0] // 4, pool[:, 1] // 4]
            assert len(np.unique(pool, axis=0)) == 20
            assert sorted(chosen) == sorted(counts.ravel())[:20]


@pytest.mark.ray
def test_a_set_is_the_same_to_the_last_byte_however_it_is_made(prepared, photo_folder, tmp_path, monkeypatch):
    config = settings(photo_folder, tmp_path / "again", crops_per_image=2, masks_per_image=2, short_side=(64, 96))
    run_here(monkeypatch, backwards=True)
    prepare(config)
    assert files_of(tmp_path / "again") == files_of(prepared)


@pytest.mark.ray
def test_a_second_run_reuses_what_is_finished_and_says_so(prepared, photo_folder, tmp_path, caplog):
    out = tmp_path / "set"
    shutil.copytree(prepared, out)
    before = files_of(out)
    config = settings(photo_folder, out, crops_per_image=2, masks_per_image=2, short_side=(64, 96))
    changed = {path: path.stat().st_mtime_ns for path in out.rglob("*.parquet")}
    with caplog.at_level(logging.INFO):
        prepare(config)
    assert "3 of 3 shards are already there and are kept" in caplog.text
    assert files_of(out) == before
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.parquet")} == changed


@pytest.mark.ray
@pytest.mark.parametrize("lost", ["shards/00001.json", "shards/00001.parquet", "manifest.json"])
def test_a_run_that_was_stopped_is_completed_to_the_same_bytes(prepared, photo_folder, tmp_path, lost):
    out = tmp_path / "set"
    shutil.copytree(prepared, out)
    (out / "manifest.json").unlink()
    (out / lost).unlink(missing_ok=True)
    kept = (out / "shards/00000.parquet").stat().st_mtime_ns
    with pytest.raises(UnfinishedSet, match="is unfinished: it has shards but no manifest"):
        read_manifest(str(out))
    prepare(settings(photo_folder, out, crops_per_image=2, masks_per_image=2, short_side=(64, 96)))
    assert files_of(out) == files_of(prepared)
    assert (out / "shards/00000.parquet").stat().st_mtime_ns == kept


@pytest.mark.ray
def test_reading_records_and_writing_are_one_operator_with_a_task_for_each_missing_shard(
    prepared, photo_folder, tmp_path, monkeypatch
):
    out, datasets = tmp_path / "set", []
    shutil.copytree(prepared, out)
    for shard in (0, 2):
        (out / f"shards/0000{shard}.json").unlink()
    monkeypatch.setattr(shards, "quiet", lambda dataset: datasets.append(quiet(dataset)) or datasets[0])
    prepare(settings(photo_folder, out, crops_per_image=2, masks_per_image=2, short_side=(64, 96)))
    (dataset,) = datasets
    assert (
        "Operator 1 ReadPhotographs->MapBatches(ShardMaker.make_records)->MapBatches(write_shard): 2 tasks executed"
        in dataset.stats()
    )
    assert "Operator 2" not in dataset.stats()


@pytest.mark.ray
def test_new_images_extend_a_set_and_its_manifest_is_away_meanwhile(prepared, photo_folder, tmp_path, monkeypatch):
    photos, out = tmp_path / "photos", tmp_path / "set"
    shutil.copytree(photo_folder, photos)
    first = prepare(settings(photos, out))
    Image.fromarray(make_photo(99)).save(photos / "zz.png")
    monkeypatch.setattr(prepare_module, "make_shards", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        prepare(settings(photos, out))
    with pytest.raises(UnfinishedSet):
        read_manifest(str(out))
    monkeypatch.undo()
    second = prepare(settings(photos, out))
    assert second.records == first.records + 1
    assert second.shards[:2] == first.shards[:2]


@pytest.mark.ray
def test_other_settings_in_the_same_folder_are_refused_with_the_difference(prepared, photo_folder):
    config = settings(photo_folder, prepared, crops_per_image=3, masks_per_image=2, short_side=(64, 96), seed=7)
    with pytest.raises(ConfigMismatch, match="crops_per_image: 2 -> 3; seed: 0 -> 7") as caught:
        prepare(config)
    assert caught.value.details["differences"] == ["crops_per_image: 2 -> 3", "seed: 0 -> 7"]
    prepare(
        settings(photo_folder, prepared, crops_per_image=2, masks_per_image=2, short_side=(64, 96), max_bad_fraction=1)
    )


# Bad input


BAD = {
    "corrupt.jpg": (b"\xff\xd8\xff\xe0" + bytes(range(256)), "truncated|damaged|not-an-image"),
    "empty.png": (b"", "empty-file"),
    "text.jpeg": (b"not an image", "not-an-image"),
    "half.png": (png(make_photo(0, 200, 200))[:9000], "truncated"),
    "bomb.png": (bomb_png(60_000, 60_000), "too-large"),
    "one-pixel.png": (png(make_photo(0, 1, 1)), "too-small"),
}


def odd_but_good(folder: Path) -> int:
    """Write images of every unusual kind; returns their number."""
    photo = make_photo(3, 80, 90)
    Image.fromarray(photo[..., 0].astype(np.uint16) * 257).save(folder / "deep.png")
    Image.fromarray(photo).convert("CMYK").save(folder / "cmyk.jpg")
    Image.fromarray(photo).quantize(16).save(folder / "palette.png")
    Image.fromarray(np.dstack([photo, photo[..., 0]])).save(folder / "rgba.png")
    Image.fromarray(photo).save(folder / "moving.gif", save_all=True, append_images=[Image.fromarray(photo[::-1])])
    Image.fromarray(photo[..., 0] > 128).save(folder / "bits.png")
    return 6


@pytest.mark.ray
def test_bad_images_are_left_out_with_their_reasons_and_odd_ones_are_kept(ray_session, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for name, (data, _) in BAD.items():
        (photos / name).write_bytes(data)
    (photos / "README.txt").write_text("neither listed nor counted")
    good = odd_but_good(photos)
    manifest = prepare(settings(photos, tmp_path / "set", max_bad_fraction=0.5))
    assert (manifest.images_listed, manifest.images_used, manifest.records) == (len(BAD) + good, good, good)
    lines = [json.loads(line) for line in (tmp_path / "set/quarantine.jsonl").read_text().splitlines()]
    assert {line["key"] for line in lines} == set(BAD)
    for line in lines:
        data, reasons = BAD[line["key"]]
        assert line["reason"] in reasons.split("|")
        assert line["detail"]
        assert line["bytes"] == len(data)
    assert sum(manifest.drops.values()) == len(BAD)
    for record in read_records(str(tmp_path / "set")):
        assert record.pixels().shape == (64, 64, 3)


@pytest.mark.ray
def test_a_set_is_not_made_among_the_photographs_or_masks_that_it_is_made_of(tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    for out in (tmp_path, tmp_path / "set"):
        for act in (prepare, prepare_module.check):
            with pytest.raises(ValueError, match=r"out .* is or lies in source .*: the set's files would be taken for"):
                act(PrepareConfig(source=str(tmp_path), out=str(out)))
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_too_many_bad_images_stop_the_job_with_their_reasons(ray_session, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.fromarray(make_photo(0)).save(photos / "good.png")
    for name in ("empty.png", "text.jpeg", "bomb.png"):
        (photos / name).write_bytes(BAD[name][0])
    with pytest.raises(
        TooManyBadImages, match=r"3 of 4 images cannot be used, more than max_bad_fraction=0.1"
    ) as caught:
        prepare(settings(photos, tmp_path / "set"))
    assert caught.value.details["reasons"] == {"empty-file": 1, "not-an-image": 1, "too-large": 1}
    assert "1 empty-file, 1 not-an-image, 1 too-large" in str(caught.value)
    assert (tmp_path / "set/quarantine.jsonl").read_text().count("\n") == 3
    with pytest.raises(UnfinishedSet):
        read_manifest(str(tmp_path / "set"))
    assert prepare(settings(photos, tmp_path / "set", max_bad_fraction=0.8)).records == 1


@pytest.mark.ray
def test_a_source_without_one_usable_image_is_an_error(ray_session, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").touch()
    with pytest.raises(MissingInput, match=r"none of the 1 images in .*photos can be used: 1 empty-file; each one's"):
        prepare(settings(tmp_path / "photos", tmp_path / "set", max_bad_fraction=1))


def test_an_image_that_vanishes_after_it_was_listed_is_left_out(tmp_path):
    (files,) = read_files(ImageTree(str(tmp_path)), 0, ["a.png"])
    detail = f"cannot read {tmp_path}/a.png: it is not there"
    dropped = {"key": "a.png", "reason": "missing", "detail": detail, "bytes": 0}
    assert json.loads(files["drop"][0].as_py()) == dropped
    with lease_folder(str(tmp_path)) as lease:
        maker = ShardMaker(None, lease, settings("x", tmp_path), {0: "x"})
        receipt = json.loads(maker.write(maker.make_records(files))["receipt"][0].as_py())
    assert (receipt["drops"], receipt["images"], receipt["rows"]) == ([dropped], 1, 0)


def test_empty_and_missing_folders_are_named(tmp_path):
    with pytest.raises(MissingInput, match=r"there is no folder .*nowhere"):
        prepare(settings(tmp_path / "nowhere", tmp_path / "set"))
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "notes.txt").touch()
    with pytest.raises(MissingInput, match=r"no image in .*photos: of 1 files none ends in one of \.avif, "):
        prepare(settings(tmp_path / "photos", tmp_path / "set"))
    assert not (tmp_path / "set").exists()


# Reading a set


def test_what_is_no_prepared_set_is_refused(tmp_path):
    with pytest.raises(MissingInput, match=r"nowhere does not exist: no manifest.json there; make one with"):
        read_manifest(str(tmp_path / "nowhere"))
    with pytest.raises(MissingInput, match="is not a prepared set"):
        read_manifest(str(tmp_path))
    (tmp_path / "manifest.json").write_text("[]")
    with pytest.raises(CorruptSet, match="is not the manifest of a prepared set"):
        read_manifest(str(tmp_path))


@pytest.mark.ray
def test_another_version_and_a_changed_manifest_are_refused(prepared, tmp_path):
    values = json.loads((prepared / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps({**values, "schema_version": 99}))
    with pytest.raises(WrongVersion, match="schema version 99, this code reads 1; prepare it again"):
        read_manifest(str(tmp_path))
    (tmp_path / "manifest.json").write_text(json.dumps({**values, "settings": {**values["settings"], "seed": 1}}))
    with pytest.raises(CorruptSet, match="was changed after it was written"):
        read_manifest(str(tmp_path / "manifest.json"))


@pytest.mark.ray
def test_a_damaged_shard_is_named(prepared, tmp_path):
    shutil.copytree(prepared, tmp_path / "set")
    (tmp_path / "set/shards/00001.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(CorruptSet, match=r"the shard .*00001.parquet cannot be read"):
        list(read_records(str(tmp_path / "set")))


@pytest.mark.ray
def test_the_digest_tells_content_and_not_place(prepared):
    manifest = read_manifest(str(prepared))
    elsewhere = replace(manifest, settings={**manifest.settings, "source": "s3://elsewhere"})
    other = replace(manifest, shards=manifest.shards[:-1])
    assert elsewhere.digest == manifest.digest
    assert other.digest != manifest.digest
