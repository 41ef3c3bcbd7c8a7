"""Storage over HTTP with a server that misbehaves: what passes is waited for, the rest ends in one clear error."""

from __future__ import annotations

import logging
import pickle
import re
import socket
import time
import traceback
from collections.abc import Iterator

import pyarrow.parquet as pq
import pytest

from pipeline import storage
from pipeline.data.schema import open_shard
from pipeline.errors import CorruptSet, MissingInput, StorageFailed, TMADError
from pipeline.storage import s3
from tests.faults import FaultyProxy
from tests.s3 import forget_clients

CONTENT = bytes(range(256)) * 40
SECRET = "wJalrXUtnFEMI/K7MDENG/recognisable"


@pytest.fixture
def file(bucket: str, faulty: FaultyProxy) -> str:
    """A file of 10 240 bytes."""
    uri = f"{bucket}/photos/a b.bin"
    storage.write_atomic(uri, CONTENT)
    faulty.heal()
    return uri


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two attempts, half a second of silence."""
    monkeypatch.setenv("TMAD_STORAGE_ATTEMPTS", "2")
    monkeypatch.setenv("TMAD_STORAGE_SILENCE_S", "0.5")


@pytest.fixture
def secret(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[str]:
    """The secret key in use; afterwards no log line may hold it."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    forget_clients()
    with caplog.at_level(logging.INFO):
        yield SECRET
    forget_clients()
    assert SECRET not in caplog.text


def failure(action, *arguments) -> TMADError:
    with pytest.raises(TMADError) as caught:
        action(*arguments)
    shown = "".join(traceback.format_exception(caught.value))
    assert SECRET not in shown
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    assert caught.value.__cause__ is None
    return caught.value


def inject(proxy: FaultyProxy, fault: str, **where) -> None:
    if fault == "reset":
        proxy.reset(**where)
    elif fault == "truncate":
        proxy.truncate(100, **where)
    else:
        proxy.answer(fault, **where)


# What passes


@pytest.mark.parametrize("fault", ["InternalError", "SlowDown", "reset", "truncate"])
def test_a_file_is_read_through_faults_that_pass(faulty, file, fault):
    inject(faulty, fault, method="GET", target="photos", times=2)
    assert storage.read_bytes(file) == CONTENT
    assert faulty.seen("GET", "photos/a b") == 3
    assert faulty.seen("HEAD") == 0, "its size is not asked for"


def test_places_in_a_file_are_read_whole(faulty, file):
    faulty.truncate(100, target="photos", times=1)
    with storage.open_file(file) as opened:
        opened.seek(-1000, 2)
        assert opened.read(500) == CONTENT[-1000:-500]
        assert opened.tell() == len(CONTENT) - 500
    faulty.truncate(100, target="photos", times=1)
    with storage.open_file(file, read_ahead=4096) as opened:
        assert [opened.read(1000), opened.read(1000)] == [CONTENT[:1000], CONTENT[1000:2000]]
        assert opened.read() == CONTENT[2000:]


def test_large_files_come_in_parts_and_only_the_lost_part_is_read_again(faulty, file, monkeypatch):
    monkeypatch.setattr(storage, "PART_BYTES", 4000)
    faulty.truncate(100, target="photos", times=1)
    assert storage.read_bytes(file) == CONTENT
    assert faulty.seen("GET", "photos/") == 4


@pytest.mark.parametrize("fault", ["ServiceUnavailable", "reset", "truncate"])
def test_a_folder_is_listed_through_faults_that_pass(faulty, bucket, file, fault):
    inject(faulty, fault, method="GET", times=1)
    assert storage.list_files(bucket) == ["photos/a b.bin"]


@pytest.mark.parametrize("fault", ["SlowDown", "reset"])
def test_a_file_is_written_through_faults_that_pass(faulty, bucket, fault):
    inject(faulty, fault, method="PUT", times=2)
    storage.write_atomic(f"{bucket}/x", CONTENT)
    assert storage.read_bytes(f"{bucket}/x") == CONTENT


def test_an_answer_that_is_late_but_within_the_bound_is_waited_for(faulty, file, hasty):
    faulty.delay(0.2)
    assert storage.read_bytes(file) == CONTENT
    assert faulty.seen("GET", "photos") == 1


# What does not pass


@pytest.mark.parametrize("fault", ["InternalError", "SlowDown"])
def test_errors_of_the_server_end_after_the_attempts_that_are_set(faulty, file, hasty, secret, fault):
    faulty.answer(fault, method="GET", target="photos")
    error = failure(storage.read_bytes, file)
    status = 503 if fault == "SlowDown" else 500
    assert str(error) == (
        f"cannot read {file}: the endpoint {faulty.url} answered {status} {fault} to each of 2 attempts"
    )
    assert isinstance(error, StorageFailed)
    assert error.details["kind"] == "server"
    assert faulty.seen("GET", "photos") == 2


