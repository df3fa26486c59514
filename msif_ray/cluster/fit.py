"""The fit driver: covariances over the replicas, bases as one task per map, corrected eigenvalues.

Maps are fitted in groups whose factors fit in a rank's memory together, one group after the other.
"""

import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel

from msif_ray import layout
from msif_ray.cluster.factors import bases_checksum, check_bases, read_factors, save_basis, save_eigenvalues
from msif_ray.cluster.jobs import CorrectionJob, CovarianceJob
from msif_ray.cluster.partials import Coverage
from msif_ray.cluster.pool import ReplicaPool
from msif_ray.cluster.rank import ModelSetup
from msif_ray.cluster.tasks import for_each_map
from msif_ray.cluster.told import Progress
from msif_ray.corpus.blocks import CorpusBlocks
from msif_ray.corpus.unusable import none_usable
from msif_ray.errors import UserError
from msif_ray.influence.ekfac import eigenbasis
from msif_ray.influence.groups import FREE_SHARE, Shapes, accumulating_bytes, module_groups
from msif_ray.paths import all_there, exists
from msif_ray.store import AGAIN, delete, delete_folder, read_json, write_json

# Copies of a matrix, in float64, that its eigendecomposition holds at once: itself, its symmetric part, the
# eigenvectors and LAPACK's work space.
EIGEN_COPIES = 6
# Copies of a map's corrected eigenvalues while they are added up: the sum, another one, and both of them.
MEAN_COPIES = 3


class _Grouping(BaseModel):
    groups: list[list[str]]
    checksums: list[str] = []


class _Skip(BaseModel):
    doc_id: str
    reason: str


class _Record(BaseModel):
    documents: int
    windows: int
    tokens: int
    skipped: list[_Skip]
    mean_eigenvalues: dict[str, float]


@dataclass(frozen=True)
class FitTask:
    """A stage's fit: its model, its blocks and where its factors go. `memory` for factors, and `kept_memory` for what
    the first pass captured, in bytes, None: of what is free.

    `corpus` is how many documents the stage's corpus has, of which the blocks may be a part.
    """

    setup: ModelSetup
    labels: str
    blocks: CorpusBlocks
    corpus: int
    folder: Path
    maps: dict[str, tuple[int, int]]
    memory: int | None
    kept_memory: int | None
    record: dict[str, Any]


@dataclass(frozen=True)
class _Group:
    """Maps that are fitted together. Their covariances are kept by `index`, and by a checksum of their names: a group
    of that number, as it was decided once, may have been of other maps."""

    index: int
    maps: tuple[str, ...]
    checksum: str


Steps = Callable[[str], AbstractContextManager[Progress]]
"""Begins a step of that name."""

Say = Callable[[str], None]
"""Tells the user one line."""


def is_fitted(folder: Path) -> bool:
    """Whether a stage's fit is finished, and no file that its manifest names has been deleted since."""
    manifest = layout.factors_manifest(folder)
    return exists(manifest) and _are_there(folder, read_factors(folder)["maps"])


def _are_there(folder: Path, maps: Iterable[str]) -> bool:
    return all_there(layout.factor_files(folder, maps))


def fit(task: FitTask, pool: ReplicaPool, steps: Steps, say: Say) -> None:
    """Fits one stage's EK-FAC factors; what is on storage already is not computed again."""
    groups = _groups(task, pool, say)
    for group in groups:
        if not _is_done(task.folder, group):
            of_group = f", group {group.index + 1} of {len(groups)}" if len(groups) > 1 else ""
            _fit_group(task, pool, steps, group, of_group)
    _write_manifest(task, [_group_record(task.folder, group) for group in groups])
    drop_partials(task.folder)


def drop_partials(folder: Path) -> None:
    """Deletes what is left of a finished stage's partial sums."""
    delete_folder(folder / "partials")


def _is_done(folder: Path, group: _Group) -> bool:
    return (
        exists(layout.group_record(folder, group.index))
        and set(_group_record(folder, group)["mean_eigenvalues"]) == set(group.maps)
        and _are_there(folder, group.maps)
    )


def _group_record(folder: Path, group: _Group) -> dict[str, Any]:
    """What came of a finished group. Raises UserError for a record that is damaged, or of another stage."""
    path = layout.group_record(folder, group.index)
    found: dict[str, Any] = read_json(path, shape=_Record, about={"stage": folder.name})
    return found


def _groups(task: FitTask, pool: ReplicaPool, say: Say) -> list[_Group]:
    """The groups of maps as they were first decided: a pass that has begun holds for its group alone."""
    path = layout.groups(task.folder)
    if not exists(path):
        budget = task.memory
        if budget is None:
            free = pool.free_memory(
                task.setup, CovarianceJob(False, ()), lambda reason: say(f"{task.setup.stage}: waiting: {reason}")
            )
            budget = int(FREE_SHARE * free)
        itemsize = 8 if task.setup.dtype == "float64" else 4
        groups = [list(group) for group in module_groups(task.maps, budget, itemsize)]
        checksums = [_checksum(group) for group in groups]
        write_json(path, {"factor_memory": budget, "groups": groups, "checksums": checksums})
    about = read_json(path, shape=_Grouping)
    if sorted(chain.from_iterable(about["groups"])) != sorted(task.maps):
        raise UserError(f"{path}: its groups are not of this run's maps, each once; {AGAIN}")
    # Those of an earlier version have no checksums, and nor have the sums that were begun by them.
    checksums = about.get("checksums") or [""] * len(about["groups"])
    if len(checksums) != len(about["groups"]):
        raise UserError(f"{path}: not one checksum for each group; {AGAIN}")
    found = zip(about["groups"], checksums, strict=True)
    return [_Group(index, tuple(maps), checksum) for index, (maps, checksum) in enumerate(found)]


