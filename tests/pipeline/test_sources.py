"""Every kind of source gives the same photographs, here and over S3, and says clearly what is wrong with it."""

from __future__ import annotations

import io
import json
import logging
import os
import pickle
import re
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline import storage
from pipeline.data.prepare import PrepareConfig, prepare
from pipeline.data.schema import read_manifest, read_records
from pipeline.data.sources.base import Source
from pipeline.data.sources.choose import open_source
from pipeline.data.sources.partitions import PARTITIONS, Partition
from pipeline.data.sources.prefetch import read_ahead
from pipeline.errors import ConfigMismatch, CorruptSource, MissingInput, StorageFailed, WrongCount
from tests.conftest import ROOT, make_photo
from tmad.config import MemoryConfig


def photo(seed: int, kind: str = "jpeg") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(make_photo(seed, 64, 64)).save(buffer, kind)
    return buffer.getvalue()


PHOTOS = {
    f"{name[0]}/{name}/{number:08d}.jpg": photo(number) for number, name in enumerate(["abbey", "bar", "bay"] * 2)
}
LABELS = {key: 7 * number - 3 for number, key in enumerate(PHOTOS)}


def tar_of(members: Iterable[tuple[str, bytes]], kind: int = tarfile.GNU_FORMAT, mode: str = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode, format=kind) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def parquet_of(columns: dict[str, list], row_group_size: int = 2) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer, row_group_size=row_group_size)
    return buffer.getvalue()


def list_of(before: str = "/") -> bytes:
    return "".join(f"{before}{key} {LABELS[key]}\n" for key in PHOTOS).encode()


def write_layout(layout: str, place: str) -> dict[str, str]:
    """Write `PHOTOS` to the folder *place* in one of the usual layouts; returns the arguments of `open_source`."""
    items = list(PHOTOS.items())
    keyed = {"key": list(PHOTOS), "y": list(LABELS.values())}
    files: dict[str, bytes] = {}
    if layout in ("tree", "list of a folder"):
        files = {f"photos/{key}": data for key, data in items}
    if layout in ("tar", "list of a tar"):
        files = {"photos.tar": tar_of([(f"./data_256/{key}", data) for key, data in items])}
    if layout == "shards":
        halves = items[::2], items[1::2]
        for number, half in enumerate(halves):
            samples = [
                (name, data)
                for key, image in half
                for name, data in ((key, image), (key.replace(".jpg", ".cls"), str(LABELS[key]).encode()))
            ]
            files[f"shards/{number:06d}.tar"] = tar_of(samples)
    if layout == "parquet":
        files = {"photos.parquet": parquet_of({**keyed, "jpg": list(PHOTOS.values())})}
    if layout == "parquet of structs":
        structs = [{"bytes": data, "path": key} for key, data in items]
        files["table/0.parquet"] = parquet_of({"image": structs[:4], "y": keyed["y"][:4]})
        files["table/1.parquet"] = parquet_of({"image": structs[4:], "y": keyed["y"][4:]})
    if layout.startswith("list"):
        files["list.txt"] = list_of()
    for name, data in files.items():
        storage.write_atomic(storage.join(place, name), data)
    return {
        "tree": {"uri": f"{place}/photos"},
        "tar": {"uri": f"{place}/photos.tar/data_256"},
        "shards": {"uri": f"{place}/shards"},
        "parquet": {"uri": f"{place}/photos.parquet", "key_column": "key", "label_column": "y"},
        "parquet of structs": {"uri": f"{place}/table", "key_column": "image.path", "label_column": "y"},
        "list of a folder": {"uri": f"{place}/list.txt", "root": f"{place}/photos"},
        "list of a tar": {"uri": f"{place}/list.txt", "root": f"{place}/photos.tar/data_256"},
    }[layout]


LAYOUTS = ["tree", "tar", "shards", "parquet", "parquet of structs", "list of a folder", "list of a tar"]


def in_a_worker(source: Source) -> Source:
    """The source as a worker gets it, after its keys were listed."""
    return pickle.loads(pickle.dumps(source))


def ahead_of(source: Source, keys: list[str]) -> dict[str, bytes]:
    return {key: read() for key, read in read_ahead(in_a_worker(source), keys)}


