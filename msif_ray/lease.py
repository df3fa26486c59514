"""One driver per run directory: a lease that it renews while it lives, and that the next one takes when it is dead.

Two drivers would each do all the work, and one could delete sums that the other builds on.
"""

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
from msif_ray.errors import UserError
from msif_ray.paths import exists
from msif_ray.store import delete, read_json, write_json

RENEW_SECONDS = 10.0
# A driver on another machine that has not renewed its lease for so long is taken for dead. Clocks are not compared.
EXPIRY_SECONDS = 60.0
# Owners of the leases that this very process holds: one that it could not delete when it ended is not among them.
_HELD: set[str] = set()


@contextmanager
def held(run_dir: str, say: Callable[[str], None]) -> Iterator[None]:
    """Holds the run directory meanwhile. `say` is told why it takes a while, where it does.

    Raises UserError when another driver holds it and lives.
    """
    path = layout.lease(run_dir)
    _await_end(path, say)
    owner = uuid.uuid4().hex
    _renew(path, owner, 0)
    _HELD.add(owner)
    over = threading.Event()
    renewing = threading.Thread(target=_keep, args=(path, owner, over), daemon=True)
    renewing.start()
    try:
        yield
    finally:
        over.set()
        renewing.join()
        _HELD.discard(owner)
        with suppress(UserError):  # a storage that fails now has said so already, or the lease expires
            if _read(path).get("owner") == owner:
                delete(path)


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
            "started": process.create_time(),
        },
    )


def _keep(path: Path, owner: str, over: threading.Event) -> None:
    """Renews the lease until it is over, or another driver has it because this one was held up for long."""
    beat = 0
    while not over.wait(RENEW_SECONDS):
        with suppress(UserError):  # a renewal missed now and then does no harm
            if _read(path).get("owner", owner) != owner:
                return
            beat += 1
            _renew(path, owner, beat)


def _await_end(path: Path, say: Callable[[str], None]) -> None:
    """Returns when no living driver holds the lease."""
    first = _read(path)
    if not first:
        return
    who = f"{path}: another driver is at work on this run (process {first.get('pid')} on {first.get('host')})"
    refusal = UserError(f"{who}; wait for it, stop it, or name another run_dir")
    if first.get("machine") == _machine():
        if _is_alive(first):
            raise refusal
        return
    say(f"{who}, or was: waiting up to {EXPIRY_SECONDS:g} s for a sign of it")
    until = time.monotonic() + EXPIRY_SECONDS
    while time.monotonic() < until:
        time.sleep(min(1.0, EXPIRY_SECONDS / 10))
        found = _read(path)
        if not found:
            return
        if found != first:
            raise refusal


def _read(path: Path) -> dict[str, Any]:
    """The lease as it is, empty where there is none or it is not whole."""
    if not exists(path):
        return {}
    try:
        found = read_json(path)
    except UserError:
        return {}
    return found if isinstance(found, dict) else {}


def _is_alive(lease: dict[str, Any]) -> bool:
    """Whether the process that wrote the lease, on this machine, is there still."""
    with suppress(psutil.Error, KeyError, TypeError):
        process = psutil.Process(lease["pid"])
        if process.pid == os.getpid():
            return lease["owner"] in _HELD
        return process.create_time() == lease["started"] and process.status() != psutil.STATUS_ZOMBIE
    return False


def _machine() -> str:
    """What tells this machine, since it was started, and this container from others: process ids mean nothing there."""
    found = [socket.gethostname()]
    for read in (lambda: Path("/proc/sys/kernel/random/boot_id").read_text().strip(), _process_namespace):
        with suppress(OSError):
            found.append(read())
    return " ".join(found)


def _process_namespace() -> str:
    return os.readlink("/proc/self/ns/pid")
