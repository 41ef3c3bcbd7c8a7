"""The data contract: what one photograph has to be, which are there twice, and what the report shows of it."""

from __future__ import annotations

import html.parser
import io
import itertools
import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from pipeline.data import prepare as prepare_module
from pipeline.data.contract import (
    NO_HASH,
    ContractConfig,
    examine,
    is_grey,
    join_holes,
    perceptual_hash,
    polarity_warning,
    summarise_holes,
)
from pipeline.data.duplicates import first_equal, first_similar, similar_in, similar_values
from pipeline.data.photograph import Photograph, open_photograph
from pipeline.data.plan import ShardPlan
from pipeline.data.prepare import PrepareConfig, prepare
from pipeline.data.schema import read_manifest, read_records
from pipeline.data.shards import ShardMaker, read_files
from pipeline.data.sources.base import Source
from pipeline.demo.photographs import PHOTOGRAPHS, installed_file
from pipeline.errors import MissingInput, SharedImages, TooManyBadImages, UnfinishedSet, VanishedImages
from pipeline.runs.lease import Lease
from tests.conftest import make_photo
from tmad.config import MemoryConfig
from tmad.images import UnreadableImage, decode_image, to_rgb


def encoded(array: np.ndarray, kind: str = "png", **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, kind, **options)
    return buffer.getvalue()


def opened(array: np.ndarray) -> Photograph:
    return open_photograph(encoded(array))


def recompressed(array: np.ndarray, quality: int) -> np.ndarray:
    return to_rgb(decode_image(encoded(array, "jpeg", quality=quality)))


def resized(array: np.ndarray, scale: float) -> np.ndarray:
    height, width = array.shape[:2]
    size = (round(width * scale), round(height * scale))
    return np.asarray(Image.fromarray(array).resize(size, Image.Resampling.LANCZOS))


def bits_apart(one: int, other: int) -> int:
    return (one ^ other).bit_count()


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def quarantine(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "quarantine.jsonl").read_text().splitlines()]


def run_here(monkeypatch: pytest.MonkeyPatch, *, backwards: bool = False) -> None:
    """Shards are made here, one after the other, without Ray."""

    def make(source: Source, plan: ShardPlan, shards: list[int], maker: ShardMaker) -> Iterator[dict]:
        write = maker.writer()
        for shard in reversed(shards) if backwards else shards:
            written = [write(maker.make_records(files)) for files in read_files(source, shard, plan.keys(shard))]
            yield from receipts(written)

    def leave_out(copied: list[dict], maker: ShardMaker) -> Iterator[dict]:
        return receipts(map(maker.leave_out_copies, copied))

    def receipts(tables: Iterable[pa.Table]) -> Iterator[dict]:
        return (json.loads(text) for table in tables for text in table["receipt"].to_pylist())

    monkeypatch.setattr(prepare_module, "make_shards", make)
    monkeypatch.setattr(prepare_module, "leave_out_copies", leave_out)


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    run_here(monkeypatch)


def settings(source: Path, out: Path, **changes: object) -> PrepareConfig:
    small = {"crop_size": 64, "patch_size": 16, "memory": MemoryConfig(pool_size=20), "images_per_shard": 3}
    return PrepareConfig(**{**small, "max_bad_fraction": 0.9, "source": str(source), "out": str(out), **changes})


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Six photographs, an exact copy of two of them in later shards, a smaller JPEG of a third, and a grey one."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(6):
        (folder / f"{number}.png").write_bytes(encoded(make_photo(number, 128, 160)))
    shutil.copy(folder / "0.png", folder / "6-as-0.png")
    shutil.copy(folder / "4.png", folder / "7-as-4.png")
    shutil.copy(folder / "0.png", folder / "8-as-0.png")
    (folder / "9-like-2.jpg").write_bytes(encoded(resized(make_photo(2, 128, 160), 0.6), "jpeg", quality=60))
    (folder / "a-grey.png").write_bytes(encoded(make_photo(9, 100, 100)[..., 1]))
    return folder


