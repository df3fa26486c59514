"""The index task: a stage's corpus as compressed document gradients, one file per block (and group of maps).

Built like scores and resumed like them. A group of maps is a pass over the documents: their eigenbases fit in a
rank's memory together.
"""

import json
import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field, fields
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import BaseModel

from msif_ray import layout
from msif_ray.cluster.factors import bases_checksum
from msif_ray.cluster.fit import Steps
from msif_ray.cluster.index_metric import load_metric, write_metric
from msif_ray.cluster.jobs import Work
from msif_ray.cluster.outcomes import Outcome
from msif_ray.cluster.pool import ReplicaPool
from msif_ray.cluster.rank import ModelSetup
from msif_ray.cluster.room import own_device
from msif_ray.cluster.stream import stream
from msif_ray.cluster.tasks import for_each_map
from msif_ray.cluster.workers import ModelReplica
from msif_ray.corpus.blocks import CorpusBlocks
from msif_ray.corpus.reader import Block
from msif_ray.errors import UserError
from msif_ray.fetch import named
from msif_ray.indexes import missing_files, read_manifest, whole
from msif_ray.influence.capture import Captured
from msif_ray.influence.compress import Metric, Packed, compress, joined_rows, together, truncate_tokens
from msif_ray.influence.groups import accumulating_bytes, factor_bytes, module_groups
from msif_ray.influence.scoring import squared_norms
from msif_ray.ordered import in_order
from msif_ray.paths import all_there, exists, size_of
from msif_ray.store import AGAIN, delete_folder, read_json, save_tensors, write_json
from msif_ray.tensorfile import TensorFile

# What a map's metric takes while it is made, in copies of the map's factors: these, and the logarithms in float64.
METRIC_COPIES = 3


class _Grouping(BaseModel):
    groups: list[list[str]]
    bases: str = ""


@dataclass(frozen=True)
class Piece:
    """A document's windows in one batch: the first one's number, and the squared norms of all, summed."""

    document_id: str
    window: int
    squared_norm: float


@dataclass(frozen=True)
class IndexedBatch:
    """What one captured batch left: `pieces`, and by map their pseudo-tokens, a row for each."""

    pieces: list[Piece]
    packed: dict[str, Packed]

    def without(self, documents: Set[str]) -> "IndexedBatch":
        rows = [row for row, piece in enumerate(self.pieces) if piece.document_id not in documents]
        packed = {name: of_map.chosen(rows) for name, of_map in self.packed.items()}
        return IndexedBatch([self.pieces[row] for row in rows], packed)


@dataclass(frozen=True)
class IndexJob:
    """Compresses the document gradients of the tracked maps in the metrics of the folder of the index."""

    folder: Path
    rank: int
    dtype: torch.dtype
    tracked: tuple[str, ...] | None
    sampled_labels: bool = False

    @property
    def working_dtype(self) -> torch.dtype:
        """What pieces are kept in until a block is written, since they may yet be put together and truncated again."""
        return self.dtype if self.dtype.is_floating_point else torch.float16

    def start(self, maps: Sequence[str], device: torch.device) -> Work:
        return _IndexWork(self, {name: load_metric(self.folder, name, device) for name in maps})


@dataclass
class _IndexWork:
    job: IndexJob
    metrics: Mapping[str, Metric]
    batches: list[IndexedBatch] = field(default_factory=list)

    def add(self, captured: Captured) -> None:
        keys = captured.batch.keys
        groups = together([key.document_id for key in keys])
        norms = torch.zeros(len(keys), dtype=torch.float64, device=captured.losses.device)
        packed = {}
        for name, metric in self.metrics.items():
            activations, gradients = captured.activations(name), captured.gradients(name)
            squares = squared_norms(activations, gradients)
            norms += squares.double()
            # What overflows is refused by its norm when the block is written; a decomposition would raise here.
            finite = squares.isfinite()[:, None, None]
            activations, gradients = (torch.where(finite, each, 0.0) for each in (activations, gradients))
            parts = [
                compress(metric, joined_rows(activations, rows), joined_rows(gradients, rows), self.job.rank)
                for _, rows in groups
            ]
            packed[name] = Packed.join([Packed.of(*part, self.job.working_dtype) for part in parts]).to("cpu")
        squared = norms.tolist()
        pieces = [
            Piece(document, min(keys[row].window for row in rows), sum(squared[row] for row in rows))
            for documents, lists in groups
            for document, rows in zip(documents, lists, strict=True)
        ]
        self.batches.append(IndexedBatch(pieces, packed))

    def drop(self, documents: Set[str]) -> None:
        left = (batch.without(documents) for batch in self.batches)
        self.batches = [batch for batch in left if batch.pieces]

    def take(self) -> list[IndexedBatch]:
        taken, self.batches = self.batches, []
        return taken


