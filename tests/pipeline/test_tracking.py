"""Tracking: a real SQLite MLflow, the JSON-lines file, and what happens when the server is away."""

from __future__ import annotations

import json
import logging
import math
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline import tracking
from pipeline.errors import TrackingUnreachable
from pipeline.models import find_model
from pipeline.tracking import (
    JsonLines,
    Tracker,
    check_tracking,
    default_tracking_uri,
    flatten,
    mlflow_client,
    read_json_lines,
    resolve_tracking_uri,
)
from pipeline.tracking.environment import code_tags
from tests.conftest import ROOT


def artifacts(uri: str, run_id: str) -> Path:
    return Path(mlflow_client(uri).get_run(run_id).info.artifact_uri.removeprefix("file://"))


def history(uri: str, run_id: str, name: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in mlflow_client(uri).get_metric_history(run_id, name)]


def test_a_restart_appends_to_the_same_run(tracking_uri: str, tmp_path: Path) -> None:
    run_id = Tracker.create(tracking_uri, "tests", "first", {"optim": {"lr": 1e-4}})
    jsonl = str(tmp_path / "metrics.jsonl")
    first = Tracker(tracking_uri, run_id, jsonl=jsonl)
    first.metrics({"loss/l1": 0.5, "lr": torch.tensor(1e-4)}, step=16)
    first.finish("FAILED")
    with Tracker(tracking_uri, run_id, jsonl=jsonl) as second:
        assert mlflow_client(tracking_uri).get_run(run_id).info.status == "RUNNING"
        second.metrics({"loss/l1": 0.25}, step=32)
    run = mlflow_client(tracking_uri).get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params == {"optim.lr": "0.0001"}
    assert history(tracking_uri, run_id, "loss/l1") == [(16, 0.5), (32, 0.25)]
    assert [(row["step"], row["loss/l1"]) for row in read_json_lines(jsonl)] == [(16, 0.5), (32, 0.25)]
    assert len(mlflow_client(tracking_uri).search_runs([run.info.experiment_id])) == 1


