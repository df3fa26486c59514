"""The benchmark's run through Ray, on a model that is tiny."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from msif_ray.benchmark import through_ray
from msif_ray.benchmark.through_ray import Job, Taken
from msif_ray.benchmark.workload import Shape, Workload
from msif_ray.connection import connected


@pytest.fixture
def job(tmp_path: Path) -> Job:
    shape = Shape(layers=1, hidden=8, heads=1, vocabulary=64, tokens_per_batch=32)
    return Job(Workload(shape, documents=12, tokens=8), queries=2, keep=0, folder=tmp_path)


def test_a_block_is_a_batch(job: Job) -> None:
    assert job.description(2, 1, "run")["cluster"]["documents_per_block"] == 4


def test_numbers_are_of_the_workload_s_type_and_on_its_device(job: Job) -> None:
    on_gpu = replace(job, workload=replace(job.workload, dtype=torch.bfloat16, device="cuda"))
    alone, two = (on_gpu.description(replicas, 1, "run")["cluster"] for replicas in (1, 2))
    assert (alone["dtype"], alone["gpus_per_rank"], two["gpus_per_rank"]) == ("bfloat16", 1, 0.5)
    assert job.description(1, 1, "run")["cluster"].items() >= {"dtype": "float32", "gpus_per_rank": 0}.items()


def test_scores_are_there_before_the_report(no_shared_cluster: None, job: Job) -> None:
    job.write()
    with connected():
        taken = job.run(1, 1)
    assert 0 < taken.scores < taken.report
    assert (job.folder / "run-1x1" / "report.html").exists()
    assert len(list((job.folder / "run-1x1" / "scores" / "stage=pretrain").glob("*.parquet"))) == 3


@pytest.mark.parametrize("threads", [1, 2])
def test_no_run_is_timed_that_another_one_has_done(threads: int, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second run on a folder finds its scores there, and takes no time for them."""
    done: set[str] = set()

    def run(job: Job, replicas: int, threads: int) -> Taken:
        folder = job.description(replicas, threads, f"run-{replicas}x{threads}")["run_dir"]
        seconds = 0.0 if folder in done else 12.0 / replicas / threads
        done.add(folder)
        return Taken(seconds, seconds)

    monkeypatch.setattr(Job, "run", run)
    monkeypatch.setattr(through_ray, "in_process_seconds", lambda *_: 10.0 / threads)
    monkeypatch.setattr("msif_ray.connection.connected", nullcontext)
    found = through_ray.compare(job.workload, 2, threads, 0)
    assert found["ray_overhead"] == pytest.approx(0.2)
    assert (found["one_replica_s"], found["replica_scaling"]) == (12.0, 2.0)
