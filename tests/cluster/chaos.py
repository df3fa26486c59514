"""A run on a real local cluster of several nodes while something in it is killed."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import ray
import yaml
from cluster import spy
from ray.cluster_utils import Cluster

Event = dict[str, Any]

TESTS = Path(__file__).parents[1]


@dataclass
class Machines:
    """A head without cores, and nodes that come and go."""

    cluster: Cluster
    cpus: int
    nodes: list[Any] = field(default_factory=list)

    def add(self) -> Any:
        self.nodes.append(self.cluster.add_node(num_cpus=self.cpus, object_store_memory=80 * 2**20))
        return self.nodes[-1]

    def kill(self, node: Any) -> None:
        """All of a node's processes at once, as when a spot machine is taken."""
        self.nodes.remove(node)
        raylet = next(info.process.pid for kind, info in processes(node) if kind == "raylet")
        with suppress(psutil.NoSuchProcess):
            for process in [*psutil.Process(raylet).children(recursive=True), psutil.Process(raylet)]:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
        self.cluster.remove_node(node, allow_graceful=False)

    def of(self, pid: int) -> Any | None:
        """The node that a process is on."""
        for node in self.nodes:
            raylet = next(info.process.pid for kind, info in processes(node) if kind == "raylet")
            with suppress(psutil.NoSuchProcess):
                if pid in {child.pid for child in psutil.Process(raylet).children(recursive=True)}:
                    return node
        return None


def processes(node: Any) -> Iterator[tuple[str, Any]]:
    for kind, infos in node.all_processes.items():
        for info in infos:
            yield kind, info


@contextmanager
def machines(nodes: int, cpus: int) -> Iterator[Machines]:
    assert not ray.is_initialized(), "the shared cluster is up: ask for no_shared_cluster"
    environment = {"PYTHONPATH": f"{TESTS}:{TESTS.parent}", "RAY_health_check_period_ms": "500"}
    kept = {name: os.environ.get(name) for name in environment}
    os.environ |= environment
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 80 * 2**20})
    found = Machines(cluster, cpus)
    try:
        for _ in range(nodes):
            found.add()
        yield found
    finally:
        ray.shutdown()
        cluster.shutdown()
        for name, value in kept.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value


@dataclass
class Job:
    """The command under test, run until it succeeds, with what its workers said of themselves."""

    description: dict[str, Any]
    folder: Path
    address: str
    process: subprocess.Popen[bytes] | None = None
    seconds_per_block: float = 0.25
    starts: int = 0

    @property
    def events_path(self) -> Path:
        return self.folder / "events.jsonl"

    def start(self) -> None:
        path = self.folder / "run.yaml"
        path.write_text(yaml.safe_dump(self.description))
        self.starts += 1
        environment = os.environ | {
            "RAY_ADDRESS": self.address,
            spy.EVENTS: str(self.events_path),
            spy.SECONDS: str(self.seconds_per_block),
        }
        with open(self.folder / f"driver-{self.starts}.log", "wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(TESTS / "cluster" / "driver.py"), str(path)],
                env=environment, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def kill(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def log(self) -> str:
        return (self.folder / f"driver-{self.starts}.log").read_text(errors="replace")

    def events(self) -> list[Event]:
        if not self.events_path.exists():
            return []
        lines = self.events_path.read_text(encoding="utf-8").splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def finish(self, each: Callable[[list[Event]], None] = lambda _: None, seconds: float = 240.0) -> None:
        """Waits for success, telling `each` of the events so far; a driver that was killed is started again."""
        until = time.monotonic() + seconds
        while True:
            assert time.monotonic() < until, f"not done after {seconds} s:\n{self.log()}"
            assert self.process is not None
            status = self.process.poll()
            if status == 0:
                return
            assert status in (None, -signal.SIGKILL), self.log()
            if status is not None:
                self.start()
            each(self.events())
            time.sleep(0.02)


@dataclass
class Kill:
    """One kill to come: in which step, at which of its units of work, after how long, and of what.

    `hit` names the unit that was under way when it came.
    """

    step: str
    unit: int
    delay: float
    kind: str
    hit: str | None = None


@dataclass
class Killer:
    """Kills once in each step, as its plan says, and only what is in the middle of a unit of work."""

    job: Job
    machines: Machines
    plan: list[Kill]
    choose: random.Random

    def __call__(self, events: list[Event]) -> None:
        for kill in self.plan:
            if kill.hit is None and len(begun(events, kill.step, ("computes", "task"))) > kill.unit:
                time.sleep(kill.delay)
                # Of several ranks, a replica is the actor over them; of one, that which computes.
                victims = under_way(self.job.events(), kill.step, "replica" if kill.kind == "replica" else "rank")
                if victims:
                    victim = self.choose.choice(victims)
                    kill.hit = victim["unit"] if self._kill(kill.kind, victim["pid"]) else None

    def _kill(self, kind: str, pid: int) -> bool:
        if kind == "driver":
            self.job.kill()
            return True
        if kind == "node":
            node = self.machines.of(pid)
            if node is not None:
                self.machines.kill(node)
                self.machines.add()
            return node is not None
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            return True
        return False


def begun(events: list[Event], step: str, roles: tuple[str, ...]) -> list[Event]:
    return [event for event in events if event["step"] == step and event["role"] in roles]


def under_way(events: list[Event], step: str, role: str) -> list[Event]:
    """What living processes have begun in the step as that role, or as a task of the driver, and not ended."""
    open_units: dict[tuple[int, str], Event] = {}
    for event in begun(events, step, (role, "task", "done")):
        if event["role"] == "done":
            open_units.pop((event["pid"], event["unit"]), None)
        else:
            open_units[event["pid"], event["unit"]] = event
    return [event for event in open_units.values() if psutil.pid_exists(event["pid"])]


KINDS = ("rank", "replica", "node", "driver")


def random_plan(seed: int, baseline: list[Event], kills: int) -> list[Kill]:
    """Kills in as many steps, at random moments. Seeds in a row go through all steps, with kinds that shift."""
    units = Counter(event["step"] for event in baseline if event["role"] in ("computes", "task"))
    order = random.Random(0).sample(sorted(units), len(units))
    choose = random.Random(seed)
    plan = []
    for index in range(seed * kills, (seed + 1) * kills):
        step = order[index % len(order)]
        kind = KINDS[(index + index // len(order)) % len(KINDS)]
        plan.append(Kill(step, choose.randrange(max(1, units[step] - 1)), choose.uniform(0, 0.15), kind))
    return plan


def computed(events: list[Event]) -> Counter[tuple[str, str]]:
    """How often each unit of work was begun, by step."""
    return Counter((e["step"], e["unit"]) for e in events if e["role"] in ("computes", "task"))