def test_artifacts_and_pictures_lie_beside_the_database_wherever_the_process_stands(
    tracking_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run_id = Tracker.create(tracking_uri, "tests", "pictures")
    tracker = Tracker(tracking_uri, run_id)
    tracker.artifact(b"{}", "config.json")
    tracker.artifact(b"bytes", "folder/raw.bin")
    picture = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    tracker.image("val/grid", picture)
    tracker.image("val/grid", picture, step=16)
    folder = artifacts(tracking_uri, run_id)
    assert folder.is_relative_to(Path(tracking_uri.removeprefix("sqlite:///")).parent / "mlartifacts")
    assert (folder / "config.json").read_text() == "{}"
    assert (folder / "folder" / "raw.bin").read_bytes() == b"bytes"
    assert np.array_equal(np.asarray(Image.open(folder / "val" / "grid.png")), picture)
    assert len(list((folder / "images").glob("*.png"))) == 1
    assert not (tmp_path / "mlruns").exists()


def test_all_metrics_of_an_interval_travel_in_one_call(tracking_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run_id = Tracker.create(tracking_uri, "tests", "batch")
    tracker = Tracker(tracking_uri, run_id)
    calls = []
    original = tracker._client.log_batch
    monkeypatch.setattr(
        tracker._client, "log_batch", lambda *a, **k: calls.append(len(k["metrics"])) or original(*a, **k)
    )
    tracker.metrics({f"m{index}": float(index) for index in range(50)}, step=1)
    assert calls == [50]


def test_many_parameters_and_long_ones_are_accepted(tracking_uri: str) -> None:
    params = {f"p{index:03d}": index for index in range(150)} | {"long": "x" * 10_000}
    run_id = Tracker.create(tracking_uri, "tests", "many", params)
    stored = mlflow_client(tracking_uri).get_run(run_id).data.params
    assert len(stored) == 151
    assert stored["p149"] == "149"
    assert stored["long"] == "x" * 6000


def test_no_secret_reaches_parameters_or_tags(tracking_uri: str) -> None:
    params = {
        "storage": {"uri": "s3://user:hunter2@host/bucket", "secret_key": "hunter2"},
        "api_key": "hunter2",
        "token": "hunter2",
        "data": "s3://bucket/places",
    }
    run_id = Tracker.create(tracking_uri, "tests", "secrets", params, {"password": "hunter2"})
    data = mlflow_client(tracking_uri).get_run(run_id).data
    assert "hunter2" not in json.dumps([data.params, data.tags])
    assert data.params["data"] == "s3://bucket/places"


def test_without_a_uri_only_the_file_is_written_and_mlflow_is_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("mlflow", "mlflow.entities"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it fails
    run_id = Tracker.create(None, "tests", "nothing", {"a": 1})
    assert run_id is None
    with Tracker(None, None, jsonl=str(tmp_path / "deep" / "metrics.jsonl")) as tracker:
        tracker.metrics({"loss": 1.0}, step=4)
        tracker.artifact(b"x", "x.bin")
        tracker.image("grid", np.zeros((2, 2, 3), dtype=np.uint8))
    assert [row["loss"] for row in read_json_lines(str(tmp_path / "deep" / "metrics.jsonl"))] == [1.0]
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["metrics.jsonl"]


def test_uri_and_run_id_go_together() -> None:
    with pytest.raises(ValueError, match="go together"):
        Tracker("sqlite:////x/mlflow.db", None)


def test_a_run_names_the_sets_that_it_reads(tracking_uri: str) -> None:
    run_id = Tracker.create(tracking_uri, "tests", "sets")
    tracker = Tracker(tracking_uri, run_id)
    tracker.dataset("s3://bucket/places/train", "0123456789abcdef", "training")
    tracker.dataset("/data/val", "fedcba9876543210", "validation")
    inputs = mlflow_client(tracking_uri).get_run(run_id).inputs.dataset_inputs
    assert sorted((one.tags[0].value, one.dataset.name, one.dataset.digest, one.dataset.source) for one in inputs) == [
        ("training", "train", "0123456789abcdef", '{"uri": "s3://bucket/places/train"}'),
        ("validation", "val", "fedcba9876543210", '{"uri": "/data/val"}'),
    ]


def test_whoever_only_reads_makes_no_database_and_a_file_that_is_none_stays(tmp_path: Path) -> None:
    absent, other = tmp_path / "typo" / "mlflow.db", tmp_path / "words.txt"
    other.write_text("x")
    with pytest.raises(TrackingUnreachable, match=r"there is no MLflow database .*typo/mlflow\.db: correct"):
        find_model("models:/tests@champion", tracking_uri=f"sqlite:///{absent}")
    assert not absent.parent.exists()
    with pytest.raises(TrackingUnreachable, match=r"words.txt is no SQLite database"):
        Tracker.create(f"sqlite:///{other}", "tests", "run")
    assert other.read_text() == "x"


def test_a_run_of_code_without_its_repository_has_the_commit_that_is_stated_and_no_tag_of_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("pipeline.tracking.environment.ROOT", tmp_path)
    monkeypatch.delenv("TMAD_COMMIT", raising=False)
    assert code_tags() == {}
    monkeypatch.setenv("TMAD_COMMIT", "0123abc")
    assert code_tags() == {"mlflow.source.git.commit": "0123abc"}


def test_values_that_json_lacks_become_null_and_mlflow_still_takes_them(tracking_uri: str, tmp_path: Path) -> None:
    run_id = Tracker.create(tracking_uri, "tests", "nan")
    jsonl = tmp_path / "metrics.jsonl"
    Tracker(tracking_uri, run_id, jsonl=str(jsonl)).metrics({"a": math.nan, "b": math.inf, "c": 1.0}, step=1)
    row = json.loads(jsonl.read_text())
    assert (row["a"], row["b"], row["c"]) == (None, None, 1.0)
    assert math.isnan(history(tracking_uri, run_id, "a")[0][1])


def test_a_server_that_is_away_costs_a_warning_and_its_metrics_arrive_later(
    tracking_uri: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run_id = Tracker.create(tracking_uri, "tests", "away")
    tracker = Tracker(tracking_uri, run_id)

    def away(*_: object, **__: object) -> None:
        raise ConnectionError("https://user:hunter2@server refused")

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(tracker._client, "log_batch", away)
        tracker.metrics({"loss": 1.0}, step=1)
    assert "MLflow did not take metrics" in caplog.text
    assert "hunter2" not in caplog.text
    tracker.metrics({"loss": 0.5}, step=2)
    assert history(tracking_uri, run_id, "loss") == [(1, 1.0), (2, 0.5)]


def test_nobody_waits_for_the_thread_that_speaks_with_a_silent_server(
    tracking_uri: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_id, jsonl = Tracker.create(tracking_uri, "tests", "silent"), str(tmp_path / "metrics.jsonl")
    answer, asked = threading.Event(), threading.Event()
    monkeypatch.setattr(tracking, "LAST_WORDS_S", 0.1)
    tracker = Tracker(tracking_uri, run_id, jsonl=jsonl, background=True)
    take = tracker._client.log_batch

    def silent(*args: object, **more: object) -> None:
        asked.set()
        assert answer.wait(60)
        take(*args, **more)

    monkeypatch.setattr(tracker._client, "log_batch", silent)
    for step in (1, 2):
        tracker.metrics({"loss": 1 / step}, step=step)
    assert asked.wait(60)
    tracker.finish()
    assert "MLflow has been away for 0.1 s" in caplog.text
    answer.set()
    tracker._thread.shutdown(wait=True)
    assert history(tracking_uri, run_id, "loss") == [(1, 1.0), (2, 0.5)]


def test_what_a_killed_worker_had_not_sent_is_sent_once_from_its_file(tracking_uri: str, tmp_path: Path) -> None:
    run_id, jsonl = Tracker.create(tracking_uri, "tests", "killed"), str(tmp_path / "metrics.jsonl")
    sent, lost = Tracker(tracking_uri, run_id, jsonl=jsonl), Tracker(None, None, jsonl=jsonl)
    sent.metrics({"loss": 1.0}, step=1)
    lost.metrics({"loss": 0.5, "rate": math.nan}, step=2)
    sent.metrics({"loss": 0.25}, step=3)
    for _ in range(2):
        Tracker(tracking_uri, run_id).catch_up(jsonl)
    assert sorted(history(tracking_uri, run_id, "loss")) == [(1, 1.0), (2, 0.5), (3, 0.25)]
    assert history(tracking_uri, run_id, "rate") == []


def test_what_waits_for_the_server_is_bounded(tracking_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "MAX_PENDING_METRICS", 10)
    tracker = Tracker(tracking_uri, Tracker.create(tracking_uri, "tests", "bounded"))

    def away(*_: object, **__: object) -> None:
        raise ConnectionError

    monkeypatch.setattr(tracker._client, "log_batch", away)
    for step in range(30):
        tracker.metrics({"loss": 1.0}, step=step)
    assert [entry[3] for entry in tracker._pending] == list(range(20, 30))


def test_a_float_picture_is_refused(tracking_uri: str) -> None:
    with pytest.raises(ValueError, match="must be uint8, got float64"):
        Tracker(None, None).image("grid", np.zeros((2, 2, 3)))


def test_a_line_cut_short_by_a_killed_writer_does_not_swallow_the_next(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    JsonLines(str(path)).append({"step": 1})
    with path.open("a") as file:
        file.write('{"step": 2, "lo')
    JsonLines(str(path)).append({"step": 3})
    assert [row["step"] for row in read_json_lines(str(path))] == [1, 3]


def test_a_remote_file_is_written_at_the_end_and_continued(monkeypatch: pytest.MonkeyPatch) -> None:
    uri = "memory://tests-tracking/metrics.jsonl"
    first = JsonLines(uri)
    for step in (1, 2):
        first.append({"step": step})
    assert len(read_json_lines(uri)) == 1, "the second line waits for the interval"
    first.close()
    second = JsonLines(uri)
    second.append({"step": 3})
    second.close()
    assert [row["step"] for row in read_json_lines(uri)] == [1, 2, 3]


TWENTY_FIRST_STARTS = """
import os, sys, time
from pipeline.tracking import Tracker
import mlflow.store.tracking.sqlalchemy_store  # once, for all of them
children = []
for number in range(20):
    if not (child := os.fork()):
        os.close(2)
        run_id = Tracker.create(sys.argv[1], "first", f"run-{number}", {"number": number})
        Tracker(sys.argv[1], run_id).metrics({"loss": number}, step=1)
        os._exit(0)
    children.append(child)
print([os.waitpid(child, 0)[1] for child in children])
"""


def test_twenty_first_starts_in_one_second_share_a_fresh_database(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/runs/mlflow.db"
    command = [sys.executable, "-c", TWENTY_FIRST_STARTS, uri]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=170)
    assert done.stdout.splitlines()[-1:] == [str([0] * 20)], done.stderr
    client = mlflow_client(uri)
    experiment = client.get_experiment_by_name("first")
    runs = client.search_runs([experiment.experiment_id])
    assert sorted(int(run.data.params["number"]) for run in runs) == list(range(20))
    assert all(run.data.metrics["loss"] == int(run.data.params["number"]) for run in runs)
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"
    assert not list((tmp_path / "runs").glob("*.tmp"))


def test_a_server_that_is_dead_and_a_database_of_an_older_mlflow_are_one_line_within_seconds(
    tracking_uri: str, tmp_path: Path
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        dead = f"http://user:hunter2@127.0.0.1:{free.getsockname()[1]}"
    with sqlite3.connect(tracking_uri.removeprefix("sqlite:///")) as database:
        database.execute("UPDATE alembic_version SET version_num = '451aebb31d03'")
    for uri, said in (
        (dead, "no answer from MLflow at http://"),
        (tracking_uri, "is unfit: .*out-of-date.*db upgrade"),
    ):
        for ask in (mlflow_client, lambda uri: find_model("models:/tmad@champion", tracking_uri=uri)):
            began = time.monotonic()
            with pytest.raises(TrackingUnreachable, match=said) as caught:
                ask(uri)
            assert time.monotonic() - began < 2 * tracking.CHECK_TIMEOUT_S
            assert "\n" not in caught.value.message
            assert "hunter2" not in caught.value.message


def test_a_database_that_another_process_keeps_locked_is_one_line_without_sql(tracking_uri: str) -> None:
    with closing(sqlite3.connect(tracking_uri.removeprefix("sqlite:///"), isolation_level=None)) as database:
        database.execute("BEGIN EXCLUSIVE")
        with pytest.raises(
            TrackingUnreachable, match="unfit: another process keeps it locked; end that process"
        ) as caught:
            check_tracking(tracking_uri)
    assert "SELECT" not in caught.value.message
    assert check_tracking(tracking_uri).endswith("answers")


def test_default_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    assert default_tracking_uri("runs") == f"sqlite:///{tmp_path}/runs/mlflow.db"
    assert resolve_tracking_uri(None, "runs") == f"sqlite:///{tmp_path}/runs/mlflow.db"
    assert resolve_tracking_uri("none", "runs") is None
    assert resolve_tracking_uri("sqlite:///a.db", "runs") == f"sqlite:///{tmp_path}/a.db"
    assert resolve_tracking_uri("http://mlflow:5000", "runs") == "http://mlflow:5000"
    with caplog.at_level(logging.WARNING):
        assert default_tracking_uri("s3://bucket/runs") is None
    assert "metrics.jsonl only" in caplog.text
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://other:5000")
    assert resolve_tracking_uri(None, "s3://bucket/runs") == "http://other:5000"
    with pytest.raises(ValueError, match="use sqlite:///"):
        resolve_tracking_uri("mlruns", "runs")


def test_flatten_joins_names_by_dots() -> None:
    assert flatten({"a": {"b": {"c": 1}, "d": ()}, "e": {}}) == {"a.b.c": 1, "a.d": (), "e": {}}
