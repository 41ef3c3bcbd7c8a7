"""Jobs called in the tests' process, and fixtures of the pipeline's tests that the jobs' tests use too."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from pipeline.runs.cli import run_job
from tests.pipeline.conftest import in_this_process as in_this_process
from tests.pipeline.conftest import make_set as make_set
from tests.pipeline.conftest import model_folder as model_folder
from tests.pipeline.conftest import tracking_template as tracking_template
from tests.pipeline.conftest import tracking_uri as tracking_uri

CallJob = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CallJob:
    """Calls a job's `main` with arguments as its script would, in the folder *tmp_path*; returns exit code, standard
    output and standard error. A process of its own takes seconds to start."""

    def call(main: Callable[[Sequence[str]], int], *arguments: object) -> tuple[int, str, str]:
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit) as done:
            run_job(main, [str(argument) for argument in arguments])
        shown = capsys.readouterr()
        assert isinstance(done.value.code, int)
        return done.value.code, shown.out, shown.err

    return call