# One photograph


def test_an_image_that_is_too_long_is_left_out_and_one_at_the_limit_is_not() -> None:
    config = ContractConfig(max_aspect=3)
    examine("a", opened(make_photo(0, 100, 300)), config)
    with pytest.raises(UnreadableImage, match=r"too-narrow: 301x100 pixels, .* 3 times .* \(max_aspect\)"):
        examine("a", opened(make_photo(0, 100, 301)), config)
    with pytest.raises(UnreadableImage, match="too-narrow: 100x301"):
        examine("a", opened(make_photo(0, 301, 100)), config)


def test_grey_is_told_from_colour_even_if_only_one_spot_has_some() -> None:
    grey = np.repeat(make_photo(0, 120, 100)[..., :1], 3, axis=2)
    spot = grey.copy()
    spot[50, 50] = (200, 10, 10)
    assert is_grey(grey)
    assert is_grey(recompressed(grey, 70))
    assert not is_grey(spot)
    assert not is_grey(make_photo(0, 120, 100))


def test_grey_images_are_counted_by_default_and_left_out_where_that_is_asked_for() -> None:
    grey = np.repeat(make_photo(0, 120, 100)[..., :1], 3, axis=2)
    assert examine("a", opened(grey), ContractConfig())["grey"]
    with pytest.raises(UnreadableImage, match=r"grey: the colour channels differ by at most 4 \(drop_grey\)"):
        examine("a", opened(grey), ContractConfig(drop_grey=True))


def test_copies_of_real_photographs_have_near_hashes_and_different_ones_have_not() -> None:
    hashes = {}
    for photograph in PHOTOGRAPHS:
        rgb = to_rgb(decode_image(installed_file(photograph).read_bytes()))
        own = hashes[photograph.file] = perceptual_hash(rgb)
        assert own != NO_HASH
        for copy in (recompressed(rgb, 50), resized(rgb, 0.5), recompressed(resized(rgb, 0.7), 75), resized(rgb, 1.5)):
            assert bits_apart(own, perceptual_hash(copy)) <= 4, photograph.file
    assert min(bits_apart(one, other) for one, other in itertools.combinations(hashes.values(), 2)) > 12


def test_flat_pictures_and_plain_gradients_have_no_hash() -> None:
    ramp = np.repeat(np.linspace(0, 255, 90).astype(np.uint8)[None, :, None], 60, axis=0).repeat(3, axis=2)
    assert perceptual_hash(np.full((50, 70, 3), 200, np.uint8)) == NO_HASH
    assert perceptual_hash(ramp) == NO_HASH
    assert perceptual_hash(ramp[:, ::-1]) == NO_HASH


# Many


