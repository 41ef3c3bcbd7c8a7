"""New images go into new shards: old ones stay as they are, whatever the source is and wherever the job is stopped."""

from __future__ import annotations

import io
import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline import storage
from pipeline.data import prepare as prepare_module
from pipeline.data.plan import extend_plan, read_plan
from pipeline.data.prepare import PrepareConfig, prepare
from pipeline.data.schema import read_manifest, read_records
from pipeline.data.sources.choose import open_source
from pipeline.errors import CorruptSet, UnfinishedSet, VanishedImages
from pipeline.runs.lease import Lease
from tests.conftest import make_photo
from tests.pipeline.test_contract import files_of, run_here
from tests.pipeline.test_sources import LABELS, LAYOUTS, PHOTOS, tar_of, write_layout
from tmad.config import MemoryConfig

SMALL = {"crop_size": 64, "patch_size": 16, "memory": MemoryConfig(pool_size=12), "images_per_shard": 3}
SOURCES = ["tree", "tar", "parquet", "list"]


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    run_here(monkeypatch)


def photo(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(make_photo(number, 64, 64)).save(buffer, "png")
    return buffer.getvalue()


def _mask_file(left: int) -> bytes:
    mask = np.zeros((64, 64), np.uint8)
    mask[20:40, left : left + 20] = 255
    buffer = io.BytesIO()
    Image.fromarray(mask).save(buffer, "png")
    return buffer.getvalue()


MASK_FILE, OTHER_MASK_FILE = _mask_file(10), _mask_file(30)
FIRST = {f"{number:02d}.png": photo(number) for number in range(0, 14, 2)}
SECOND = {f"{number:02d}.png": photo(number) for number in range(1, 9, 2)} | {"05.png": FIRST["00.png"]}
THIRD = {"-1.png": photo(40), "03a.png": photo(41)}


def write(kind: str, place: Path, parts: list[dict[str, bytes]]) -> dict[str, str]:
    """Write *parts* as they would have come one after the other; returns settings that name the source."""
    everything = {key: data for part in parts for key, data in part.items()}
    if kind in ("tree", "list"):
        for key, data in everything.items():
            _write_new(f"{place}/photos/{key}", data)
    if kind == "list":
        (place / "list.txt").write_text("".join(f"{key} {len(key)}\n" for key in sorted(everything)))
        return {"source": f"{place}/list.txt", "root": f"{place}/photos"}
    for number, part in enumerate(parts):
        if kind == "tar":
            _write_new(f"{place}/photos/{number}.tar", tar_of(part.items()))
        if kind == "parquet":
            # A new file before the old ones, so that the rows of those move.
            buffer = io.BytesIO()
            pq.write_table(pa.table({"key": list(part), "image": list(part.values())}), buffer)
            _write_new(f"{place}/photos/{9 - number}.parquet", buffer.getvalue())
    return {"source": f"{place}/photos", **({"key_column": "key"} if kind == "parquet" else {})}


def _write_new(uri: str, data: bytes) -> None:
    """Files that are there already keep their times."""
    if not storage.exists(uri) or storage.read_bytes(uri) != data:
        storage.write_atomic(uri, data)


def config(kind: str, place: Path, parts: list[dict[str, bytes]], out: Path, **changes: object) -> PrepareConfig:
    return PrepareConfig(**{**SMALL, "max_bad_fraction": 0.9, "out": str(out), **write(kind, place, parts), **changes})


def keys_of(out: Path) -> list[str]:
    return [record.source["key"] for record in read_records(str(out))]


def shards_of(out: Path) -> dict[str, bytes]:
    return {name: data for name, data in files_of(out).items() if name.startswith(("shards/", "facts/"))}


@pytest.mark.parametrize("kind", SOURCES)
def test_a_set_that_is_extended_twice_keeps_every_file_of_the_old_shards(kind, tmp_path, monkeypatch):
    made = []
    make = prepare_module.make_shards

    def make_and_note(source, plan, shards, maker):
        made.extend(map(plan.keys, shards))
        return make(source, plan, shards, maker)

    monkeypatch.setattr(prepare_module, "make_shards", make_and_note)
    out = tmp_path / "set"
    digests = []
    for parts, new in (([FIRST], 3), ([FIRST, SECOND], 2), ([FIRST, SECOND, THIRD], 1)):
        before = shards_of(out)
        made.clear()
        manifest = prepare(config(kind, tmp_path, parts, out))
        assert len(made) == new
        assert {name: data for name, data in shards_of(out).items() if name in before} == before
        assert manifest.images_listed == sum(map(len, parts))
        digests.append(manifest.digest)
    assert len(set(digests)) == 3
    assert [sorted(keys) for keys in made] == [sorted(THIRD)]
    assert sorted(keys_of(out)) == sorted({**FIRST, **SECOND, **THIRD}.keys() - {"05.png"})
    assert keys_of(out)[: len(FIRST)] == sorted(FIRST)
    (line,) = (out / "quarantine.jsonl").read_text().splitlines()
    assert (json.loads(line)["key"], json.loads(line)["copy_of"]) == ("05.png", "00.png")
    # Records are those of a set made in one go, in another order; so of two copies the other one may stay.
    prepare(config(kind, tmp_path, [FIRST, SECOND, THIRD], tmp_path / "fresh"))
    extended, fresh = ({one.image_id: one for one in read_records(str(place))} for place in (out, tmp_path / "fresh"))
    assert extended.keys() ^ fresh.keys() <= {"00.png#0", "05.png#0"}
    assert all(extended[name] == fresh[name] for name in extended.keys() & fresh.keys())


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("writes", [0, 1, 2, 5, 7, 8, 9, 10])
def test_an_extension_that_was_stopped_is_the_one_that_was_not(kind, writes, tmp_path, monkeypatch):
    whole, out = tmp_path / "whole", tmp_path / "set"
    prepare(config(kind, tmp_path, [FIRST], whole))
    shutil.copytree(whole, out)
    arguments = config(kind, tmp_path, [FIRST, SECOND], out)
    write, left = Lease.write, iter(range(writes))

    def until_stopped(lease: Lease, key: str, data: bytes) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt
        write(lease, key, data)

    with monkeypatch.context() as stopped:
        stopped.setattr(Lease, "write", until_stopped)
        with pytest.raises(KeyboardInterrupt):
            prepare(arguments)
    with pytest.raises(UnfinishedSet):
        read_manifest(str(out))
    prepare(arguments)
    prepare(replace(arguments, out=str(whole)))
    assert files_of(out) == files_of(whole)


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("what", ["image", "mask"])
def test_what_is_replaced_under_its_name_has_its_shard_made_again_and_no_other(kind, what, tmp_path) -> None:
    parts = [FIRST, SECOND] if kind != "list" else [FIRST]
    masks: dict[str, str] = {}
    if what == "mask":
        for key in {**FIRST, **SECOND}:
            storage.write_atomic(f"{tmp_path}/masks/{key}", MASK_FILE)
        masks = {"mask_from": "paired", "masks": f"{tmp_path}/masks"}
    asked = config(kind, tmp_path, parts, tmp_path / "set", **masks)
    before = prepare(asked)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "set" / "shards").iterdir()}
    assert prepare(asked) == before
    if what == "mask":
        storage.write_atomic(f"{tmp_path}/masks/02.png", OTHER_MASK_FILE)
    else:
        write(kind, tmp_path, [FIRST | {"02.png": photo(77)}, *parts[1:]])
    after = prepare(asked)
    assert after.digest != before.digest
    assert after == prepare(replace(asked, out=str(tmp_path / "anew"))), "what a new set is"
    untouched = [path for path, at in times.items() if path.stat().st_mtime_ns == at]
    # The version of an archive or a table is that of all of its images.
    assert untouched or (what == "image" and kind in ("tar", "parquet"))


