"""Starts Ray on this machine or joins a cluster; compares requested with available resources."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import grpc
import ray

from pipeline.errors import ClusterTooSmall, ClusterUnreachable, one_line
from pipeline.runs.cli import give_up, silence_libraries
from pipeline.storage import submitted

ROOT = Path(__file__).resolve().parent.parent.parent
"""Folder that holds the packages: the checkout, an uploaded working directory, or site-packages."""

MIN_EMBEDDED_CPUS = 4
"""Logical CPUs of an embedded Ray. They are bookkeeping, not processors: with two training workers on a two-core laptop
none would be left for Ray Data's tasks, and the job would stand still without a word."""

EMBEDDED_OBJECT_STORE_BYTES = 512 * 2**20
"""Shared memory of an embedded Ray: encoded images travel through it, a few batches at a time."""

STARTS = 3
"""Attempts to start an embedded Ray."""
_TOO_SLOW = "timed out during startup"

CONNECT_TIMEOUT_S = 5.0
"""Seconds in which a cluster has to accept a connection before it counts as absent."""

KNOCK_S = 5.0
"""Seconds between two looks at whether a joined cluster is there."""

LOST_AFTER_S = 30.0
"""A joined cluster that has not answered for this many seconds is gone. Ray gives it a minute and then ends the
process, without a word and without giving back what a job holds."""

CLIENT_PORT = 10001
"""Of `ray://host`."""

log = logging.getLogger(__name__)


def start_ray(*, dashboard: bool = False, object_store_bytes: int = EMBEDDED_OBJECT_STORE_BYTES) -> None:
    """Start or join Ray; does nothing where this process already has it.

    With `RAY_ADDRESS` set, which `ray job submit` does, the cluster there is joined; otherwise Ray starts on this
    machine and ends with the process. *dashboard* belongs to an embedded Ray only; sweeps need it, as without it the
    resources of a trial that is stopped are never given back. A joined cluster must have this project's packages: from
    the submitted working directory, installed, or, on machines that share this one's files, from here. Raises
    `ClusterUnreachable` within seconds if nothing answers there.
    """
    if ray.is_initialized():
        return
    # Ray reads these when its processes start, workers inherit them.
    os.environ.setdefault("RAY_DISABLE_IMPORT_WARNING", "1")
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("RAY_COLOR_PREFIX", "0")
    # An embedded Ray without dashboard has Ray Train complain of that once a second, in every worker's stderr; training
    # brings its own log lines to the driver, and Ray's session logs keep the rest.
    quiet: dict[str, Any] = {"logging_level": logging.WARNING, "log_to_driver": False}
    logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)
    began = time.monotonic()
    with _own_signals():
        _start_or_join(dashboard, object_store_bytes, quiet)
    silence_libraries()
    threading.Thread(target=_watch, name="cluster", daemon=True).start()
    if joined():
        log.info("joined the Ray cluster at %s: %s", os.environ["RAY_ADDRESS"], shown(ray.cluster_resources()))
    else:
        log.info("started Ray on this machine in %.0f s", time.monotonic() - began)


def _start_or_join(dashboard: bool, object_store_bytes: int, quiet: dict[str, Any]) -> None:
    if joined():
        address = os.environ["RAY_ADDRESS"]
        runtime_env = None if submitted() else {"env_vars": {"PYTHONPATH": _python_path()}}
        try:
            _knock(address)
            ray.init(runtime_env=runtime_env, **quiet)
        except (OSError, RuntimeError, ValueError) as error:
            raise ClusterUnreachable(
                f"no Ray cluster at {address} (RAY_ADDRESS): {one_line(error)}; start it, correct RAY_ADDRESS, give "
                "its token (RAY_AUTH_MODE=token, RAY_AUTH_TOKEN), or unset it for a Ray on this machine alone"
            ) from error
        return
    os.environ["PYTHONPATH"] = _python_path()
    start_local(num_cpus=_embedded_cpus(), include_dashboard=dashboard, object_store_memory=object_store_bytes, **quiet)


def start_local(**options: Any) -> None:
    """`ray.init` on this machine. A start that a loaded machine does not finish within Ray's half minute is made again,
    `STARTS` times in all."""
    for left in reversed(range(STARTS)):
        try:
            # "local": a marker file of a killed cluster would otherwise be taken for a cluster to join.
            ray.init(address="local", **options)
            return
        except Exception as error:  # Ray has no class for it
            if _TOO_SLOW not in str(error):
                raise
            if not left:
                raise ClusterUnreachable(
                    f"Ray did not start on this machine in {STARTS} attempts of half a minute, as on a loaded one: "
                    f"{one_line(error)}; try again when it is quieter, or set RAY_ADDRESS to a cluster that runs"
                ) from error
            log.warning("Ray did not start in time, as happens on a loaded machine; starting it again")
            ray.shutdown()


