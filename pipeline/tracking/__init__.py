"""Where the numbers and pictures of a run go: MLflow, a JSON-lines file, or nowhere, behind the same calls.

The driver creates the MLflow run once (`Tracker.create`) and hands its id to whoever writes; every restart opens the
same run again by that id, so a run that was killed five times is one run with one curve. Only `MlflowClient` is used:
the fluent API (`mlflow.start_run`, `mlflow.set_experiment`) keeps hidden state in the process that has sent runs into
the wrong experiment.
"""

from __future__ import annotations

import fcntl
import json
import logging
import math
import os
import re
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from PIL import Image

from pipeline import observe, storage
from pipeline.errors import TrackingUnreachable, one_line
from pipeline.observe import logs
from pipeline.runs.settings import flatten

if TYPE_CHECKING:
    from mlflow import MlflowClient

Status = Literal["FINISHED", "FAILED", "KILLED"]

NO_TRACKING = "none"
"""Value of a tracking URI setting that switches MLflow off."""

SECRET_NAME = re.compile(r"passw|secret|token|credential|api_?key|access_?key|account_?key", re.IGNORECASE)
"""Parameters and tags with such a name are logged as `***`."""

CHECK_TIMEOUT_S = 5
"""Seconds that a server has to answer when asked whether it is there; MLflow takes whole ones."""

MAX_PARAM_CHARACTERS = 6000
MAX_PENDING_METRICS = 20_000
PARAMS_PER_CALL = 100
METRICS_PER_CALL = 900
"""Limits of the MLflow API, and of what is kept in memory while its server is away."""

LAST_WORDS_S = 60.0
"""Seconds that a closing background tracker waits for its server; `catch_up` sends what was not sent by then."""

REMOTE_WRITE_INTERVAL_S = 30.0
"""Object storage cannot append: a remote JSON-lines file is written again at most this often, and at the end."""

log = logging.getLogger(__name__)


def default_tracking_uri(storage_root: str) -> str | None:
    """Where a run is tracked when its configuration does not say: `MLFLOW_TRACKING_URI`, or SQLite beside the runs.

    The file is `<storage_root>/mlflow.db` with an absolute path, as workers run in another directory. A remote
    *storage_root* cannot hold SQLite: then the result is `None`, with a warning, and only `metrics.jsonl` is written.
    """
    if named := os.environ.get("MLFLOW_TRACKING_URI"):
        return named
    if storage.is_remote(storage_root):
        log.warning(
            "no MLflow: %s is not on this machine and MLFLOW_TRACKING_URI is not set; metrics go to metrics.jsonl only",
            storage.redact(storage_root),
        )
        return None
    return f"sqlite:///{storage.absolute(storage_root)}/mlflow.db"


_SCHEMES = re.compile(r"(https?|databricks|databricks-uc|uc|(sqlite|postgresql|mysql|mssql)(\+\w+)?)://")
"""Of URIs that MLflow records at."""


def resolve_tracking_uri(uri: str | None, storage_root: str) -> str | None:
    """The tracking URI that a setting means: `None` = the default place, `"none"` = off (gives `None`), else itself.

    A relative `sqlite:///` path is made absolute here, once, before workers in other directories read it. Raises
    `ValueError` for what MLflow no longer takes, and for a relative path in a submitted job.
    """
    if uri is None:
        return default_tracking_uri(storage_root)
    if uri.lower() == NO_TRACKING:
        return None
    if uri.startswith("sqlite:///") and not uri.startswith("sqlite:////"):
        if storage.submitted():
            raise ValueError(
                "a submitted job runs in Ray's copy of the uploaded folder, where nothing lasts: the tracking URI must "
                f"be a server or an absolute sqlite:////folder/mlflow.db, not the relative {uri}; set "
                "MLFLOW_TRACKING_URI"
            )
        return f"sqlite:///{Path(uri.removeprefix('sqlite:///')).absolute()}"
    if not _SCHEMES.match(uri):
        raise ValueError(
            "tracking_uri must be a server (http://...), sqlite:///path/mlflow.db, databricks://... or 'none', "
            f"got {uri!r}; "
            "MLflow no longer writes plain folders: use sqlite:///"
        )
    return uri


