"""One driver per run directory: who is refused, and who takes over from whom."""

import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from msif_ray import layout, lease
from msif_ray.errors import UserError
from msif_ray.store import read_json, write_json

HOLDER = """
import sys, time
from msif_ray import lease
with lease.held(sys.argv[1], print):
    print("held", flush=True)
    time.sleep(600)
"""


def quiet(line: str) -> None:
    raise AssertionError(f"nobody should have had to wait: {line}")


def test_a_living_driver_is_left_alone_and_a_killed_one_followed_at_once(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=rf"process {holder.pid} on .*; wait for it, stop it") as refused:
            lease.held(str(tmp_path), quiet).__enter__()
        assert "\n" not in str(refused.value)
        holder.kill()
    with lease.held(str(tmp_path), quiet):
        assert layout.lease(str(tmp_path)).exists()
    assert not layout.lease(str(tmp_path)).exists()


@pytest.mark.parametrize("step", [0.0, 1.0, -3600.0])
def test_a_living_driver_is_left_alone_when_the_clock_is_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: float
) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    created = psutil.Process.create_time
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        monkeypatch.setattr(psutil.Process, "create_time", lambda process: created(process) + step)
        with pytest.raises(UserError, match="another driver is at work"):
            lease.held(str(tmp_path), quiet).__enter__()
        holder.kill()


def test_a_living_driver_of_an_earlier_version_is_left_alone(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        started = psutil.Process(other.pid).create_time()
        about = elsewhere(tmp_path, 0) | {"machine": lease._machine(), "pid": other.pid, "started": started}
        write_json(layout.lease(str(tmp_path)), about)
        with pytest.raises(UserError, match=f"process {other.pid} on"):
            lease.held(str(tmp_path), quiet).__enter__()
        other.kill()


def test_a_lease_that_this_process_could_not_give_back_does_not_keep_it_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(path: Path) -> None:
        raise UserError("the storage fails")

    with monkeypatch.context() as patch, lease.held(str(tmp_path), quiet):
        patch.setattr(lease, "delete", fails)
        with pytest.raises(UserError, match="another driver is at work"):
            lease.held(str(tmp_path), quiet).__enter__()
    assert layout.lease(str(tmp_path)).exists()
    with lease.held(str(tmp_path), quiet):
        pass
    assert not layout.lease(str(tmp_path)).exists()


def elsewhere(tmp_path: Path, beat: int) -> dict[str, object]:
    about = {"owner": "x", "beat": beat, "host": "elsewhere", "machine": "elsewhere 1", "pid": 1, "started": 0.0}
    write_json(layout.lease(str(tmp_path)), about)
    return about


def test_a_driver_of_another_machine_is_dead_when_it_does_not_renew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "EXPIRY_SECONDS", 0.3)
    elsewhere(tmp_path, 0)
    said: list[str] = []
    with lease.held(str(tmp_path), said.append):
        assert read_json(layout.lease(str(tmp_path)))["pid"] == psutil.Process().pid
    assert len(said) == 1 and "process 1 on elsewhere" in said[0]


def test_a_driver_of_another_machine_that_renews_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "EXPIRY_SECONDS", 10.0)
    elsewhere(tmp_path, 0)
    renewal = threading.Timer(0.5, elsewhere, (tmp_path, 1))
    renewal.start()
    with pytest.raises(UserError, match="another driver is at work"):
        lease.held(str(tmp_path), lambda line: None).__enter__()
    renewal.join()
    assert read_json(layout.lease(str(tmp_path)))["beat"] == 1


def test_the_lease_is_renewed_until_another_driver_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.02)
    lost = r"process 1 on elsewhere\) and has taken the lease .*; leave the run"
    with pytest.raises(UserError, match=lost) as ended:  # noqa: SIM117 (it is raised as the inner one ends)
        with lease.held(str(tmp_path), quiet) as held:
            until = time.monotonic() + 10
            while read_json(layout.lease(str(tmp_path)))["beat"] < 2:
                held.check()
                assert time.monotonic() < until
            for _ in range(100):  # a renewal that was under way may still come
                taken = elsewhere(tmp_path, 7)
                time.sleep(0.05)
                if read_json(layout.lease(str(tmp_path))) == taken:
                    break
            with pytest.raises(UserError, match="has taken the lease"):
                held.check()
    assert "\n" not in str(ended.value)
    assert read_json(layout.lease(str(tmp_path))) == taken


def test_a_driver_that_was_held_up_looks_before_it_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may wake in the middle of its work, long before the thread that renews its lease comes to look."""
    with pytest.raises(UserError, match="has taken the lease"), lease.held(str(tmp_path), quiet) as held:
        held.check()
        elsewhere(tmp_path, 7)
        held.check()  # which reads nothing: it looked a moment ago
        monkeypatch.setattr(lease, "EXPIRY_SECONDS", 0.0)
        held.check()
        raise AssertionError("it went on")


def test_a_lease_that_the_storage_does_not_give_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(path: Path) -> None:
        raise UserError(f"{path}: cannot be read: Please reduce your request rate.")

    about = elsewhere(tmp_path, 0)
    with monkeypatch.context() as patch, pytest.raises(UserError, match="reduce your request rate"):
        patch.setattr(lease, "read_json", fails)
        lease.held(str(tmp_path), quiet).__enter__()
    assert read_json(layout.lease(str(tmp_path))) == about


@pytest.mark.parametrize("locks", [True, False])
@pytest.mark.parametrize("dead", [True, False])
def test_of_drivers_that_start_together_one_is_let_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, locks: bool, dead: bool
) -> None:
    looked, begun, ended = lease._await_end, threading.Barrier(3), threading.Barrier(3)
    first = threading.local()

    def look(path: Path, say: Callable[[str], None]) -> dict[str, Any]:
        """All have looked before any goes on."""
        found = looked(path, say)
        if not hasattr(first, "look"):
            first.look = begun.wait(10)
        return found

    def start() -> None:
        try:
            with lease.held(str(tmp_path), lambda line: None):
                came.append("held")
                ended.wait(10)
        except UserError as error:
            came.append(str(error))
            ended.wait(10)

    monkeypatch.setattr(lease, "EXPIRY_SECONDS", 0.3)
    monkeypatch.setattr(lease, "_await_end", look)
    if not locks:  # as on object storage
        monkeypatch.setattr(lease, "is_remote", lambda path: True)
    if dead:
        elsewhere(tmp_path, 0)
    came: list[str] = []
    drivers = [threading.Thread(target=start) for _ in range(3)]
    for driver in drivers:
        driver.start()
    for driver in drivers:
        driver.join()
    assert came.count("held") == 1
    assert sum("another driver is at work" in line for line in came) == 2
    assert not layout.lease(str(tmp_path)).exists()


@pytest.mark.parametrize("found", [[], 3, {"pid": -1}, {"pid": "x", "owner": []}, {"pid": 10**30}])
def test_a_lease_that_was_edited_is_nobodys(tmp_path: Path, found: Any) -> None:
    about = {"owner": "x", "machine": lease._machine(), "host": "h"} | found if isinstance(found, dict) else found
    write_json(layout.lease(str(tmp_path)), about)
    with lease.held(str(tmp_path), quiet):
        assert read_json(layout.lease(str(tmp_path)))["pid"] > 0
