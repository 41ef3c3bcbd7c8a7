"""One job at a time per folder: a lease that its holder renews and releases at the end.

The lease is a file, `lease.json`: who holds it, and the last sign of life, which a thread renews. What is promised:

- Of jobs that start together one gets the folder: on local file systems (exclusive creation) and on S3 (a put with
  `If-None-Match`). On other storage, and where an expired lease is taken over, each writes, waits `SETTLE_S` and reads
  back; the last to write has it.
- The lease of a dead process is taken over at once on the same machine (Linux: its boot, its process namespace, the
  time the process started), elsewhere when it has expired. Clocks may differ: nothing is taken from a holder that has
  not been watched for longer than it takes to give a sign.
- A holder that lost its lease writes no more. It looks before every write, workers too, and what it had begun fails on
  local file systems, since whoever takes over removes temporary files first. On object stores a put that was on its way
  while its sender was stopped may still arrive.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from pipeline.errors import FolderInUse, MissingInput, TMADError
from pipeline.storage import (
    absolute,
    check_place,
    create,
    is_remote,
    join,
    read_bytes,
    redact,
    remove,
    remove_temporary,
    write_atomic,
)

LEASE_NAME = "lease.json"
EXPIRY_S = 60.0
"""Seconds without a sign of life after which a lease is taken over."""
SIGNS = 6
"""Signs of life that are given in that time."""
SETTLE_S = 1.0
"""Seconds that whoever could not create a lease exclusively waits before it reads the lease back."""

_POLL_S = 0.5
_JOIN_S = 10.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Holder:
    """Who has a folder: the content of the lease. Times are seconds since 1970 by the holder's clock."""

    token: str
    host: str
    pid: int
    process: str
    """What tells the process from another with its number; empty where the system does not say."""
    since: float
    sign: float
    """The last sign of life."""
    expiry_s: float

    @property
    def sign_every_s(self) -> float:
        """Seconds between two signs of life."""
        return self.expiry_s / SIGNS

    def is_dead(self) -> bool:
        """True if its process was one of this machine and is no more."""
        here = _identity(os.getpid())
        if not here or not self.process or self.process.rsplit("/", 1)[0] != here.rsplit("/", 1)[0]:
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            return False  # there is one, another user's, of which no more may be known
        return _identity(self.pid) != self.process

    def __str__(self) -> str:
        since = datetime.fromtimestamp(self.since).astimezone().isoformat(" ", "seconds")
        age = max(0.0, time.time() - self.sign)
        return f"process {self.pid} on {self.host}, since {since}, last sign of life {age:.0f} s ago"


@dataclass(frozen=True)
class Lease:
    """A lease that this job holds; picklable, so that workers write under it."""

    folder: str
    token: str

    def check(self) -> None:
        """Raise `FolderInUse` if the lease is another's by now."""
        theirs = _read(self.folder)
        if theirs is not None and theirs.token == self.token:
            return
        taken = f"was taken over: {theirs}" if theirs else f"is no longer held by this job: {LEASE_NAME} is gone"
        raise FolderInUse(
            f"{redact(self.folder)} {taken}; this job gave no sign of life for too long (a closed lid, a stopped "
            "process, storage out of reach) and ends without writing more; run it again when the other has ended",
            holder=dataclasses.asdict(theirs) if theirs else None,
        )

    def write(self, key: str, data: bytes) -> None:
        """`write_atomic` to *key* below the folder, unless the lease is lost. Raises `FolderInUse`."""
        try:
            write_atomic(join(self.folder, key), data, ready=self.check)
        except MissingInput:
            self.check()  # the temporary file was removed by the next holder
            raise

    def remove(self, key: str) -> None:
        """Delete *key* below the folder, unless the lease is lost. Raises `FolderInUse`."""
        self.check()
        remove(join(self.folder, key))


@contextmanager
def lease_folder(folder: str, *, expiry_s: float = EXPIRY_S, wait_s: float = 0.0) -> Iterator[Lease]:
    """Hold the *folder*, which is made, against other jobs inside the block.

    Raises `FolderInUse` if another job has it and does not end within *wait_s*. One that has given no sign for a while
    is watched until it gives one or *expiry_s* (that other job's) has passed.
    """
    folder = absolute(folder)
    if not is_remote(folder):
        check_place(folder)
    is_new = not is_remote(folder) and not os.path.isdir(folder)
    now = time.time()
    mine = Holder(uuid.uuid4().hex, socket.gethostname(), os.getpid(), _identity(os.getpid()), now, now, expiry_s)
    lease = Lease(folder, mine.token)
    stop = threading.Event()
    thread = threading.Thread(target=_renew, args=(lease, mine, stop), name="lease", daemon=True)
    try:
        _acquire_within(lease, mine, wait_s)
        thread.start()
        remove_temporary(folder)
        yield lease
    finally:
        stop.set()
        held = thread.ident is not None
        if held:
            thread.join(_JOIN_S)
        try:
            _release(lease)
        except TMADError as error:
            if held:
                logger.warning("the lease on %s stays until it expires: %s", redact(folder), error.message)
        if is_new:
            with suppress(OSError):
                os.rmdir(folder)  # nothing was written to it