def test_images_that_vanished_stop_the_job_until_their_shards_may_be_made_again(tmp_path):
    out = tmp_path / "set"
    prepare(config("tree", tmp_path, [FIRST], out))
    before = files_of(out)
    for key in ("00.png", "02.png", "04.png", "08.png"):
        (tmp_path / "photos" / key).unlink()
    left = {key: data for key, data in FIRST.items() if (tmp_path / "photos" / key).exists()}
    message = r"4 of the 7 images of .* no longer in .*photos: '00.png', '02.png', '04.png', \.\.\.; .*vanished=drop"
    with pytest.raises(VanishedImages, match=message) as caught:
        prepare(config("tree", tmp_path, [left], out))
    assert caught.value.details["keys"] == ["00.png", "02.png", "04.png", "08.png"]
    assert files_of(out) == before
    manifest = prepare(config("tree", tmp_path, [left], out, vanished="drop"))
    assert keys_of(out) == sorted(left)
    # The first shard lost all its images and its files, the third none.
    assert [shard.file for shard in manifest.shards] == ["shards/00001.parquet", "shards/00002.parquet"]
    after = shards_of(out)
    assert not any("00000" in name for name in after)
    assert {name for name, data in after.items() if before[name] == data} == {
        f"{folder}/00002.{kind}" for folder, kind in (("shards", "json"), ("shards", "parquet"), ("facts", "parquet"))
    }
    # What comes back is new.
    manifest = prepare(config("tree", tmp_path, [FIRST], out))
    assert keys_of(out) == [*sorted(left), *sorted(FIRST.keys() - left.keys())]
    assert [shard.rows for shard in manifest.shards] == [2, 1, 3, 1]