def labels_of(source: Source, keys: list[str]) -> list[int | None]:
    return source.labels(pa.array(keys, pa.large_string())).to_pylist()


def all_of(source: Source) -> dict[str, bytes]:
    keys = source.keys()
    worker = in_a_worker(source)
    return {key: worker.read(key) for key in keys}


@pytest.fixture(params=["here", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path) if request.param == "here" else request.getfixturevalue("bucket")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_kind_of_source_gives_the_same_photographs(place, layout):
    source = open_source(**write_layout(layout, place))
    assert all_of(source) == PHOTOS
    for keys in (source.keys(), source.keys()[::-1], source.keys()[::2]):
        found = ahead_of(source, keys)
        assert list(found) == keys
        assert found == {key: PHOTOS[key] for key in keys}
    labels = dict(zip(PHOTOS, labels_of(in_a_worker(source), [*PHOTOS]), strict=True))
    assert labels == (dict.fromkeys(PHOTOS) if layout in ("tree", "tar") else LABELS)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_image_that_is_not_there_is_missing(place, layout):
    source = open_source(**write_layout(layout, place))
    source.keys()
    with pytest.raises(MissingInput, match=r"b/none\.jpg"):
        source.read("b/none.jpg")


@pytest.mark.parametrize(
    ("name", "message"), [("x", "no folder"), ("x.tar", "x.tar"), ("x.parquet", "x.parquet"), ("x.txt", "x.txt")]
)
def test_a_source_that_is_not_there_is_named(place, name, message):
    with pytest.raises(MissingInput, match=message):
        open_source(f"{place}/{name}").keys()


# Tar files


def test_neighbours_in_a_remote_tar_file_are_fetched_together_and_a_lost_one_is_named_alone(bucket, monkeypatch):
    files = {f"{number:03d}.jpg": bytes([number]) * 3000 for number in range(200)}
    storage.write_atomic(f"{bucket}/many.tar", tar_of(files.items()))
    source = open_source(f"{bucket}/many.tar")
    assert source.keys() == list(files)
    runs = source.runs(list(files))
    assert [len(run) for run in runs] == [200]
    scattered = source.runs(["000.jpg", "001.jpg", "100.jpg", "nowhere.jpg", "101.jpg"])
    assert [len(run) for run in scattered] == [2, 1, 1, 1]
    monkeypatch.setattr("pipeline.data.sources.tar.RUN_BYTES", 40_000)
    cut = source.runs(list(files))
    assert [key for run in cut for key in run] == list(files)
    assert max(map(len, cut)) < 15
    assert ahead_of(source, list(files)) == files
    storage.write_atomic(f"{bucket}/many.tar", tar_of(files.items())[: 150 * (512 + 3072)])
    found, lost = [], []
    for key, read in read_ahead(source, list(files)):
        try:
            assert read() == files[key]
            found.append(key)
        except StorageFailed:
            lost.append(key)
    assert found == list(files)[:150]
    assert lost == list(files)[150:]


def test_an_object_that_is_gone_is_missing_alone(bucket):
    write_layout("tree", bucket)
    source = open_source(f"{bucket}/photos")
    keys = source.keys()
    storage.remove(f"{bucket}/photos/{keys[1]}")
    reads = dict(read_ahead(source, keys))
    with pytest.raises(MissingInput, match=keys[1]):
        reads.pop(keys[1])()
    assert {key: read() for key, read in reads.items()} == {key: PHOTOS[key] for key in reads}


@pytest.fixture
def tar(tmp_path: Path):
    """Writes an archive and opens it."""

    def make(data: bytes | list[tuple[str, bytes]], name: str = "x.tar", **options) -> Source:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data if isinstance(data, bytes) else tar_of(data))
        return open_source(str(tmp_path / name.split("/")[0]), **options)

    return make


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names_of_members_are_kept(tar, kind):
    names = ["deep/" * 60 + "a.jpg", "Straße/夜.png", "plain.webp"]
    assert all_of(tar(tar_of([(name, name.encode()) for name in names], kind))) == {
        name: name.encode() for name in names
    }


