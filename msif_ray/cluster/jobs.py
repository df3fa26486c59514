"""What a rank does with each captured batch: one small class per step of the run.

A job is data that travels to the rank; `start` turns it into work that takes captured batches and
gives back what has gathered.
"""

import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from msif_ray import layout
from msif_ray.errors import UserError
from msif_ray.influence.capture import Captured
from msif_ray.influence.ekfac import Basis, CorrectionSums, CovarianceSums
from msif_ray.influence.queries import query_tokens
from msif_ray.influence.scoring import DenseDirections, Directions, LowRankDirections, Scorer, join
from msif_ray.store import checksums, load_tensors


class Work(Protocol):
    """Takes captured batches; `take` gives what has gathered since the last `take`, on the CPU."""

    def add(self, captured: Captured) -> None: ...

    def take(self) -> Any: ...


@runtime_checkable
class Sums(Protocol):
    """Takes captured batches and keeps raw sums of them, which other ranks' sums are added to."""

    def add(self, captured: Captured) -> None: ...

    def parts(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """The sums so far by name of part (a map, or a heading of its own), one part on the CPU at a time."""
        ...


class Job(Protocol):
    """A description of work, sent to ranks. `tracked` names the maps it needs; None: all."""

    @property
    def sampled_labels(self) -> bool: ...

    @property
    def tracked(self) -> tuple[str, ...] | None: ...

    def start(self, maps: Sequence[str], device: torch.device) -> Work | Sums: ...


@dataclass(frozen=True)
class CovarianceJob:
    """Σ a aᵀ and Σ g gᵀ of a group of maps."""

    sampled_labels: bool
    tracked: tuple[str, ...] | None = None

    def start(self, maps: Sequence[str], device: torch.device) -> Sums:
        return _CovarianceWork(CovarianceSums())


@dataclass
class _CovarianceWork:
    sums: CovarianceSums

    def add(self, captured: Captured) -> None:
        self.sums.add(captured)

    def parts(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        for name in [key.removeprefix("A/") for key in self.sums.sums if key.startswith("A/")]:
            part = {side: self.sums.sums[f"{side}/{name}"].cpu() for side in ("A", "S")}
            counts = {f"{side}_positions": torch.tensor(self.sums.counts[f"{side}/{name}"]) for side in ("A", "S")}
            yield name, part | counts


@dataclass(frozen=True)
class CorrectionJob:
    """Σ of squared rotated gradients of a group of maps, whose bases are in the folder of factors.

    `bases` is those bases' `bases_checksum`: sums over others would not add up to anything.
    """

    sampled_labels: bool
    factors: Path
    bases: str
    tracked: tuple[str, ...] | None = None

    def start(self, maps: Sequence[str], device: torch.device) -> Sums:
        found = {name: load_basis(self.factors, name, device) for name in maps}
        check_bases(self.factors, maps, self.bases)
        return _CorrectionWork(CorrectionSums(found))


@dataclass
class _CorrectionWork:
    sums: CorrectionSums

    def add(self, captured: Captured) -> None:
        self.sums.add(captured)

    def parts(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        for key, total in self.sums.sums.items():
            yield key.removeprefix("E/"), {"E": total.cpu()}


LOG_LIKELIHOODS = "log_likelihoods"


@dataclass(frozen=True)
class QueryJob:
    """Every query's gradient as its tokens, and its completion's log-likelihood in nats.

    A map's part holds `activations/<query>` `[tokens, columns]` and `gradients/<query>` `[tokens, out]`;
    the part `log_likelihoods` one number per query.
    """

    sampled_labels: bool = False
    tracked: tuple[str, ...] | None = None

    def start(self, maps: Sequence[str], device: torch.device) -> Sums:
        return _QueryWork()


@dataclass
class _QueryWork:
    gathered: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def add(self, captured: Captured) -> None:
        for row, key in enumerate(captured.batch.keys):
            query = key.document_id
            for name, tokens in query_tokens(captured, row).items():
                part = self.gathered.setdefault(name, {})
                part[f"activations/{query}"] = tokens.activations.cpu().contiguous()
                part[f"gradients/{query}"] = tokens.gradients.cpu().contiguous()
            self.gathered.setdefault(LOG_LIKELIHOODS, {})[query] = -captured.losses[row].cpu()

    def parts(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        yield from self.gathered.items()


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
    tracked: tuple[str, ...] | None = None

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
    tracked: tuple[str, ...] | None = None

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


def bases_checksum(factors: Path, maps: Sequence[str]) -> str:
    """One checksum of the bases of these maps, as they are on storage."""
    sums = {name: checksums(layout.basis_file(factors, name)) for name in maps}
    return f"{zlib.crc32(json.dumps(sums, sort_keys=True).encode()):08x}"


def check_bases(factors: Path, maps: Sequence[str], expected: str) -> None:
    """Raises UserError where the bases are no longer those that a step began with."""
    if bases_checksum(factors, maps) != expected:
        raise UserError(
            f"{layout.basis_file(factors, maps[0]).parent}: the bases were replaced while they were in use; see that "
            "no other run writes there, and run the same command again"
        )


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