@dataclass(frozen=True)
class IndexTask:
    """One pass: a stage's corpus over one group of maps, its files in `folder`."""

    what: ClassVar[str] = "index"

    setup: ModelSetup
    job: IndexJob
    blocks: CorpusBlocks
    folder: Path

    @property
    def replica(self) -> type[ModelReplica]:
        return ModelReplica

    def done(self) -> set[str]:
        return layout.block_names(self.folder, ".safetensors")

    def write(self, block: Block, outcome: Outcome, taken: Sequence[IndexedBatch]) -> None:
        """Raises UserError, naming the document, for a gradient that is not finite."""
        pieces = [piece for batch in taken for piece in batch.pieces]
        fault = next((piece for piece in pieces if not math.isfinite(piece.squared_norm)), None)
        if fault is not None:
            raise UserError(f"{named(self.setup.model)}: a gradient is not finite, of document {fault.document_id!r}")
        documents = {document: row for row, document in enumerate(outcome.tokens)}
        # In the same order wherever the batches were computed.
        order = sorted(range(len(pieces)), key=lambda i: (documents[pieces[i].document_id], pieces[i].window))
        norms = torch.zeros(len(documents), dtype=torch.float64)
        for i in order:
            norms[documents[pieces[i].document_id]] += pieces[i].squared_norm
        tensors = {"squared_norms": norms, "n_tokens": torch.tensor(list(outcome.tokens.values()), dtype=torch.int32)}
        owners = [pieces[i].document_id for i in order]
        for name in taken[0].packed if taken else ():
            found = Packed.join([batch.packed[name] for batch in taken]).chosen(order)
            whole = self._documents(found, owners, documents)
            tensors |= {f"{each.name}/{name}": getattr(whole, each.name) for each in fields(whole)}
        skipped = [(skip.document_id, skip.reason) for skip in outcome.skipped]
        about = {
            "block": block.id,
            "index": self.folder.parent.name,
            "documents": json.dumps(list(documents)),
            "skipped": json.dumps(skipped),
        }
        save_tensors(layout.index_block(self.folder, block.id), tensors, about)

    def _documents(self, found: Packed, owners: Sequence[str], documents: Mapping[str, int]) -> Packed:
        """A row for each document, of its pieces: put together, truncated and rounded."""
        device = own_device()  # a sharded replica's own process has no GPU
        activations, gradients = found.to(device).unpack(found.scales.dtype)
        parts, names = [], []
        for group, lists in together(owners):
            tokens = joined_rows(activations, lists), joined_rows(gradients, lists)
            if tokens[0].shape[1] > self.job.rank:
                tokens = truncate_tokens(*tokens, self.job.rank)
            parts.append(Packed.of(*tokens, self.job.dtype).to("cpu"))
            names += group
        return Packed.join(parts).chosen(sorted(range(len(names)), key=lambda row: documents[names[row]]))


@dataclass(frozen=True)
class IndexPlan:
    """An index to be built in `folder` from the stage's `factors`. `memory`: bytes for a pass's factors, or None."""

    setup: ModelSetup
    blocks: CorpusBlocks
    folder: Path
    factors: Path
    maps: dict[str, tuple[int, int]]
    damping: dict[str, float]
    rank: int
    dtype: str
    memory: int | None
    record: dict[str, Any]