def test_a_body_that_is_always_cut_short_ends_after_the_attempts_that_are_set(faulty, file, hasty):
    faulty.truncate(100, target="photos")
    error = failure(storage.read_bytes, file)
    assert str(error) == f"cannot read {file}: the file arrived cut short in each of 2 attempts"
    assert error.details["kind"] == "incomplete"
    assert faulty.seen("GET", "photos") == 2


def test_a_file_that_is_shorter_than_what_is_asked_for_is_not_waited_for(faulty, file):
    error = failure(storage.read_range, file, len(CONTENT) - 10, 20)
    assert str(error) == (
        f"cannot read {file}: bytes 10230 to 10250 were asked for and 10 came, "
        "it ends at 10240; was it replaced meanwhile?"
    )
    assert faulty.seen("GET", "photos") == 1


def test_connections_that_are_always_reset_are_an_error(faulty, file, hasty):
    faulty.reset(target="photos")
    error = failure(storage.read_bytes, file)
    assert f"the endpoint {faulty.url} closed the connection without an answer in each of 2 attempts" in str(error)
    assert error.details["kind"] == "connection"


@pytest.mark.parametrize("method", ["HEAD", "GET", "PUT"])
def test_a_server_that_hangs_is_an_error_after_a_bounded_time(faulty, file, hasty, method):
    faulty.hang(method=method, target="photos")
    begin = time.monotonic()
    asked = {"HEAD": (storage.size, file), "GET": (storage.read_bytes, file), "PUT": (storage.write_atomic, file, b"x")}
    error = failure(*asked[method])
    assert time.monotonic() - begin < 30
    assert f"the endpoint {faulty.url} stayed silent in each of 2 attempts; TMAD_STORAGE_SILENCE_S is" in str(error)
    assert error.details["kind"] == "timeout"
    assert faulty.seen(method, "photos") == 2


def test_the_total_bounds_what_attempts_and_silence_would_allow(faulty, file, monkeypatch):
    monkeypatch.setenv("TMAD_STORAGE_TOTAL_S", "1")
    faulty.hang(method="GET")
    begin = time.monotonic()
    error = failure(storage.read_bytes, file)
    assert time.monotonic() - begin < 15
    assert f"the endpoint {faulty.url} was not done in time; TMAD_STORAGE_TOTAL_S is the bound" in str(error)


