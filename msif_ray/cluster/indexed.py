"""Scores from an index: a block's stored pseudo-tokens in place of a pass over its documents."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, cast

import torch
from torch import Tensor

from msif_ray import layout
from msif_ray.cluster.index import load_metric
from msif_ray.cluster.jobs import WindowScores, load_scorer
from msif_ray.cluster.rank import Outcome
from msif_ray.cluster.replica import RankResources
from msif_ray.cluster.score import ScoreTask, write_scores
from msif_ray.cluster.stream import BlockReplica, Counted
from msif_ray.corpus.blocks import CorpusBlocks
from msif_ray.corpus.reader import Block
from msif_ray.corpus.windows import Skipped
from msif_ray.indexes import read_manifest, whole
from msif_ray.influence.capture import Captured
from msif_ray.influence.compress import Packed
from msif_ray.influence.scoring import LowRankDirections, Scorer
from msif_ray.tensorfile import TensorFile


class IndexBlock:
    """One block of an index. What `Scorer.score` reads of a captured batch it has too: `activations` and
    `gradients` of a map, pseudo-tokens in place of tokens, read from storage when asked for.

    Raises UserError, saying what to delete, for a file that is missing or damaged.
    """

    def __init__(self, folder: Path, groups: Sequence[Sequence[str]], block: str, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._files: dict[str, TensorFile] = {}
        self.device = torch.device("cpu")
        with whole(folder):
            opened = [TensorFile(layout.index_block(layout.index_group(folder, i), block)) for i in range(len(groups))]
            for file, maps in zip(opened, groups, strict=True):
                self._files |= dict.fromkeys(maps, file)
            first = opened[0]
            self.documents: list[str] = json.loads(first.metadata["documents"])
            self.skipped = [Skipped(*skip) for skip in json.loads(first.metadata["skipped"])]
            self.n_tokens: list[int] = first.tensor("n_tokens").tolist()
            self.squared_norms = torch.stack([file.tensor("squared_norms") for file in opened]).sum(0)
        self._folder = folder

    def packed(self, name: str) -> Packed:
        with whole(self._folder):
            read = (self._files[name].tensor(f"{key}/{name}") for key in ("activations", "gradients", "scales"))
            return Packed(*(tensor.to(self.device) for tensor in read))

    def activations(self, name: str) -> Tensor:
        """`[documents, k, columns]`."""
        return self.packed(name).unpack(self._dtype)[0]

    def gradients(self, name: str) -> Tensor:
        """`[documents, k, out]`."""
        return self.packed(name).unpack(self._dtype)[1]

    def score(self, scorer: Scorer) -> list[WindowScores]:
        """Every document's scores, with its exact squared norm."""
        if not self.documents:
            return []
        scores = scorer.score(cast(Captured, self))[0].cpu()
        found = zip(self.documents, scores, self.squared_norms.tolist(), strict=True)
        return [WindowScores(document, 0, row, square) for document, row, square in found]

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
    """Scores blocks of an index; it loads the queries' directions and no model."""

    def __init__(self, task: "IndexedScoreTask", resources: RankResources) -> None:
        setup = task.score.setup
        torch.set_num_threads(setup.threads)
        self._task = task
        self._device = torch.device("cuda" if setup.cuda else "cpu")
        self._dtype = torch.promote_types(getattr(torch, setup.dtype), torch.float32)
        maps = [name for group in task.groups for name in group]
        self._scorer = indexed_scorer(load_scorer(task.score.job.directions, maps, self._device), task.folder)

    def do(self, block: Block) -> Counted:
        index = IndexBlock(self._task.folder, self._task.groups, block.id, self._dtype)
        index.device = self._device
        outcome = index.outcome
        write_scores(self._task.score, block, outcome, index.score(self._scorer))
        return Counted(len(outcome.tokens), sum(outcome.tokens.values()), len(outcome.skipped))


def indexed_scorer(scorer: Scorer, folder: Path) -> Scorer:
    """A scorer of the same queries against the pseudo-tokens of an index; one map's metric in memory at a time."""
    rotated = {}
    for name, directions in scorer.directions.items():
        device = (directions.left if isinstance(directions, LowRankDirections) else directions.matrix).device
        rotated[name] = load_metric(folder, name, device).directions(directions)
    return Scorer(rotated)


@dataclass(frozen=True)
class IndexedScoreTask:
    """What `score` asks for, from the index in `folder`."""

    what: ClassVar[str] = "scores from the index"

    score: ScoreTask
    folder: Path
    groups: tuple[tuple[str, ...], ...]

    @property
    def blocks(self) -> CorpusBlocks:
        return NamedBlocks(**vars(self.score.blocks))

    @property
    def replica(self) -> type[IndexedReplica]:
        return IndexedReplica

    def done(self) -> set[str]:
        return self.score.done()


def indexed_task(score: ScoreTask, folder: Path) -> IndexedScoreTask:
    """The task from a finished index."""
    return IndexedScoreTask(score, folder, tuple(tuple(group) for group in read_manifest(folder)["groups"]))
