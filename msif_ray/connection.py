"""The Ray cluster that a run is on."""

import os
import re
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import ray

from msif_ray.config import Cluster
from msif_ray.errors import UserError
from msif_ray.machines import check_room, cluster_address, with_gpus
from msif_ray.paths import reason
from msif_ray.streams import open_streams

# A cluster that is there answers at once; a name or a route that leads nowhere may never.
ANSWER_SECONDS = 10.0
# How long a process may wait for its next task, a map's in a later step. Beside a longer pass over a corpus it does not
# matter what it takes to start.
IDLE_SECONDS = 60
LOG_LEVEL = "RAY_BACKEND_LOG_LEVEL"
ENDED = "msif: ended by SIGTERM; run the same command again to go on"


@contextmanager
def connected() -> Iterator[None]:
    """A connection to the Ray cluster that RAY_ADDRESS names, else to a local one that ends with the context.

    Where this process is connected already, nothing is done.
    """
    if ray.is_initialized():
        yield
        return
    open_streams()
    address = cluster_address()
    if address is not None:
        _join(address)
    else:
        _quieten_core()
        # Ray ends processes that have been idle for a second; each new one imports torch for some.
        os.environ.setdefault("RAY_idle_worker_killing_time_threshold_ms", str(1000 * IDLE_SECONDS))
        ray.init(address="local", log_to_driver=False, logging_level="ERROR", include_dashboard=False)
    with _ended_by_sigterm():
        try:
            _have_the_core_warn()
            yield
        finally:
            ray.shutdown()


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM ends what is in the context as an exception does, with a line. By the handler that Ray has put in place
    the process prints a stack of addresses, and aborts in the end.

    Where the whole process group is sent it, as by `timeout` or Slurm, Ray's processes end, too, and its core ends this
    one as soon as it sees that, which may be before Python's handler has its turn. So a thread says the line at once.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)  # as `set_wakeup_fd` asks
    threading.Thread(target=_tell_of_sigterm, args=(reading,), daemon=True).start()
    descriptor = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    handler = signal.signal(signal.SIGTERM, _end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler or signal.SIG_DFL)
        signal.set_wakeup_fd(descriptor)
        os.close(writing)  # which ends the thread


def _tell_of_sigterm(signals: int) -> None:
    """Says that a SIGTERM has come, where its number is read; of more of them nothing."""
    told = False
    with open(signals, "rb", buffering=0) as numbers:
        while number := numbers.read(1):
            if number[0] == signal.SIGTERM and not told:
                told = True
                over_the_bar = "\r\x1b[2K" if os.isatty(2) else ""
                os.write(2, f"{over_the_bar}{ENDED}\n".encode())


def _end(number: int, frame: FrameType | None) -> None:
    raise SystemExit(1)


def _quieten_core() -> None:
    """The core's own log lines are for Ray's developers; what fails here is raised."""
    if LOG_LEVEL not in os.environ:
        os.environ[LOG_LEVEL] = "fatal"
        # The core begins with a line on the terminal that says so, in this process alone: the processes that Ray starts
        # have copies of `os.environ`, which this leaves as it is.
        os.unsetenv(LOG_LEVEL)


class _Restarted:
    def __init__(self, given: None) -> None: ...


def _have_the_core_warn() -> None:
    """Once in a process Ray's core says on the terminal that an actor was given references and may be restarted when
    they are gone. Ray Data makes all actors so, with references that last as long as this process, and the core says it
    of the first one, whatever the user does (ray-project/ray#57733). Here it says it of one that nobody needs, in the
    call itself, while standard error goes nowhere; what it says later is heard."""
    terminal, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        actor = ray.remote(_Restarted).options(num_cpus=0, max_restarts=1).remote(ray.put(None))
    finally:
        os.dup2(terminal, 2)
        os.close(terminal)
        os.close(nowhere)
    ray.kill(actor)


def _join(address: str) -> None:
    try:
        # Ray itself tries for minutes, and prints a page about it.
        if found := re.fullmatch(r"(?:ray://)?\[?([^\[\]/]+)\]?:(\d+)", address):
            socket.create_connection((found[1], int(found[2])), timeout=ANSWER_SECONDS).close()
        ray.init(log_to_driver=False, logging_level="ERROR")
    except (OSError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        raise UserError(
            f"RAY_ADDRESS: no Ray cluster answers at {address} ({reason(error)}); start it, or unset RAY_ADDRESS to "
            "run on this machine"
        ) from None


def decide_gpus(cluster: Cluster) -> Cluster:
    """The replicas with the GPUs that the Ray cluster has for them. Raises UserError where they have no room on it."""
    resources = ray.cluster_resources()
    cpus, gpus = resources.get("CPU", 0.0), resources.get("GPU", 0.0)
    cluster = with_gpus(cluster, gpus)
    if cluster_address() is None:  # another cluster may grow when the replicas ask for it
        check_room(cluster, cpus, gpus)
    return cluster