def test_a_name_that_is_no_utf_8_does_not_stop_the_archive(tar):
    data = tar_of([("x?.jpg", b"1")])
    data = data.replace(b"x?.jpg", b"x\xe9.jpg")
    # A header's checksum is the sum of its bytes, with blanks in the checksum's own place.
    header = bytearray(data[:512])
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    assert all_of(tar(bytes(header) + data[512:])) == {"x\\xe9.jpg": b"1"}


def test_only_images_that_are_not_hidden_are_listed(tar, caplog):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in ("/a.jpg", "._a.jpg", "b/.cache/c.png", "../up.jpg", "notes.txt"):
            archive.addfile(tarfile.TarInfo(name))
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "a.jpg"
        archive.addfile(link)
        folder = tarfile.TarInfo("folder.jpg")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
    # A step to another folder is no hidden file: it is listed, for the job to leave out with its reason.
    assert all_of(tar(buffer.getvalue())) == {"a.jpg": b"", "../up.jpg": b""}
    assert "1 images are links or sparse members; they are left out" in caplog.text


def test_the_last_member_of_a_name_counts_as_when_it_is_unpacked(tar, caplog):
    caplog.set_level(logging.INFO)
    assert all_of(tar([("a.jpg", b"old"), ("b.jpg", b"b"), ("./a.jpg", b"new")])) == {"a.jpg": b"new", "b.jpg": b"b"}
    assert "holds 1 images twice; the last of each name counts" in caplog.text


def test_shards_that_use_a_name_twice_have_the_shards_name_in_every_key(tar):
    tar([("0.jpg", b"a"), ("1.jpg", b"b")], "set/x-0.tar")
    source = tar([("0.jpg", b"c"), ("2.jpg", b"d")], "set/x-1.tar")
    assert all_of(source) == {
        "x-0.tar/0.jpg": b"a",
        "x-0.tar/1.jpg": b"b",
        "x-1.tar/0.jpg": b"c",
        "x-1.tar/2.jpg": b"d",
    }


def test_a_label_belongs_to_all_images_of_its_sample_and_to_no_other(tar, caplog):
    members = [("a.cls", b"5\n"), ("a.left.jpg", b"1"), ("a.right.jpg", b"2"), ("s/a.jpg", b"3"), ("b.jpg", b"4")]
    source = tar([*members, ("b.cls", b"cat")])
    keys = source.keys()
    assert keys == ["a.left.jpg", "a.right.jpg", "b.jpg", "s/a.jpg"]
    assert labels_of(source, keys) == [5, 5, None, None]
    assert "1 members .cls hold no whole number" in caplog.text


@pytest.mark.parametrize(("mode", "kind"), [("w:gz", "gzip"), ("w:bz2", "bzip2"), ("w:xz", "xz")])
def test_a_compressed_archive_is_refused_with_the_reason(tar, mode, kind):
    data = tar_of(PHOTOS.items(), mode=mode)
    with pytest.raises(CorruptSource, match=rf"compressed \({kind}\), so no image in it can be read without"):
        tar(data).keys()
    with pytest.raises(CorruptSource, match=r"photos.tar.gz is a compressed archive"):
        tar(data, "photos.tar.gz")
    with pytest.raises(CorruptSource, match=r"set/photos.tgz is a compressed archive"):
        tar(data, "set/photos.tgz")


def test_a_first_member_that_is_called_like_the_mark_of_a_compression_is_no_compression(tar):
    assert all_of(tar([("PK.jpg", b"1"), ("BZh.jpg", b"2")])) == {"BZh.jpg": b"2", "PK.jpg": b"1"}


@pytest.mark.parametrize(
    ("length", "message"),
    [
        (512 + 1000, r"cut off or damaged at the member 'a.jpg', before byte 3584: unexpected end of data"),
        (3584 + 100, r"cut off or damaged after the member 'a.jpg', at byte 3584: no header stands there"),
        (100, r"cut off or damaged at its beginning: truncated header"),
        (0, r"cut off or damaged at its beginning: empty file"),
    ],
)
def test_an_archive_that_was_cut_off_says_where(tar, length, message):
    data = tar_of([("a.jpg", b"x" * 3000), ("b.jpg", b"y" * 3000)])
    with pytest.raises(CorruptSource, match=message):
        tar(data[:length]).keys()


