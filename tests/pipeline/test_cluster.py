"""An embedded Ray on a machine that is too busy to start it in time, and addresses where no cluster is."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import ray
from ray.exceptions import ActorUnavailableError

from pipeline.errors import ClusterUnreachable
from pipeline.runs.cli import run_job
from pipeline.runs.cluster import STARTS, start_local
from tests.conftest import ROOT

TOO_SLOW = Exception("The current node timed out during startup. This could happen because the GCS is overloaded.")


def starts(monkeypatch: pytest.MonkeyPatch, errors: Iterator[Exception | None]) -> list[dict[str, Any]]:
    """The calls of `ray.init`, which end in *errors* one after the other, none = it starts."""
    calls: list[dict[str, Any]] = []

    def init(**options: Any) -> None:
        calls.append(options)
        if (error := next(errors)) is not None:
            raise error

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    return calls


def test_a_start_that_took_too_long_is_made_again(monkeypatch, caplog) -> None:
    calls = starts(monkeypatch, iter([TOO_SLOW, None]))
    start_local(num_cpus=3)
    assert calls == [{"address": "local", "num_cpus": 3}] * 2
    assert "starting it again" in caplog.text


def test_a_machine_that_is_always_too_slow_is_an_error_after_a_few_attempts(monkeypatch) -> None:
    calls = starts(monkeypatch, iter([TOO_SLOW] * 9))
    with pytest.raises(ClusterUnreachable, match=r"in 3 attempts .*timed out during startup.*RAY_ADDRESS"):
        start_local()
    assert len(calls) == STARTS


def test_another_error_is_not_tried_again(monkeypatch) -> None:
    calls = starts(monkeypatch, iter([ValueError("num_cpus must be positive")]))
    with pytest.raises(ValueError, match="num_cpus"):
        start_local(num_cpus=-1)
    assert len(calls) == 1


def test_an_error_of_ray_whose_cluster_is_gone_says_that_it_is(monkeypatch, capfd) -> None:
    def job(_: object) -> None:
        raise ActorUnavailableError("The actor is unavailable: RpcError: Socket closed", None)

    with socket.create_server(("127.0.0.1", 0)) as head:
        address = f"127.0.0.1:{head.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(SystemExit, match="1"):
            run_job(job, [])
        assert "is unavailable" in capfd.readouterr().err
    with pytest.raises(SystemExit, match="1"):
        run_job(job, [])
    said = capfd.readouterr().err
    assert f"the Ray cluster at {address} is gone" in said
    assert "the same command continues where it stopped" in said
    assert "is unavailable" not in said


AT_ADDRESSES = """
import os, sys, time
from pipeline.runs.cluster import start_ray
from pipeline.errors import ClusterUnreachable
for address in sys.argv[1:]:
    os.environ["RAY_ADDRESS"] = address
    began = time.monotonic()
    try:
        start_ray()
    except ClusterUnreachable as error:
        print(f"{time.monotonic() - began:.0f}", error.message)
"""


def test_an_address_without_a_cluster_is_one_line_within_seconds() -> None:
    with socket.socket() as free, socket.create_server(("127.0.0.1", 0)) as stranger:
        free.bind(("127.0.0.1", 0))
        dead, other = (f"127.0.0.1:{one.getsockname()[1]}" for one in (free, stranger))
        addresses = [dead, f"ray://{dead}", "no-host.invalid:6379", "nonsense", other, f"ray://{other}"]
        command = [sys.executable, "-c", AT_ADDRESSES, *addresses]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=170)
    causes = ["refused", "refused", "not known", "Invalid address", "is no Ray", "is no Ray"]
    lines = done.stdout.splitlines()
    assert len(lines) == len(addresses), done.stderr
    for address, cause, line in zip(addresses, causes, lines, strict=True):
        seconds, said = line.split(" ", 1)
        assert int(seconds) < 15, line
        assert said.startswith(f"no Ray cluster at {address} (RAY_ADDRESS): "), line
        assert cause in said
        assert said.endswith("unset it for a Ray on this machine alone")
    assert "Traceback" not in done.stderr