def holder_of(folder: str) -> Holder | None:
    """Who works in *folder*; `None` if nobody does, or nobody who has given a sign of life in time."""
    theirs = _read(absolute(folder))
    if theirs is None or theirs.is_dead() or time.time() - theirs.sign > theirs.expiry_s:
        return None
    return theirs


def _acquire_within(lease: Lease, mine: Holder, wait_s: float) -> None:
    deadline, announced = time.monotonic() + wait_s, False
    while True:
        try:
            _acquire(lease, mine)
            return
        except FolderInUse as error:
            if time.monotonic() >= deadline:
                raise
            if not announced:
                logger.info("waiting for up to %.0f s: %s", wait_s, error.message)
                announced = True
            time.sleep(_POLL_S)


def _acquire(lease: Lease, mine: Holder) -> None:
    settle = is_remote(lease.folder)
    while True:
        theirs = _read(lease.folder)
        if theirs is None:
            if create(join(lease.folder, LEASE_NAME), _signed(mine)):
                break
        elif theirs.token == mine.token:  # the answer to the put was lost
            break
        elif _has_ended(lease.folder, theirs):
            write_atomic(join(lease.folder, LEASE_NAME), _signed(mine))
            settle = True
            break
    if settle:
        time.sleep(SETTLE_S)
        theirs = _read(lease.folder)
        if theirs is not None and theirs.token != mine.token:
            raise _in_use(lease.folder, theirs)


def _has_ended(folder: str, theirs: Holder) -> bool:
    """True if the lease can be taken over, false if it has changed hands. Raises `FolderInUse` if *theirs* is alive."""
    if theirs.is_dead():
        logger.info("taking over %s: its job is no longer running (%s)", redact(folder), theirs)
        return True
    silent = time.time() - theirs.sign
    if silent < 2 * theirs.sign_every_s:
        raise _in_use(folder, theirs)
    wait = max(theirs.expiry_s - silent, 1.5 * theirs.sign_every_s)
    logger.warning(
        "%s is held by another job: %s; it is taken over if it gives none within %.0f s",
        redact(folder),
        theirs,
        wait,
    )
    end = time.monotonic() + wait
    while time.monotonic() < end and not theirs.is_dead():
        time.sleep(_POLL_S)
        now = _read(folder)
        if now is None or now.token != theirs.token:
            return False
        if now.sign != theirs.sign:
            raise _in_use(folder, now)
    logger.warning("taking over %s: its job has ended or is stopped (%s)", redact(folder), theirs)
    return True


def _in_use(folder: str, theirs: Holder) -> FolderInUse:
    return FolderInUse(
        f"another job writes to {redact(folder)}: {theirs}; wait for its end, stop it, or name another folder; if "
        f"it was killed, the next job takes over {theirs.expiry_s:g} s after the last sign",
        holder=dataclasses.asdict(theirs),
    )


def _renew(lease: Lease, mine: Holder, stop: threading.Event) -> None:
    """Give a sign of life again and again, until the end or until the lease is lost."""
    while not stop.wait(mine.sign_every_s):
        try:
            lease.check()
            write_atomic(join(lease.folder, LEASE_NAME), _signed(mine))
        except FolderInUse:
            return  # whoever writes next says so
        except TMADError as error:
            logger.warning("the lease was not renewed: %s", error.message)


def _release(lease: Lease) -> None:
    theirs = _read(lease.folder)
    if theirs is not None and theirs.token == lease.token:
        remove_temporary(lease.folder)  # of workers that were killed while the job went on
        remove(join(lease.folder, LEASE_NAME))


def _signed(mine: Holder) -> bytes:
    """The content of the lease with a sign of life of now."""
    return (json.dumps({**dataclasses.asdict(mine), "sign": time.time()}, indent=2) + "\n").encode()


def _read(folder: str) -> Holder | None:
    """The holder of the folder, none if there is none. What cannot be read is looked at again, as it may just be
    written, and is then taken for one that never was."""
    for _ in range(4):
        try:
            return Holder(**json.loads(read_bytes(join(folder, LEASE_NAME))))
        except MissingInput as error:
            if error.details.get("kind"):
                raise
            return None
        except (ValueError, TypeError):
            time.sleep(SETTLE_S / 4)
    return Holder("", "an unknown host", 0, "", 0, 0, 0)


def _identity(pid: int) -> str:
    """BOOT/NAMESPACE/START of a running process of this machine; empty if there is none, or where the system does not
    say."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.readlink("/proc/self/ns/pid")
        # The second field, the name, may hold blanks and brackets.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else f"{boot}/{namespace}/{fields[19]}"
