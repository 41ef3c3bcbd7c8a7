"""Paths and URIs, whole writes, keys that stay in their folder, messages without credentials."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

import pyarrow.fs
import pytest

from pipeline import storage
from pipeline.errors import MissingInput, StorageFailed


@pytest.fixture(params=["path", "file", "memory"])
def place(request, tmp_path):
    """The URI of an empty folder of each kind."""
    return {
        "path": str(tmp_path),
        "file": f"file://{tmp_path}",
        "memory": f"memory://{uuid.uuid4().hex}/set",
    }[request.param]


def test_what_is_written_is_read_listed_and_removed(place):
    uri = storage.join(place, "a", "b.txt")
    storage.write_atomic(uri, b"one")
    storage.write_atomic(uri, b"two, longer")
    storage.write_atomic(storage.join(place, "Z.TXT"), b"")
    storage.write_atomic(storage.join(place, "a/c.bin"), b"")
    storage.write_atomic(storage.join(place, ".hidden"), b"")
    assert storage.read_bytes(uri) == b"two, longer"
    assert storage.size(uri) == 11
    assert storage.list_files(place) == ["Z.TXT", "a/b.txt", "a/c.bin"]
    assert storage.list_files(place, [".txt"]) == ["Z.TXT", "a/b.txt"]
    storage.remove(uri)
    storage.remove(uri)
    assert not storage.exists(uri)
    assert storage.size(uri) is None


def test_a_write_that_dies_before_its_rename_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "manifest.json"
    storage.write_atomic(str(path), b"old")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(StorageFailed, match=r"cannot write .*manifest.json: OSError: no space left"):
        storage.write_atomic(str(path), b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "key", ["../x", "a/../../x", "/etc/passwd", "a//b", ".", "", "a\\..\\b", "s3://other/x", "a\0b"]
)
def test_a_key_cannot_leave_its_folder(key):
    with pytest.raises(ValueError, match="a key must"):
        storage.join("s3://bucket/set", "shards", key)


def test_joined_uris_keep_their_scheme():
    assert storage.join("s3://bucket/set/", "a/b.png") == "s3://bucket/set/a/b.png"
    assert storage.join("/data", "x") == "/data/x"
    assert storage.join("/", "x") == "/x"


@pytest.mark.parametrize("key", ["/a", "a//b", "a/../b", "./a", "a/.", "a\\b", "a\0b", "", "s3://x/y", "a/"])
def test_a_name_that_could_lead_elsewhere_has_an_error_of_its_own(key):
    with pytest.raises(storage.UnsafeName, match="a key must"):
        storage.join("/data", key)


def test_names_as_long_as_a_disk_allows_and_with_every_sign_are_written_read_and_listed(tmp_path):
    names = ["x" * 255, "ü" * 127, "a::b", "a?b", "a*b", "[a]", "a b", "a\nb", "a#b", "a%20b", "~", "a:b"]
    for name in names:
        storage.write_atomic(storage.join(str(tmp_path), name), name.encode())
    assert storage.list_files(str(tmp_path)) == sorted(names)
    for name in names:
        assert storage.read_bytes(storage.join(str(tmp_path), name)) == name.encode()
        assert storage.size(storage.join(str(tmp_path), name)) == len(name.encode())
    remote = f"memory://{uuid.uuid4().hex}"
    storage.write_atomic(storage.join(remote, "a::b"), b"1")
    assert storage.read_bytes(storage.join(remote, "a::b")) == b"1"


def test_a_name_that_is_no_utf_8_is_listed_so_that_it_can_be_shown_and_not_read(tmp_path):
    (tmp_path / "plain").touch()
    with open(os.path.join(os.fsencode(tmp_path), b"caf\xe9"), "wb"):
        pass
    found = storage.list_files(str(tmp_path))
    assert found == ["caf\\xe9", "plain"]
    with pytest.raises(storage.UnsafeName):
        storage.join(str(tmp_path), found[0])


def test_local_places_become_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert storage.absolute("sets/train") == str(tmp_path / "sets/train")
    assert storage.absolute("file:///data/x/") == "/data/x"
    assert storage.absolute("s3://bucket/x/") == "s3://bucket/x"
    assert storage.absolute("~/x") == str(Path.home() / "x")


def test_missing_things_are_named(tmp_path):
    with pytest.raises(MissingInput, match="there is no folder /nowhere/at/all"):
        storage.list_files("/nowhere/at/all")
    with pytest.raises(MissingInput, match=r"cannot read .*gone.bin: it is not there"):
        storage.read_bytes(str(tmp_path / "gone.bin"))
    with pytest.raises(MissingInput, match=r"there is nothing at .*gone"):
        storage.local_copy(str(tmp_path / "gone"))
    (tmp_path / "file").touch()
    with pytest.raises(MissingInput, match="is a file; a folder is needed here"):
        storage.list_files(str(tmp_path / "file"))
    with pytest.raises(StorageFailed, match="cannot open storage for nope://x"):
        storage.read_bytes("nope://x")


def test_folders_travel_to_storage_and_back(tmp_path):
    (tmp_path / "model" / "deep").mkdir(parents=True)
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "deep" / "x.bin").write_bytes(b"\1\2")
    remote = f"memory://{uuid.uuid4().hex}/model"
    storage.upload_folder(tmp_path / "model", remote)
    copy = storage.local_copy(remote)
    assert (copy / "config.json").read_text() == "{}"
    assert (copy / "deep" / "x.bin").read_bytes() == b"\1\2"
    assert storage.local_copy(storage.join(remote, "deep", "x.bin")).read_bytes() == b"\1\2"
    assert storage.local_copy(f"file://{tmp_path}/model") == tmp_path / "model"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("s3://key:secret@bucket/x", "s3://***@bucket/x"),
        ("postgresql://me:pw@host/db failed", "postgresql://***@host/db failed"),
        ("https://h/x?X-Amz-Signature=abc&size=3", "https://h/x?X-Amz-Signature=***&size=3"),
        ("secret_access_key='abcdef', region='eu'", "secret_access_key='***', region='eu'"),
        ("s3://bucket/photos/a@2x.png", "s3://bucket/photos/a@2x.png"),
    ],
)
def test_credentials_do_not_show(text, shown):
    assert storage.redact(text) == shown


def test_secrets_of_the_environment_do_not_show(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI")
    assert storage.redact("denied for wJalrXUtnFEMI") == "denied for ***"


def test_trouble_of_storage_is_reported_without_credentials(tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_SESSION_TOKEN", "hidden-token-1")
    monkeypatch.setattr(os, "makedirs", lambda *_, **__: (_ for _ in ()).throw(PermissionError("hidden-token-1")))
    with pytest.raises(StorageFailed) as caught:
        storage.write_atomic(str(tmp_path / "x" / "y"), b"")
    assert "PermissionError: ***" in str(caught.value)
    assert "hidden-token-1" not in repr(caught.value.__cause__)


def test_an_object_that_stands_for_a_folder_is_no_file(bucket: str) -> None:
    place = f"{bucket}/run/model"
    # As Ray does before it uploads a checkpoint.
    pyarrow.fs.S3FileSystem(endpoint_override=os.environ["AWS_ENDPOINT_URL"]).create_dir(place.removeprefix("s3://"))
    storage.write_atomic(f"{place}/config.json", b"{}")
    assert storage.list_files(place) == ["config.json"]
    assert storage.list_files(bucket) == ["run/model/config.json"]
    assert storage.file_sizes(bucket) == {"run/model/config.json": 2}
    assert [path.name for path in storage.local_copy(place).iterdir()] == ["config.json"]