def mlflow_client(uri: str, *, make: bool = False) -> MlflowClient:
    """A client of the tracking server or SQLite file at *uri*, which answers; *make*: the file, if there is none.
    Raises `TrackingUnreachable` within seconds if it does not; what happens later takes MLflow its minutes."""
    if uri not in _answered:
        check_tracking(uri)
        if uri.startswith("sqlite:///") and not (path := Path(uri.removeprefix("sqlite:///"))).exists():
            if not make:
                raise TrackingUnreachable(
                    f"there is no MLflow database {path}: correct the tracking URI (MLFLOW_TRACKING_URI or the job's "
                    "option)"
                )
            _make_database(path)
        _answered.add(uri)
    return _client(uri)


_answered: set[str] = set()
"""Where this process has found MLflow."""


def _client(uri: str) -> MlflowClient:
    """With MLflow imported here because that takes seconds.

    MLflow's usage reports to its makers are switched off unless the environment says otherwise: training machines
    often have no way out, and nobody asked for them. So are its progress bars, among our log lines.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def _make_database(path: Path) -> None:
    """A database at *path*, unless another process has made it. MLflow makes its tables one after the other, and a
    second process in between, or a kill, leaves a database that nothing opens any more: one process makes it, under
    another name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            new = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
            try:
                _client(f"sqlite:///{new}").search_experiments(max_results=1)
                new.rename(path)
            finally:
                new.unlink(missing_ok=True)


def _is_database(path: Path) -> bool:
    """MLflow would make one of a file of a few bytes."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(16) in (b"", b"SQLite format 3\0")


def check_tracking(uri: str | None) -> str:
    """Whether runs can be recorded at *uri* (resolved), in words, within seconds and without a trace. Raises
    `TrackingUnreachable` with the cause."""
    if uri is None:
        return "off, metrics go to metrics.jsonl only"
    shown, database = storage.redact(uri), uri.removeprefix("sqlite:///")
    if database != uri and not Path(database).exists():
        return f"{shown}, a new database"
    if database != uri and not _is_database(Path(database)):
        raise TrackingUnreachable(
            f"{database} is no SQLite database: correct the tracking URI (MLFLOW_TRACKING_URI or the job's option)"
        )
    # What MLflow does by itself: 120 s for an answer, seven times over.
    patience = {"MLFLOW_HTTP_REQUEST_TIMEOUT": str(CHECK_TIMEOUT_S), "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    before = {name: os.environ.get(name) for name in patience}
    os.environ.update(patience)
    try:
        _client(uri).search_experiments(max_results=1)
    except Exception as error:
        # Errors of MLflow's HTTP and SQL libraries come through, as everywhere here.
        server = database == uri
        what = f"no answer from MLflow at {shown} within {CHECK_TIMEOUT_S} s" if server else f"{shown} is unfit"
        raise TrackingUnreachable(
            f"{what}: {storage.redact(_cause(error))}; {'start the server, ' if server else ''}correct the tracking "
            "URI (MLFLOW_TRACKING_URI or the job's option), or go without where the job can (`none`)"
        ) from error
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)
    return f"{shown} answers"


def _cause(error: Exception) -> str:
    """Why a server does not answer, out of what three libraries say about it."""
    text = one_line(error)
    if "database is locked" in text:
        return "another process keeps it locked; end that process"
    if "not in a valid JSON format" in text:
        return "what answers there is no MLflow server"
    if found := re.search(r"too many (\d+) error responses", text):
        return f"it answers with HTTP {found[1]}"
    found = re.search(r"\[Errno -?\d+\] ([^'\")]+)", text)
    return found[1] if found else "it timed out" if "timed out" in text else text


def check_run(uri: str, run_id: str) -> None:
    """Raise `TrackingUnreachable`, or `ValueError` if MLflow at *uri* has no run *run_id* that can be written to."""
    from mlflow.exceptions import MlflowException

    try:
        run = mlflow_client(uri).get_run(run_id)
    except MlflowException as error:
        raise ValueError(f"no MLflow run {run_id!r} at {storage.redact(uri)}: {one_line(error)}") from error
    if run.info.lifecycle_stage == "deleted":
        raise ValueError(f"the MLflow run {run_id!r} at {storage.redact(uri)} was deleted; restore it or name another")


def wait_for_tracking(uri: str | None, wait_s: float) -> None:
    """Return when the server at *uri* answers; raises `TrackingUnreachable` if it does not within *wait_s*."""
    deadline, announced = time.monotonic() + wait_s, False
    while True:
        try:
            check_tracking(uri)
            return
        except TrackingUnreachable as error:
            if time.monotonic() >= deadline:
                raise
            if not announced:
                log.warning("waiting up to %g s for MLflow: %s", wait_s, error)
                announced = True
            time.sleep(min(5.0, wait_s))


class JsonLines:
    """A file of one JSON object a line that survives restarts: opened again, it appends to what is there.

    Local files are appended to line by line; at any other URI the whole text is written again, atomically, at most
    every 30 s and when closed. Values that JSON cannot hold (NaN, infinity) become `null`.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._local = None if storage.is_remote(uri) else Path(storage.absolute(uri))
        self._text = ""
        self._last_write_s = -math.inf
        if self._local is None:
            self._text = storage.read_bytes(uri).decode() if storage.exists(uri) else ""
        else:
            self._local.parent.mkdir(parents=True, exist_ok=True)
            _end_last_line(self._local)

    def append(self, row: Mapping[str, float]) -> None:
        """Add *row*; on a local file it is on disk when this returns."""
        finite = {name: value if math.isfinite(value) else None for name, value in row.items()}
        line = json.dumps(finite, ensure_ascii=False) + "\n"
        if self._local is not None:
            with self._local.open("a", encoding="utf-8") as file:
                file.write(line)
            return
        self._text += line
        if time.monotonic() - self._last_write_s >= REMOTE_WRITE_INTERVAL_S:
            self.close()

    def close(self) -> None:
        """Write what object storage does not have yet; harmless to repeat."""
        if self._local is None:
            storage.write_atomic(self.uri, self._text.encode())
            self._last_write_s = time.monotonic()


