"""The fit driver: covariances over the replicas, bases as one task per map, corrected eigenvalues."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch

from msif_ray import layout
from msif_ray.cluster import partials
from msif_ray.cluster.jobs import CorrectionJob, CovarianceJob
from msif_ray.cluster.pool import Blocks, ReplicaPool
from msif_ray.cluster.rank import ModelSetup, Outcome
from msif_ray.errors import UserError
from msif_ray.influence.ekfac import eigenbasis
from msif_ray.store import read_json, save_tensors, write_json

Progress = Callable[[Outcome], None]
"""Told what came of each block."""


@dataclass(frozen=True)
class FitTask:
    """A stage's fit: its model, its blocks and where its factors go."""

    setup: ModelSetup
    labels: str
    blocks: Blocks
    folder: Path
    maps: dict[str, tuple[int, int]]
    record: dict[str, Any]


def is_fitted(folder: Path) -> bool:
    return layout.factors_manifest(folder).exists()


def fit(task: FitTask, pool: ReplicaPool, progress: Callable[[str], AbstractContextManager[Progress]]) -> None:
    """Fits one stage's EK-FAC factors; what is on storage already is not computed again."""
    sampled, folder = task.labels == "sampled", task.folder
    with progress("covariance") as count:
        covariance = pool.accumulate(
            task.setup, CovarianceJob(sampled), task.blocks, layout.partials(folder, "covariance"), count
        )
    missing = [name for name in task.maps if not layout.basis_file(folder, name).exists()]
    for_each_map(write_basis, missing, folder, covariance)
    with progress("correction") as count:
        correction = pool.accumulate(
            task.setup,
            CorrectionJob(sampled, folder),
            task.blocks,
            layout.partials(folder, "correction"),
            count,
        )
    means = for_each_map(write_eigenvalues, list(task.maps), folder, correction)
    _write_manifest(task, correction, dict(zip(task.maps, means, strict=True)))


def for_each_map(function: Callable[..., Any], maps: Sequence[str], *arguments: Any) -> list[Any]:
    """`function(map, *arguments)` as one Ray task per map, as many at once as the cluster has cores.

    Tasks ask for no core of their own: replicas hold those, and are idle meanwhile.
    """
    task = ray.remote(function).options(num_cpus=0, scheduling_strategy="SPREAD")
    shared = [ray.put(argument) for argument in arguments]
    at_once = max(1, int(ray.cluster_resources().get("CPU", 1)))
    results: dict[str, Any] = {}
    running: dict[Any, str] = {}
    waiting = list(reversed(maps))
    while waiting or running:
        while waiting and len(running) < at_once:
            name = waiting.pop()
            running[task.remote(name, *shared)] = name
        (ref,), _ = ray.wait(list(running), num_returns=1)
        try:
            results[running.pop(ref)] = ray.get(ref)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, UserError):
                raise error.cause from None
            raise
    return [results[name] for name in maps]


def write_basis(map_name: str, folder: Path, covariance: Sequence[partials.Partial]) -> None:
    """Reduces one map's covariances and writes their eigenbases and eigenvalues (of means over positions)."""
    torch.set_num_threads(1)
    tensors: dict[str, torch.Tensor] = {}
    for side, key in (("activation", f"A/{map_name}"), ("gradient", f"S/{map_name}")):
        total, count = partials.total(covariance, key)
        if not torch.isfinite(total).all():
            raise UserError(f"{map_name}: the {side} covariance is not finite; the model's numbers overflow")
        values, vectors = eigenbasis(total.double() / count)
        tensors[f"{side}_basis"] = vectors.to(total.dtype).contiguous()
        tensors[f"{side}_eigenvalues"] = values.to(total.dtype)
    save_tensors(layout.basis_file(folder, map_name), tensors, {"map": map_name})


def write_eigenvalues(map_name: str, folder: Path, correction: Sequence[partials.Partial]) -> float:
    """Reduces and writes one map's corrected eigenvalues, undamped; gives their mean."""
    total, _ = partials.total(correction, f"E/{map_name}")
    eigenvalues = total / sum(partial.documents for partial in correction)
    save_tensors(layout.eigenvalues_file(folder, map_name), {"eigenvalues": eigenvalues}, {"map": map_name})
    return float(eigenvalues.double().mean())


def _write_manifest(task: FitTask, correction: Sequence[partials.Partial], means: dict[str, float]) -> None:
    skipped = [skip for partial in correction for skip in partial.skipped]
    documents = sum(partial.documents for partial in correction)
    write_json(
        layout.factors_manifest(task.folder),
        task.record
        | {
            "documents": documents,
            "windows": sum(partial.windows for partial in correction),
            "tokens": sum(partial.tokens for partial in correction),
            "share_covered": 1.0,
            "skipped": [{"doc_id": document, "reason": reason} for document, reason in skipped],
            "maps": {name: {"shape": list(shape), "mean_eigenvalue": means[name]} for name, shape in task.maps.items()},
        },
    )


def mean_eigenvalues(folder: Path) -> dict[str, float]:
    """The mean corrected eigenvalue of each map of a fitted stage."""
    return {
        name: about["mean_eigenvalue"] for name, about in read_json(layout.factors_manifest(folder))["maps"].items()
    }


def remaining(blocks: Callable[[], Iterable[Any]]) -> Blocks:
    """Blocks less those that are done, from a function that reads them all in order."""

    def left(done: set[str]) -> Iterator[Any]:
        return (block for block in blocks() if block.id not in done)

    return left