@contextlib.contextmanager
def _own_signals() -> Iterator[None]:
    """Ray puts a handler of SIGTERM in place of the job's, which ends with another code. The end of a terminal reaches
    Ray's processes too: they ignore it, as they do Ctrl-C, so that the job can end in order."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    term, hang_up = signal.getsignal(signal.SIGTERM), signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        yield
    finally:
        if callable(term):
            signal.signal(signal.SIGTERM, term)
        signal.signal(signal.SIGHUP, hang_up)


def available() -> dict[str, float]:
    """Resources of the cluster, which is joined for this, or those that an embedded Ray would have, which is not
    started. Raises `ClusterUnreachable` as `start_ray`."""
    if not ray.is_initialized() and not joined():
        import torch

        return {"CPU": float(_embedded_cpus()), "GPU": float(torch.cuda.device_count())}
    start_ray()
    return dict(ray.cluster_resources())


def _knock(address: str) -> None:
    """Raise `OSError` unless a Ray may listen at `[ray://]host[:port]`: Ray itself asks for minutes, in lines of its
    own."""
    if (place := _host_and_port(address)) is None:
        return  # Ray says at once what is wrong with it
    socket.create_connection(place, timeout=CONNECT_TIMEOUT_S).close()
    if os.environ.get("RAY_USE_TLS", "0") == "0":
        with grpc.insecure_channel("{}:{}".format(*place)) as channel:
            try:
                grpc.channel_ready_future(channel).result(timeout=CONNECT_TIMEOUT_S)
            except grpc.FutureTimeoutError:
                raise ConnectionError(
                    f"what listens there is no Ray, or is silent for {CONNECT_TIMEOUT_S:g} s"
                ) from None


def _host_and_port(address: str) -> tuple[str, int] | None:
    place = urlsplit(address if "://" in address else f"//{address}")
    port = place.port or (CLIENT_PORT if place.scheme == "ray" else None)
    return (place.hostname, port) if place.hostname and port else None


def _head() -> str | None:
    """Address of the cluster of this job; `None` without one."""
    if joined():
        return os.environ["RAY_ADDRESS"]
    return str(ray.get_runtime_context().gcs_address) if ray.is_initialized() else None


def loss(address: str | None = None) -> str | None:
    """Why the cluster at *address* (default: that of this job) no longer answers, in a sentence; `None` while it does,
    or if there was none."""
    address = address or _head()
    if address is None or (place := _host_and_port(address)) is None:
        return None
    try:
        socket.create_connection(place, timeout=CONNECT_TIMEOUT_S).close()
    except OSError as error:
        whose = f"the Ray cluster at {address}" if joined() else "the Ray of this job"
        where = "on one that is there the same command" if joined() else "the same command"
        return f"{whose} is gone ({one_line(error)}); {where} continues where it stopped"
    return None


def _watch() -> None:
    """End the job when nobody takes connections where Ray's head is any more; one that is slow still does."""
    # Asked once: when Ray is shut down it no longer says.
    address, last = _head(), time.monotonic()
    while ray.is_initialized():
        time.sleep(KNOCK_S)
        if (reason := loss(address)) is None:
            last = time.monotonic()
        elif time.monotonic() - last > LOST_AFTER_S and ray.is_initialized():
            give_up(reason, within_s=LOST_AFTER_S / 3)


def require(resources: Mapping[str, float], option: str, *, wait_s: float = 0.0) -> None:
    """Raise `ClusterTooSmall` unless the cluster has *resources* (`{"CPU": 3, "GPU": 2}`) in total; *option*, which
    asks for less, is named in it.

    Waits up to *wait_s* for a cluster that grows. Ray itself would wait forever, silently.
    """
    deadline = time.monotonic() + wait_s
    announced = False
    while missing := shortage(resources, ray.cluster_resources()):
        if time.monotonic() >= deadline:
            raise ClusterTooSmall(
                f"asked for {shown(resources)}, the cluster has {shown(ray.cluster_resources())}: {missing}; "
                f"lower {option}, or take a larger cluster"
            )
        if not announced:
            log.info("waiting up to %.0f s for the cluster to grow: %s", wait_s, missing)
            announced = True
        time.sleep(min(2.0, max(0.05, deadline - time.monotonic())))


def shortage(asked: Mapping[str, float], there: Mapping[str, float]) -> str:
    """What is missing, in words; empty when *there* covers *asked*."""
    return ", ".join(
        f"{amount - there.get(name, 0):g} {name} missing"
        for name, amount in asked.items()
        if amount > there.get(name, 0) + 1e-6
    )


def joined() -> bool:
    """Whether Ray is (or would be) somebody else's cluster rather than an embedded one."""
    return bool(os.environ.get("RAY_ADDRESS"))


def shown(resources: Mapping[str, float]) -> str:
    """`4 CPU, 1 GPU`: only what people count."""
    return ", ".join(f"{resources[name]:g} {name}" for name in ("CPU", "GPU") if resources.get(name)) or "nothing"


def _embedded_cpus() -> int:
    return max(MIN_EMBEDDED_CPUS, os.cpu_count() or 1)


def _python_path() -> str:
    there = [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part]
    return os.pathsep.join([str(ROOT), *(part for part in there if part != str(ROOT))])


def models_side_by_side(*, use_gpu: bool, cpus_each: float = 1, gpus_each: float = 1) -> int:
    """Copies of a model that the cluster has room for, at least one."""
    copies = ray.cluster_resources().get("GPU", 0) / gpus_each if use_gpu else real_cpus() / cpus_each
    return max(1, int(copies))


def real_cpus() -> float:
    """Processors of the cluster; an embedded Ray counts more than this machine may have."""
    cpus = float(ray.cluster_resources().get("CPU", 1))
    return cpus if joined() else min(cpus, os.cpu_count() or 1)
