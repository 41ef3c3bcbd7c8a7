"""jobs/prepare.py and the training input from object storage to object storage, with faults in between."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from jobs.prepare import main
from pipeline import storage
from pipeline.data.batches import training_batches
from pipeline.data.schema import read_manifest
from pipeline.runs.cli import run_job
from pipeline.tracking import Tracker, mlflow_client
from tests.pipeline.test_batches import assert_equal
from tests.s3 import forget_clients

SECRET = "wJalrXUtnFEMI/K7MDENG/recognisable"
SMALL = ["--crop-size", "64", "--patch-size", "16", "--memory.pool-size", "12", "--images-per-shard", "3"]


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the job with the recognisable key; returns exit code and everything that was shown, free of the key."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    forget_clients()

    def call(source: str, out: str, *more: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as done:
            run_job(main, ["--source", source, "--out", out, *SMALL, *more])
        shown = capsys.readouterr()
        assert SECRET not in shown.out + shown.err
        return int(done.value.code), " ".join((shown.out + shown.err).split())

    yield call
    forget_clients()


@pytest.fixture
def photos(photo_folder: Path, bucket: str, tmp_path: Path) -> str:
    """Six photographs in the bucket."""
    for path in sorted(photo_folder.rglob("*.*"))[::2]:
        target = tmp_path / "photos" / path.relative_to(photo_folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    storage.upload_folder(tmp_path / "photos", f"{bucket}/photos")
    return f"{bucket}/photos"


def content(folder: str) -> dict[str, bytes]:
    return {key: storage.read_bytes(storage.join(folder, key)) for key in storage.list_files(folder)}


@pytest.mark.ray
def test_a_set_made_and_read_through_faults_is_the_one_made_and_read_without(faulty_cluster, bucket, photos, run):
    assert run(photos, f"{bucket}/calm")[0] == 0
    faulty_cluster.heal()
    faulty_cluster.answer("SlowDown", times=3)
    faulty_cluster.reset(method="GET", target=r"photos/\w+/", times=2)
    faulty_cluster.truncate(500, target=r"photos/\w+/", times=2)
    faulty_cluster.reset(method="PUT", target="stormy/shards", times=1)
    faulty_cluster.answer("InternalError", method="PUT", target="stormy/shards", times=2)
    code, shown = run(photos, f"{bucket}/stormy")
    assert code == 0, shown
    assert "6 records in 2 shards" in shown
    assert faulty_cluster.unspent() == 0
    assert content(f"{bucket}/stormy") == content(f"{bucket}/calm")
    assert all(SECRET.encode() not in data for data in content(f"{bucket}/stormy").values())

    options = {"seed": 5, "batch_images": 3, "total_images": 12, "num_cells": 9, "patch_size": 16}
    calm = list(training_batches(f"{bucket}/calm", **options))
    faulty_cluster.heal()
    faulty_cluster.truncate(700, target="stormy/shards", times=3)
    stormy = list(training_batches(f"{bucket}/stormy", **options))
    assert faulty_cluster.unspent() == 0
    assert len(calm) == len(stormy) == 4
    for one, other in zip(calm, stormy, strict=True):
        assert_equal(one, other)


@pytest.mark.ray
def test_a_key_that_is_deleted_after_it_was_listed_is_quarantined_and_counted(faulty_cluster, bucket, photos, run):
    gone = storage.list_files(photos)[2]
    faulty_cluster.vanish(bucket.removeprefix("s3://"), f"photos/{gone}")
    code, shown = run(photos, f"{bucket}/set", "--max-bad-fraction", "0.5")
    assert code == 0, shown
    manifest = read_manifest(f"{bucket}/set")
    assert (manifest.images_listed, manifest.images_used, manifest.drops) == (6, 5, {"missing": 1})
    (line,) = storage.read_bytes(f"{bucket}/set/quarantine.jsonl").decode().splitlines()
    assert json.loads(line) == {
        "key": gone,
        "reason": "missing",
        "detail": f"cannot read {photos}/{gone}: it is not there",
        "bytes": 0,
    }


@pytest.mark.ray
def test_an_outage_ends_the_job_with_key_and_cause_and_the_next_run_completes_it(faulty_cluster, bucket, photos, run):
    last = storage.list_files(photos)[-1]
    faulty_cluster.answer("InvalidAccessKeyId", target=re.escape(f"photos/{last}"))
    # The question for the reason, which the answer to a HEAD lacks.
    faulty_cluster.answer("InvalidAccessKeyId", target=r"\?(?!.*prefix).*max-keys=1\b")
    code, shown = run(photos, f"{bucket}/set")
    assert code == 1
    assert f"cannot read {photos}/{last}: the endpoint {faulty_cluster.url} refused the credentials" in shown
    assert "Traceback" not in shown
    assert not storage.exists(f"{bucket}/set/manifest.json")
    faulty_cluster.heal()
    code, shown = run(photos, f"{bucket}/set")
    assert code == 0, shown
    assert read_manifest(f"{bucket}/set").images_used == 6


@pytest.mark.parametrize("debug", [[], ["--debug"]])
def test_what_is_wrong_from_the_start_ends_the_job_before_anything_is_written(faulty, bucket, photos, run, debug):
    code, shown = run("s3://no-such-bucket/photos", f"{bucket}/set", *debug)
    assert code == 1
    assert f"there is no bucket 'no-such-bucket' at the endpoint {faulty.url}" in shown
    code, shown = run(photos, "s3://no-such-bucket/set", *debug)
    assert code == 1
    assert "s3://no-such-bucket/set/lease.json: there is no bucket 'no-such-bucket'" in shown
    code, shown = run(photos.replace("s3://", f"s3://AKIAKEY:{SECRET}@"), f"{bucket}/set", *debug)
    assert code == 1
    assert "has credentials in it" in shown
    assert not storage.exists(f"{bucket}/set")
    faulty.answer("InvalidAccessKeyId")
    code, shown = run(photos, f"{bucket}/set", *debug)
    assert code == 1
    assert f"{bucket}/set/lease.json: the endpoint {faulty.url} refused the credentials (InvalidAccessKeyId)" in shown
    assert ("Traceback" in shown) == bool(debug)


def test_no_secret_of_storage_reaches_mlflow(tracking_uri, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    places = {
        "source": f"s3://AKIAKEY:{SECRET}@bucket/photos",
        "weights": f"https://host/vgg.pth?X-Amz-Credential=AKIAKEY&X-Amz-Signature={SECRET[:12]}&X-Amz-Expires=9",
        "note": f"signed with {SECRET}",
    }
    run_id = Tracker.create(tracking_uri, "tests", "storage", {"data": places}, places)
    data = mlflow_client(tracking_uri).get_run(run_id).data
    kept = json.dumps([data.params, data.tags])
    assert SECRET[:12] not in kept
    assert "AKIAKEY" not in kept
    assert data.params["data.source"] == "s3://***@bucket/photos"
