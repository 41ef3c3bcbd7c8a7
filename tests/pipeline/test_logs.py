"""Log lines for people and for collectors: the place of a line is that of the process that wrote it."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import time

import pytest

from pipeline.observe import logs
from pipeline.runs.cli import configure_logging
from pipeline.tracking import Tracker
from pipeline.train.log_relay import RelayHandler, relayed_logs


@pytest.fixture(autouse=True)
def _as_before():
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logs._place.clear()


def test_json_lines_have_run_rank_and_the_step_of_the_last_metrics(monkeypatch, capsys) -> None:
    monkeypatch.setenv("TMAD_LOG", "json")
    configure_logging("first", 2)
    log = logging.getLogger("pipeline.test")
    log.info("before\nanything")
    Tracker(None, None).metrics({"loss/total": 1.0}, 800)
    try:
        raise ValueError("wrong")
    except ValueError:
        log.exception("after %d images", 800)
    before, after = (json.loads(line) for line in capsys.readouterr().err.splitlines())
    assert (before["run"], before["rank"], before["message"]) == ("first", 2, "before\nanything")
    assert "step" not in before
    assert (after["step"], after["level"], after["message"]) == (800, "error", "after 800 images")
    assert after["trace"].endswith("ValueError: wrong")


def test_text_stays_text_and_an_unknown_kind_is_said_and_is_text(monkeypatch, capsys, caplog) -> None:
    monkeypatch.setenv("TMAD_LOG", "xml")
    configure_logging("50%", 1)
    logging.getLogger("pipeline.test").info("a line")
    assert "TMAD_LOG must be text or json, got 'xml'" in caplog.text
    assert capsys.readouterr().err.endswith(" I 50%[1] a line\n")


@pytest.mark.ray
def test_a_workers_line_arrives_at_the_driver_with_the_workers_place(ray_session, caplog) -> None:
    logs.set_place(run="first", rank=1, step=16)
    with caplog.at_level(logging.INFO, "pipeline.train.log_relay"), relayed_logs() as lines:
        RelayHandler(lines, "worker 1: ").emit(
            logging.LogRecord("pipeline.x", logging.WARNING, "", 0, "slow", (), None)
        )
        logs._place.clear()
        time.sleep(0.1)
    [record] = [one for one in caplog.records if one.name == "pipeline.train.log_relay"]
    said = json.loads(logs.JsonFormatter().format(record))
    assert said["message"] == "worker 1: slow"
    assert (said["run"], said["rank"], said["step"]) == ("first", 1, 16)


def test_outside_ray_nothing_is_exported_and_nothing_is_imported_for_it() -> None:
    code = (
        "import sys; from pipeline import observe; observe.export('run', {'loss/total': 1.0}); "
        "observe.count('storage_repeat'); print([name for name in ('ray', 'torch') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
