"""Nodes that join and leave half-way."""

from pathlib import Path
from typing import Any

import models
import pytest
from cluster import chaos, runs
from ray.autoscaler.v2.sdk import get_cluster_status

pytestmark = pytest.mark.usefixtures("no_shared_cluster")


def demanded_cpus(address: str) -> float:
    """What an autoscaler would see asked for and not placed."""
    demands = get_cluster_status(address).resource_demands
    return sum(
        bundle.bundle.get("CPU", 0.0) * bundle.count
        for demand in demands.ray_task_actor_demand
        for bundle in demand.bundles_by_count
    )


def pids(events: list[chaos.Event], kind: str) -> set[int]:
    return {event["pid"] for event in events if event["role"] == "computes" and kind in event["step"]}


@pytest.mark.long
@pytest.mark.timeout(400)
def test_nodes_that_join_take_work_and_nodes_that_leave_are_survived(tmp_path: Path) -> None:
    documents = models.random_documents(1, 160, (3, 30), prefix="base")
    description: dict[str, Any] = runs.two_stages(tmp_path, "run", replicas={"min": 1, "max": 2}, documents_per_block=2)
    description["stages"][0]["documents"]["path"] = runs.write_lines(tmp_path / "more.jsonl", documents)
    description["stages"][0]["fit"]["documents"] = 60  # the scoring takes longer: Ray Data looks for room now and then
    description["stages"][1]["response"] = {"kind": "identity"}
    description["score"] = [{"stage": "pretrain"}]
    description["top"] = 1
    with chaos.machines(nodes=1, cpus=1) as machines:
        job = chaos.Job(description, tmp_path, machines.cluster.address, seconds_per_block=0.7)
        demands: list[float] = []
        left: list[Any] = []
        scored_on: dict[int, Any] = {}  # by process
        joined: list[Any] = []

        def come_and_go(events: list[chaos.Event]) -> None:
            covariance, correction = pids(events, "CovarianceJob"), pids(events, "CorrectionJob")
            if covariance and not correction and len(machines.nodes) == 1:
                demands.append(demanded_cpus(machines.cluster.address))
                if demands[-1]:
                    machines.add()
            if correction and not left:  # one of two, in the middle of a step
                left.append(machines.nodes[0])
                machines.kill(left[0])
            scored = [event for event in events if event["role"] == "computes" and "ScoreJob" in event["step"]]
            if len(scored) > 3 and not joined:
                joined.append(machines.add())
            for pid in pids(events, "ScoreJob") - scored_on.keys():
                scored_on[pid] = machines.of(pid)

        job.start()
        job.finish(come_and_go, seconds=280)
        events = job.events()
    assert max(demands) >= 1.0
    assert len(pids(events, "CovarianceJob")) == 2, "the node that joined took no work of the fit"
    assert left and joined
    assert joined[0] in scored_on.values(), "the node that joined took no work of the scoring"
    scores = runs.read_scores(description["run_dir"], "pretrain")
    assert {document for _, document in scores} == {document["id"] for document in documents}
    assert max(chaos.computed(events).values()) <= 2