def test_an_archive_without_its_end_is_read_with_a_warning(tar, caplog):
    data = tar_of([("a.jpg", b"x" * 3000), ("b.jpg", b"y" * 3000)])
    assert tar(data[:3584]).keys() == ["a.jpg"]
    assert "ends after the member 'a.jpg', at byte 3584 without the mark of an end; was it cut off" in caplog.text


def test_an_archive_with_a_damaged_header_is_refused(tar):
    data = bytearray(tar_of([("a.jpg", b"x"), ("b.jpg", b"y")]))
    data[1024:1034] = b"0123456789"
    with pytest.raises(CorruptSource, match=r"after the member 'a.jpg', at byte 1024: no header stands there"):
        tar(bytes(data)).keys()


def test_an_archive_without_images_says_what_was_looked_for(tar):
    with pytest.raises(MissingInput, match=r"no image in .*x.tar: no member ends in one of \.avif, "):
        tar([]).keys()
    tar([("data_large/a.jpg", b"1"), ("data_large_too/b.jpg", b"1")])
    with pytest.raises(MissingInput, match="no member below data_256/ ends in"):
        open_source(tar([("data_large/a.jpg", b"1")]).uri + "/data_256").keys()


def test_an_archive_that_shrinks_meanwhile_fails_at_the_image_and_not_silently(tar, tmp_path):
    source = tar([("a.jpg", b"x" * 3000)])
    source.keys()
    (tmp_path / "x.tar").write_bytes(b"x" * 600)
    with pytest.raises(StorageFailed, match="bytes 512 to 3512 were asked for and 88 came"):
        source.read("a.jpg")


def test_places_of_images_are_kept_until_the_archive_is_another(tar, tmp_path, monkeypatch):
    cache = str(tmp_path / "cache.arrow")
    assert all_of(tar([("a.jpg", b"1")], cache=cache)) == {"a.jpg": b"1"}
    with monkeypatch.context() as patch:
        patch.setattr(tarfile, "open", lambda *_, **__: pytest.fail("the archive was walked again"))
        assert all_of(open_source(str(tmp_path / "x.tar"), cache=cache)) == {"a.jpg": b"1"}
    assert all_of(tar([("a.jpg", b"2"), ("b.jpg", b"33")], cache=cache)) == {"a.jpg": b"2", "b.jpg": b"33"}
    with pytest.raises(MissingInput, match="below c/"):
        open_source(str(tmp_path / "x.tar/c"), cache=cache).keys()


# Parquet


@pytest.fixture
def table(tmp_path: Path):
    """Writes a Parquet file and opens it."""

    def make(columns: dict[str, list], **options) -> Source:
        (tmp_path / "x.parquet").write_bytes(parquet_of(columns))
        return open_source(str(tmp_path / "x.parquet"), **options)

    return make


def test_without_a_key_column_keys_are_file_and_row_in_the_order_of_the_rows(table):
    images = [bytes([number]) for number in range(12)]
    source = table({"bytes": images})
    assert list(all_of(source).items()) == [(f"x.parquet#{row}", images[row]) for row in range(12)]


def test_a_row_group_is_read_once_though_the_keys_do_not_follow_the_rows(table, monkeypatch):
    numbers = np.random.default_rng(0).permutation(20)
    source = table({"image": [b"%d" % n for n in numbers], "name": [f"{n:02d}" for n in numbers]}, key_column="name")
    read = pq.ParquetFile.read_row_group
    groups = []
    monkeypatch.setattr(
        pq.ParquetFile, "read_row_group", lambda self, group, **rest: groups.append(group) or read(self, group, **rest)
    )
    assert all_of(source) == {f"{n:02d}": b"%d" % n for n in range(20)}
    assert groups == list(range(10))


