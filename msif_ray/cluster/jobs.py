"""What a rank does with each captured batch: one small class per step of the run.

A job is data that travels to the rank; `start` turns it into work that takes captured batches and
gives back what has gathered.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from msif_ray import layout
from msif_ray.influence.capture import Captured
from msif_ray.influence.ekfac import Basis, CorrectionSums, CovarianceSums
from msif_ray.influence.queries import query_tokens
from msif_ray.influence.scoring import DenseDirections, Directions, LowRankDirections, Scorer, join
from msif_ray.store import load_tensors


class Work(Protocol):
    """Takes captured batches; `take` gives what has gathered since the last `take`, on the CPU."""

    def add(self, captured: Captured) -> None: ...

    def take(self) -> Any: ...


class Job(Protocol):
    """A description of work, sent to ranks."""

    @property
    def sampled_labels(self) -> bool: ...

    def start(self, maps: Sequence[str], device: torch.device) -> Work: ...


@dataclass(frozen=True)
class PartialSums:
    """Raw sums by name, and what was counted into each (positions; nothing for corrections)."""

    sums: Mapping[str, Tensor]
    counts: Mapping[str, int]

    def __add__(self, other: "PartialSums") -> "PartialSums":
        return PartialSums(_add(self.sums, other.sums), _add(self.counts, other.counts))


def _add(left: Mapping[str, Any], right: Mapping[str, Any]) -> dict[str, Any]:
    total = dict(left)
    for name, value in right.items():
        total[name] = total[name] + value if name in total else value
    return total


@dataclass(frozen=True)
class CovarianceJob:
    sampled_labels: bool

    def start(self, maps: Sequence[str], device: torch.device) -> Work:
        return _SumsWork(CovarianceSums())


@dataclass(frozen=True)
class CorrectionJob:
    sampled_labels: bool
    factors: Path

    def start(self, maps: Sequence[str], device: torch.device) -> Work:
        bases = {name: load_basis(self.factors, name, device) for name in maps}
        return _SumsWork(CorrectionSums(bases))


@dataclass
class _SumsWork:
    sums: CovarianceSums | CorrectionSums

    def add(self, captured: Captured) -> None:
        self.sums.add(captured)

    def take(self) -> PartialSums:
        taken = PartialSums(
            {name: tensor.cpu() for name, tensor in self.sums.sums.items()},
            dict(self.sums.counts) if isinstance(self.sums, CovarianceSums) else {},
        )
        self.sums.sums.clear()
        if isinstance(self.sums, CovarianceSums):
            self.sums.counts.clear()
        return taken


@dataclass(frozen=True)
class QueryJob:
    """Every query's gradient as its tokens, and its completion's log-likelihood in nats."""

    sampled_labels: bool = False

    def start(self, maps: Sequence[str], device: torch.device) -> Work:
        return _QueryWork()


def query_keys(map_name: str, query: str) -> tuple[str, str]:
    """The names of one query's activations `[tokens, columns]` and output gradients `[tokens, out]` at a map."""
    return f"activations/{map_name}/{query}", f"gradients/{map_name}/{query}"


def log_likelihood_key(query: str) -> str:
    return f"log_likelihood/{query}"


@dataclass
class _QueryWork:
    gathered: dict[str, Tensor] = field(default_factory=dict)

    def add(self, captured: Captured) -> None:
        for row, key in enumerate(captured.batch.keys):
            for name, tokens in query_tokens(captured, row).items():
                activations, gradients = query_keys(name, key.document_id)
                self.gathered[activations] = tokens.activations.cpu().contiguous()
                self.gathered[gradients] = tokens.gradients.cpu().contiguous()
            self.gathered[log_likelihood_key(key.document_id)] = -captured.losses[row].cpu()

    def take(self) -> PartialSums:
        taken, self.gathered = self.gathered, {}
        return PartialSums(taken, {})


@dataclass(frozen=True)
class WindowScores:
    """One window's scores `[queries]` (float64) and the squared norm of its gradient."""

    document_id: str
    window: int
    scores: Tensor
    squared_norm: float


@dataclass(frozen=True)
class ScoreJob:
    """Scores against the queries of every folder of directions, one folder's after the other's."""

    directions: tuple[Path, ...]
    sampled_labels: bool = False

    def start(self, maps: Sequence[str], device: torch.device) -> Work:
        return _ScoreWork(load_scorer(self.directions, maps, device))


@dataclass
class _ScoreWork:
    scorer: Scorer
    windows: list[WindowScores] = field(default_factory=list)

    def add(self, captured: Captured) -> None:
        scores, norms = (tensor.cpu() for tensor in self.scorer.score(captured))
        for row, key in enumerate(captured.batch.keys):
            self.windows.append(WindowScores(key.document_id, key.window, scores[row], float(norms[row])))

    def take(self) -> list[WindowScores]:
        taken, self.windows = self.windows, []
        return taken


@dataclass(frozen=True)
class TokenJob:
    """Per-token scores of chosen pairs; `queries_of` names, for each document, positions in the query list.

    `stride` is the number of tokens from one window's start to the next's.
    """

    directions: tuple[Path, ...]
    queries_of: Mapping[str, tuple[int, ...]]
    stride: int
    sampled_labels: bool = False

    def start(self, maps: Sequence[str], device: torch.device) -> Work:
        return _TokenWork(load_scorer(self.directions, maps, device), self.queries_of, self.stride)


@dataclass(frozen=True)
class WindowTokenScores:
    """One window's scores by token for one query, `[tokens]`, from the document's token `start` on."""

    document_id: str
    start: int
    query: int
    scores: list[float]


@dataclass
class _TokenWork:
    scorer: Scorer
    queries_of: Mapping[str, tuple[int, ...]]
    stride: int
    windows: list[WindowTokenScores] = field(default_factory=list)

    def add(self, captured: Captured) -> None:
        keys = captured.batch.keys
        for query in sorted({query for key in keys for query in self.queries_of[key.document_id]}):
            scores = self.scorer.token_scores(captured, query).cpu()
            for row, key in enumerate(keys):
                if query in self.queries_of[key.document_id]:
                    length = int(captured.batch.attention_mask[row].sum())
                    by_token = scores[row, :length].tolist()
                    self.windows.append(WindowTokenScores(key.document_id, key.window * self.stride, query, by_token))

    def take(self) -> list[WindowTokenScores]:
        taken, self.windows = self.windows, []
        return taken


def load_basis(factors: Path, map_name: str, device: torch.device) -> Basis:
    tensors = load_tensors(layout.basis_file(factors, map_name))
    return Basis(tensors["activation_basis"].to(device), tensors["gradient_basis"].to(device))


def load_scorer(folders: Sequence[Path], maps: Sequence[str], device: torch.device) -> Scorer:
    """The directions of several folders as one list of queries, folder after folder."""
    return Scorer({name: join([_load_directions(folder, name, device) for folder in folders]) for name in maps})


def _load_directions(folder: Path, map_name: str, device: torch.device) -> Directions:
    tensors = load_tensors(layout.direction_file(folder, map_name))
    if "matrix" in tensors:
        return DenseDirections(tensors["matrix"].to(device))
    return LowRankDirections(tensors["left"].to(device), tensors["right"].to(device))
