"""Partial sums on storage: each file states which blocks it covers, and is whole or absent."""

import json
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from msif_ray.cluster.jobs import PartialSums
from msif_ray.cluster.rank import Outcome
from msif_ray.errors import UserError
from msif_ray.store import load_metadata, save_tensors


@dataclass(frozen=True)
class Partial:
    """One file of partial sums: the blocks it covers, positions counted by sum, documents, tokens and skips."""

    path: Path
    blocks: frozenset[str]
    counts: dict[str, int]
    documents: int
    tokens: int
    windows: int
    skipped: tuple[tuple[str, str], ...]


def write(folder: Path, partial: PartialSums, outcomes: Sequence[tuple[str, Outcome]]) -> None:
    """Writes the sums of the named blocks atomically."""
    skipped = [(skip.document_id, skip.reason) for _, outcome in outcomes for skip in outcome.skipped]
    about = {
        "blocks": [block for block, _ in outcomes],
        "counts": dict(partial.counts),
        "documents": sum(len(outcome.tokens) for _, outcome in outcomes),
        "tokens": sum(sum(outcome.tokens.values()) for _, outcome in outcomes),
        "windows": sum(outcome.windows for _, outcome in outcomes),
        "skipped": skipped,
    }
    path = folder / f"{outcomes[0][0]}-{uuid.uuid4().hex[:8]}.safetensors"
    save_tensors(path, dict(partial.sums), {"about": json.dumps(about)})


def read_disjoint(folder: Path) -> list[Partial]:
    """The partials to be summed: those in the folder, in order of name, less any that overlaps an earlier one.

    Raises UserError for a file that is not whole safetensors.
    """
    chosen: list[Partial] = []
    covered: set[str] = set()
    for path in sorted(folder.glob("*.safetensors")):
        partial = _read(path)
        if covered.isdisjoint(partial.blocks):
            chosen.append(partial)
            covered |= partial.blocks
    return chosen


def _read(path: Path) -> Partial:
    try:
        about = json.loads(load_metadata(path)["about"])
    except (SafetensorError, KeyError, ValueError):
        raise UserError(f"{path}: not a whole partial sum; delete it, and its blocks are done again") from None
    return Partial(
        path,
        frozenset(about["blocks"]),
        about["counts"],
        about["documents"],
        about["tokens"],
        about["windows"],
        tuple((document, reason) for document, reason in about["skipped"]),
    )


def covered_blocks(partials: Iterable[Partial]) -> set[str]:
    return {block for partial in partials for block in partial.blocks}


def total(partials: Sequence[Partial], name: str) -> tuple[torch.Tensor, int]:
    """The sum of one named tensor over partials, and how many positions were counted into it."""
    tensor: torch.Tensor | None = None
    count = 0
    for partial in partials:
        with safe_open(partial.path, framework="pt") as file:
            if name in set(file.keys()):
                part = file.get_tensor(name)
                tensor = part if tensor is None else tensor + part
        count += partial.counts.get(name, 0)
    if tensor is None:
        raise UserError(f"{name}: no document had a target, so there is nothing to fit")
    return tensor, count
