"""kill -9 of replicas, a node and the driver while preferences' reference log-probabilities are computed."""

import random
from collections import Counter
from pathlib import Path

import pytest
from cluster import chaos, objective_runs, runs

STEP = "prefer:ReferenceJob"
KINDS = ("rank", "driver", "node", "replica")


def job(folder: Path, name: str, machines: chaos.Machines) -> chaos.Job:
    here = folder / name
    here.mkdir()
    description = objective_runs.preferring(folder, f"{name}/run")
    description["cluster"] |= {"replicas": {"min": 1, "max": 2}, "documents_per_block": 2}
    description["score"] = [{"stage": "prefer"}]
    return chaos.Job(description, here, machines.cluster.address)


@pytest.mark.long
@pytest.mark.timeout(600)
def test_what_the_reference_said_is_neither_lost_nor_doubled(tmp_path: Path, machines: chaos.Machines) -> None:
    undisturbed = job(tmp_path, "undisturbed", machines)
    undisturbed.start()
    undisturbed.finish()
    units = Counter(step for step, _ in chaos.computed(undisturbed.events()))
    assert units[STEP] > len(KINDS), units

    disturbed = job(tmp_path, "disturbed", machines)
    plan = [chaos.Kill(STEP, unit, 0.05, kind) for unit, kind in enumerate(KINDS)]
    killer = chaos.Killer(disturbed, machines, plan, random.Random(0))
    disturbed.start()
    disturbed.finish(killer, seconds=500)

    assert [kill.hit for kill in plan if kill.hit is None] == []
    found, wanted = (runs.read_scores(each.description["run_dir"], "prefer") for each in (disturbed, undisturbed))
    assert found.keys() == wanted.keys() and runs.largest_error(found, wanted) < 1e-5
    assert chaos.computed(disturbed.events()).keys() == chaos.computed(undisturbed.events()).keys()
