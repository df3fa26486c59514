"""The query driver: gradients at the last stage's model, then carried back as one task per map."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from msif_ray import layout, stages
from msif_ray.cluster.fit import for_each_map, mean_eigenvalues
from msif_ray.cluster.jobs import LOG_LIKELIHOODS, QueryJob, load_basis
from msif_ray.cluster.partials import Coverage
from msif_ray.cluster.pool import Progress, ReplicaPool
from msif_ray.cluster.rank import ModelSetup
from msif_ray.config import Run
from msif_ray.corpus.blocks import Blocks
from msif_ray.influence.ekfac import Factor
from msif_ray.influence.queries import QueryTokens, carry_back, truncate
from msif_ray.influence.response import Response
from msif_ray.influence.scoring import DenseDirections
from msif_ray.paths import all_there, exists
from msif_ray.store import load_tensors, read_json, save_tensors, write_json


def query_gradients(setup: ModelSetup, blocks: Blocks, step: Path, pool: ReplicaPool, progress: Progress) -> Coverage:
    """Every query's gradient at the last stage, written by the replicas that computed it."""
    return pool.accumulate(setup, QueryJob(), blocks, step, progress)


def log_likelihoods(gradients: Coverage, queries: Sequence[str]) -> dict[str, float]:
    """Each query's completion log-likelihood under the last stage's model, in nats."""
    found = gradients.total(LOG_LIKELIHOODS)
    return {query: float(found[query]) for query in queries}


@dataclass(frozen=True)
class CarryTask:
    """Queries carried back to one scored stage; `factors` is each passed stage's folder, None for an identity."""

    run: Run
    scored: int
    factors: dict[int, Path | None]
    queries: tuple[str, ...]
    folder: Path


def carry(task: CarryTask, gradients: Coverage, maps: Sequence[str]) -> None:
    """Writes the directions of every map and a manifest with what was kept and which strengths were used."""
    if is_carried(task.folder):
        return
    means = {index: mean_eigenvalues(folder) for index, folder in task.factors.items() if folder is not None}
    done = for_each_map(write_directions, maps, task, gradients, means)
    strengths: dict[str, dict[str, float]] = {}
    for name, about in zip(maps, done, strict=True):
        for key, value in about["strengths"].items():
            strengths.setdefault(key, {})[name] = value
    write_json(
        layout.directions_manifest(task.folder),
        {
            "queries": list(task.queries),
            "log_likelihood": log_likelihoods(gradients, task.queries),
            "strengths": strengths,
            "maps": {
                name: {
                    "rank": about["rank"],
                    "energy_kept": dict(zip(task.queries, about["kept"], strict=True)),
                }
                for name, about in zip(maps, done, strict=True)
            },
        },
    )


def is_carried(folder: Path) -> bool:
    """Whether queries are carried back there, and no file that the manifest names has been deleted since."""
    manifest = layout.directions_manifest(folder)
    if not exists(manifest):
        return False
    return all_there([layout.direction_file(folder, name) for name in read_json(manifest)["maps"]])


def carried_strengths(folder: Path) -> dict[str, dict[str, float]]:
    """The damping and α of each stage at each map, as used (eigenvalue units)."""
    return read_json(layout.directions_manifest(folder))["strengths"]


def write_directions(
    map_name: str, task: CarryTask, gradients: Coverage, means: dict[int, dict[str, float]]
) -> dict[str, Any]:
    """Carries all queries back at one map and writes them; gives the rank, the energy kept, the strengths."""
    torch.set_num_threads(1)
    chain: list[tuple[Factor | None, Response]] = []
    strengths: dict[str, float] = {}
    for index in stages.carried_through(task.run, task.scored):
        folder = task.factors[index]
        mean = 0.0 if folder is None else means[index][map_name]
        response, strength = stages.response_of(task.run, index, task.scored, map_name, mean)
        if strength is not None:
            kind = "damping" if index == task.scored else "alpha"
            strengths[f"{task.run.stages[index].name}.{kind}"] = strength
        chain.append((None if folder is None else load_factor(folder, map_name), response))
    queries = task.run.queries
    full = _gradients(gradients, map_name, task.queries)
    directions, kept = truncate(carry_back(full, chain), queries.rank, queries.energy)
    if isinstance(directions, DenseDirections):
        tensors, rank = {"matrix": directions.matrix.contiguous()}, None
    else:
        tensors = {"left": directions.left, "right": directions.right}
        rank = directions.left.shape[1]
    save_tensors(layout.direction_file(task.folder, map_name), tensors, {"map": map_name})
    return {"rank": rank, "kept": kept.tolist(), "strengths": strengths}


def load_factor(folder: Path, map_name: str) -> Factor:
    """One map's factor as it is on storage, undamped."""
    eigenvalues = load_tensors(layout.eigenvalues_file(folder, map_name))["eigenvalues"]
    return Factor(load_basis(folder, map_name, torch.device("cpu")), eigenvalues)


def _gradients(gradients: Coverage, map_name: str, queries: Sequence[str]) -> torch.Tensor:
    """The queries' gradients at one map, `[queries, out, columns]`."""
    found: dict[str, torch.Tensor] = {}
    for tensors in gradients.each(map_name):
        for query in queries:
            if (activations := tensors.get(f"activations/{query}")) is not None:
                found[query] = QueryTokens(activations, tensors[f"gradients/{query}"]).gradient
    return torch.stack([found[query] for query in queries])
