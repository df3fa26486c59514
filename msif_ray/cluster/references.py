"""What a reference model makes of a stage's preferences: a pass beforehand, one file per block.

It is no function of the stage's own weights, so it is computed once, for all passes over the same pairs, and no rank
holds two models. Built like scores and resumed like them.
"""

from collections.abc import Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch

from msif_ray import layout
from msif_ray.cluster.jobs import Work
from msif_ray.cluster.outcomes import Outcome
from msif_ray.cluster.rank import ModelSetup
from msif_ray.cluster.workers import ModelReplica
from msif_ray.corpus.blocks import LOG_RATIOS, CorpusBlocks, references_said
from msif_ray.corpus.preferences import Pairs
from msif_ray.corpus.reader import Block
from msif_ray.influence.capture import Captured
from msif_ray.store import write_json

Loss = tuple[str, int, float]
"""A document, the number of its sequence (0: chosen), and that sequence's −log π_ref in nats, or nats per target."""


@dataclass(frozen=True)
class ReferenceJob:
    """The losses of both sequences of every pair, or with `length_normalised` those divided by their targets. No map is
    tracked, so there is no backward pass."""

    length_normalised: bool = False
    sampled_labels: bool = False
    tracked: tuple[str, ...] | None = ()

    def start(self, maps: Sequence[str], device: torch.device) -> Work:
        return _ReferenceWork(self.length_normalised)


@dataclass
class _ReferenceWork:
    length_normalised: bool
    losses: list[Loss] = field(default_factory=list)

    def add(self, captured: Captured) -> None:
        losses = captured.losses
        if self.length_normalised:
            losses = losses / captured.batch.targets.sum(dim=1)
        for key, loss in zip(captured.batch.keys, losses.tolist(), strict=True):
            self.losses.append((key.document_id, key.window, loss))

    def drop(self, documents: Set[str]) -> None:
        self.losses = [loss for loss in self.losses if loss[0] not in documents]

    def take(self) -> list[Loss]:
        taken, self.losses = self.losses, []
        return taken


@dataclass(frozen=True)
class ReferenceTask:
    """One corpus of pairs, its files in `folder`: of all blocks, or of those `wanted`."""

    what: ClassVar[str] = "reference"

    setup: ModelSetup
    blocks: CorpusBlocks
    folder: Path
    wanted: frozenset[str] | None = None

    @property
    def job(self) -> ReferenceJob:
        pairs = self.setup.objective
        return ReferenceJob(isinstance(pairs, Pairs) and pairs.length_normalised)

    @property
    def replica(self) -> type[ModelReplica]:
        return ModelReplica

    def done(self) -> set[str]:
        written = layout.block_names(self.folder, ".json")
        return written if self.wanted is None else written | (self.blocks.ids - self.wanted)

    def write(self, block: Block, outcome: Outcome, taken: Sequence[Loss]) -> None:
        """log π_ref(chosen) − log π_ref(rejected) of every pair of which both are finite, as `job` has them."""
        ratios = dict.fromkeys(outcome.tokens, 0.0)
        for document, sequence, loss in taken:
            ratios[document] += loss if sequence else -loss
        write_json(
            layout.reference_block(self.folder, block.id), {LOG_RATIOS: ratios} | references_said(self.folder, block.id)
        )
