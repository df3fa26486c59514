"""Carrying queries back to a scored stage: one task per map, which carries some queries at a time, as many as their
copies fit in its memory, and writes them in shards."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy
import pyarrow as pa
import torch

from msif_ray import layout
from msif_ray.cluster.direction_manifest import read_directions
from msif_ray.cluster.directions import ShardFile, direction_entries, save_shard
from msif_ray.cluster.partials import Coverage
from msif_ray.cluster.passage import CarryTask, Source, Vector, passed_means, passing, strengths_used
from msif_ray.cluster.queries import log_likelihoods
from msif_ray.cluster.tasks import for_each_map
from msif_ray.config import Queries
from msif_ray.influence.directions import LowRankDirections, join
from msif_ray.influence.ekfac import Factor
from msif_ray.influence.groups import Shapes, accumulating_bytes
from msif_ray.influence.queries import carry_back, smaller_form, stays_dense, truncate
from msif_ray.influence.response import Response
from msif_ray.paths import all_there, exists
from msif_ray.store import write_json
from msif_ray.tables import writing

# Bytes that a task takes for the copies of the queries that it carries at once, beside the factors that they meet
# and the shard that it fills. A single query may take more.
CARRY_BYTES = 2**30
# Copies of a direction while it is carried: as it came, as the last stage left it, answered, half rotated back and
# wholly.
CARRY_COPIES = 5
# What cutting one direction to low rank takes at once, in copies of it: in float64 itself, its Gram matrix, and what
# the eigendecomposition of that works in.
CUT_COPIES = 12


@dataclass(frozen=True)
class Carried:
    """What came of one map: each query's rank and the share of its squared norm kept, `[queries]`; of each shard the
    vectors of all its queries together (None: it is dense); the strengths used."""

    ranks: numpy.ndarray
    kept: numpy.ndarray
    vectors: tuple[int | None, ...]
    strengths: dict[str, float]


def carry(
    task: CarryTask,
    source: Source,
    gradients: Coverage,
    maps: Shapes,
    about: Mapping[str, Any],
    replicas: Sequence[Any] = (),
) -> None:
    """Carries queries from the source back to the scored stage: writes the directions of every map, what was kept of
    each query, and a manifest with the strengths used and what else there is to say `about` them. `replicas`: actors
    that are idle."""
    means = passed_means(task)
    itemsize = accumulating_bytes(task.run.cluster.dtype)
    memory = {name: task_bytes(shape, task, itemsize) for name, shape in maps.items()}
    written = for_each_map(write_directions, list(maps), task, source, means, memory=memory, replicas=replicas)
    done = dict(zip(maps, written, strict=True))
    strengths: dict[str, dict[str, float]] = {}
    for name, each in done.items():
        for key, value in each.strengths.items():
            strengths.setdefault(key, {})[name] = value
    _write_energy(layout.energy_file(task.folder), task.queries, done)
    write_json(
        layout.directions_manifest(task.folder),
        {
            "scores": task.folder.name,
            "queries": list(task.queries),
            "log_likelihood": log_likelihoods(gradients, task.queries),
            "strengths": strengths,
            "shards": [list(shard) for shard in task.shards],
            "itemsize": itemsize,
            "maps": {name: _summary(maps[name], each) for name, each in done.items()},
        }
        | dict(about),
    )


def task_bytes(shape: tuple[int, int], task: CarryTask, itemsize: int) -> int:
    """What carrying back takes at most at one map, beside the process itself and the query gradients it reads."""
    met = sum(folder is not None for folder in task.factors.values())
    return carry_bytes(shape, max(stop - start for start, stop in task.shards), met, itemsize, task.run.queries)


def carry_bytes(shape: tuple[int, int], shard: int, stages_met: int, itemsize: int, queries: Queries) -> int:
    """The factors of the stages met, the copies of the queries that are carried and cut at once, and a shard of so
    many queries twice, as it comes and joined; by energy it may be twice as large as if it were dense."""
    out, columns = shape
    factors = stages_met * (out * out + columns * columns + out * columns)
    cut = _cuts(queries, shape)
    copies = CARRY_COPIES * at_once(shape, shard, itemsize, cut) + CUT_COPIES * cut
    filled = (4 if queries.energy is not None else 2) * shard * direction_entries(shape, queries.rank)
    return (factors + copies * out * columns + filled) * itemsize


def _cuts(queries: Queries, shape: tuple[int, int]) -> bool:
    """Whether directions of that shape are decomposed."""
    return queries.energy is not None or (queries.rank is not None and not stays_dense(queries.rank, *shape))


def at_once(shape: tuple[int, int], shard: int, itemsize: int, cut: bool, memory: int | None = None) -> int:
    """How many of a shard's queries are carried at once, within `memory` bytes (default: CARRY_BYTES); at least one."""
    copies = (CARRY_BYTES if memory is None else memory) // (shape[0] * shape[1] * itemsize)
    return max(1, min(shard, (copies - CUT_COPIES * cut) // CARRY_COPIES))


def _summary(shape: tuple[int, int], about: Carried) -> dict[str, Any]:
    """A map in the manifest; each query's figures are in `energy.parquet`."""
    ranks, kept = about.ranks, about.kept
    return {
        "shape": list(shape),
        "vectors": list(about.vectors),
        "rank": {"min": int(ranks.min()), "mean": float(ranks.mean()), "max": int(ranks.max())},
        "energy_kept": {"min": float(kept.min()), "mean": float(kept.mean())},
    }


def _write_energy(path: Path, queries: Sequence[str], done: dict[str, Carried]) -> None:
    """`map`, `query_id`, `rank` and `energy_kept` of every map and query; a row group per map."""
    schema = pa.schema(
        [("map", pa.string()), ("query_id", pa.string()), ("rank", pa.int32()), ("energy_kept", pa.float64())],
        {"scores": path.parent.name},
    )
    with writing(path, schema) as writer:
        for name, about in done.items():
            columns = [[name] * len(queries), list(queries), about.ranks, about.kept]
            writer.write_table(
                pa.table([pa.array(column, kind.type) for column, kind in zip(columns, schema, strict=True)], schema)
            )


def is_carried(folder: Path) -> bool:
    """Whether queries are carried back there, and no file that the manifest names has been deleted since."""
    if not exists(layout.directions_manifest(folder)):
        return False
    manifest = read_directions(folder)
    shards = [(start, stop) for start, stop in manifest["shards"]]
    files = [layout.direction_file(folder, name, shard) for shard in shards for name in manifest["maps"]]
    return all_there([layout.energy_file(folder), *files])


def carried_solvers(folder: Path) -> dict[str, Any]:
    """What came of each stage that conjugate gradients solved, by its name."""
    solvers: dict[str, Any] = read_directions(folder).get("solvers", {})
    return solvers


def carried_strengths(folder: Path) -> dict[str, dict[str, float]]:
    """The damping and α of each stage at each map, as used (eigenvalue units)."""
    strengths: dict[str, dict[str, float]] = read_directions(folder)["strengths"]
    return strengths


def write_directions(map_name: str, task: CarryTask, source: Source, means: dict[int, dict[str, float]]) -> Carried:
    """Carries all queries back at one map and writes those shards that are not there yet."""
    strengths = strengths_used(map_name, task, means)
    chain = passing(map_name, task, means, source.passed, task.scored)
    stream = source.vectors(map_name, task.queries)
    files = []
    for shard in task.shards:
        file = ShardFile.of(task.folder, map_name, shard)
        some = islice(stream, shard[1] - shard[0])
        if exists(file.path):
            for _ in some:
                pass
        else:
            _write_shard(file, some, chain, task)
        files.append(file)
    ranks, kept = (torch.cat([file.tensor(part) for file in files]).numpy() for part in ("ranks", "kept"))
    vectors = tuple(None if file.dense else int(file.tensor("ranks").sum()) for file in files)
    return Carried(ranks, kept, vectors, strengths)


def _write_shard(
    file: ShardFile, vectors: Iterator[Vector], chain: Sequence[tuple[Factor | None, Response]], task: CarryTask
) -> None:
    """Carries a shard's queries back, some at a time, and writes them once all are there."""
    queries = task.run.queries
    parts, shares = [], []
    for each in vectors:
        first = each.gradient
        out, columns = first.shape
        cuts = _cuts(queries, (out, columns))
        some = at_once((out, columns), len(task.queries), first.element_size(), cuts, task.memory)
        full = torch.stack([first, *(other.gradient for other in islice(vectors, some - 1))])
        del first
        directions, kept = truncate(carry_back(full, chain), queries.rank, queries.energy)
        del full
        parts.append(directions)
        shares.append(kept)
    joined = join(parts)
    parts.clear()
    if isinstance(joined, LowRankDirections):
        ranks = joined.ranks
    else:
        ranks = torch.full((len(joined),), min(joined.dense.shape[1:]))
    save_shard(file.path, smaller_form(joined), ranks, torch.cat(shares), file.about)
