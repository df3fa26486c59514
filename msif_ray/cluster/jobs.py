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

import numpy
import torch
from torch import Tensor

from msif_ray import layout
from msif_ray.cluster.directions import LoadedDirections, load
from msif_ray.cluster.memory import free_memory
from msif_ray.errors import UserError
from msif_ray.influence.batch import Batch
from msif_ray.influence.capture import Capture, Captured
from msif_ray.influence.ekfac import Basis, CorrectionSums, CovarianceSums
from msif_ray.influence.groups import FREE_SHARE
from msif_ray.influence.queries import map_tokens
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


@runtime_checkable
class Products(Sums, Protocol):
    """Sums that take several passes of their own over each batch."""

    def pass_over(self, capture: Capture, batch: Batch) -> Tensor:
        """Adds a batch, unless a loss is not finite; gives its rows' losses, `[rows]`."""
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
        sums = self.sums.sums
        for name in [key.removeprefix("A/") for key in sums if key.startswith("A/")]:
            part = {side: sums[f"{side}/{name}"].cpu() for side in ("A", "S")}
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
        queries = [key.document_id for key in captured.batch.keys]
        for name in captured.maps:
            part = self.gathered.setdefault(name, {})
            for query, tokens in zip(queries, map_tokens(captured, name), strict=True):
                part[f"activations/{query}"] = tokens.activations.cpu().contiguous()
                part[f"gradients/{query}"] = tokens.gradients.cpu().contiguous()
        for query, loss in zip(queries, captured.losses.cpu(), strict=True):
            self.gathered.setdefault(LOG_LIKELIHOODS, {})[query] = -loss

    def parts(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """What has gathered, which is dropped: it is large, and nothing is added to it later."""
        while self.gathered:
            name = next(iter(self.gathered))
            yield name, self.gathered.pop(name)


@dataclass
class DocumentScores:
    """One document's scores `[queries]` (float64) and the squared norm of its gradient, both sums over windows.

    Where they were asked for: the scores by map, `[queries, maps]`, and by token, `[queries, tokens]` of each
    window (float32), from the document's token that it begins with.
    """

    document_id: str
    scores: Tensor
    squared_norm: float = 0.0
    by_map: Tensor | None = None
    by_token: list[tuple[int, numpy.ndarray]] = field(default_factory=list)


@dataclass(frozen=True)
class Shares:
    """What of a score is wanted beside it; `stride` is the number of tokens from one window's start to the next's."""

    tokens: bool
    stride: int


@dataclass(frozen=True)
class ScoreJob:
    """Scores against the queries of every folder of directions, one folder's after the other's.

    `memory`: bytes of a rank's for the directions; None: a share of what is free. `shares`: with the scores by map
    and perhaps by token.
    """

    directions: tuple[Path, ...]
    memory: int | None = None
    sampled_labels: bool = False
    tracked: tuple[str, ...] | None = None
    shares: Shares | None = None

    def start(self, maps: Sequence[str], device: torch.device) -> Work:
        loaded = load_directions(self.directions, maps, device, self.memory)
        return _ScoreWork(loaded) if self.shares is None else _DetailWork(loaded, shares=self.shares)


@dataclass
class _ScoreWork:
    """Sums over a document's windows as they come: of long documents there are many."""

    loaded: LoadedDirections
    documents: dict[str, DocumentScores] = field(default_factory=dict)

    def add(self, captured: Captured) -> None:
        scored = [scorer.score(captured) for scorer in self.loaded.scorers]
        self._count(captured, torch.cat([scores for scores, _ in scored], dim=1).cpu(), scored[0][1])

    def _count(self, captured: Captured, scores: Tensor, squared_norms: Tensor) -> list[DocumentScores]:
        """Adds a batch's scores `[rows, queries]` and norms `[rows]` to their documents; gives each row's."""
        found = []
        for key, row, square in zip(captured.batch.keys, scores, squared_norms.tolist(), strict=True):
            document = self.documents.get(key.document_id)
            if document is None:
                document = DocumentScores(key.document_id, torch.zeros_like(row))
                self.documents[key.document_id] = document
            document.scores += row
            document.squared_norm += square
            found.append(document)
        return found

    def take(self) -> list[DocumentScores]:
        taken, self.documents = list(self.documents.values()), {}
        return taken


@dataclass
class _DetailWork(_ScoreWork):
    """Scores with their shares by map and, where wanted, by token."""

    shares: Shares = field(kw_only=True)

    def add(self, captured: Captured) -> None:
        scored = [scorer.detailed(captured, self.shares.tokens) for scorer in self.loaded.scorers]
        documents = self._count(captured, torch.cat([each.scores for each in scored], dim=1).cpu(), scored[0].norms)
        for document, row in zip(documents, torch.cat([each.by_map for each in scored], dim=1).cpu(), strict=True):
            document.by_map = row.clone() if document.by_map is None else document.by_map + row
        by_token = [each.by_token for each in scored if each.by_token is not None]
        if not by_token:
            return
        rows = torch.cat(by_token, dim=1).float().cpu().numpy()
        lengths = captured.batch.attention_mask.sum(1).tolist()
        for document, key, tokens, length in zip(documents, captured.batch.keys, rows, lengths, strict=True):
            document.by_token.append((key.window * self.shares.stride, tokens[:, :length].copy()))


@dataclass(frozen=True)
class TokenJob:
    """Scores of chosen pairs by token and by map; `queries_of` names, for each document, positions in the query list.

    `stride` is the number of tokens from one window's start to the next's.
    """

    directions: tuple[Path, ...]
    queries_of: Mapping[str, tuple[int, ...]]
    stride: int
    memory: int | None = None
    sampled_labels: bool = False
    tracked: tuple[str, ...] | None = None

    def start(self, maps: Sequence[str], device: torch.device) -> Work:
        loaded = load_directions(self.directions, maps, device, self.memory)
        return _TokenWork(loaded, self.queries_of, self.stride)


@dataclass(frozen=True)
class WindowShares:
    """One window's score for one query by token, `[tokens]`, from the document's token `start` on, and by map,
    `[maps]`; both float64."""

    document_id: str
    start: int
    query: int
    by_token: numpy.ndarray
    by_map: numpy.ndarray


@dataclass
class _TokenWork:
    loaded: LoadedDirections
    queries_of: Mapping[str, tuple[int, ...]]
    stride: int
    windows: list[WindowShares] = field(default_factory=list)

    def add(self, captured: Captured) -> None:
        keys = captured.batch.keys
        lengths = captured.batch.attention_mask.sum(1).tolist()
        first = 0
        for scorer, queries in zip(self.loaded.scorers, self.loaded.queries, strict=True):
            pairs = [
                (row, query - first)
                for row, key in enumerate(keys)
                for query in self.queries_of[key.document_id]
                if first <= query < first + queries
            ]
            shares = [each.cpu().numpy() for each in scorer.pair_shares(captured, pairs)] if pairs else [(), ()]
            for (row, query), by_token, by_map in zip(pairs, *shares, strict=True):
                start = keys[row].window * self.stride
                own = by_token[: lengths[row]].copy()  # a view would keep the padding, and all other pairs
                self.windows.append(WindowShares(keys[row].document_id, start, first + query, own, by_map.copy()))
            first += queries

    def take(self) -> list[WindowShares]:
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


def load_directions(
    folders: Sequence[Path], maps: Sequence[str], device: torch.device, memory: int | None
) -> LoadedDirections:
    """The directions of several folders as one list of queries, within `memory` bytes, or a share of what is free."""
    budget = memory or int(FREE_SHARE * free_memory(device, torch.get_num_threads()))
    return load(folders, maps, device, budget)