def test_a_row_without_an_image_is_an_empty_file(table):
    assert all_of(table({"image": [b"1", None]})) == {"x.parquet#0": b"1", "x.parquet#1": b""}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_column": "photo"}, r"no column 'photo'; set image_column; its columns are jpeg \(binary\), y \(str"),
        ({}, r"no column 'image'; set image_column; its columns are jpeg"),
        ({"image_column": "y"}, r"column 'y' of .*x.parquet holds string, encoded images \(binary\) are needed"),
        ({"image_column": "jpeg", "key_column": "jpeg.path"}, r"no column 'jpeg.path'; set key_column"),
        ({"image_column": "jpeg", "label_column": "y"}, r"column 'y' of .* \(string\) cannot be the label_column"),
    ],
)
def test_a_column_that_cannot_be_used_is_named_beside_those_there_are(table, options, message):
    with pytest.raises(CorruptSource, match=message):
        table({"jpeg": [b"1", b"2"], "y": ["cat", "cat"], "z": ["a", None]}, **options).keys()


def test_what_is_no_parquet_and_a_table_without_rows_are_named(table, tmp_path):
    with pytest.raises(MissingInput, match=r"no row in 1 Parquet file"):
        table({"image": pa.array([], pa.binary())}).keys()
    (tmp_path / "x.parquet").write_bytes(parquet_of({"image": [b"1"]})[:-9])
    with pytest.raises(CorruptSource, match="is no Parquet file or was cut off"):
        open_source(str(tmp_path / "x.parquet")).keys()


# Lists


@pytest.fixture
def listed(tmp_path: Path):
    """Writes a list beside a folder of photographs and opens it."""
    write_layout("tree", str(tmp_path))

    def make(text: str | bytes, root: str | None = None) -> Source:
        (tmp_path / "list.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
        return open_source(str(tmp_path / "list.txt"), root=root or str(tmp_path / "photos"))

    return make


def test_slashes_labels_comments_blanks_and_byte_order_marks_of_lists_are_understood(listed, tmp_path):
    first, second, third = list(PHOTOS)[:3]
    (tmp_path / "photos" / "my photo.jpg").write_bytes(b"blank")
    source = listed(f"\ufeff# train\r\n/{first} 3\r\n\r\n{second}\t-1\r\n  {third}\nmy photo.jpg\n")
    assert all_of(source) == {**{key: PHOTOS[key] for key in (first, second, third)}, "my photo.jpg": b"blank"}
    assert labels_of(source, [first, second, third, "my photo.jpg"]) == [3, -1, None, None]


def test_the_root_of_a_list_is_its_own_folder_if_none_is_named(tmp_path):
    storage.write_atomic(str(tmp_path / "a" / "b.jpg"), b"1")
    (tmp_path / "list.txt").write_text("a/b.jpg\n")
    assert all_of(open_source(str(tmp_path / "list.txt"))) == {"a/b.jpg": b"1"}


def test_an_image_that_a_list_names_twice_is_taken_once_and_one_of_two_classes_is_refused(listed, caplog):
    first, second = list(PHOTOS)[:2]
    source = listed(f"{first} 1\n{second}\n/{first} 1\n./{second}\n{first} 1\n")
    assert all_of(source) == {first: PHOTOS[first], second: PHOTOS[second]}
    assert labels_of(source, [first]) == [1]
    assert f"names 3 images twice; each is taken once: {first!r} in lines 1 and 3" in caplog.text
    with pytest.raises(CorruptSource, match=rf"gives 1 images two labels: {first!r} in lines 1 and 3; an image has"):
        listed(f"{first} 1\n{second}\n/{first} 2\n").keys()


def test_a_list_in_another_encoding_is_no_list(listed) -> None:
    with pytest.raises(CorruptSource, match="no text in UTF-8: it has zero bytes, as UTF-16 has"):
        listed("a.jpg\nb.jpg\n".encode("utf-16"))


def test_an_odd_name_in_a_list_is_one_image_that_cannot_be_read(listed):
    first = next(iter(PHOTOS))
    odd = ["../../secret.jpg", "a/../b.jpg", "c\\d.jpg", "nul\0.jpg"]
    source = listed(f"./{first}\n".encode() + "".join(f"{name}\n" for name in odd).encode() + b"caf\xe9.jpg\n")
    assert source.read(first) == PHOTOS[first]
    assert len(source.keys()) == 6
    for key in set(source.keys()) - {first}:
        with pytest.raises(storage.UnsafeName):
            source.read(key)
        assert source.versions([key]) == [""]


def test_a_list_asks_for_its_images_and_does_not_walk_the_folder(listed, tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "_listed", lambda uri: pytest.fail(f"{uri} was walked"))
    absolute_names = "".join(f"{tmp_path}/photos/{key}\n" for key in PHOTOS)
    assert all_of(listed(absolute_names, root="/")) == {f"{tmp_path}/photos/{key}"[1:]: PHOTOS[key] for key in PHOTOS}
    (tmp_path / "photos" / "list.txt").write_text(absolute_names)
    with pytest.raises(MissingInput, match=r"set root to the place .* \(they are absolute: --root /\)"):
        open_source(str(tmp_path / "photos" / "list.txt")).keys()
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "list.txt").write_bytes(list_of())
    with pytest.raises(MissingInput, match=r"there is 'list.txt'; set root to the place .* \(--root FOLDER;"):
        open_source(str(tmp_path / "lists" / "list.txt")).keys()


