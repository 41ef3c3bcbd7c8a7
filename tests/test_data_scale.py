"""What the benchmark of scale measures with: processes watched, requests metered, totals computed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from benchmarks import data_scale
from benchmarks.data_cost import KINDS, SHARD, Costs, PerImage, total
from benchmarks.object_store import running
from benchmarks.processes import processor_s, run_watched

ROOT = Path(__file__).resolve().parent.parent
MB = 10**6

HOLDS = "import time; held = bytearray(b'x') * {size}; time.sleep(1.5)"
"""A program that holds so many bytes for a while."""

FULL_STORE = """
import sys
from pathlib import Path
from benchmarks.processes import run_watched, share_token
share_token()
job = '''
import numpy as np, ray, time
from pipeline.cluster import start_ray
start_ray(object_store_bytes=100 * 2**20)
held = [ray.put(np.zeros(30 * 10**6, np.uint8)) for _ in range({objects})]
time.sleep(2)
'''
usage = run_watched([sys.executable, "-c", job], log=Path("log"), cwd=Path({root!r}))
print(usage.store_looks, usage.store_peak, usage.spilled)
"""


def test_the_peak_of_a_process_and_of_all_below_it_is_what_they_held(tmp_path: Path) -> None:
    child = HOLDS.format(size=100 * MB)
    parent = f"import subprocess, sys; below = subprocess.Popen([sys.executable, '-c', {child!r}]); "
    code = f"{parent}{HOLDS.format(size=200 * MB)}; below.wait()"
    usage = run_watched([sys.executable, "-c", code], log=tmp_path / "log")
    assert 200 * MB < usage.driver_own < 230 * MB
    assert usage.driver_rss > usage.driver_own
    assert 300 * MB < usage.all_own < 350 * MB


def test_processor_time_counts_children_that_have_ended_and_not_the_process_that_is_left_out() -> None:
    busy = "import time; end = time.process_time() + {s}\nwhile time.process_time() < end: pass"
    spent = processor_s(lambda: subprocess.run([sys.executable, "-c", busy.format(s=1)], check=True), without=-1)
    assert 0.9 < spent < 2
    with subprocess.Popen([sys.executable, "-c", busy.format(s=60)]) as other:
        try:
            assert processor_s(lambda: time.sleep(1), without=other.pid) < 0.3
        finally:
            other.kill()


def test_a_job_that_fails_is_an_error_with_its_last_words(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="no such thing"):
        run_watched([sys.executable, "-c", "raise SystemExit('no such thing')"], log=tmp_path / "log")


@pytest.mark.ray
@pytest.mark.parametrize(("objects", "spills"), [(2, False), (6, True)])
def test_what_has_no_room_in_a_jobs_store_is_seen_as_spilled(tmp_path: Path, objects: int, spills: bool) -> None:
    code = FULL_STORE.format(objects=objects, root=str(ROOT))
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=170
    )
    assert run.returncode == 0, run.stderr
    looks, peak, spilled = map(int, run.stdout.split())
    assert looks > 0
    assert 60 * MB <= peak <= 105 * MB
    assert (spilled >= 30 * MB) is spills
    assert spills or spilled == 0


def environment() -> dict[str, str]:
    """This process's, with the project to be imported from anywhere."""
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def test_the_meter_counts_requests_and_bytes_of_each_bucket_and_answers_late(tmp_path: Path) -> None:
    with running(tmp_path) as store:
        for bucket in ("photographs", "others"):
            store.make_bucket(bucket)
        store.reset()
        ask(store.address, "/photographs/a.jpg", "PUT", b"x" * 1000)
        assert len(ask(store.address, "/photographs/a.jpg")) == 1000
        assert len(ask(store.address, "/photographs/a.jpg", range="bytes=10-19")) == 10
        ask(store.address, "/photographs/a.jpg", "HEAD")
        listing = ask(store.address, "/photographs?list-type=2")
        found = store.traffic("photographs")
        assert found.requests == {"PUT": 1, "GET": 2, "HEAD": 1, "LIST": 1}
        assert (found.written, found.read) == (1000, 1010 + len(listing))
        assert store.traffic("others").all_requests == 0
        store.reset(late_s=0.5)
        began = time.monotonic()
        ask(store.address, "/photographs/a.jpg")
        assert time.monotonic() - began > 0.5
        assert store.traffic("photographs").requests == {"GET": 1}


def ask(address: str, path: str, method: str = "GET", body: bytes | None = None, *, range: str = "") -> bytes:
    # Whose signature it is does not matter, only that there is one.
    headers = {"Authorization": "AWS tests:x", "Content-Type": "image/jpeg", **({"Range": range} if range else {})}
    request = urllib.request.Request(address + path, body, headers, method=method)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return bytes(answer.read())


def test_totals_are_the_figures_of_one_image_times_their_number() -> None:
    kind = KINDS[-1]
    one = PerImage(kind, 4e6, 0.036, read_requests=2, read_share=1.5, written=10_000, shard_reads=3, shard_writes=4)
    found = total(one, Costs([one], epoch=(5, 1e6, 0.36), driver_bytes=1000))
    shards, groups = -(-(10**8) // SHARD), -(-(10**8) // 64)
    assert found == pytest.approx(
        {
            "images": 10**8,
            "core-hours": 1000,
            "hours of waiting": 2 * 10**8 * 0.03 / 3600,
            "GET and HEAD": 2 * 10**8 + 3 * shards,
            "PUT, LIST, DELETE": 4 * shards,
            "GB read": 600_000,
            "GB written": 1000,
            "shards": shards,
            "driver, GB": 100,
            "a pass: GET and HEAD": 5 * groups,
            "a pass: GB read": groups / 1000,
            "a pass: core-hours": groups / 10_000,
        }
    )


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.skipif("TMAD_SOAK_S" not in os.environ, reason="takes minutes; set TMAD_SOAK_S to run it")
@pytest.mark.timeout(900)
def test_a_quick_run_looks_into_every_job_and_counts_every_request(tmp_path: Path) -> None:
    script = ROOT / "benchmarks" / "data_scale.py"
    command = [sys.executable, str(script), "--quick", "--out", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    (figures,) = tmp_path.glob("*-data_scale-quick.json")
    found = json.loads(figures.read_text(encoding="utf-8"))["figures"]
    for name in ("preparation", "training input", "small pictures", "list"):
        for usage in found["Memory"][name].values():
            assert usage["store_looks"] > 0
            assert usage["driver_rss"] > usage["driver_own"] > 50 * MB
            assert usage["spilled"] == 0
    traffic = found["Preparation over S3"]["traffic"]
    images = data_scale.quick(data_scale.ScaleOptions()).s3_photographs
    assert traffic[data_scale.BARE]["read"]["requests"]["GET"] == images
    assert traffic["tree"]["read"]["requests"]["GET"] >= images
    assert traffic["tar"]["read"]["requests"]["GET"] < images
    assert traffic["Parquet"]["read"]["requests"]["GET"] < images
    assert set(found["One image"]) - {"samples"} == {kind.name for kind in KINDS}
