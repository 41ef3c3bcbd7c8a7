"""An embedded Ray on a machine that is too busy to start it in time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import ray

from pipeline.cluster import STARTS, start_local

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
    with pytest.raises(Exception, match="timed out during startup"):
        start_local()
    assert len(calls) == STARTS


def test_another_error_is_not_tried_again(monkeypatch) -> None:
    calls = starts(monkeypatch, iter([ValueError("num_cpus must be positive")]))
    with pytest.raises(ValueError, match="num_cpus"):
        start_local(num_cpus=-1)
    assert len(calls) == 1
