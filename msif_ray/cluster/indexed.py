"""Scores from an index: a block's stored pseudo-tokens in place of a pass over its documents."""

import functools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import ray
import torch
from torch import Tensor

from msif_ray import layout
from msif_ray.cluster.index_metric import load_metric
from msif_ray.cluster.outcomes import Outcome
from msif_ray.cluster.room import RankResources, own_device
from msif_ray.cluster.score import ScoreTask, write_scores
from msif_ray.cluster.score_jobs import DocumentScores, load_directions
from msif_ray.cluster.workers import BlockReplica, Counted
from msif_ray.corpus.blocks import CorpusBlocks
from msif_ray.corpus.reader import Block
from msif_ray.corpus.windows import Skipped
from msif_ray.errors import DamagedError
from msif_ray.indexes import read_manifest, whole
from msif_ray.influence.compress import Packed
from msif_ray.influence.scoring import Scorer
from msif_ray.tensorfile import TensorFile


class IndexBlock:
    """One block of an index: pseudo-tokens in place of a captured batch's tokens, read from storage when asked for.

    Raises UserError, saying what to delete, for a file that is missing, damaged or of other documents or maps.
    """

    def __init__(self, folder: Path, groups: Sequence[Sequence[str]], block: str, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._files: dict[str, TensorFile] = {}
        self.device = torch.device("cpu")
        with whole(folder):
            paths = [layout.index_block(layout.index_group(folder, number), block) for number in range(len(groups))]
            opened = [TensorFile(path, {"block": block, "index": folder.name}) for path in paths]
            first = opened[0]
            self.documents: list[str] = json.loads(first.metadata["documents"])
            for file, maps in zip(opened, groups, strict=True):
                of_maps = {*file.names} >= {f"scales/{name}" for name in maps} if self.documents else True
                if file.metadata["documents"] != first.metadata["documents"] or not of_maps:
                    raise DamagedError(f"{file.path} is in the wrong place: it is of other documents or other maps")
                self._files |= dict.fromkeys(maps, file)
            self.skipped = [Skipped(*skip) for skip in json.loads(first.metadata["skipped"])]
            self.n_tokens: list[int] = first.tensor("n_tokens").tolist()
            self.squared_norms = torch.stack([file.tensor("squared_norms") for file in opened]).sum(0)
        self._folder = folder

    def vectors(self, name: str) -> tuple[Tensor, Tensor]:
        """A map's pseudo-tokens, `[documents, k, columns]` and `[documents, k, out]`, read from storage."""
        with whole(self._folder):
            read = (self._files[name].tensor(f"{key}/{name}") for key in ("activations", "gradients", "scales"))
            return Packed(*(tensor.to(self.device) for tensor in read)).unpack(self._dtype)

    def score(self, scorers: Sequence[Scorer], by_map: Sequence[str] | None = None) -> list[DocumentScores]:
        """Every document's scores, with its exact squared norm, and their shares of the maps named."""
        if not self.documents:
            return []
        if by_map is None:
            scores = torch.cat([functools.reduce(torch.add, self._by_map(scorer)) for scorer in scorers], dim=1).cpu()
            found = zip(self.documents, scores, self.squared_norms.tolist(), strict=True)
            return [DocumentScores(document, row, square) for document, row, square in found]
        names = list(scorers[0].directions)
        order = [names.index(name) for name in by_map]
        shares = torch.cat([torch.stack(list(self._by_map(scorer)), dim=2) for scorer in scorers], dim=1).cpu()
        of_documents = zip(self.documents, shares[:, :, order], self.squared_norms.tolist(), strict=True)
        return [DocumentScores(document, row.sum(1), square, row) for document, row, square in of_documents]

    def _by_map(self, scorer: Scorer) -> Iterator[Tensor]:
        """`[documents, queries]` of every map, float64."""
        for name, directions in scorer.directions.items():
            yield scorer.score_map(name, directions, *self.vectors(name))[0].double()

    @property
    def outcome(self) -> Outcome:
        """What came of the block's documents when it was built."""
        tokens = dict(zip(self.documents, self.n_tokens, strict=True))
        return Outcome(tokens, tuple(self.skipped), len(tokens))


@dataclass(frozen=True)
class NamedBlocks(CorpusBlocks):
    """A corpus's blocks by name alone: no document is read."""

    def left_in(self, file: int, done: "frozenset[str] | set[str]") -> Iterator[Block]:  # type: ignore[override]
        return (Block(name, ()) for name in self._names(file) if name not in done)


class IndexedReplica(BlockReplica):
    """Scores blocks of an index; it loads the queries' directions, with its first block, and no model."""

    def __init__(self, task: list[Any], resources: RankResources, lent: list[Any]) -> None:
        self._task: IndexedScoreTask = ray.get(task[0])

    @cached_property
    def _scorers(self) -> list[Scorer]:
        setup, job = self._task.score.setup, self._task.score.job
        torch.set_num_threads(setup.threads)
        maps = [name for group in self._task.groups for name in group]
        return indexed_scorers(job.directions, maps, self._device, job.memory, self._task.folder)

    @property
    def _device(self) -> torch.device:
        return torch.device(own_device())

    def do(self, block: Block) -> Counted:
        dtype = torch.promote_types(getattr(torch, self._task.score.setup.dtype), torch.float32)
        index = IndexBlock(self._task.folder, self._task.groups, block.id, dtype)
        index.device = self._device
        outcome = index.outcome
        task = self._task.score
        scores = index.score(self._scorers, task.maps if task.detail.modules else None)
        write_scores(task, block, outcome, scores)
        return Counted(len(outcome.tokens), sum(outcome.tokens.values()), len(outcome.skipped))


def indexed_scorers(
    queries: Sequence[Path], maps: Sequence[str], device: torch.device, memory: int | None, folder: Path
) -> list[Scorer]:
    """Scorers of the `queries` in these folders against the pseudo-tokens of the index in `folder`.

    Directions are rotated as they are read, a shard at a time, so that they take the `memory` that they take in exact
    scoring, beside one map's metric. Documents' norms are in the index.
    """
    metrics = functools.partial(load_metric, folder, device=device)
    return load_directions(queries, maps, device, memory, norms=False, metrics=metrics).scorers


@dataclass(frozen=True)
class IndexedScoreTask:
    """What `score` asks for, from the index in `folder`."""

    what: ClassVar[str] = "scores from the index"

    score: ScoreTask
    folder: Path
    groups: tuple[tuple[str, ...], ...]

    @property
    def blocks(self) -> CorpusBlocks:
        return self.score.blocks.as_a(NamedBlocks)

    @property
    def replica(self) -> type[IndexedReplica]:
        return IndexedReplica

    def done(self) -> set[str]:
        return self.score.done()


def indexed_task(score: ScoreTask, folder: Path) -> IndexedScoreTask:
    """The task from a finished index."""
    return IndexedScoreTask(score, folder, tuple(tuple(group) for group in read_manifest(folder)["groups"]))
