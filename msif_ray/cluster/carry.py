"""The query driver: gradients at the last stage's model, then carried back as one task per map."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from msif_ray import layout, stages
from msif_ray.cluster import partials
from msif_ray.cluster.fit import Progress, for_each_map, mean_eigenvalues
from msif_ray.cluster.jobs import QueryJob, load_basis, log_likelihood_key, query_keys
from msif_ray.cluster.pool import Blocks, ReplicaPool
from msif_ray.cluster.rank import ModelSetup
from msif_ray.config import Run
from msif_ray.influence.ekfac import Factor
from msif_ray.influence.queries import QueryTokens, carry_back, truncate
from msif_ray.influence.response import Response
from msif_ray.influence.scoring import DenseDirections
from msif_ray.store import load_tensors, read_json, save_tensors, write_json


def query_gradients(
    setup: ModelSetup, blocks: Blocks, folder: Path, pool: ReplicaPool, progress: Progress
) -> list[partials.Partial]:
    """Every query's gradient at the last stage, written by the replicas that computed it."""
    return pool.accumulate(setup, QueryJob(), blocks, layout.partials(folder, "gradients"), progress)


def log_likelihoods(gradients: Sequence[partials.Partial], queries: Sequence[str]) -> dict[str, float]:
    """Each query's completion log-likelihood under the last stage's model, in nats."""
    return {query: float(partials.total(gradients, log_likelihood_key(query))[0]) for query in queries}


@dataclass(frozen=True)
class CarryTask:
    """Queries carried back to one scored stage; `factors` is each passed stage's folder, None for an identity."""

    run: Run
    scored: int
    factors: dict[int, Path | None]
    queries: tuple[str, ...]
    folder: Path


def carry(task: CarryTask, gradients: Sequence[partials.Partial], maps: Sequence[str]) -> None:
    """Writes the directions of every map and a manifest with what was kept and which strengths were used."""
    if layout.directions_manifest(task.folder).exists():
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
    return layout.directions_manifest(folder).exists()


def carried_strengths(folder: Path) -> dict[str, dict[str, float]]:
    """The damping and α of each stage at each map, as used (eigenvalue units)."""
    return read_json(layout.directions_manifest(folder))["strengths"]


def write_directions(
    map_name: str, task: CarryTask, gradients: Sequence[partials.Partial], means: dict[int, dict[str, float]]
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
    full = torch.stack([_gradient(gradients, map_name, query) for query in task.queries])
    queries = task.run.queries
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


def _gradient(gradients: Sequence[partials.Partial], map_name: str, query: str) -> torch.Tensor:
    activations, outputs = query_keys(map_name, query)
    for partial in gradients:
        with safe_open(partial.path, framework="pt") as file:
            if activations in set(file.keys()):
                return QueryTokens(file.get_tensor(activations), file.get_tensor(outputs)).gradient
    raise RuntimeError(f"the gradient of query {query!r} is in none of the partial files")
