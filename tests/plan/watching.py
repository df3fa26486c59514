"""The most memory that each process of a run takes, watched from outside."""

import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# A rank's process ends within a poll or two of its last step; the peak is read until then.
SECONDS_BETWEEN_POLLS = 0.1


def run_watched(description: Path, timeout: float) -> dict[str, int]:
    """Runs `msif run` in a process of its own; the largest VmHWM in bytes of its kinds of process: `driver`, `fit`
    (replicas before their first block to score: they fit, and give queries' gradients), `score` (replicas then and
    after, so what they took before, too), `hand` (who hands them the blocks) and the tasks per map,
    `eigendecomposition` and `carry`, of which Ray lets one process do many."""
    # A working directory of this name marks the processes of this run, Ray's too, among those of other runs.
    mark = f"MSIF_TEST_RUN={description.resolve()}"
    name, _, value = mark.partition("=")
    command = [sys.executable, "-c", "from msif_ray.cli import main; main()", "run", str(description)]
    largest: dict[str, int] = {}
    with _polling(mark.encode(), largest):
        subprocess.run(command, env={**os.environ, name: value}, check=True, timeout=timeout)
    return largest


@contextmanager
def _polling(mark: bytes, largest: dict[str, int]) -> Iterator[None]:
    done = threading.Event()
    kinds: dict[str, str] = {}  # by process

    def poll() -> None:
        while not done.wait(SECONDS_BETWEEN_POLLS):
            for process in Path("/proc").glob("[0-9]*"):
                try:
                    if mark in (process / "environ").read_bytes():
                        _read(process, kinds, largest)
                except OSError:  # it has ended
                    continue

    thread = threading.Thread(target=poll)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _read(process: Path, kinds: dict[str, str], largest: dict[str, int]) -> None:
    command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    peak = re.search(r"VmHWM:\s+(\d+) kB", (process / "status").read_text())
    known = kinds.get(process.name, "")
    kind = known if known == "score" else _kind(command) or known
    kinds[process.name] = kind
    if peak is not None and kind:
        largest[kind] = max(largest.get(kind, 0), int(peak[1]) * 1024)


def _kind(command: str) -> str:
    """What a process is by its title, which Ray changes with each call."""
    if "ModelReplica" in command:
        return "hand"
    if command.startswith("ray::Replica.do"):
        return "score"
    if command.startswith("ray::Replica") or command.startswith("ray::Rank"):
        return "fit"
    if command.startswith("ray::write_basis"):
        return "eigendecomposition"
    if command.startswith("ray::write_directions"):
        return "carry"
    return "driver" if "cli import main" in command else ""
