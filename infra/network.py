"""Where the stack's nodes live: all at this machine's loopback address, or each as a host of its own.

With network namespaces every node of Ray has an address, a loopback interface and ports of its own, and reaches
storage, MLflow and the other nodes over a bridge only: what crosses hosts on a real cluster crosses here too. Needs
Linux, root and the `ip` command.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

MAX_NODES = 9

REACHES = """
import socket, sys
try:
    socket.create_connection((sys.argv[1], 9), timeout=5)
except ConnectionRefusedError:
    pass  # an answer: a firewall that drops what crosses a bridge gives none
"""


class Loopback:
    """Everything at 127.0.0.1."""

    services = "127.0.0.1"
    """Address of storage and MLflow."""
    environment: dict[str, str] = {}  # noqa: RUF012
    """What nodes need to know."""

    def node(self, number: int) -> tuple[str, list[str]]:
        """Address of node *number* (0 = the head) and what its command begins with."""
        return "127.0.0.1", []

    def close(self) -> None:
        """Take back what was set up."""


class Namespaces:
    """A namespace for each node, made when it is asked for; names and addresses come from the stack's folder, so that
    what a killed stack left is found and removed."""

    environment = {"GLOO_SOCKET_IFNAME": "eth0", "NCCL_SOCKET_IFNAME": "eth0"}  # noqa: RUF012

    def __init__(self, folder: Path) -> None:
        digest = hashlib.sha256(str(folder).encode()).digest()
        self._name = f"tmad{digest[:3].hex()}"
        # 10.64-127.x, where few networks are.
        self._net = f"10.{64 + digest[3] % 64}.{digest[4]}"
        self.services = f"{self._net}.1"

    def open(self) -> Namespaces:
        """Make the bridge, after what an earlier one of this name has left is removed."""
        self.close()
        _ip("link", "add", self._name, "type", "bridge")
        _ip("address", "add", f"{self.services}/24", "dev", self._name)
        _ip("link", "set", self._name, "up")
        return self

    @staticmethod
    def possible() -> bool:
        """Whether this machine and user can make them, and one reaches another."""
        if not hasattr(os, "geteuid") or os.geteuid() != 0 or shutil.which("ip") is None:
            return False
        trial = Namespaces(Path(f"trial-{os.getpid()}"))
        try:
            trial.open()
            (_, begin), (address, _) = trial.node(0), trial.node(1)
            subprocess.run([*begin, sys.executable, "-c", REACHES, address], check=True, capture_output=True)
        except subprocess.CalledProcessError:
            return False
        finally:
            trial.close()
        return True

    def node(self, number: int) -> tuple[str, list[str]]:
        """As `Loopback.node`."""
        name, address, cable = f"{self._name}-{number}", f"{self._net}.{10 + number}", f"{self._name}v{number}"
        _ip("netns", "add", name)
        _ip("link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", name)
        _ip("link", "set", cable, "master", self._name, "up")
        _ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            _ip("-n", name, "link", "set", device, "up")
        return address, ["ip", "netns", "exec", name]

    def close(self) -> None:
        """Remove namespaces, cables and bridge."""
        for number in range(MAX_NODES + 1):
            with contextlib.suppress(subprocess.CalledProcessError):
                _ip("netns", "delete", f"{self._name}-{number}")
        with contextlib.suppress(subprocess.CalledProcessError):
            _ip("link", "delete", self._name)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
