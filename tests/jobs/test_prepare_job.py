"""jobs/prepare.py as a user meets it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jobs.prepare import main
from pipeline import storage
from pipeline.data.schema import read_records
from pipeline.report.pictures import png_bytes
from tests.pipeline.test_sources import tar_of
from tests.tmad.tiny import make_image

JOB = Path(__file__).resolve().parents[2] / "jobs" / "prepare.py"


@pytest.fixture
def run(call_job):
    """Calls the job; returns exit code, standard output, and standard error without its line breaks."""

    def call(*arguments: object) -> tuple[int, str, str]:
        code, out, shown = call_job(main, *arguments)
        return code, out, " ".join(shown.replace("│", " ").split())

    return call


def test_the_help_teaches_from_any_folder(tmp_path):
    done = subprocess.run([sys.executable, JOB, "--help"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    options = ("--masks-per-image", "--against", "--dry-run", "pool-size", "paris-streetview-test")
    for part in ("Examples:", "ray job submit", "quarantine.jsonl", *options):
        assert part in done.stdout


def test_a_dry_run_prints_settings_reads_the_pairs_and_writes_nothing(run, tmp_path):
    asked = ["--source", "photos", "--out", "set", "--crop-size", 64, "--mask-from", "paired", "--masks", "masks"]
    code, _, said = run(*asked, "--dry-run")
    assert code == 1
    assert "there is no folder" in said
    mask = np.zeros((64, 64), np.uint8)
    mask[10:30, 10:30] = 255
    files = {f"photos/{number}.png": png_bytes(make_image(number)) for number in range(4)}
    files |= {"photos/3.png": files["photos/3.png"][:500], "photos/notes.txt": b"words"}
    files |= {"masks/0.png": png_bytes(mask), "masks/1.png": png_bytes(mask // 4), "masks/3.png": png_bytes(mask)}
    for name, data in files.items():
        storage.write_atomic(str(tmp_path / name), data)
    code, out, said = run(*asked, "--dry-run")
    assert code == 0
    assert json.loads(out)["crop_size"] == 64
    for line in (
        "4 images in 1 shards, 0 of them planned before",
        "1 files beside them are no images, e.g. 'notes.txt'",
        "4 were read: 1 can be used",
        "1 faint-mask",
        "1 no-mask",
        "1 truncated",
    ):
        assert line in said, line
    assert {path.name for path in tmp_path.iterdir()} == {"photos", "masks"}


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--source", "nowhere", "--out", "set"], 1, "there is no folder"),
        (["--source", "x", "--out", "y", "--crop-sise", "3"], 2, "--crop-size"),
        (["--source", "x", "--out", "y", "--crop-size", "100"], 2, "crop_size must be a multiple of"),
        (["--source", "x"], 2, "--out"),
        (["--source", "x", "--out", "y", "--expect", "places"], 2, "places365-challenge-train"),
        (["--source", "..", "--out", "y", "--root", "z"], 1, "is or lies in source"),
        (["--source", "/etc", "--out", "y", "--root", "z"], 1, "root cannot be used here: the source"),
    ],
)
def test_what_cannot_be_done_ends_with_one_clear_message(run, arguments, code, message):
    found, _, shown = run(*arguments)
    assert found == code
    assert message in shown
    assert "Traceback" not in shown


@pytest.mark.ray
def test_a_folder_of_photographs_becomes_a_set_and_the_second_time_at_once(run, ray_session, photo_folder):
    arguments = ["--source", photo_folder, "--out", "sets/train", "--crop-size", 128, "--images-per-shard", 6]
    code, out, shown = run(*arguments)
    assert code == 0, shown
    assert "12 records in 2 shards" in out
    assert "12 of 12 images" in shown
    assert "images/s" in shown
    assert "with pictures: " in shown
    assert "sets/train/report.html" in shown
    code, again, shown = run(*arguments)
    assert (code, again) == (0, out)
    assert "2 of 2 shards are already there and are kept" in shown
    code, _, shown = run(*arguments, "--seed", 1)
    assert code == 1
    assert "seed: 0 -> 1" in shown


@pytest.mark.ray
def test_a_list_and_a_tar_file_in_object_storage_become_a_set_in_object_storage(run, faulty_cluster, bucket):
    photographs = {f"{number:03d}.png": png_bytes(make_image(number, 32)) for number in range(100)}
    archive = tar_of([(f"./test/{name}", data) for name, data in photographs.items()])
    storage.write_atomic(f"{bucket}/test.tar", archive)
    storage.write_atomic(f"{bucket}/test.txt", "".join(f"/{name} 7\n" for name in photographs).encode())
    code, out, shown = run(
        *("--source", f"{bucket}/test.txt", "--root", f"{bucket}/test.tar/test"),
        *("--expect", "paris-streetview-test", "--out", f"{bucket}/set", "--images-per-shard", "50"),
        *("--crop-size", "32", "--patch-size", "16", "--memory.pool-size", "4"),
    )
    assert code == 0, shown
    assert "100 records in 2 shards" in out
    assert "paris-streetview-test has 100 images, 100 are listed here" in shown
    records = list(read_records(f"{bucket}/set"))
    assert {record.source["key"]: record.image for record in records} == photographs
    assert {record.label for record in records} == {7}
    assert json.loads(storage.read_bytes(f"{bucket}/set/source_report.json"))["agrees"]


@pytest.mark.ray
def test_what_a_task_cannot_write_ends_the_job_in_one_sentence(ray_session, run, tmp_path):
    storage.write_atomic(str(tmp_path / "photos/0.png"), png_bytes(make_image(0)))
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "facts").symlink_to("/dev/full")  # as a disk that is full
    code, _, said = run("--source", "photos", "--out", "set", "--crop-size", 64, "--patch-size", 16)
    assert code == 1
    assert "Traceback" not in said
    assert f"E cannot write {tmp_path}/set/facts/00000.parquet" in said
