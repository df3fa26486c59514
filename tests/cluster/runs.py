"""Small runs on disk and what they should have said, by the dense reference."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import models
import numpy
import pyarrow.parquet as pq
import pytest
import ray
import reference
import torch
from cluster import spy
from corpora import write_lines

Pair = tuple[str, str]
TESTS = Path(__file__).parents[1]
# Scores are written as float32, whatever they were computed in.
FLOAT32 = 2e-7


def start_cluster(hook: Callable[[], None] = spy.shard_small_weights) -> None:
    """A Ray of this machine with two cores, whose workers find the tests' modules, and call `hook` when they start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{TESTS}:{TESTS / 'cluster'}:{os.environ.get('PYTHONPATH', '')}")
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            runtime_env={"worker_process_setup_hook": hook},
        )


@contextmanager
def own_cluster(hook: Callable[[], None] = spy.shard_small_weights) -> Iterator[None]:
    """Such a cluster that ends with the context; the shared one must not be up."""
    start_cluster(hook)
    try:
        yield
    finally:
        ray.shutdown()


BASE = [
    *models.random_documents(1, 14, (3, 30), prefix="base"),
    {"id": "short", "text": "the"},
    {"id": "null", "text": None},
]
# Enough targets that no covariance is rank-deficient: an eigenbasis of a null space is anyone's choice.
TUNING = models.random_documents(2, 24, (3, 14), completions=True, prefix="tune")
QUERIES = models.random_documents(3, 3, (3, 6), completions=True, prefix="query")


def two_stages(folder: Path, run_dir: str, dtype: str = "float64", **cluster: Any) -> dict[str, Any]:
    """A run description over a tiny pair, its corpora and queries, all written under `folder`."""
    if not (folder / "stage1").exists():
        models.save_pair(folder, "gpt_neox", seed=5, tokenizer=models.build_tokenizer(pad=True))
    return {
        "run_dir": str(folder / run_dir),
        "seed": 3,
        "stages": [
            {
                "name": "pretrain",
                "model": str(folder / "stage0"),
                "documents": {"path": write_lines(folder / "base.jsonl", BASE), "text": "text", "id": "id"},
                "fit": {"max_tokens": 12},
                "damping": {"relative": 0.001},
            },
            {
                "name": "tune",
                "model": str(folder / "stage1"),
                "documents": {
                    "path": write_lines(folder / "tune.jsonl", TUNING),
                    "prompt": "prompt",
                    "completion": "completion",
                    "id": "id",
                },
                "fit": {"max_tokens": 8},
                "response": {"kind": "proximal", "alpha": {"relative": 0.01}},
            },
        ],
        "queries": {"path": write_lines(folder / "queries.jsonl", QUERIES), "id": "id"},
        "score": [{"stage": "pretrain"}, {"stage": "tune"}],
        "top": 4,
        "cluster": {"dtype": dtype, "gpus_per_rank": 0, "tokens_per_batch": 64, "documents_per_block": 4} | cluster,
    }


def save_wide_pair(folder: Path) -> None:
    """A pair whose weights are over the size below which a sharded model keeps them whole on every rank."""
    models.save_pair(
        folder, "gpt_neox", seed=5, tokenizer=models.build_tokenizer(pad=True), hidden=160, intermediate=160, std=0.05
    )


@cache
def dense(folder: Path) -> tuple[list[reference.StageSpec], list[dict[str, reference.Fit]]]:
    """The stages of the run above, and their fits by the dense reference: once for all that is expected of a folder."""
    stages = specs(folder)
    with torch.enable_grad():
        return stages, [reference.fit(stage, reference.tracked_names(stages[-1].model)) for stage in stages]


def expected(folder: Path, scored: int, later: str = "proximal") -> dict[Pair, tuple[float, float, int]]:
    """The dense reference's (score, norm, tokens) of every pair of the run above; `later`: what the later stage does
    to the scores of the first."""
    (first, second), fits = dense(folder)
    stages = [first, replace(second, response=later)]
    with torch.enable_grad():
        found, _ = reference.scores(stages, QUERIES, stages[scored].documents, scored, None, fits)
    return found


def expected_shares(folder: Path, scored: int) -> dict[Pair, tuple[dict[str, float], list[float]]]:
    """The dense reference's scores by map and by token of every pair of the run above."""
    stages, fits = dense(folder)
    with torch.enable_grad():
        return reference.shares(stages, QUERIES, stages[scored].documents, scored, fits)


def expected_curvature_norms(folder: Path, scored: int) -> dict[str, float]:
    """The dense reference's norm in the scored stage's inverse curvature of every document of the run above."""
    stages, fits = dense(folder)
    with torch.enable_grad():
        return reference.curvature_norms(stages[scored], fits[scored], stages[scored].documents)


def read_curvature_norms(run_dir: str, stage: str) -> dict[str, float]:
    table = pq.read_table(Path(run_dir) / "scores" / f"stage={stage}", partitioning=None)
    norms = dict(zip(table["doc_id"].to_pylist(), table["curvature_norm"].to_pylist(), strict=True))
    assert len({*zip(*(table[name].to_pylist() for name in ("doc_id", "curvature_norm")), strict=True)}) == len(norms)
    return norms


def specs(folder: Path) -> list[reference.StageSpec]:
    """The stages of the run above, for the dense reference."""
    stages = []
    usable = [row for row in BASE if row["text"] and row["id"] != "short"]
    for index, (name, documents, max_tokens) in enumerate([("pretrain", usable, 12), ("tune", TUNING, 8)]):
        model, tokenizer = models.load(folder / f"stage{index}")
        stages.append(
            reference.StageSpec(
                name,
                model,
                tokenizer,
                documents,
                max_tokens,
                seed=3,
                strength=0.01,
                damping=0.001 if index == 0 else 0.01,
            )
        )
    return stages


def read_scores(run_dir: str, stage: str) -> dict[Pair, tuple[float, float, int]]:
    table = pq.read_table(Path(run_dir) / "scores" / f"stage={stage}", partitioning=None)
    rows = table.to_pylist()
    pairs = {(row["query_id"], row["doc_id"]): (row["score"], row["norm"], row["n_tokens"]) for row in rows}
    assert len(pairs) == len(rows), "a pair is there twice"
    return pairs


def largest_error(found: dict[Pair, tuple[float, float, int]], wanted: dict[Pair, tuple[float, float, int]]) -> float:
    """The largest difference of a score or a norm, relative to the largest score or norm."""
    assert found.keys() == wanted.keys()
    assert all(found[pair][2] == wanted[pair][2] for pair in wanted)
    columns = [numpy.array([[side[pair][i] for pair in wanted] for side in (found, wanted)]) for i in (0, 1)]
    return max(float(numpy.abs(got - want).max() / numpy.abs(want).max()) for got, want in columns)
