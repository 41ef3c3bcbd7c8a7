"""Submits a job to a cluster after checking settings, places, token, upload size and commit."""

from __future__ import annotations

import asyncio
import logging
import os
import shlex
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic.dataclasses import dataclass

from pipeline.errors import ClusterUnreachable, TMADError
from pipeline.runs.cluster import ROOT
from pipeline.storage import redact
from pipeline.tracking.environment import code_state
from tmad.config import STRICT, PositiveInt

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
TOKEN_FILE = Path("~/.ray/auth_token")
AGENT_S = 60.0

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SubmitConfig:
    """How a job is submitted; the job and its own options follow."""

    address: str | None = None
    """Dashboard of the cluster; default: RAY_API_SERVER_ADDRESS, else RAY_ADDRESS, else http://127.0.0.1:8265."""
    changed: bool = False
    """Submit code that differs from its commit, too."""
    max_upload_mb: PositiveInt = 50
    """Most that may be uploaded, in MiB. Ray itself ends at 100, with an error of its server."""
    wait: bool = True
    """Show the job's log until it ends, and end as it did; Ctrl-C ends the showing, not the job."""

    @property
    def dashboard(self) -> str:
        """`address`, resolved."""
        given = self.address or os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS")
        return (given or DEFAULT_ADDRESS).rstrip("/")


def submit(config: SubmitConfig, module: str, arguments: Sequence[str]) -> int:
    """Submit `jobs/<module>.py` with *arguments*, which were checked; returns the exit code.

    Raises `ValueError` for an address that is none, for code that differs from its commit and for too large an upload,
    `ClusterUnreachable` where nothing answers or the token is not taken.
    """
    if not config.dashboard.startswith(("http://", "https://")):
        raise ValueError(f"--address must be that of the dashboard, http://HEAD:8265, got {config.dashboard}")
    environment: dict[str, Any] = {"env_vars": _commit(config)}
    # Ray walks through the folder five times, and each time names the files that stay here.
    for noisy in ("ray._private.runtime_env", "ray.dashboard"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    where = f"-m jobs.{module}"
    if (ROOT / ".rayignore").exists():
        _check_upload(ROOT, config.max_upload_mb)
        environment["working_dir"], where = str(ROOT), f"jobs/{module}.py"
    client = _client(config.dashboard)
    job = _submit(client, f"python {where} {shlex.join(arguments)}", environment)
    print(f"{job} is submitted to {config.dashboard}", flush=True)
    if not config.wait:
        print(f"ray job logs --address {config.dashboard} --follow {job}")
        return 0
    asyncio.run(_show(client, job))
    status = client.get_job_status(job)
    log.info("%s: %s", job, status)
    return 0 if status == "SUCCEEDED" else 1


def _submit(client: Any, entrypoint: str, environment: dict[str, Any]) -> str:
    """The job's name. The nodes of a cluster that has just started can take no job for some seconds."""
    end = time.monotonic() + AGENT_S
    while True:
        try:
            return str(client.submit_job(entrypoint=entrypoint, runtime_env=environment))
        except RuntimeError as error:  # with the server's answer
            text = redact(" ".join(str(error).split()))
            if "No available agent" not in text or time.monotonic() > end:
                raise TMADError(f"the cluster did not take the job: {text[:300]}") from None
            time.sleep(1)


def _commit(config: SubmitConfig) -> dict[str, str]:
    """For the job's environment: its folder has no repository."""
    state = code_state()
    if state["dirty"] and not config.changed:
        raise ValueError(
            f"the code differs from its commit ({state['commit'][:12]}), which is what the run would be recorded with; "
            "commit first, or say --changed"
        )
    return {"TMAD_COMMIT": state["commit"] + (" with changes" if state["dirty"] else "")} if state["commit"] else {}


def _check_upload(folder: Path, most_mb: int) -> None:
    files = sorted(uploaded(folder), reverse=True)
    total = sum(size for size, _ in files) / 2**20
    if total > most_mb:
        largest = ", ".join(f"{name} ({size / 2**20:.0f} MiB)" for size, name in files[:3])
        raise ValueError(
            f"{total:.0f} MiB would be uploaded, at most {most_mb} may be (--max-upload-mb); the largest: {largest}; "
            "name in .rayignore what no job needs"
        )
    log.info("%d files, %.1f MiB are uploaded", len(files), total)


def uploaded(folder: Path) -> Iterator[tuple[int, str]]:
    """Bytes and name of each file that Ray uploads of *folder*."""
    from ray._private.ray_constants import get_runtime_env_default_excludes
    from ray._private.runtime_env.packaging import _dir_travel, _get_excludes

    found: list[Path] = []
    excludes = [_get_excludes(folder, get_runtime_env_default_excludes())]
    _dir_travel(folder, excludes, found.append, include_gitignore=True)
    for path in found:
        if path.is_file():
            yield path.stat().st_size, path.relative_to(folder).as_posix()


def _client(address: str) -> Any:
    """Where jobs are submitted. A token that is there is sent, which Ray leaves to a variable."""
    token = (
        "RAY_AUTH_TOKEN" in os.environ or Path(os.environ.get("RAY_AUTH_TOKEN_PATH", TOKEN_FILE.expanduser())).is_file()
    )
    if token:
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    # Ray takes this variable, and RAY_ADDRESS after it, before the address that it is given.
    os.environ["RAY_API_SERVER_ADDRESS"] = address
    from ray.job_submission import JobSubmissionClient

    try:
        return JobSubmissionClient(address)
    except Exception as error:  # Ray has no class for it
        text = redact(" ".join(str(error).split()))
        if any(word in text for word in ("Unauthorized", "Forbidden", "Authentication", "authentication")):
            raise ClusterUnreachable(
                f"the cluster at {address} {'does not take the token' if token else 'asks for a token'}; set "
                f"RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH, or write it into {TOKEN_FILE}"
            ) from None
        if isinstance(error, ConnectionError):
            raise ClusterUnreachable(f"no dashboard of a Ray cluster answers at {address} (--address)") from None
        raise TMADError(f"{address} takes no jobs: {text[:300]}") from None


async def _show(client: Any, job: str) -> None:
    async for lines in client.tail_job_logs(job):
        print(lines, end="", flush=True)
