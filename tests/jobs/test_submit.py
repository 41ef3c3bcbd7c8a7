"""`tmad submit` refuses what would fail on the cluster; a submission to a real one is in `test_train_on_cluster`."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from jobs.submit import main
from pipeline.errors import ClusterUnreachable, TMADError
from pipeline.runs import submit
from pipeline.runs.submit import SubmitConfig
from pipeline.storage import redact

JOB = ["prepare", "--source", "s3://bucket/photos", "--out", "s3://bucket/sets/train"]


@pytest.fixture(autouse=True)
def _elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_MODE"):
        monkeypatch.setenv(name, "")  # so that what a submission sets goes with the test
        monkeypatch.delenv(name)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "none"))


@pytest.fixture
def guarded() -> Iterator[str]:
    """Answers as a dashboard that asks for a token."""

    class Guarded(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(401)
            self.end_headers()
            self.wfile.write(b"Unauthorized: Missing authentication token")

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Guarded)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_what_would_be_refused_there_is_refused_here(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=r"each place must be a URI .* got --out sets/train"):
        main(["prepare", "--source", "s3://bucket/photos", "--out", "sets/train"])
    for wrong, said in (("--crop-size 250", "crop_size must be a multiple of"), ("--crop-sise 256", "--crop-sise")):
        with pytest.raises(SystemExit, match="2"):
            main([*JOB, *wrong.split()])
        assert said in capsys.readouterr().err
    with pytest.raises(ValueError, match="name a job and its options"):
        main(["--no-wait", "web"])
    assert main(["--dry-run", *JOB]) == 0
    assert capsys.readouterr().out.endswith(
        "http://127.0.0.1:8265: python jobs/prepare.py --source s3://bucket/photos --out s3://bucket/sets/train\n"
    )


def test_a_cluster_that_is_not_there_or_asks_for_a_token_is_one_sentence(
    guarded: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    for address, said in (
        (f"http://127.0.0.1:{port}", f"no dashboard of a Ray cluster answers at http://127.0.0.1:{port} "),
        (guarded, "asks for a token; set RAY_AUTH_TOKEN"),
    ):
        # Ray itself would go to these rather than to the address that it is given.
        monkeypatch.setenv("RAY_API_SERVER_ADDRESS", guarded)
        monkeypatch.setenv("RAY_ADDRESS", guarded)
        with pytest.raises(ClusterUnreachable, match=said) as refused:
            main(["--changed", "--address", address, *JOB])
        assert redact(str(refused.value)) == str(refused.value), "the log shows the whole sentence"
    with pytest.raises(ValueError, match=r"--address must be that of the dashboard.*got head:6379"):
        main(["--changed", "--address", "head:6379", *JOB])


def test_changed_code_and_a_large_upload_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "code_state", lambda: {"commit": "a" * 40, "dirty": True})
    with pytest.raises(ValueError, match=r"differs from its commit \(aaaaaaaaaaaa\)"):
        submit.submit(SubmitConfig(), "prepare", [])
    (tmp_path / ".rayignore").write_text("/left/\n")
    for name, size in {"jobs/large.bin": 2 * 2**20, "left/larger.bin": 3 * 2**20, "jobs/a.py": 10}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(bytes(size))
    assert {name for _, name in submit.uploaded(tmp_path)} == {".rayignore", "jobs/large.bin", "jobs/a.py"}
    monkeypatch.setattr(submit, "ROOT", tmp_path)
    with pytest.raises(ValueError, match=r"2 MiB would be uploaded, at most 1 .*jobs/large.bin \(2 MiB\)"):
        submit.submit(SubmitConfig(changed=True, max_upload_mb=1), "prepare", [])


def test_a_cluster_that_has_just_started_is_waited_for_and_a_refusal_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answers = ["500: No available agent to submit job, please try again later..", None]

    class Cluster:
        def submit_job(self, *, entrypoint: str, runtime_env: dict[str, object]) -> str:
            if said := answers.pop(0):
                raise RuntimeError(said)
            return f"raysubmit_1 {entrypoint}"

    monkeypatch.setattr(submit.time, "sleep", lambda _: None)
    assert submit._submit(Cluster(), "python jobs/prepare.py", {}) == "raysubmit_1 python jobs/prepare.py"
    answers.append("500: Traceback ...\n  token=hunter22 is wrong")
    with pytest.raises(TMADError, match=r"did not take the job: 500: Traceback \.\.\. token=\*\*\* is wrong"):
        submit._submit(Cluster(), "python jobs/prepare.py", {})