def test_a_set_without_a_plan_keeps_its_shards_if_the_source_is_the_same(tmp_path):
    out = tmp_path / "set"
    prepare(config("tree", tmp_path, [FIRST], out))
    before = files_of(out)
    (out / "plan.parquet").write_bytes(b"PAR1")
    with pytest.raises(CorruptSet, match=r"plan.parquet cannot be read: .*; remove it and prepare again"):
        prepare(config("tree", tmp_path, [FIRST], out))
    (out / "plan.parquet").unlink()
    times = {path: path.stat().st_mtime_ns for path in (out / "shards").iterdir()}
    prepare(config("tree", tmp_path, [FIRST], out))
    assert files_of(out) == before
    assert {path: path.stat().st_mtime_ns for path in (out / "shards").iterdir()} == times


def test_a_finished_set_is_recognised_without_a_look_at_its_images(tmp_path, monkeypatch, caplog):
    out = tmp_path / "set"
    manifest = prepare(config("tree", tmp_path, [FIRST, SECOND], out))
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    with monkeypatch.context() as nothing:
        nothing.delattr(prepare_module, "read_facts")
        with caplog.at_level(logging.INFO):
            assert prepare(config("tree", tmp_path, [FIRST, SECOND], out)) == manifest
    assert "4 of 4 shards are already there" in caplog.text
    assert f"digest {manifest.digest}" in caplog.text
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()} == before
    for lost in ("report.html", "report.json", "quarantine.jsonl", "manifest.json"):
        content = (out / lost).read_bytes()
        (out / lost).unlink()
        prepare(config("tree", tmp_path, [FIRST, SECOND], out))
        assert (out / lost).read_bytes() == content, lost
    whole = (out / "manifest.json").read_bytes()
    (out / "manifest.json").write_bytes(whole.replace(b'"rows": 3', b'"rows": 2'))
    prepare(config("tree", tmp_path, [FIRST, SECOND], out))
    assert (out / "manifest.json").read_bytes() == whole


def test_a_finished_set_is_compared_anew_with_the_one_it_is_held_against(tmp_path):
    prepare(config("tree", tmp_path / "train", [THIRD], tmp_path / "against"))
    arguments = config("tree", tmp_path, [FIRST, SECOND], tmp_path / "set", against=str(tmp_path / "against"))
    assert prepare(arguments).drops == {"duplicate": 1}
    prepare(config("tree", tmp_path / "train", [THIRD, {"x.png": FIRST["06.png"]}], tmp_path / "against"))
    assert prepare(arguments).drops == {"duplicate": 1, "in-other-set": 1}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_labels_come_in_the_order_of_the_keys_and_an_unknown_key_has_none(layout, tmp_path):
    source = open_source(**write_layout(layout, str(tmp_path)))
    keys = [*sorted(source.keys(), reverse=True), "nowhere.png"]
    found = source.labels(pa.array(keys, pa.large_string()))
    assert found.type == pa.int64()
    assert found.to_pylist() == [None if layout in ("tree", "tar") else LABELS.get(key) for key in keys]


def test_labels_of_a_list_come_from_its_root_where_it_has_none(tmp_path):
    arguments = write_layout("shards", str(tmp_path))
    (tmp_path / "list.txt").write_text("".join(f"{key}{' 99' * (n == 2)}\n" for n, key in enumerate(PHOTOS)))
    source = open_source(f"{tmp_path}/list.txt", root=arguments["uri"])
    keys = source.keys()
    labels = source.labels(pa.array(keys, pa.large_string())).to_pylist()
    assert [one for n, one in enumerate(labels) if keys[n] != list(PHOTOS)[2]] == [
        LABELS[key] for key in keys if key != list(PHOTOS)[2]
    ]
    assert labels[keys.index(list(PHOTOS)[2])] == 99
    assert None not in labels


@pytest.mark.parametrize("count", [1, 3, 4, 100])
def test_the_plan_holds_every_image_once_in_shards_of_the_size_asked_for(count, tmp_path):
    arguments = PrepareConfig(**SMALL, source="x", out=str(tmp_path))
    keys = [f"{number:03d}" for number in range(count)]
    plan = extend_plan(None, keys, arguments)
    assert plan.table["key"].to_pylist() == keys
    assert plan.shards() == list(range(-(-count // 3)))
    storage.write_atomic(f"{tmp_path}/plan.parquet", plan.encode())
    again = read_plan(str(tmp_path))
    assert again is not None
    assert again.table.equals(plan.table)
    assert extend_plan(again, keys, arguments) is again
    more = extend_plan(again, [*keys, "00", "a"], arguments)
    assert more.table["key"].to_pylist() == [*keys, "00", "a"]
    assert pc.max(more.table["shard"]).as_py() == plan.shards()[-1] + 1
