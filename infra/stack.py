"""The whole stack on this machine, as plain processes: object storage, MLflow and a Ray cluster of several nodes.

    python infra/stack.py             until Ctrl-C
    . runs/stack/environment.sh       in another terminal: jobs and tools now find it

Nothing is installed and nothing needs root or Docker. The object storage is moto's S3 server, which keeps everything in
memory: what lies there is gone when the stack ends. The run database of MLflow stays in the stack's folder.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from infra.network import MAX_NODES, Loopback, Namespaces

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "runs" / "stack"
BUCKET = "tmad"

MARK = "TMAD_STACK"
"""Environment variable that every process of a stack inherits; its value is the stack's folder. What is still there
after an orderly end is found by it, and nothing else on the machine is ever touched."""

START_S = 300.0
"""Services that do not answer by then have failed; on a quiet machine they take some fifteen seconds."""

STOP_S = 15.0
"""Between asking a service to end and ending it."""


class StackFailed(Exception):
    """A service did not start, or ended by itself; the message has the end of its log."""


@dataclass
class Service:
    """One process with its log."""

    name: str
    log: Path
    ready: Callable[[], bool]
    """Whether it answers."""
    launch: Callable[[], subprocess.Popen[bytes]]
    process: subprocess.Popen[bytes]
    tries_left: int
    """Times that it is launched again if it ends before it answers."""

    def failure(self) -> str:
        """What happened, with the last lines of the log."""
        tail = self.log.read_text(errors="replace").splitlines()[-15:]
        return "\n  ".join([f"{self.name} ended with code {self.process.poll()}; {self.log} ends:", *tail])


class Stack:
    """Starts on entering, ends on leaving: S3, MLflow, a Ray head without work and *workers* nodes of *cpus* each.

    *folder* keeps logs, MLflow's database and the address list; one stack at a time has it. With *separate_hosts* every
    node of Ray is a host of its own (`infra.network`). Raises `StackFailed`.
    """

    def __init__(
        self,
        folder: Path = FOLDER,
        *,
        workers: int = 2,
        cpus: int = 3,
        object_store_bytes: int = 200 * 2**20,
        separate_hosts: bool = False,
    ) -> None:
        if not 1 <= workers < MAX_NODES:
            raise StackFailed(f"--workers must be 1 to {MAX_NODES - 1}, got {workers}")
        if separate_hosts and not Namespaces.possible():
            raise StackFailed("separate hosts need Linux, root, the command `ip`, and a firewall that lets bridges be")
        self.folder = folder.absolute()
        self.workers = workers
        self.environment: dict[str, str] = {}
        """What a client of the stack needs; also in environment.sh."""
        self.addresses: dict[str, str] = {}
        self._cpus = cpus
        self._object_store_bytes = object_store_bytes
        self._separate_hosts = separate_hosts
        self._network: Loopback | Namespaces = Loopback()
        self._services: list[Service] = []
        # Ray's socket names are limited to some 100 characters, so its folders lie high up.
        digest = hashlib.sha256(str(self.folder).encode()).hexdigest()
        self._ray_folders = Path(tempfile.gettempdir(), f"tmad-{digest[:8]}")

    def __enter__(self) -> Stack:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = (self.folder / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StackFailed(f"a stack is running in {self.folder}: use it, or name another --folder") from None
        end_leftovers(self.folder)  # of a stack in this folder that was killed
        shutil.rmtree(self._ray_folders, ignore_errors=True)
        self._ray_folders.mkdir(mode=0o700)
        try:
            if self._separate_hosts:
                self._network = Namespaces(self.folder)
                self._network.open()
            self._start_storage()
            self._start_mlflow()
            self._start_ray()
            self._wait(self._services)
            _make_bucket(self.environment["AWS_ENDPOINT_URL"])
        except BaseException:
            self.stop()
            raise
        self._write_environment()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def check(self) -> None:
        """Raise `StackFailed` if a service has ended."""
        for service in self._services:
            if service.process.poll() is not None:
                raise StackFailed(service.failure())

    def stop(self) -> None:
        """End every process, the last started first, and wait until they are gone."""
        for service in reversed(self._services):
            _signal(service.process, signal.SIGTERM)
        deadline = time.monotonic() + STOP_S
        for service in self._services:
            with contextlib.suppress(subprocess.TimeoutExpired):
                service.process.wait(max(0.1, deadline - time.monotonic()))
            _signal(service.process, signal.SIGKILL)
            service.process.wait()
        self._services.clear()
        end_leftovers(self.folder)
        self._network.close()
        shutil.rmtree(self._ray_folders, ignore_errors=True)
        (self.folder / "environment.sh").unlink(missing_ok=True)
        self._lock.close()

    def shown(self) -> str:
        """Addresses and variables, for people."""
        width = max(map(len, self.addresses))
        return "\n".join(
            [
                *(f"  {name:<{width}}  {address}" for name, address in self.addresses.items()),
                "",
                "In another terminal, at the top of this project:",
                f"  . {os.path.relpath(self.folder / 'environment.sh')}",
                *(f"    {line}" for line in self._exports()),
            ]
        )

    def _start_storage(self) -> None:
        host = self._network.services
        port = _free_port(9000)
        address = f"http://{host}:{port}"
        self.environment |= {
            "AWS_ENDPOINT_URL": address,
            "AWS_ACCESS_KEY_ID": "stack",
            "AWS_SECRET_ACCESS_KEY": "stack-secret",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        self._start(
            "storage",
            [sys.executable, "-m", "moto.server", "-H", host, "-p", str(port)],
            lambda: _answer(f"{address}/moto-api/data.json") is not None,
        )
        self.addresses["S3"] = f"{address}, bucket s3://{BUCKET}"

    def _start_mlflow(self) -> None:
        host = self._network.services
        port = _free_port(5000)
        address = f"http://{host}:{port}"
        command = [sys.executable, "-m", "mlflow", "server", "--host", host, "--port", str(port)]
        command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db"]
        # Clients hand artifacts to the server, which alone needs the storage's credentials.
        command += ["--serve-artifacts", "--artifacts-destination", f"s3://{BUCKET}/mlflow"]
        self._start("mlflow", command, lambda: _answer(f"{address}/health") is not None)
        self.environment["MLFLOW_TRACKING_URI"] = address
        self.addresses["MLflow"] = address

    def _start_ray(self) -> None:
        token = self.folder / "ray-token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        self.environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
        gcs, dashboard = _free_port(6379), _free_port(8265)
        host, begin = self._network.node(0)
        address = f"http://{host}:{dashboard}"
        self.environment["RAY_API_SERVER_ADDRESS"] = address

        def alive() -> int:
            answer = _answer(f"{address}/nodes?view=summary", token.read_text())
            nodes = json.loads(answer)["data"]["summary"] if answer else []
            return sum(node["raylet"].get("state") == "ALIVE" for node in nodes)

        # Without processors the head gets no tasks: it has the drivers, the dashboard and the cluster's records.
        head = ["--head", f"--port={gcs}", "--num-cpus=0", f"--dashboard-host={host}"]
        head += [f"--dashboard-port={dashboard}", f"--ray-client-server-port={_free_port()}"]
        self._start_node("ray-head", (host, begin), head, lambda: alive() >= 1)
        self._wait(self._services[-1:])
        for number in range(1, self.workers + 1):
            worker = [f"--address={host}:{gcs}", f"--num-cpus={self._cpus}"]
            place = self._network.node(number)
            self._start_node(f"ray-worker-{number}", place, worker, lambda: alive() == 1 + self.workers)
        self.addresses["Ray dashboard"] = f"{address}, which asks for the token in {token}"

    def _start_node(
        self, name: str, place: tuple[str, list[str]], arguments: list[str], ready: Callable[[], bool]
    ) -> None:
        metrics = _free_port()
        host, begin = place
        command = [*begin, sys.executable, "-m", "ray.scripts.scripts", "start", "--block", f"--node-ip-address={host}"]
        command += [*arguments, f"--temp-dir={self._ray_folders / name.removeprefix('ray-')}", "--disable-usage-stats"]
        command += [f"--object-store-memory={self._object_store_bytes}", f"--metrics-export-port={metrics}"]
        command += [f"--dashboard-agent-listen-port={_free_port()}"]
        # Ray gives a node 30 s to start, which a busy machine may not keep.
        self._start(name, command, ready, tries=3)
        self.addresses[f"Metrics, {name}"] = f"http://{host}:{metrics}/metrics"

    def _start(self, name: str, command: list[str], ready: Callable[[], bool], *, tries: int = 1) -> None:
        log = self.folder / f"{name}.log"

        def launch() -> subprocess.Popen[bytes]:
            with log.open("wb") as output:
                return subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    env=self._inherited(),
                    cwd=self.folder,
                    start_new_session=True,  # a Ctrl-C in the terminal reaches only this process, which ends the others
                )

        self._services.append(Service(name, log, ready, launch, launch(), tries - 1))

    def _wait(self, services: list[Service]) -> None:
        """Until all of *services* answer."""
        deadline = time.monotonic() + START_S
        waiting = list(services)
        while waiting := [one for one in waiting if not one.ready()]:
            for service in waiting:
                if service.process.poll() is not None and service.tries_left > 0:
                    _signal(service.process, signal.SIGKILL)  # what it had started already
                    service.tries_left -= 1
                    service.process = service.launch()
            self.check()
            if time.monotonic() > deadline:
                names = ", ".join(one.name for one in waiting)
                raise StackFailed(f"{names} did not answer within {START_S:.0f} s; the logs are in {self.folder}")
            time.sleep(0.2)

    def _inherited(self) -> dict[str, str]:
        """The environment of the services. Ray's workers inherit it, so that jobs find storage and MLflow by it."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_", "AWS_"))}
        here = str(Path(sys.executable).parent)
        return {
            **kept,
            **self.environment,
            **self._network.environment,
            MARK: str(self.folder),
            # Jobs start with a bare `python`, as they do on a cluster.
            "PATH": os.pathsep.join([here, kept.get("PATH", os.defpath)]),
            "MLFLOW_DISABLE_TELEMETRY": "true",
            # Its job consumers, which serve language models, take gigabytes.
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            # What `ray job stop` gives a training for its last checkpoint, three seconds otherwise.
            "RAY_JOB_STOP_WAIT_TIME_S": "60",
            # Ray looks at the memory of the whole machine; a neighbour's must not end our workers.
            "RAY_memory_monitor_refresh_ms": "0",
            "RAY_DISABLE_IMPORT_WARNING": "1",
        }

    def _exports(self) -> list[str]:
        return [f"export {name}={shlex.quote(value)}" for name, value in self.environment.items()]

    def _write_environment(self) -> None:
        path = self.folder / "environment.sh"
        path.touch(mode=0o600)
        path.write_text("\n".join(self._exports()) + "\n")


