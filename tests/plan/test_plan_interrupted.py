"""Ctrl-C, as a terminal sends it, to `msif plan` while a model is measured in a process of its own."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import yaml
from cluster import runs

SECONDS = 60.0


def within(seconds: float, there: Callable[[], bool]) -> bool:
    end = time.monotonic() + seconds
    while not (found := there()) and time.monotonic() < end:
        time.sleep(0.1)
    return found


def measures(pid: int) -> bool:
    """Whether a process has a child that multiprocessing started."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return any(b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes() for child in children)


def has_ended(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


def test_it_ends_at_once_without_a_word(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(runs.two_stages(tmp_path, "run")))
    command = [sys.executable, "-c", "from msif_ray.cli import main; main()", "plan", str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True) as planning:
        try:
            assert within(SECONDS, lambda: measures(planning.pid))
            time.sleep(1.0)  # it imports its libraries
            os.killpg(planning.pid, signal.SIGINT)
            printed, said = planning.communicate(timeout=SECONDS)
        except BaseException:
            os.killpg(planning.pid, signal.SIGKILL)
            raise
    assert planning.returncode == 130 and printed == b""
    assert b"Traceback" not in said and b"spawn" not in said
    assert within(10.0, lambda: has_ended(planning.pid))