def test_an_endpoint_that_is_not_there_is_named(bucket, hasty, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        monkeypatch.setenv("TMAD_STORAGE_CONNECT_S", "2")
        forget_clients()
        for action in (storage.exists, storage.list_files, storage.read_bytes):
            error = failure(action, f"{bucket}/photos")
            assert f"the endpoint {address} cannot be reached (2 attempts); AWS_ENDPOINT_URL names an" in str(error)
            assert error.details["kind"] == "endpoint"
    forget_clients()


@pytest.mark.parametrize("code", ["InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken"])
def test_refused_credentials_are_named_at_once_and_not_shown(faulty, bucket, file, secret, code):
    faulty.answer(code)
    for action in (storage.list_files, storage.exists, storage.read_bytes, storage.size):
        faulty.requests.clear()
        error = failure(action, f"{bucket}/photos")
        assert (
            f"{bucket}/photos: the endpoint {faulty.url} refused the credentials ({code}); looked at AWS_PROFILE, "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, ~/.aws/credentials"
        ) in str(error)
        assert error.details["kind"] == "credentials"
        assert faulty.requests.total() <= 3, "not asked again, save for the reason and the bucket's region"
    assert isinstance(failure(storage.exists, bucket), StorageFailed), "a bucket is not taken for missing either"


def test_what_is_not_allowed_is_told_from_wrong_credentials(faulty, file):
    faulty.answer("AccessDenied", target="photos")
    error = failure(storage.read_bytes, file)
    assert f"cannot read {file}: the endpoint {faulty.url} does not allow it (AccessDenied)" in str(error)
    assert error.details["kind"] == "permission"


def test_without_credentials_the_places_are_named_that_were_looked_at(bucket, faulty, monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    forget_clients()
    error = failure(storage.list_files, bucket)
    assert f"cannot list {bucket}: no complete credentials were found; looked at AWS_PROFILE" in str(error)
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    forget_clients()
    assert "AWS_PROFILE names no usable profile" in str(failure(storage.list_files, bucket))
    forget_clients()


def test_a_bucket_that_is_not_there_is_named(faulty):
    words = f"there is no bucket 'no-such-bucket' at the endpoint {faulty.url}"
    for action, verb in [(storage.list_files, "list"), (storage.read_bytes, "read")]:
        error = failure(action, "s3://no-such-bucket/photos")
        assert str(error) == f"cannot {verb} s3://no-such-bucket/photos: {words}"
        assert isinstance(error, MissingInput)
    error = failure(storage.write_atomic, "s3://no-such-bucket/set/settings.json", b"{}")
    assert str(error) == f"cannot write s3://no-such-bucket/set/settings.json: {words}"
    assert not storage.exists("s3://no-such-bucket")
    assert not storage.exists("s3://no-such-bucket/photos")


def test_a_key_that_is_not_there_is_named_and_not_asked_for_again(faulty, bucket):
    error = failure(storage.read_bytes, f"{bucket}/photos/gone.png")
    assert str(error) == f"cannot read {bucket}/photos/gone.png: it is not there"
    assert isinstance(error, MissingInput)
    assert faulty.requests.total() <= 3
    assert storage.size(f"{bucket}/photos/gone.png") is None
    assert str(failure(storage.list_files, f"{bucket}/photos")) == f"there is no folder {bucket}/photos"


def test_a_folder_is_no_file_and_a_file_no_folder(bucket, file):
    assert str(failure(storage.read_bytes, f"{bucket}/photos")) == f"cannot read {bucket}/photos: it is a folder"
    assert "is a file; a folder is needed here" in str(failure(storage.list_files, file))


# Shards


def test_a_shard_is_read_through_bodies_cut_short(faulty, bucket, make_set):
    local = make_set(6)
    storage.upload_folder(local, f"{bucket}/set")
    faulty.truncate(40, target="shards", times=1)
    opened = open_shard(f"{bucket}/set", "shards/00000.parquet")
    faulty.truncate(40, target="shards", times=1)
    assert opened.read().equals(pq.read_table(f"{local}/shards/00000.parquet"))


def test_an_outage_is_not_taken_for_a_corrupt_shard_but_a_missing_one_is(faulty, bucket, make_set, hasty):
    storage.upload_folder(make_set(6), f"{bucket}/set")
    opened = open_shard(f"{bucket}/set", "shards/00000.parquet")
    faulty.answer("SlowDown", target="shards")
    with pytest.raises(StorageFailed, match=r"shards/00000.parquet: .* answered 503 SlowDown to each of 2 attempts"):
        opened.read_row_group(0)
    with pytest.raises(StorageFailed, match="503"):
        open_shard(f"{bucket}/set", "shards/00000.parquet")
    faulty.heal()
    storage.remove(f"{bucket}/set/shards/00000.parquet")
    with pytest.raises(CorruptSet, match=r"shards/00000.parquet cannot be read: .* it is not there"):
        open_shard(f"{bucket}/set", "shards/00000.parquet")


# Settings and secrets


@pytest.mark.parametrize(
    ("name", "value"),
    [("TMAD_STORAGE_ATTEMPTS", "0"), ("TMAD_STORAGE_ATTEMPTS", "two"), ("TMAD_STORAGE_TOTAL_S", "-1")],
)
def test_settings_that_cannot_be_are_refused(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=re.escape(f"{name} must be a positive number, got {value!r}")):
        storage.exists("s3://bucket/x")


def test_the_environment_changes_only_what_it_names(monkeypatch):
    monkeypatch.setenv("TMAD_STORAGE_ATTEMPTS", "9")
    assert s3.Patience.of_environment() == s3.Patience(attempts=9)


@pytest.mark.parametrize("user", ["AKIAKEY:" + SECRET, "AKIAKEY:" + SECRET.replace("/", "%2F")])
def test_a_uri_with_credentials_in_it_is_refused_without_showing_them(user, secret):
    for action in (storage.read_bytes, storage.list_files, storage.exists, storage.size):
        error = failure(action, f"s3://{user}@bucket/photos")
        assert str(error).startswith("s3://***@bucket/photos has credentials in it; s3://bucket/key is expected")


def test_a_signed_address_is_shown_without_its_signature(faulty, hasty, secret):
    signed = f"{faulty.url}/bucket/x?X-Amz-Credential=AKIAKEY%2Fus&X-Amz-Signature={SECRET}&X-Amz-Expires=60"
    faulty.answer("AccessDenied")
    error = failure(storage.read_bytes, signed)
    assert "X-Amz-Signature=***" in str(error)
    assert "AKIAKEY" not in str(error)


def test_an_empty_object_and_one_that_is_not_there_are_told_apart(bucket):
    storage.write_atomic(f"{bucket}/photos/empty", b"")
    assert storage.read_bytes(f"{bucket}/photos/empty") == b""
    with pytest.raises(MissingInput, match="photos/none"):
        storage.read_bytes(f"{bucket}/photos/none")
    with pytest.raises(MissingInput, match="it is a folder"):
        storage.read_bytes(f"{bucket}/photos")