def read_json_lines(uri: str) -> list[dict[str, Any]]:
    """Rows of a `JsonLines` file, in order; a line cut short by a killed writer is left out. Missing file: no rows."""
    if not storage.exists(uri):
        return []
    rows = []
    for line in storage.read_bytes(uri).decode("utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


class Tracker:
    """One run's metrics, pictures and files; *uri* `None` leaves MLflow out, *jsonl* `None` leaves the file out.
    *exported_as*: name of the run at Ray's metrics endpoint (`pipeline.observe`), `None` = not there.

    A tracking server that is away does not stop training: metrics wait in memory (20 000 values at most, the oldest go
    first) and are sent with the next interval; pictures and files are given up with a warning. `metrics.jsonl` has
    every value whatever the server does, and `catch_up` gives MLflow what it lacks of them. With *background*, a thread
    speaks with the server, which takes minutes to find that one is away, and nobody waits for it.
    """

    def __init__(
        self,
        uri: str | None,
        run_id: str | None,
        *,
        jsonl: str | None = None,
        background: bool = False,
        exported_as: str | None = None,
    ) -> None:
        if (uri is None) != (run_id is None):
            raise ValueError(f"uri and run_id go together: both or neither, got {uri!r} and {run_id!r}")
        self.uri = uri
        self.run_id = run_id
        self._client = _client(uri) if uri is not None else None
        self._jsonl = JsonLines(jsonl) if jsonl is not None else None
        self._pending: list[tuple[str, float, int, int]] = []
        self._thread = ThreadPoolExecutor(1, "mlflow") if background and uri is not None else None
        self._exported_as = exported_as
        # A restart opens the run that a crash may have left as FAILED or KILLED.
        self._do(partial(self._guard, "the start", "update_run", status="RUNNING"))

    @staticmethod
    def create(
        uri: str | None,
        experiment: str,
        run_name: str,
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, Any] | None = None,
    ) -> str | None:
        """Start a run in MLflow and return its id, or `None` without *uri*.

        *params* may be nested (a configuration as dictionaries): `optim.lr` is one parameter. Names that look like
        secrets are logged as `***` and URIs without their user and password.
        """
        if uri is None:
            return None
        client = mlflow_client(uri, make=True)
        run = client.create_run(
            experiment_id=_experiment_id(client, uri, experiment),
            run_name=run_name,
            tags={name: _shown(name, value) for name, value in (tags or {}).items()},
        )
        run_id: str = run.info.run_id
        _log_params(client, run_id, params or {})
        return run_id

    def metrics(self, values: Mapping[str, Any], step: int) -> None:
        """Record *values* (numbers or 0-dim tensors) at *step*, in one call to MLflow. *step* counts images seen."""
        logs.set_place(step=int(step))
        numbers = {name: float(value) for name, value in values.items()}
        if self._exported_as is not None:
            observe.export(self._exported_as, {"images": step, **numbers})
        now_ms = int(time.time() * 1000)
        if self._jsonl is not None:
            self._jsonl.append({"step": int(step), "time_s": now_ms / 1000, **numbers})
        if self._client is not None:
            self._pending += [(name, value, now_ms, int(step)) for name, value in numbers.items()]
            self._do(self._send)

    def flush(self) -> None:
        """Metrics up to here are in the file, wherever it lies."""
        if self._jsonl is not None:
            self._jsonl.close()

    def catch_up(self, jsonl: str) -> None:
        """Send the metrics of the file *jsonl* that MLflow does not have: those of a worker that was killed while the
        server was away."""
        if self._client is None:
            return
        rows = read_json_lines(jsonl)
        lacking = []
        for name in sorted({name for row in rows for name in row} - {"step", "time_s"}):
            points = [
                (round(row["time_s"] * 1000), row["step"], row[name]) for row in rows if row.get(name) is not None
            ]
            try:
                history = self._client.get_metric_history(str(self.run_id), name)
            except Exception as error:
                log.warning("MLflow did not say which metrics it has: %s", storage.redact(str(error)))
                return
            there = {(point.timestamp, point.step) for point in history}
            lacking += [(name, value, *when) for *when, value in points if tuple(when) not in there]
        if lacking:
            log.info("%d metric values were kept while MLflow was away: sending them", len(lacking))
            self._pending += lacking
            self._send()

    def artifact(self, content: bytes, name: str) -> None:
        """Keep a file under *name* (`folder/file.json`)."""
        if self._client is None:
            return
        folder, _, filename = name.rpartition("/")
        with tempfile.TemporaryDirectory(prefix="tmad-artifact-") as temporary:
            path = Path(temporary, filename)
            path.write_bytes(content)
            self._guard("artifact " + name, "log_artifact", str(path), folder or None)

    def dataset(self, place: str, digest: str, context: str) -> None:
        """Say that the run reads the set at *place* with that *digest*, for `training` or `validation`."""
        if self._client is None:
            return
        from mlflow.entities import Dataset, DatasetInput, InputTag

        tags = [InputTag("mlflow.data.context", context)]
        source = json.dumps({"uri": place})
        name = place.rstrip("/").rsplit("/", 1)[-1]
        entry = DatasetInput(Dataset(name, digest, "prepared set", source), tags)
        self._guard(f"data set {name}", "log_inputs", datasets=[entry])

    def image(self, name: str, array: np.ndarray, step: int | None = None) -> None:
        """Keep a picture, (H, W, 3) or (H, W) uint8; with *step* it joins the series *name* that MLflow can play."""
        if array.dtype != np.uint8:
            raise ValueError(f"image {name!r} must be uint8, got {array.dtype}; convert with tmad.images.to_uint8")
        picture = Image.fromarray(array)
        if step is None:
            place: dict[str, Any] = {"artifact_file": f"{name}.png"}
        else:
            place = {"key": name, "step": int(step), "synchronous": True}
        self._do(partial(self._guard, f"image {name}", "log_image", picture, **place))

    def finish(self, status: Status = "FINISHED") -> None:
        """Send what waits and close the run; opening it again by its id continues it."""
        self.flush()
        self._do(self._send)
        self._do(partial(self._guard, "the end", "set_terminated", status=status))
        if self._thread is not None:
            last = self._thread.submit(lambda: None)
            self._thread.shutdown(wait=False)
            if wait([last], LAST_WORDS_S).not_done:
                log.warning("MLflow has been away for %g s: its metrics are in metrics.jsonl", LAST_WORDS_S)

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.finish("FINISHED" if kind is None else "KILLED" if kind is KeyboardInterrupt else "FAILED")

    def _do(self, call: Callable[[], object]) -> None:
        if self._thread is None:
            call()
        else:
            self._thread.submit(call)

    def _send(self) -> None:
        if not self._pending:
            return
        from mlflow.entities import Metric

        while self._pending:
            share = self._pending[:METRICS_PER_CALL]
            if not self._guard("metrics", "log_batch", metrics=[Metric(*row) for row in share], synchronous=True):
                dropped = len(self._pending) - MAX_PENDING_METRICS
                if dropped > 0:
                    log.warning(
                        "MLflow has been away for long: %d metric values dropped (metrics.jsonl has them)", dropped
                    )
                    del self._pending[:dropped]
                return
            del self._pending[: len(share)]

    def _guard(self, what: str, method: str, *args: Any, **kwargs: Any) -> bool:
        """Call *method* of the client for this run; a failure is a warning and `False`, never the end of a training."""
        if self._client is None:
            return False
        try:
            getattr(self._client, method)(self.run_id, *args, **kwargs)
        except Exception as error:
            # Errors of MLflow's HTTP and SQL libraries come through, so no narrower class covers "the server is away".
            log.warning("MLflow did not take %s: %s", what, storage.redact(str(error)))
            return False
        return True