def _checksum(maps: Sequence[str]) -> str:
    return f"{zlib.crc32(json.dumps(maps).encode()):08x}"


def _fit_group(task: FitTask, pool: ReplicaPool, steps: Steps, group: _Group, of_group: str) -> None:
    """Fits one group of maps and drops its partial sums. `of_group` says in steps' names which it is."""
    sampled, folder, index, maps = task.labels == "sampled", task.folder, group.index, group.maps
    missing = [name for name in maps if not exists(layout.basis_file(folder, name))]
    if missing:
        with steps(f"covariance{of_group}") as progress:
            covariance = pool.accumulate(
                task.setup,
                CovarianceJob(sampled, maps, task.kept_memory),
                task.blocks,
                layout.partials(folder, index, "covariance"),
                progress,
                inputs=group.checksum,
            )
        if not covariance.documents:
            reasons = Counter(reason for _, reason in covariance.skipped)
            raise none_usable(task.blocks.documents, task.blocks.key, task.setup.stage, reasons)
        _forget(folder, index, maps)
        memory = _eigen_memory(task.maps)
        for_each_map(write_basis, missing, folder, covariance, memory=memory, replicas=pool.idle())
    bases = bases_checksum(folder, maps)
    with steps(f"correction{of_group}") as progress:
        correction = pool.accumulate(
            task.setup,
            CorrectionJob(sampled, maps, task.kept_memory, factors=folder, bases=bases),
            task.blocks,
            layout.partials(folder, index, "correction"),
            progress,
            inputs=bases,
        )
    check_bases(folder, maps, bases)
    memory = _mean_memory(task.maps, task.setup.dtype)
    means = for_each_map(write_eigenvalues, maps, folder, correction, memory=memory, replicas=pool.idle())
    write_json(
        layout.group_record(folder, index),
        {
            "stage": folder.name,
            "documents": correction.documents,
            "windows": correction.windows,
            "tokens": correction.tokens,
            "skipped": [{"doc_id": document, "reason": reason} for document, reason in correction.skipped],
            "mean_eigenvalues": dict(zip(maps, means, strict=True)),
        },
    )
    delete_folder(layout.partials(folder, index, "covariance").parent)


def _forget(folder: Path, index: int, maps: Sequence[str]) -> None:
    """Deletes what was made of bases that are about to be replaced, in the order in which it would be believed."""
    delete(layout.factors_manifest(folder))
    delete(layout.group_record(folder, index))
    for name in maps:
        delete(layout.eigenvalues_file(folder, name))
    delete_folder(layout.partials(folder, index, "correction"))


def _mean_memory(maps: Shapes, dtype: str) -> dict[str, int]:
    return {name: MEAN_COPIES * accumulating_bytes(dtype) * out * columns for name, (out, columns) in maps.items()}


def _eigen_memory(maps: Shapes) -> dict[str, int]:
    return {name: EIGEN_COPIES * 8 * max(shape) ** 2 for name, shape in maps.items()}


def write_basis(map_name: str, folder: Path, covariance: Coverage) -> None:
    """Reduces one map's covariances and writes their eigenbases and eigenvalues (of means over positions).

    A basis that is there stays: sums over it may have begun, and a task that Ray runs again, or one that outlived
    its driver, would give another basis of the same matrix.
    """
    if exists(layout.basis_file(folder, map_name)):
        return
    total = covariance.total(map_name)
    tensors: dict[str, torch.Tensor] = {}
    for side, key in (("activation", "A"), ("gradient", "S")):
        summed = total.pop(key)
        if not torch.isfinite(summed).all():
            raise UserError(f"{map_name}: the {side} covariance is not finite; the model's numbers overflow")
        # Of an expert that no token reached the mean is zero.
        values, vectors = eigenbasis(summed.double() / total[f"{key}_positions"].clamp_min(1))
        tensors[f"{side}_basis"] = vectors.to(summed.dtype).contiguous()
        tensors[f"{side}_eigenvalues"] = values.to(summed.dtype)
    if not exists(layout.basis_file(folder, map_name)):  # nor meanwhile
        save_basis(folder, map_name, tensors)


def write_eigenvalues(map_name: str, folder: Path, correction: Coverage) -> float:
    """Reduces and writes one map's corrected eigenvalues, undamped; gives their mean."""
    eigenvalues = correction.total(map_name)["E"] / correction.documents
    if not torch.isfinite(eigenvalues).all():
        raise UserError(f"{map_name}: the corrected eigenvalues are not finite; the model's numbers overflow")
    save_eigenvalues(folder, map_name, eigenvalues)
    return float(eigenvalues.double().mean())


def _write_manifest(task: FitTask, groups: Sequence[dict[str, Any]]) -> None:
    first = groups[0]  # each group's passes see the same documents
    means = {name: mean for group in groups for name, mean in group["mean_eigenvalues"].items()}
    write_json(
        layout.factors_manifest(task.folder),
        task.record
        | {key: first[key] for key in ("documents", "windows", "tokens", "skipped")}
        | {
            "share_covered": first["documents"] / task.corpus,
            "maps": {name: {"shape": list(shape), "mean_eigenvalue": means[name]} for name, shape in task.maps.items()},
        },
    )
