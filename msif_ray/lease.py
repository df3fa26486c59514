"""One driver per run directory: a lease that it renews while it lives, and that the next one takes when it is dead.

Two drivers would each do all the work, and one could delete sums that the other builds on.
"""

import fcntl
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from msif_ray import layout
from msif_ray.errors import DamagedError, UserError
from msif_ray.paths import exists, is_remote, storage
from msif_ray.store import delete, read_json, write_json

RENEW_SECONDS = 10.0
# A driver on another machine that has not renewed its lease for so long is taken for dead. Clocks are not compared.
EXPIRY_SECONDS = 60.0
# Where nothing keeps two drivers from writing at once, both have after so long, and the last lease is there.
SETTLE_SECONDS = 1.0
# Owners of the leases that this very process holds: one that it could not delete when it ended is not among them.
_HELD: set[str] = set()


class Lease:
    """A driver's own lease on a run directory."""

    def __init__(self, path: Path) -> None:
        self.path, self.owner = path, uuid.uuid4().hex
        self._taken: dict[str, Any] = {}
        self._looked = time.monotonic()

    def check(self) -> None:
        """Raises UserError when another driver was found to have the lease: it took this one for dead, which was held
        up for long, or came at the same moment.

        One that was held up looks for itself: it may be about to write before `keep` comes to look.
        """
        if time.monotonic() - self._looked > EXPIRY_SECONDS:
            with suppress(UserError):
                self._look()
        if self._taken:
            raise UserError(f"{_who(self.path, self._taken)} and has taken the lease of this one; leave the run to it")

    def claim(self, say: Callable[[str], None]) -> None:
        """Writes the lease once no living driver holds one. Raises UserError when one does, or was quicker."""
        claimed = False
        while not claimed:
            dead = _await_end(self.path, say)
            with _lock(self.path) as alone:
                claimed = _read(self.path) == dead
                if claimed:
                    _renew(self.path, self.owner, 0)
        if not alone:
            time.sleep(SETTLE_SECONDS)
            found = self._other()
            if found:
                raise _refusal(self.path, found)

    def keep(self, over: threading.Event) -> None:
        """Renews the lease until it is over, or another driver has it."""
        beat = 0
        while not (over.wait(RENEW_SECONDS) or self._taken):
            with suppress(UserError):  # a renewal missed now and then does no harm
                self._look()
                beat += 1
                if not self._taken:
                    _renew(self.path, self.owner, beat)

    def _look(self) -> None:
        try:
            self._taken = self._taken or self._other()
        finally:
            self._looked = time.monotonic()

    def _other(self) -> dict[str, Any]:
        """Another driver's lease in the place of this one, or nothing."""
        found = _read(self.path)
        return {} if found.get("owner", self.owner) == self.owner else found


@contextmanager
def held(run_dir: str, say: Callable[[str], None]) -> Iterator[Lease]:
    """Holds the run directory meanwhile. `say` is told why it takes a while, where it does.

    Raises UserError when another driver holds it and lives; at the end, when another one has come to hold it.
    """
    lease, over = Lease(layout.lease(run_dir)), threading.Event()
    renewing = threading.Thread(target=lease.keep, args=(over,), daemon=True)
    _HELD.add(lease.owner)
    try:
        lease.claim(say)
        renewing.start()
        yield lease
        lease.check()
    finally:
        over.set()
        if renewing.ident is not None:
            renewing.join()
        _HELD.discard(lease.owner)
        with suppress(UserError):  # a storage that fails now has said so already, or the lease expires
            if _read(lease.path).get("owner") == lease.owner:
                delete(lease.path)


@contextmanager
def _lock(path: Path) -> Iterator[bool]:
    """Keeps others from writing a lease there meanwhile; whether it does, which object storage and some shared file
    systems do not know."""
    if is_remote(path):
        yield False
        return
    with storage(path, "written"):
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = os.open(path.parent, os.O_RDONLY)
    try:
        locked = False
        with suppress(OSError):
            fcntl.flock(folder, fcntl.LOCK_EX)
            locked = True
        yield locked
    finally:
        os.close(folder)


def _renew(path: Path, owner: str, beat: int) -> None:
    process = psutil.Process()
    write_json(
        path,
        {
            "owner": owner,
            "beat": beat,
            "host": socket.gethostname(),
            "machine": _machine(),
            "pid": process.pid,
            "started": _started(process),
        },
    )


def _await_end(path: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Returns when no living driver holds the lease: the lease of a dead one, empty where there is none."""
    first = _read(path)
    if not first:
        return first
    if first.get("machine") == _machine():
        if _is_alive(first):
            raise _refusal(path, first)
        return first
    say(f"{_who(path, first)}, or was: waiting up to {EXPIRY_SECONDS:g} s for a sign of it")
    until = time.monotonic() + EXPIRY_SECONDS
    while time.monotonic() < until:
        time.sleep(min(1.0, EXPIRY_SECONDS / 10))
        found = _read(path)
        if found and found != first:
            raise _refusal(path, found)
        if not found:
            return found
    return first


def _who(path: Path, lease: dict[str, Any]) -> str:
    return f"{path}: another driver is at work on this run (process {lease.get('pid')} on {lease.get('host')})"


def _refusal(path: Path, lease: dict[str, Any]) -> UserError:
    return UserError(f"{_who(path, lease)}; wait for it, stop it, or name another run_dir")


def _read(path: Path) -> dict[str, Any]:
    """The lease as it is, empty where there is none or it is not whole. Raises UserError for a storage that does not
    say: a driver may have it, and live."""
    if not exists(path):
        return {}
    try:
        found = read_json(path)
    except DamagedError:
        return {}
    except UserError:
        if exists(path):
            raise
        return {}  # deleted just now
    return found if isinstance(found, dict) else {}


def _is_alive(lease: dict[str, Any]) -> bool:
    """Whether the process that wrote the lease, on this machine, is there still."""
    with suppress(psutil.Error, KeyError, TypeError, ValueError):
        process = psutil.Process(lease["pid"])
        if process.pid == os.getpid():
            return lease["owner"] in _HELD
        # Those of an earlier version have the time of day.
        is_same = lease["started"] in (_started(process), process.create_time())
        return is_same and process.status() != psutil.STATUS_ZOMBIE
    return False


def _started(process: psutil.Process) -> float:
    """When a process began: in ticks since the machine did, where the system says so. The time of day moves with the
    clock when that is set."""
    with suppress(OSError, IndexError, ValueError):
        after_name = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2]
        return int(after_name.split()[19])
    return float(process.create_time())


def _machine() -> str:
    """What tells this machine, since it was started, and this container from others: process ids mean nothing there."""
    found = [socket.gethostname()]
    for read in (lambda: Path("/proc/sys/kernel/random/boot_id").read_text().strip(), _process_namespace):
        with suppress(OSError):
            found.append(read())
    return " ".join(found)


def _process_namespace() -> str:
    return os.readlink("/proc/self/ns/pid")