def marked(folder: Path) -> list[int]:
    """Ids of the processes that belong to the stack in *folder*, this one left out; needs /proc, else none."""
    wanted = f"{MARK}={folder.absolute()}".encode()
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if wanted in (entry / "environ").read_bytes().split(b"\0") and int(entry.name) != os.getpid():
                found.append(int(entry.name))
    return found


def running(folder: Path = FOLDER) -> dict[str, str] | None:
    """The environment of the stack that runs in *folder*; none if there is none."""
    path = folder / "environment.sh"
    if not path.exists():
        return None
    with (folder / "lock").open("w") as lock, contextlib.suppress(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return None  # left by a stack that was killed
    variables = (shlex.split(line)[1].partition("=") for line in path.read_text().splitlines())
    return {name: value for name, _, value in variables}


def _make_bucket(address: str) -> None:
    """This server asks for no signature, so a bucket is one plain request."""
    urllib.request.urlopen(urllib.request.Request(f"{address}/{BUCKET}", method="PUT"), timeout=30).close()


def end_leftovers(folder: Path) -> None:
    """End what belongs to the stack in *folder* and has outlived it: Ray's workers get groups of their own."""
    deadline = time.monotonic() + STOP_S
    while (left := marked(folder)) and time.monotonic() < deadline:
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def _signal(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """To the whole group of *process*."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


def _free_port(wanted: int = 0) -> int:
    """*wanted* if nobody has it, else any."""
    for port in (wanted, 0):
        with socket.socket() as one, contextlib.suppress(OSError):
            one.bind(("127.0.0.1", port))
            return int(one.getsockname()[1])
    raise StackFailed("no free port on 127.0.0.1")


def _answer(address: str, token: str = "") -> bytes | None:
    """What is at *address*; none while nothing answers there."""
    request = urllib.request.Request(address, headers={"Authorization": f"Bearer {token}"} if token else {})
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            body: bytes = response.read()
            return body
    except (urllib.error.URLError, OSError):
        return None


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP end the block as Ctrl-C does."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = {one: signal.signal(one, interrupt) for one in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def main() -> int:
    """Run a stack until Ctrl-C, SIGTERM, or until one of its services ends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="logs, MLflow's database, environment.sh")
    parser.add_argument("--workers", type=int, default=2, help="nodes of Ray beside the head")
    parser.add_argument("--cpus", type=int, default=3, help="logical CPUs of each; bookkeeping, not processors")
    parser.add_argument("--separate-hosts", action="store_true", help="each node in a network namespace; needs root")
    arguments = parser.parse_args()
    began = time.monotonic()
    settings = {"workers": arguments.workers, "cpus": arguments.cpus, "separate_hosts": arguments.separate_hosts}
    try:
        with ended_by_signals(), Stack(arguments.folder, **settings) as stack:
            print(f"The stack is up after {time.monotonic() - began:.0f} s:\n{stack.shown()}\n\nCtrl-C ends it.")
            sys.stdout.flush()
            while True:
                stack.check()
                time.sleep(1)
    except KeyboardInterrupt:
        print("ended")
        return 0
    except StackFailed as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
