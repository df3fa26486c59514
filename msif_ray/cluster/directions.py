"""Carried-back queries on storage, in shards of queries, and on a rank: what fits in its memory stays there, the
rest is read from local disk, a map's shards at a time, for every batch.

Under a folder of directions there is a folder for each shard with a file for each map; the manifest says which
shards there are and what form each has.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from msif_ray import layout
from msif_ray.cluster.direction_manifest import read_directions
from msif_ray.fetch import fetched
from msif_ray.heap import give_back_freed_memory
from msif_ray.influence.compress import Metric
from msif_ray.influence.directions import DenseDirections, Directions, LowRankDirections, join, laid_out
from msif_ray.influence.groups import Shapes
from msif_ray.influence.queries import stays_dense
from msif_ray.influence.scoring import DENSE_ENTRIES, Scorer
from msif_ray.paths import is_remote
from msif_ray.store import damage_to_mend, save_tensors
from msif_ray.tensorfile import TensorFile

# Queries of a shard at most, and bytes of one map's shard at most, were no query of low rank. A single query may
# take more.
SHARD_QUERIES = 64
SHARD_BYTES = 2**30
# Shards that fit in a rank's `directions_memory`, at least.
SHARDS_IN_MEMORY = 8
# What is streamed is in memory three times for a moment: the map before, the shards as read, and those joined.
STREAM_COPIES = 3
# Of `directions_memory`, what is for streaming where not everything fits.
STREAM_SHARE = 0.5


Shard = tuple[int, int]
"""The queries from the first number to before the second."""

Metrics = Callable[[str], Metric]
"""A map's metric in an index; read when asked for."""