# What lies beside


def test_what_is_not_read_is_counted_and_told(tmp_path, caplog):
    for name in ("a.jpg", "b.heic", "c.json", "sub/d", "e.TXT"):
        storage.write_atomic(str(tmp_path / "in" / name), b"1")
    (tmp_path / "elsewhere").mkdir()
    storage.write_atomic(str(tmp_path / "elsewhere" / "x.jpg"), b"1")
    (tmp_path / "in" / "linked").symlink_to(tmp_path / "elsewhere")
    source = open_source(str(tmp_path / "in"))
    assert source.keys() == ["a.jpg", "b.heic"]
    beside = {"c.json": "not-an-image", "e.TXT": "not-an-image", "linked": "link", "sub/d": "not-an-image"}
    assert source.beside() == beside
    assert "4 files are not read as images" in caplog.text
    assert "1 links to folders" in caplog.text
    assert "1 without an ending" in caplog.text


def test_a_picture_beside_shards_does_not_take_their_place_and_archives_do_not_vanish(tmp_path, caplog):
    write_layout("tar", str(tmp_path / "in"))
    storage.write_atomic(str(tmp_path / "in" / "preview.png"), b"1" * 100)
    storage.write_atomic(str(tmp_path / "in" / "more.tar.gz"), b"1" * 100)
    source = open_source(str(tmp_path / "in"))
    assert len(source.keys()) == len(PHOTOS)
    assert source.beside() == {"preview.png": "not-read", "more.tar.gz": "not-read"}
    assert "1 .png" in caplog.text
    storage.write_atomic(str(tmp_path / "in" / "most.tar.gz"), b"1" * 10**6)
    with pytest.raises(
        CorruptSource, match=r"most of .*in would not be read: 2 compressed archives .* are larger than the 1"
    ):
        open_source(str(tmp_path / "in"))


def test_a_version_changes_with_its_file_alone(tmp_path):
    for name in ("a.jpg", "b.jpg"):
        storage.write_atomic(str(tmp_path / "in" / name), b"1")
    first = open_source(str(tmp_path / "in")).versions(["a.jpg", "b.jpg", "c.jpg"])
    assert first[2] == ""
    storage.write_atomic(str(tmp_path / "in" / "a.jpg"), b"12")
    second = open_source(str(tmp_path / "in")).versions(["a.jpg", "b.jpg", "c.jpg"])
    assert (first[0] == second[0], first[1:]) == (False, second[1:])
    assert pickle.loads(pickle.dumps(open_source(str(tmp_path / "in")))).versions(["a.jpg", "b.jpg", "c.jpg"]) == second


def test_an_empty_list_says_so(listed):
    with pytest.raises(MissingInput, match=r"list.txt names no image"):
        listed("# nothing\n\n").keys()


