"""kill -9 of ranks, replicas, nodes and the driver, at random moments in every step."""

import random
from pathlib import Path
from typing import Any

import models
import pytest
from cluster import chaos, runs

DOCUMENTS = 30
# For a night: two seeds reach each of the ten steps once.
KILLS = 5
# For every change: a node and the driver.
FEW_KILLS, FEW_SEED = 2, 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kills")


def description(folder: Path, run_dir: str, ranks: int) -> dict[str, Any]:
    """A run of eight blocks a step, and two groups of maps of the one stage that is fitted."""
    cluster = {"replicas": {"min": 1, "max": 3 - ranks}, "ranks_per_replica": ranks, "documents_per_block": 4}
    found = runs.two_stages(folder, run_dir, dtype="float64", **cluster, factor_memory=60_000)
    documents = models.random_documents(1, DOCUMENTS, (3, 30), prefix="base")
    found["stages"][0]["documents"]["path"] = runs.write_lines(folder / "more.jsonl", [*documents, *runs.BASE[-2:]])
    found["stages"][1]["response"] = {"kind": "identity"}
    found["score"] = [{"stage": "pretrain"}]
    return found


@pytest.fixture(scope="module")
def undisturbed(folder: Path, machines: chaos.Machines) -> chaos.Job:
    (folder / "undisturbed").mkdir()
    job = chaos.Job(description(folder, "undisturbed/run", 1), folder / "undisturbed", machines.cluster.address)
    job.seconds_per_block = 0  # nothing is to be hit
    job.start()
    job.finish()
    return job


def test_replicas_do_themselves_what_is_little_work_per_map(undisturbed: chaos.Job) -> None:
    by_role: dict[str, set[int]] = {}
    for event in undisturbed.events():
        by_role.setdefault(event["role"], set()).add(event["pid"])
    assert by_role["task"] and by_role["task"] <= by_role["replica"]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "seed" in metafunc.fixturenames:
        # Each long one takes some minutes; `--kill-seeds 100` for a night.
        seeds = range(metafunc.config.getoption("--kill-seeds"))
        long = [pytest.param(seed, KILLS, marks=pytest.mark.long) for seed in seeds]
        metafunc.parametrize(("seed", "kills"), [pytest.param(FEW_SEED, FEW_KILLS, id="few"), *long])


@pytest.mark.timeout(1200)
def test_nothing_is_lost_or_doubled(
    seed: int, kills: int, folder: Path, machines: chaos.Machines, undisturbed: chaos.Job
) -> None:
    ranks = 1 + seed % 2 if kills == KILLS else 1  # two replicas of one rank, or one of two that hold one model
    here = folder / f"seed-{seed}-{kills}"
    here.mkdir()
    job = chaos.Job(description(folder, f"seed-{seed}-{kills}/run", ranks), here, machines.cluster.address)
    killer = chaos.Killer(job, machines, chaos.random_plan(seed, undisturbed.events(), kills), random.Random(seed))
    job.start()
    job.finish(killer, seconds=1100)

    found, wanted = (runs.read_scores(j.description["run_dir"], "pretrain") for j in (job, undisturbed))
    assert runs.largest_error(found, wanted) < 1e-5
    assert any(event["role"] == "shard" for event in job.events()) == (ranks > 1)
    times = chaos.computed(job.events())
    assert times.keys() == chaos.computed(undisturbed.events()).keys()
    assert max(times.values()) <= 2, [unit for unit, count in times.items() if count > 2]
    again = chaos.Counter(step for (step, _), count in times.items() if count > 1)
    for kill in killer.plan:
        print(f"seed {seed}: killed a {kill.kind} of {ranks} rank(s) in {kill.step}, in the middle of {kill.hit}; "
              f"{again[kill.step]} units of the step were begun twice")  # fmt: skip
    print(f"seed {seed}: {sum(again.values())} of {len(times)} units of work begun twice")
    # A step may be over, for once, before the test's own process sees it.
    assert sum(kill.hit is not None for kill in killer.plan) >= kills - 1