def shards(queries: int, shapes: Shapes, rank: int | None, itemsize: int, memory: int | None) -> list[Shard]:
    """The queries cut into shards, the same for all maps: as many each as `SHARD_QUERIES`, `SHARD_BYTES` and the
    `memory` of a rank allow, and one at least. `rank` is the fixed rank, None where it may be anything."""
    largest = max(direction_entries(shape, rank) for shape in shapes.values()) * itemsize
    allowed = SHARD_BYTES if memory is None else min(SHARD_BYTES, memory // SHARDS_IN_MEMORY)
    each = max(1, min(SHARD_QUERIES, allowed // largest))
    return [(start, min(start + each, queries)) for start in range(0, queries, each)]


def direction_entries(shape: tuple[int, int], rank: int | None) -> int:
    """Entries of one query's direction at a map `(out, columns)`, at most."""
    out, columns = shape
    return out * columns if rank is None or stays_dense(rank, out, columns) else rank * (out + columns)


def shard_metadata(map_name: str, shard: Shard, scores: str) -> dict[str, str]:
    """What a shard's file says of itself; `scores`: what the folder of its directions is called."""
    return {"map": map_name, "queries": f"{shard[0]}-{shard[1]}", "scores": scores}


def save_shard(path: Path, directions: Directions, ranks: Tensor, kept: Tensor, metadata: Mapping[str, str]) -> None:
    """Writes one map's shard with the rank of each query and the share of its squared norm that is kept."""
    if isinstance(directions, DenseDirections):
        tensors = {"matrix": directions.matrix}
    else:
        tensors = {"left": directions.left, "right": directions.right}
    save_tensors(path, tensors | {"ranks": ranks, "kept": kept}, metadata)


@dataclass
class ReadAgain:
    """A file of tensors that is read many times. Checksums are compared when one is first read, and not again; `about`
    is what its metadata are to say."""

    path: Path
    about: Mapping[str, str] = field(default_factory=dict)
    _file: TensorFile | None = None
    _verified: set[str] = field(default_factory=set)

    def tensor(self, name: str) -> Tensor:
        """A tensor of the file, on the CPU. Raises UserError, which says what to do, for a damaged file."""
        with damage_to_mend("it"):
            tensor = self._opened.tensor(name, verify=name not in self._verified)
        self._verified.add(name)
        return tensor

    @property
    def checksums(self) -> dict[str, int]:
        """Each tensor's. Raises UserError as `tensor`."""
        with damage_to_mend("it"):
            return self._opened.checksums

    @property
    def _opened(self) -> TensorFile:
        if self._file is None:
            self._file = TensorFile(self.path, self.about)
        return self._file


@dataclass
class ShardFile(ReadAgain):
    """One map's shard on storage."""

    @classmethod
    def of(cls, folder: Path, map_name: str, shard: Shard, scores: str | None = None) -> Self:
        """`scores`: what the folder is called of which this one may be a copy."""
        about = shard_metadata(map_name, shard, scores or folder.name)
        return cls(layout.direction_file(folder, map_name, shard), about)

    def load(self, device: torch.device) -> Directions:
        if self.dense:
            return DenseDirections(self.tensor("matrix").to(device))
        return LowRankDirections(self.tensor("left").to(device), self.tensor("right").to(device), self.tensor("ranks"))

    @property
    def dense(self) -> bool:
        with damage_to_mend("it"):
            return "matrix" in self._opened.names


@dataclass(frozen=True)
class Stored:
    """One shard of a folder of directions, all maps. By map: `vectors` of all its queries together (None: they are
    dense), and the `bytes` that they take. `scores`: what the folder is called, or that of which it is a copy."""

    folder: Path
    scores: str
    shard: Shard
    vectors: dict[str, int | None]
    bytes: dict[str, int]

    def __len__(self) -> int:
        return self.shard[1] - self.shard[0]


def stored_shards(folder: Path, maps: Sequence[str]) -> list[Stored]:
    """The shards of a folder whose manifest is written, in the order of queries."""
    manifest = read_directions(folder)
    found = []
    for number, (start, stop) in enumerate(manifest["shards"]):
        about = {name: manifest["maps"][name] for name in maps}
        vectors = {name: of_map["vectors"][number] for name, of_map in about.items()}
        sizes = {
            name: entries(stop - start, tuple(of_map["shape"]), vectors[name]) * manifest["itemsize"]
            for name, of_map in about.items()
        }
        found.append(Stored(folder, folder.name, (start, stop), vectors, sizes))
    return found


def stored_bytes(folders: Sequence[Path], maps: Sequence[str]) -> int:
    """What several folders' directions take together."""
    return sum(sum(each.bytes.values()) for folder in folders for each in stored_shards(folder, maps))


def entries(queries: int, shape: tuple[int, int], vectors: int | None) -> int:
    """Entries of so many queries at a map `(out, columns)`: with so many vectors together, or dense (None)."""
    out, columns = shape
    return queries * out * columns if vectors is None else vectors * (out + columns)


@dataclass
class _Lazy(Mapping[str, Directions]):
    """The directions of some shards by map: those in `resident`, and others read from `files` each time; as they are,
    or in the coordinates of `metrics`."""

    files: dict[str, list[ShardFile]]
    device: torch.device
    metrics: Metrics | None = None
    resident: dict[str, Directions] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Directions:
        return self.resident[name] if name in self.resident else self.read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)

    def read(self, name: str) -> Directions:
        shards = (file.load(self.device) for file in self.files[name])
        if self.metrics is None:
            return join(list(shards))
        metric = self.metrics(name)
        return join([metric.directions(shard) for shard in shards])  # one by one, since that takes copies of its own


@dataclass(frozen=True)
class LoadedDirections:
    """What a rank scores with: a scorer for each group of shards, in the order of queries; `queries` of each."""

    scorers: list[Scorer]
    queries: list[int]
    streamed: int
    """Bytes that are read for every batch."""


def load(
    folders: Sequence[Path],
    maps: Sequence[str],
    device: torch.device,
    memory: int,
    norms: bool = True,
    metrics: Metrics | None = None,
) -> LoadedDirections:
    """The directions of several folders as one list of queries, folder after folder, within `memory` bytes. With
    `norms` the first scorer alone gives the windows': no other forms gradients for them. With `metrics` they meet
    the pseudo-tokens of an index in place of windows.

    Where they take more, half of the memory is for what is streamed: as many shards are scored together as let
    any map's be in it; at the least it is one shard. Raises UserError for a file that is damaged or missing.
    """
    stored = [each for folder in folders for each in stored_shards(folder, maps)]
    total = sum(sum(each.bytes.values()) for each in stored)
    if total <= memory:
        everything = _lazy(stored, maps, device, metrics)
        directions = {name: laid_out(everything.read(name)) for name in maps}
        scorer = Scorer(directions, kept_entries(total, memory, _itemsize(directions)), norms)
        return LoadedDirections([scorer], [sum(map(len, stored))], 0)
    give_back_freed_memory()
    local = {folder: fetched(str(folder)) if is_remote(folder) else folder for folder in folders}
    stored = [replace(each, folder=local[each.folder]) for each in stored]
    groups = _groups(stored, maps, int(STREAM_SHARE * memory) // STREAM_COPIES)
    left = memory - STREAM_COPIES * max(_bytes(group, name) for group in groups for name in maps)
    scorers: list[Scorer] = []
    streamed = 0
    for group in groups:
        lazy = _lazy(group, maps, device, metrics)
        for name in maps:
            size = _bytes(group, name)
            if size <= left:
                lazy.resident[name] = laid_out(lazy.read(name))
                left -= size
            else:
                streamed += size
        scorers.append(Scorer(lazy, dense_entries=0, norms=norms and not scorers))
    return LoadedDirections(scorers, [sum(map(len, group)) for group in groups], streamed)


def kept_entries(total: int, memory: int, itemsize: int) -> int:
    """Entries of dense directions that may be kept beside `total` bytes of directions; none where these do not fit."""
    return max(0, min(DENSE_ENTRIES, (memory - total) // itemsize))


def _lazy(group: Sequence[Stored], maps: Sequence[str], device: torch.device, metrics: Metrics | None) -> _Lazy:
    files = {name: [ShardFile.of(each.folder, name, each.shard, each.scores) for each in group] for name in maps}
    return _Lazy(files, device, metrics)


def _itemsize(directions: Mapping[str, Any]) -> int:
    first = next(iter(directions.values()))
    return int((first.matrix if isinstance(first, DenseDirections) else first.left).element_size())


def _bytes(group: Sequence[Stored], name: str) -> int:
    """What a map's shards take together: all are expanded where one is dense."""
    if all(each.vectors[name] is not None for each in group):
        return sum(each.bytes[name] for each in group)
    one = next(each.bytes[name] // len(each) for each in group if each.vectors[name] is None)
    return one * sum(map(len, group))


def _groups(stored: Sequence[Stored], maps: Sequence[str], limit: int) -> list[list[Stored]]:
    """Neighbouring shards that are scored together: as few groups as let every map's shards take `limit` bytes."""
    groups: list[list[Stored]] = []
    for each in stored:
        if groups and all(_bytes([*groups[-1], each], name) <= limit for name in maps):
            groups[-1].append(each)
        else:
            groups.append([each])
    return groups