def _experiment_id(client: MlflowClient, uri: str, name: str) -> str:
    from mlflow.exceptions import MlflowException

    for _ in range(2):
        found = client.get_experiment_by_name(name)
        if found is not None:
            if found.lifecycle_stage == "deleted":
                raise ValueError(
                    f"MLflow experiment {name!r} was deleted; restore it or choose another experiment name"
                )
            experiment_id: str = found.experiment_id
            return experiment_id
        location = None
        if uri.startswith("sqlite:///"):
            # MLflow's own default is relative to the current directory, which differs between workers.
            location = (Path(uri.removeprefix("sqlite:///")).absolute().parent / "mlartifacts").as_uri()
        try:
            # Without it the UI opens on pages for language models.
            tags = {"mlflow.experimentKind": "custom_model_development"}
            created: str = client.create_experiment(name, artifact_location=location, tags=tags)
            return created
        except MlflowException:
            continue  # another process was faster; the second round finds its experiment or fails for good
    raise ValueError(f"MLflow experiment {name!r} can neither be found nor created at {storage.redact(uri)}")


def _log_params(client: MlflowClient, run_id: str, params: Mapping[str, Any]) -> None:
    from mlflow.entities import Param

    flat = [Param(name, _shown(name, value)[:MAX_PARAM_CHARACTERS]) for name, value in sorted(flatten(params).items())]
    for start in range(0, len(flat), PARAMS_PER_CALL):
        client.log_batch(run_id, params=flat[start : start + PARAMS_PER_CALL], synchronous=True)


def _shown(name: str, value: Any) -> str:
    if SECRET_NAME.search(name) and value not in (None, ""):
        return "***"
    return storage.redact(str(value)) if isinstance(value, str | os.PathLike) else str(value)


def _end_last_line(path: Path) -> None:
    """A writer killed in the middle of a line must not swallow the next one."""
    if not path.exists() or path.stat().st_size == 0:
        return
    with path.open("rb+") as file:
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b"\n":
            file.write(b"\n")