def build(plan: IndexPlan, pool: ReplicaPool, steps: Steps) -> None:
    """Builds what is left of an index; its manifest, written last, says that it is finished."""
    if exists(layout.index_manifest(plan.folder)) and not missing_files(plan.folder, plan.blocks):
        return
    _drop_of_other_bases(plan)
    groups = _groups(plan)
    missing = [name for name in plan.maps if not exists(layout.metric_file(plan.folder, name))]
    itemsize = accumulating_bytes(plan.setup.dtype)
    memory = {name: METRIC_COPIES * factor_bytes(plan.maps[name], itemsize) for name in missing}
    for_each_map(write_metric, missing, plan.folder, plan.factors, plan.damping, memory=memory, replicas=pool.idle())
    for number, maps in enumerate(groups):
        folder = layout.index_group(plan.folder, number)
        job = IndexJob(plan.folder, plan.rank, getattr(torch, plan.dtype), tuple(maps))
        of_group = f", group {number + 1} of {len(groups)}" if len(groups) > 1 else ""
        with steps(f"index{of_group}") as progress:
            stream(IndexTask(plan.setup, job, plan.blocks, folder), pool, progress)
    write_json(
        layout.index_manifest(plan.folder),
        plan.record
        | {
            "rank": plan.rank,
            "dtype": plan.dtype,
            "computed_in": plan.setup.dtype,
            "metric": "separable (Λ + damping)^(-1/2) in the stage's eigenbasis",
            "damping": plan.damping,
            "maps": {name: list(shape) for name, shape in plan.maps.items()},
            "groups": groups,
            "bases": read_json(layout.groups(plan.folder)).get("bases", ""),
            "documents_per_block": plan.blocks.size,
        }
        | _totals(plan, len(groups)),
    )


def _drop_of_other_bases(plan: IndexPlan) -> None:
    """Blocks are in the coordinates of the bases that the metrics were made of. Where a metric is lost and the factors
    have been fitted anew since, no other is that one, and the blocks go with it."""
    path, manifest = layout.groups(plan.folder), layout.index_manifest(plan.folder)
    if all_there(layout.metric_file(plan.folder, name) for name in plan.maps):
        return
    if exists(path):
        begun_with = read_json(path, shape=_Grouping).get("bases", "")  # an earlier version's may not say
    elif exists(manifest):
        begun_with = read_manifest(plan.folder).get("bases", "not said, and may be any")
    else:
        return  # all of it goes
    if begun_with not in ("", bases_checksum(plan.factors, list(plan.maps))):
        delete_folder(plan.folder, first=manifest.name)


def _groups(plan: IndexPlan) -> list[list[str]]:
    """The maps of each pass, as they were first decided: by the plan's memory, or else as the factors were fitted."""
    path, manifest = layout.groups(plan.folder), layout.index_manifest(plan.folder)
    if not exists(path) and exists(manifest):
        about = read_manifest(plan.folder)
        write_json(path, {key: about[key] for key in ("groups", "bases") if key in about})
    elif not exists(path):
        groups = _decided(plan)
        write_json(path, {"groups": groups, "bases": bases_checksum(plan.factors, list(plan.maps))})
    return _read_groups(path, plan)


def _read_groups(path: Path, plan: IndexPlan) -> list[list[str]]:
    """Raises UserError for groups that are damaged, or not of the plan's maps."""
    found: list[list[str]] = read_json(path, shape=_Grouping)["groups"]
    if sorted(chain.from_iterable(found)) != sorted(plan.maps):
        raise UserError(f"{path}: its groups are not of this run's maps, each once; {AGAIN}")
    return found


def _decided(plan: IndexPlan) -> list[list[str]]:
    """The groups of an index that does not say which it has: blocks that are there may be of other maps, and go."""
    delete_folder(plan.folder)
    fitted = layout.groups(plan.factors)
    if plan.memory is None and exists(fitted):
        return _read_groups(fitted, plan)
    itemsize = 8 if plan.setup.dtype == "float64" else 4
    return [list(group) for group in module_groups(plan.maps, plan.memory, itemsize)]


def _totals(plan: IndexPlan, groups: int) -> dict[str, int]:
    """Documents, their tokens, and bytes of all blocks."""
    group, totals = layout.index_group(plan.folder, 0), dict.fromkeys(("documents", "tokens"), 0)

    def lengths(block: str) -> torch.Tensor:
        with whole(plan.folder):
            return TensorFile(layout.index_block(group, block)).tensor("n_tokens")

    for n_tokens in in_order(lengths, plan.blocks.ids):
        totals["documents"] += len(n_tokens)
        totals["tokens"] += int(n_tokens.sum())
    size = sum(size_of(layout.index_group(plan.folder, group)) for group in range(groups))
    return totals | {"bytes": size}
