"""Progress: log lines with rates elsewhere, a bar on a terminal that log lines do not cut through."""

from __future__ import annotations

import io
import logging
import sys

import pytest

from pipeline.runs import progress
from pipeline.runs.progress import LogHandler, Progress


class Terminal(io.StringIO):
    """Standard error as a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, to be set."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_line_every_ten_seconds_whose_rate_leaves_out_the_loading(
    clock: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "pipeline.runs.progress")
    with Progress(100, done=10) as one:
        for now, images in ((130.0, 10), (135.0, 10), (140.0, 20)):
            clock[0] = now
            one.add(images, reasons={"no-mask": 1})
    # 30 of the 40 images came in the 10 s after the first call.
    assert [record.message for record in caplog.records] == [
        "20 of 100 images, 0.333 images/s, ? to go; left out: 1 no-mask",
        "50 of 100 images, 3 images/s, 17 s to go; left out: 3 no-mask",
    ]


def test_on_a_terminal_a_bar_counts_and_log_lines_stand_above_it(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    logger = logging.Logger("x")
    logger.addHandler(LogHandler(terminal))
    with Progress(4) as one:
        one.add(1)
        logger.warning("a line")
        one.add(3)
    shown = terminal.getvalue()
    assert "/4 [" in shown
    # The bar is taken away before the line and drawn again after it.
    before, after = shown.split("a line\n")
    assert before.endswith("\r")
    assert "/4 [" in after
