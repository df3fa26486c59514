"""Scoring, as jobs of a rank: documents against all queries, with or without shares, and shares of chosen pairs."""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path

import numpy
import torch
from torch import Tensor

from msif_ray.cluster.curvature import Curvature
from msif_ray.cluster.directions import LoadedDirections, Metrics, load, stored_bytes
from msif_ray.cluster.jobs import Work
from msif_ray.cluster.memory import free_memory
from msif_ray.influence.capture import Captured
from msif_ray.influence.curvature import CurvatureMetric, curvature_squares
from msif_ray.influence.groups import FREE_SHARE


@dataclass
class DocumentScores:
    """One document's scores `[queries]` (float64) and the squared norm of its gradient (NaN: not computed), both sums
    over windows.

    Where they were asked for: the squared norm in the inverse curvature, likewise; the scores by map,
    `[queries, maps]`, and by token, `[queries, tokens]` of each window (float32), from the document's token that it
    begins with.
    """

    document_id: str
    scores: Tensor
    squared_norm: float = 0.0
    by_map: Tensor | None = None
    by_token: list[tuple[int, numpy.ndarray]] = field(default_factory=list)
    squared_curvature_norm: float = 0.0


@dataclass(frozen=True)
class Shares:
    """What of a score is wanted beside it; `stride` is the number of tokens from one window's start to the next's."""

    tokens: bool
    stride: int


@dataclass(frozen=True)
class ScoreJob:
    """Scores against the queries of every folder of directions, one folder's after the other's.

    `memory`: bytes of a rank's for the directions; None: a share of what is free. `shares`: with the scores by map
    and perhaps by token. `norms`: with those of gradients; `curvature`: with those in that stage's inverse curvature.
    """

    directions: tuple[Path, ...]
    memory: int | None = None
    sampled_labels: bool = False
    tracked: tuple[str, ...] | None = None
    shares: Shares | None = None
    norms: bool = True
    curvature: Curvature | None = None

    def start(self, maps: Sequence[str], device: torch.device) -> Work:
        # First, since the default for directions is a share of what is free then.
        metrics = None if self.curvature is None else self.curvature.load(device, self._left_for_factors(maps, device))
        loaded = load_directions(self.directions, maps, device, self.memory, self.norms)
        if self.shares is None:
            return _ScoreWork(loaded, metrics)
        return _DetailWork(loaded, metrics, shares=self.shares)

    def _left_for_factors(self, maps: Sequence[str], device: torch.device) -> int:
        """The default's bytes for factors: what directions leave of the memory for both, half of it at least."""
        needed = stored_bytes(self.directions, maps)
        return left_beside(needed if self.memory is None else min(needed, self.memory), _share_of_free(device))


@dataclass
class _ScoreWork:
    """Sums over a document's windows as they come: of long documents there are many."""

    loaded: LoadedDirections
    metrics: Mapping[str, CurvatureMetric] | None = None
    documents: dict[str, DocumentScores] = field(default_factory=dict)

    def add(self, captured: Captured) -> None:
        scored = [scorer.score(captured) for scorer in self.loaded.scorers]
        self._count(captured, torch.cat([scores for scores, _ in scored], dim=1).cpu(), scored[0][1])

    def _count(self, captured: Captured, scores: Tensor, squared_norms: Tensor) -> list[DocumentScores]:
        """Adds a batch's scores `[rows, queries]` and norms `[rows]` to their documents; gives each row's."""
        found = []
        in_curvature = torch.zeros_like(squared_norms)
        if self.metrics is not None:
            in_curvature = curvature_squares(self.metrics, captured)
        columns = (scores, squared_norms.tolist(), in_curvature.tolist())
        for key, row, square, curvature in zip(captured.batch.keys, *columns, strict=True):
            document = self.documents.get(key.document_id)
            if document is None:
                document = DocumentScores(key.document_id, torch.zeros_like(row))
                self.documents[key.document_id] = document
            document.scores += row
            document.squared_norm += square
            document.squared_curvature_norm += curvature
            found.append(document)
        return found

    def drop(self, documents: Set[str]) -> None:
        for document in documents:
            self.documents.pop(document, None)

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
        attended = captured.batch.attention_mask.cpu().numpy()  # padding may be between two sequences, too
        for document, key, tokens, own in zip(documents, captured.batch.keys, rows, attended, strict=True):
            document.by_token.append((key.window * self.shares.stride, tokens[:, own]))


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
        attended = captured.batch.attention_mask.cpu().numpy()
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
                own = by_token[attended[row]]  # a copy: a view would keep the padding, and all other pairs
                self.windows.append(WindowShares(keys[row].document_id, start, first + query, own, by_map.copy()))
            first += queries

    def drop(self, documents: Set[str]) -> None:
        self.windows = [window for window in self.windows if window.document_id not in documents]

    def take(self) -> list[WindowShares]:
        taken, self.windows = self.windows, []
        return taken


def load_directions(
    folders: Sequence[Path],
    maps: Sequence[str],
    device: torch.device,
    memory: int | None,
    norms: bool = True,
    metrics: Metrics | None = None,
) -> LoadedDirections:
    """As `directions.load`, within `memory` bytes, or a share of what is free."""
    return load(folders, maps, device, memory or _share_of_free(device), norms, metrics)


def left_beside(directions: int, both: int) -> int:
    """What so many bytes of directions leave for factors of the bytes for both: half of these at least."""
    return both - min(directions, both // 2)


def _share_of_free(device: torch.device) -> int:
    return int(FREE_SHARE * free_memory(device, torch.get_num_threads()))