@pytest.mark.parametrize("distance", [0, 1, 4, 8])
@pytest.mark.parametrize("number", [0, 1, 2, 900])
def test_all_near_values_are_found_and_no_others(number: int, distance: int) -> None:
    rng = np.random.default_rng(number)
    values = rng.integers(1, 2**63, number, dtype=np.uint64)
    for _ in range(9):
        flipped = values[rng.integers(0, max(number, 1), number // 10)] if number else values
        values = np.concatenate([values, flipped ^ (np.uint64(1) << rng.integers(0, 64, flipped.size, np.uint64))])
    values = np.unique(np.concatenate([values, np.array([NO_HASH], np.uint64)]))
    table = np.bitwise_count(values[:, None] ^ values[None])
    one, two = np.nonzero(np.triu(table <= distance, 1))
    expected = {(a, b) for a, b in zip(one, two, strict=True) if NO_HASH not in (values[a], values[b])}
    found = similar_values(values, distance)
    assert set(zip(*found, strict=True)) == expected
    assert len(found[0]) == len(expected)


def test_of_equal_digests_the_first_counts() -> None:
    digests = np.array([[5, 1], [3, 3], [5, 1], [5, 2], [3, 3], [5, 1]], np.uint64)
    assert first_equal(digests).tolist() == [0, 1, 0, 3, 1, 0]
    assert first_equal(digests[:0]).tolist() == []


def test_an_image_is_no_copy_of_one_that_is_a_copy_itself() -> None:
    start = 0x0F0F_F0F0_3C3C_C3C3
    chain = np.array([start, start ^ 0b111, start ^ 0b111_111, NO_HASH, NO_HASH, start], np.uint64)
    assert first_similar(chain, 3).tolist() == [0, 0, 2, 3, 4, 0]
    assert first_similar(chain, 0).tolist() == [0, 1, 2, 3, 4, 0]


def test_what_looks_like_an_image_of_another_set_is_found_even_if_that_is_a_copy_there() -> None:
    start = 0x0F0F_F0F0_3C3C_C3C3
    others = np.array([NO_HASH, start, start ^ 0b111], np.uint64)
    mine = np.array([start ^ 0b111_111, NO_HASH, ~np.uint64(start), start], np.uint64)
    positions, originals = similar_in(mine, others, 3)
    assert (positions.tolist(), originals.tolist()) == ([0, 3], [2, 1])
    assert similar_in(mine, others[:0], 3)[0].tolist() == []


def test_statistics_of_holes_are_those_of_all_shards_together() -> None:
    fractions = np.array([0.05, 0.15, 0.16, 0.5, 1.0])
    whole, parts = join_holes([summarise_holes(fractions)]), [summarise_holes(fractions[:2])]
    parts += [summarise_holes(fractions[2:]), summarise_holes(fractions[:0])]
    assert whole == join_holes(parts)
    assert whole["histogram"] == [1, 2, 0, 0, 0, 1, 0, 0, 0, 1]
    assert (whole["min"], whole["max"], whole["mean"]) == (0.05, 1.0, pytest.approx(0.372))


def test_masks_that_cover_more_than_half_raise_the_question_of_their_polarity() -> None:
    assert polarity_warning(0.4) is None
    assert "holes cover 70% of the pictures on average: in a mask, 1 (white) is the hole" in str(polarity_warning(0.7))


# A set


def test_the_later_of_two_equal_files_is_left_out_wherever_it_lies(one_process: None, photos: Path) -> None:
    out = photos.parent / "set"
    manifest = prepare(settings(photos, out))
    assert manifest.drops == {"duplicate": 3}
    assert [(line["key"], line["copy_of"]) for line in quarantine(out)] == [
        ("6-as-0.png", "0.png"),
        ("7-as-4.png", "4.png"),
        ("8-as-0.png", "0.png"),
    ]
    assert quarantine(out)[0]["detail"] == "the same bytes as 0.png"
    kept = [*(f"{number}.png" for number in range(6)), "9-like-2.jpg", "a-grey.png"]
    assert [record.source["key"] for record in read_records(str(out))] == kept
    assert (manifest.images_used, manifest.records) == (8, 8)
    # The third shard held nothing but copies.
    assert [shard.rows for shard in manifest.shards] == [3, 3, 2]
    assert not (out / "shards/00002.parquet").exists()
    report = json.loads((out / "report.json").read_text())
    assert [(line["reason"], line["key"], line["copy_of"]) for line in report["copies_kept"]] == [
        ("near-duplicate", "9-like-2.jpg", "2.png")
    ]
    assert report["grey"] == {"count": 1, "first": ["a-grey.png"]}


def test_settings_say_which_copies_stay(one_process: None, photos: Path) -> None:
    both = settings(photos, photos.parent / "both", exact_duplicates="keep", drop_grey=True)
    assert prepare(both).drops == {"grey": 1}
    report = json.loads((photos.parent / "both/report.json").read_text())
    assert [line["reason"] for line in report["copies_kept"]] == ["duplicate"] * 3 + ["near-duplicate"]
    neither = prepare(settings(photos, photos.parent / "neither", near_duplicates="drop"))
    assert neither.drops == {"duplicate": 3, "near-duplicate": 1}


@pytest.mark.parametrize("writes", range(2, 24, 3))
def test_a_run_that_was_stopped_anywhere_is_completed_to_the_same_bytes(
    one_process: None, photos: Path, monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    whole, out = photos.parent / "whole", photos.parent / "set"
    prepare(settings(photos, whole))
    write = Lease.write
    left = iter(range(writes))

    def until_stopped(lease: Lease, key: str, data: bytes) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt
        write(lease, key, data)

    with monkeypatch.context() as stopped:
        stopped.setattr(Lease, "write", until_stopped)
        try:
            prepare(settings(photos, out))
        except KeyboardInterrupt:
            with pytest.raises(UnfinishedSet):
                read_manifest(str(out))
    prepare(settings(photos, out))
    assert files_of(out) == files_of(whole)
    before = {path: path.stat().st_mtime_ns for path in (out / "shards").iterdir()}
    prepare(settings(photos, out))
    assert {path: path.stat().st_mtime_ns for path in (out / "shards").iterdir()} == before


def test_a_copy_comes_back_when_what_it_is_a_copy_of_is_gone(one_process: None, photos: Path) -> None:
    out = photos.parent / "set"
    prepare(settings(photos, out))
    (photos / "0.png").unlink()
    before = files_of(out)
    with pytest.raises(VanishedImages, match=r"1 of the 11 images of .* no longer in .*: '0.png'; .*vanished=drop"):
        prepare(settings(photos, out))
    assert files_of(out) == before
    manifest = prepare(settings(photos, out, vanished="drop"))
    assert manifest.drops == {"duplicate": 2}
    keys = [record.source["key"] for record in read_records(str(out))]
    assert "6-as-0.png" in keys
    assert "8-as-0.png" not in keys
    changed = {name for name, data in files_of(out).items() if name.startswith("shards/") and data != before.get(name)}
    # The shard that it was in, and the one whose copy came back and the other one that is a copy of that now.
    assert changed == {f"shards/0000{number}.{kind}" for number in (0, 2) for kind in ("json", "parquet")}


def test_images_of_the_training_set_are_left_out_of_validation(one_process: None, photos: Path, tmp_path: Path) -> None:
    train, val = tmp_path / "train", tmp_path / "val-photos"
    prepare(settings(photos, train))
    val.mkdir()
    shutil.copy(photos / "3.png", val / "same.png")
    (val / "similar.jpg").write_bytes(encoded(resized(make_photo(5, 128, 160), 0.8), "jpeg", quality=70))
    (val / "new.png").write_bytes(encoded(make_photo(77, 100, 100)))
    config = settings(val, tmp_path / "val", against=str(train))
    manifest = prepare(config)
    assert manifest.drops == {"in-other-set": 2}
    lines = quarantine(tmp_path / "val")
    assert [(line["key"], line["copy_of"]) for line in lines] == [("same.png", "3.png"), ("similar.jpg", "5.png")]
    assert lines[0]["detail"] == "the same bytes as 3.png of the other set"
    assert lines[1]["detail"].startswith("looks like 5.png of the other set (")
    assert [record.source["key"] for record in read_records(str(tmp_path / "val"))] == ["new.png"]
    assert (tmp_path / "val/report.html").read_text().count("no picture") == 0
    shutil.copytree(train, tmp_path / "moved")
    elsewhere = prepare(settings(val, tmp_path / "again", against=str(tmp_path / "moved")))
    assert elsewhere.digest == manifest.digest


def test_shared_images_stop_the_job_where_that_is_asked_for(one_process: None, photos: Path, tmp_path: Path) -> None:
    prepare(settings(photos, tmp_path / "train"))
    config = settings(photos, tmp_path / "val", against=str(tmp_path / "train"), shared_images="stop")
    with pytest.raises(SharedImages, match=r"11 images are also in .*train \(0.png: the same bytes as 0.png") as caught:
        prepare(config)
    assert "a-grey.png" in caught.value.details["keys"]
    with pytest.raises(UnfinishedSet):
        read_manifest(str(tmp_path / "val"))


def test_a_set_that_cannot_be_compared_with_is_refused_at_once(one_process: None, photos: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingInput, match="nowhere does not exist"):
        prepare(settings(photos, tmp_path / "set", against=str(tmp_path / "nowhere")))
    with pytest.raises(ValueError, match="against must be another prepared set than out"):
        prepare(settings(photos, tmp_path / "set", against=str(tmp_path / "set")))
    assert not (tmp_path / "set").exists()
    prepare(settings(photos, tmp_path / "train"))
    shutil.rmtree(tmp_path / "train/facts")
    with pytest.raises(MissingInput, match=r"train cannot be compared with: .* prepared by an older version"):
        prepare(settings(photos, tmp_path / "set", against=str(tmp_path / "train")))


def test_too_many_copies_stop_the_job_before_a_shard_is_touched(one_process: None, photos: Path) -> None:
    out = photos.parent / "set"
    with pytest.raises(TooManyBadImages, match=r"3 of 11 images .* max_bad_fraction=0.2 allows: 3 duplicate; .*report"):
        prepare(settings(photos, out, max_bad_fraction=0.2))
    assert (out / "shards/00002.parquet").exists()
    assert json.loads((out / "report.json").read_text())["drops"] == {"duplicate": 3}
    assert prepare(settings(photos, out, max_bad_fraction=0.3)).drops == {"duplicate": 3}


# The report


class Checker(html.parser.HTMLParser):
    """Notes elements that are not closed in order, and every address that is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img", "rect"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag != "rect":
            assert self.open.pop() == tag


def test_the_report_names_everything_left_out_is_well_formed_and_asks_for_nothing(
    one_process: None, photos: Path
) -> None:
    out = photos.parent / "set"
    evil = "b-<script>alert(1)<"
    (photos / f"{evil}.png").write_bytes(b"not an image")
    (photos / "c-long.png").write_bytes(encoded(make_photo(1, 60, 300)))
    (photos / "d-half.png").write_bytes(encoded(make_photo(1, 200, 200))[:9000])
    manifest = prepare(settings(photos, out, near_duplicates="drop"))
    report = json.loads((out / "report.json").read_text())
    assert report["drops"] == manifest.drops
    assert set(manifest.drops) == {"duplicate", "near-duplicate", "not-an-image", "too-narrow", "truncated"}
    assert {line["key"] for line in report["left_out"]} == {line["key"] for line in quarantine(out)}
    assert f"{evil}.png" in {line["key"] for line in report["left_out"]}
    assert report["holes"]["masks"] == manifest.records
    text = (out / "report.html").read_text()
    checker = Checker()
    checker.feed(text)
    assert checker.open == []
    assert "script" not in checker.tags
    assert "b-&lt;script&gt;alert(1)&lt;.png" in text
    assert checker.addresses
    assert all(address.startswith("data:image/") for address in checker.addresses)
    # Two pictures each of three duplicates and a near duplicate, the long one, the grey one, and the records.
    assert checker.tags.count("img") == 2 * 4 + 1 + 1 + manifest.records
    assert text.count("no picture") == 2


def test_a_reason_with_many_images_shows_the_first_and_says_so(one_process: None, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for number in range(30):
        (tmp_path / "photos" / f"{number:02d}.png").write_bytes(encoded(make_photo(0, 80, 80)))
    prepare(settings(tmp_path / "photos", tmp_path / "set", max_bad_fraction=1))
    text = (tmp_path / "set/report.html").read_text()
    assert "duplicate: 29, the first 24 by key" in text
    assert text.count("<figure>") == 24 + 1
    assert len(json.loads((tmp_path / "set/report.json").read_text())["left_out"]) == 29


@pytest.mark.ray
def test_on_ray_the_set_is_the_same(ray_session: None, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(settings(photos, photos.parent / "ray"))
    run_here(monkeypatch)
    prepare(settings(photos, photos.parent / "here"))
    assert files_of(photos.parent / "ray") == files_of(photos.parent / "here")
