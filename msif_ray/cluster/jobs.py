"""What a rank does with each captured batch: one small class per step of the run.

A job is data that travels to the rank; `start` turns it into work that takes captured batches and
gives back what has gathered.
"""

from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from msif_ray.cluster.factors import check_bases, load_basis
from msif_ray.influence.batch import Batch
from msif_ray.influence.capture import Capture, Captured
from msif_ray.influence.ekfac import CorrectionSums, CovarianceSums
from msif_ray.influence.queries import OTHER, map_tokens, sign


@runtime_checkable
class Work(Protocol):
    """Takes captured batches; `take` gives what has gathered since the last `take`, on the CPU."""

    def add(self, captured: Captured) -> None: ...

    def drop(self, documents: Set[str]) -> None:
        """Forgets what has gathered of these documents."""
        ...

    def take(self) -> Any: ...


@runtime_checkable
class Parts(Protocol):
    """Takes captured batches and keeps what is written, not taken: other ranks' parts are added to it."""

    def add(self, captured: Captured) -> None: ...

    def parts(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """What there is so far by name of part (a map, or a heading of its own), one part on the CPU at a time."""
        ...


@runtime_checkable
class Sums(Parts, Protocol):
    """Keeps raw sums over batches, in which no document is told from another."""

    def negate(self) -> None:
        """Changes the sign of all sums: batches that are added until the next call are taken off."""
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

    def start(self, maps: Sequence[str], device: torch.device) -> Work | Parts: ...


@dataclass(frozen=True)
class FitJob:
    """A pass of a fit over a group of maps. Those of one group see the same, and a rank keeps what it captures for the
    next, up to `memory` bytes (None: a share of what is free)."""

    sampled_labels: bool
    tracked: tuple[str, ...] | None = None
    memory: int | None = None


@dataclass(frozen=True)
class CovarianceJob(FitJob):
    """Σ a aᵀ and Σ g gᵀ of a group of maps."""

    def start(self, maps: Sequence[str], device: torch.device) -> Sums:
        return _CovarianceWork(CovarianceSums())


@dataclass
class _CovarianceWork:
    sums: CovarianceSums

    def add(self, captured: Captured) -> None:
        self.sums.add(captured)

    def negate(self) -> None:
        self.sums.negate()

    def parts(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        sums = self.sums.sums
        for name in [key.removeprefix("A/") for key in sums if key.startswith("A/")]:
            part = {side: sums[f"{side}/{name}"].cpu() for side in ("A", "S")}
            counts = {f"{side}_positions": torch.tensor(self.sums.counts[f"{side}/{name}"]) for side in ("A", "S")}
            yield name, part | counts


@dataclass(frozen=True, kw_only=True)
class CorrectionJob(FitJob):
    """Σ of squared rotated gradients of a group of maps, whose bases are in the folder of factors.

    `bases` is those bases' `bases_checksum`: sums over others would not add up to anything.
    """

    factors: Path
    bases: str

    def start(self, maps: Sequence[str], device: torch.device) -> Sums:
        found = {name: load_basis(self.factors, name, device) for name in maps}
        check_bases(self.factors, maps, self.bases)
        return _CorrectionWork(CorrectionSums(found))


@dataclass
class _CorrectionWork:
    sums: CorrectionSums

    def add(self, captured: Captured) -> None:
        self.sums.add(captured)

    def negate(self) -> None:
        self.sums.negate()

    def parts(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        for key, total in self.sums.sums.items():
            yield key.removeprefix("E/"), {"E": total.cpu()}


LOG_LIKELIHOODS = "log_likelihoods"


def query_parts(query: str, window: int) -> tuple[str, str]:
    """What a query's window is called in a map's part: its activations and its gradients."""
    other = "other_" if window == OTHER else ""
    return f"{other}activations/{query}", f"{other}gradients/{query}"


@dataclass(frozen=True)
class QueryJob:
    """Every query's gradient as its tokens, and its completion's log-likelihood in nats, or the difference of two.

    A map's part holds `activations/<query>` `[tokens, columns]` and `gradients/<query>` `[tokens, out]`, and of a query
    about two completions `other_activations/<query>` and `other_gradients/<query>`, the latter taken off already; the
    part `log_likelihoods` one number per query. Ranks that hold one model together may have one completion each.
    """

    sampled_labels: bool = False
    tracked: tuple[str, ...] | None = None

    def start(self, maps: Sequence[str], device: torch.device) -> Parts:
        return _QueryWork()


@dataclass
class _QueryWork:
    """A query that is skipped ends the run, so what is here of one is never read."""

    gathered: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def add(self, captured: Captured) -> None:
        keys = captured.batch.keys
        for name in captured.maps:
            part = self.gathered.setdefault(name, {})
            for key, tokens in zip(keys, map_tokens(captured, name), strict=True):
                activations, gradients = query_parts(key.document_id, key.window)
                part[activations] = tokens.activations.cpu().contiguous()
                part[gradients] = (sign(key) * tokens.gradients).cpu().contiguous()
        for key, loss in zip(keys, captured.losses.cpu(), strict=True):
            found = self.gathered.setdefault(LOG_LIKELIHOODS, {})
            found[key.document_id] = found.get(key.document_id, 0.0) - sign(key) * loss

    def parts(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """What has gathered, which is dropped: it is large, and nothing is added to it later."""
        while self.gathered:
            name = next(iter(self.gathered))
            yield name, self.gathered.pop(name)