def test_a_wrong_root_is_noticed_before_the_work_with_what_was_looked_for_and_what_there_is(listed, tmp_path):
    with pytest.raises(MissingInput, match=r"looked for 'a/abbey/00000000.jpg'.*; there is 'abbey'; set root"):
        listed(list_of(), root=str(tmp_path / "photos" / "a")).keys()
    write_layout("tar", str(tmp_path))
    with pytest.raises(MissingInput, match=r"there is 'data_256/a/abbey/00000000.jpg'; set root.*ARCHIVE.tar/FOLDER"):
        listed(list_of(), root=str(tmp_path / "photos.tar")).keys()
    with pytest.raises(MissingInput, match=r"there is no folder .*gone"):
        listed(list_of(), root=str(tmp_path / "gone")).keys()


@pytest.mark.parametrize(
    ("layout", "options", "message"),
    [
        ("tree", {"root": "x"}, "root cannot be used here: the source .*photos is not a list of keys"),
        ("tar", {"key_column": "x"}, "key_column cannot be used here: .* is not a Parquet table"),
        ("list of a tar", {"image_column": "x"}, "image_column cannot be used here: .* is a list of keys"),
    ],
)
def test_a_setting_of_another_kind_of_source_is_refused(tmp_path, layout, options, message):
    with pytest.raises(ValueError, match=message):
        open_source(**{**write_layout(layout, str(tmp_path)), **options})


def test_a_folder_is_what_most_of_it_is(tmp_path):
    storage.write_atomic(str(tmp_path / "photos" / "z.jpg"), b"1" * 50_000)
    write_layout("tree", str(tmp_path))
    write_layout("tar", str(tmp_path))
    write_layout("parquet", str(tmp_path))
    assert open_source(str(tmp_path)).keys() == [f"photos/{key}" for key in [*sorted(PHOTOS), "z.jpg"]]


# Prepared sets


def settings(out: Path, *, uri: str, **changes) -> PrepareConfig:
    small = {"crop_size": 64, "patch_size": 16, "memory": MemoryConfig(pool_size=20), "images_per_shard": 4}
    return PrepareConfig(**{**small, "source": uri, "out": str(out), **changes})


@pytest.fixture
def expecting_six(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if Paris StreetView's test part had six photographs."""
    monkeypatch.setitem(PARTITIONS, "paris-streetview-test", Partition(6, "six"))


@pytest.mark.ray
def test_a_set_does_not_depend_on_how_its_photographs_are_kept(ray_session, tmp_path):
    tree = prepare(settings(tmp_path / "set of a tree", **write_layout("tree", str(tmp_path))))
    tar = prepare(settings(tmp_path / "set of a tar", **write_layout("tar", str(tmp_path))))
    assert (tar.shards, tar.digest) == (tree.shards, tree.digest)
    for layout in ("shards", "parquet", "list of a tar"):
        out = tmp_path / f"set of {layout}"
        prepare(settings(out, **write_layout(layout, str(tmp_path))))
        both = [
            {record.image_id: record for record in read_records(str(place))}
            for place in (tmp_path / "set of a tree", out)
        ]
        assert {record.source["key"]: record.label for record in both[1].values()} == LABELS
        for name, record in both[0].items():
            other = both[1][name]
            assert (record.image, record.masks, record.pool_yx) == (other.image, other.masks, other.pool_yx)


@pytest.mark.ray
def test_other_labels_make_other_shards_and_another_root_is_another_setting(ray_session, tmp_path):
    arguments = write_layout("list of a folder", str(tmp_path))
    first = prepare(settings(tmp_path / "set", **arguments))
    (tmp_path / "list.txt").write_bytes(list_of().replace(b" 4\n", b" 5\n"))
    second = prepare(settings(tmp_path / "set", **arguments))
    changed = [one == other for one, other in zip(first.shards, second.shards, strict=True)]
    assert sorted(changed) == [False, True]
    (tmp_path / "photos").rename(tmp_path / "moved")
    with pytest.raises(ConfigMismatch, match=r"root: .*photos -> .*moved"):
        prepare(settings(tmp_path / "set", **{**arguments, "root": f"{tmp_path}/moved"}))


@pytest.mark.ray
def test_images_that_a_list_names_and_its_root_lacks_are_quarantined_as_missing(ray_session, tmp_path):
    arguments = write_layout("list of a tar", str(tmp_path))
    with (tmp_path / "list.txt").open("ab") as file:
        file.write(b"/z/zoo/1.jpg 9\n")
    manifest = prepare(settings(tmp_path / "set", max_bad_fraction=0.5, **arguments))
    assert (manifest.drops, manifest.records) == ({"missing": 1}, 6)
    (line,) = (tmp_path / "set/quarantine.jsonl").read_text().splitlines()
    assert json.loads(line)["key"] == "z/zoo/1.jpg"


@pytest.mark.ray
def test_a_partition_that_is_whole_is_reported_so(ray_session, tmp_path, expecting_six):
    arguments = write_layout("list of a tar", str(tmp_path))
    prepare(settings(tmp_path / "set", expect="paris-streetview-test", **arguments))
    report = json.loads((tmp_path / "set/source_report.json").read_text())
    assert report["agrees"]
    assert (report["expected"], report["listed"], report["missing"], report["unlisted"]) == (6, 6, 0, 0)


@pytest.mark.ray
def test_a_partition_that_differs_stops_the_job_with_the_difference_unless_that_is_allowed(
    ray_session, tmp_path, caplog, expecting_six
):
    arguments = write_layout("list of a tar", str(tmp_path))
    kept = list_of().splitlines(keepends=True)[:4]
    (tmp_path / "list.txt").write_bytes(b"".join(kept) + b"z/gone.jpg 1\n")
    config = settings(tmp_path / "set", expect="paris-streetview-test", max_bad_fraction=0.5, **arguments)
    message = (
        "paris-streetview-test has 6 images, 5 are listed here; 1 too few; 1 listed images are not in the root, "
        "e.g. 'z/gone.jpg'; 2 images in the root are not in the list, e.g. 'b/bar/00000004.jpg'"
    )
    with pytest.raises(WrongCount, match=message) as caught:
        prepare(config)
    report = json.loads((tmp_path / "set/source_report.json").read_text())
    assert report == caught.value.details["report"]
    assert (report["agrees"], report["missing_examples"]) == (False, ["z/gone.jpg"])
    allowed = settings(
        tmp_path / "set",
        expect="paris-streetview-test",
        max_bad_fraction=0.5,
        allow_count_difference=True,
        **arguments,
    )
    assert prepare(allowed).records == 4
    assert f"{message}; going on all the same" in caplog.text
    assert read_manifest(str(tmp_path / "set")).drops == {"missing": 1}


def test_the_published_numbers_are_these():
    numbers = {name: partition.images for name, partition in PARTITIONS.items()}
    assert numbers["places365-standard-train"] == 1_803_460
    assert numbers["places365-challenge-train"] == 8_026_628
    assert (numbers["places365-val"], numbers["places365-test"]) == (36_500, 328_500)
    assert numbers["celeba-hq"] == numbers["celeba-hq-deepfill-train"] + numbers["celeba-hq-deepfill-val"] == 30_000
    assert (numbers["paris-streetview-train"], numbers["paris-streetview-test"]) == (14_900, 100)


def test_the_table_of_partitions_says_what_the_code_says():
    text = (ROOT / "docs" / "bring-your-own-data.md").read_text()
    shown = re.findall(r"^\| `([a-z0-9-]+)` \| ([0-9,]+) \|", text, re.M)
    assert shown == [(name, f"{one.images:,}") for name, one in PARTITIONS.items()]


@pytest.mark.ray
def test_an_odd_name_is_one_photograph_left_out_and_its_set_is_made(ray_session, tmp_path):
    folder = tmp_path / "in"
    for key, data in PHOTOS.items():
        storage.write_atomic(str(folder / key), data)
    data = next(iter(PHOTOS.values()))
    for name in (b"back\\slash.jpg", b"caf\xe9.jpg", b"new\nline.jpg", b"a::b.jpg"):
        with open(os.path.join(os.fsencode(folder), name), "wb") as file:
            file.write(data)
    prepare(settings(tmp_path / "set", uri=str(folder), max_bad_fraction=0.9))
    text = storage.read_bytes(str(tmp_path / "set" / "quarantine.jsonl")).decode()
    reasons = {row["key"]: row["reason"] for row in map(json.loads, text.splitlines())}
    assert {key for key, reason in reasons.items() if reason == "unsafe-name"} == {"back\\slash.jpg", "caf\\xe9.jpg"}
