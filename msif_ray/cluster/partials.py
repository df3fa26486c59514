"""Partial sums on storage: a folder per partial, whole once its manifest says which blocks it covers.

Every rank writes a file per map; the replica then writes the manifest. A replica's later partial holds
its earlier one's blocks too, and takes its place: storage holds one partial per replica, and one per death.
"""

import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import BaseModel

from msif_ray.cluster.outcomes import Counts
from msif_ray.errors import UserError
from msif_ray.layout import part_file
from msif_ray.paths import exists, subfolders
from msif_ray.shapes import Pair
from msif_ray.store import delete_folder, load_tensors, read_json, write_json

MANIFEST = "manifest.json"


class _Manifest(BaseModel):
    parts: list[list[str]]
    blocks: list[str]
    documents: int
    tokens: int
    windows: int
    skipped: list[Pair[str]]
    inputs: str


@dataclass(frozen=True)
class Partial:
    """One partial: the parts that each rank wrote, the blocks covered, and what was counted over them.

    `inputs` says what the sums were computed by: sums of different inputs do not add up.
    """

    folder: Path
    parts: tuple[frozenset[str], ...]
    blocks: frozenset[str]
    documents: int
    tokens: int
    windows: int
    skipped: tuple[tuple[str, str], ...]
    inputs: str

    def tensors(self, part: str) -> Iterator[dict[str, torch.Tensor]]:
        """One part's tensors from each rank that has it."""
        for rank, written in enumerate(self.parts):
            if part in written:
                path, about = part_file(self.folder, part, rank), part_metadata(self.folder, part, rank)
                yield load_tensors(path, part_of=self.folder, about=about)


def part_metadata(folder: Path, part: str, rank: int) -> dict[str, str]:
    """What the file of a part says of itself: no two partials have folders of one name."""
    return {"part": part, "rank": str(rank), "partial": folder.name}


def new_folder(step: Path, first_block: str) -> Path:
    """A name for a partial that begins with a block; names differ between replicas that redo one."""
    return step / f"{first_block}-{uuid.uuid4().hex[:8]}"


def publish(
    folder: Path,
    parts: Sequence[Sequence[str]],
    counts: Sequence[tuple[str, Counts]],
    replaces: Path | None,
    inputs: str = "",
    stage: str | None = None,
) -> None:
    """Makes a folder that all ranks have written count, then drops the partial whose blocks it holds too.

    `parts` names what each rank wrote, `counts` what there was of each block; `stage` is that of the model.
    """
    write_json(
        folder / MANIFEST,
        {
            "parts": [list(written) for written in parts],
            "blocks": [block for block, _ in counts],
            "documents": sum(each.documents for _, each in counts),
            "tokens": sum(each.tokens for _, each in counts),
            "windows": sum(each.windows for _, each in counts),
            "skipped": [[skip.document_id, skip.reason] for _, each in counts for skip in each.skipped],
            "inputs": inputs,
        }
        | _said(folder, stage),
    )
    if replaces is not None:
        delete_folder(replaces, first=MANIFEST)


def _said(folder: Path, stage: str | None) -> dict[str, str]:
    """What a partial's manifest says of its place, and of the stage where that is known."""
    place = {"partial": folder.name, "step": folder.parent.name}
    return place if stage is None else place | {"stage": stage}


def read_disjoint(step: Path, inputs: str = "", stage: str | None = None) -> list[Partial]:
    """Partials of these inputs that share no block, those of many blocks first: a replica that died between its new
    partial and the end of its old one leaves both.

    Raises UserError for a manifest that is damaged, or was written for another folder, step or stage.
    """
    manifests = [path for folder in subfolders(step) if exists(path := folder / MANIFEST)]
    of_inputs = [partial for path in manifests if (partial := _read(path, stage)) and partial.inputs == inputs]
    found = sorted(of_inputs, key=lambda p: (-len(p.blocks), p.folder.name))
    chosen: list[Partial] = []
    covered: set[str] = set()
    for partial in found:
        if covered.isdisjoint(partial.blocks):
            chosen.append(partial)
            covered |= partial.blocks
    return sorted(chosen, key=lambda partial: partial.folder.name)


def _read(manifest: Path, stage: str | None) -> Partial | None:
    """A partial, unless it has just been replaced, as a replica of a dead driver may do yet. Raises UserError for a
    manifest that is damaged, and for a storage that does not give it."""
    mend = f"delete the folder {manifest.parent}, and run the same command again: its blocks are done again"
    try:
        about = read_json(manifest, mend, _Manifest, _said(manifest.parent, stage))
        return Partial(
            manifest.parent,
            tuple(frozenset(written) for written in about["parts"]),
            frozenset(about["blocks"]),
            about["documents"],
            about["tokens"],
            about["windows"],
            tuple((document, reason) for document, reason in about["skipped"]),
            about["inputs"],
        )
    except UserError:
        if not exists(manifest):
            return None
        raise


def covered_blocks(partials: Iterable[Partial]) -> set[str]:
    return {block for partial in partials for block in partial.blocks}


@dataclass(frozen=True)
class Coverage:
    """Partials that together cover every block of a step exactly once: what may be reduced.

    Raises UserError, naming a block, where one is missing or covered twice.
    """

    partials: tuple[Partial, ...]
    blocks: frozenset[str]

    def __post_init__(self) -> None:
        times = Counter(block for partial in self.partials for block in partial.blocks)
        for block in sorted(self.blocks | times.keys()):
            expected = 1 if block in self.blocks else 0
            if times[block] != expected:
                holders = ", ".join(str(partial.folder) for partial in self.partials if block in partial.blocks)
                raise UserError(
                    f"block {block} is in {times[block]} partial sums and belongs in {expected}: "
                    f"{holders or 'none of the folders that were read'}; delete those, and run the same command again"
                )

    def total(self, part: str) -> dict[str, torch.Tensor]:
        """One part's tensors, each summed over partials and their ranks; one partial in memory at a time."""
        total: dict[str, torch.Tensor] = {}
        for tensors in self.each(part):
            for name, tensor in tensors.items():
                total[name] = total[name] + tensor if name in total else tensor
        return total

    def each(self, part: str) -> Iterator[dict[str, torch.Tensor]]:
        """One part's tensors from every partial and rank."""
        for partial in self.partials:
            yield from partial.tensors(part)

    @property
    def documents(self) -> int:
        return sum(partial.documents for partial in self.partials)

    @property
    def tokens(self) -> int:
        return sum(partial.tokens for partial in self.partials)

    @property
    def windows(self) -> int:
        return sum(partial.windows for partial in self.partials)

    @property
    def skipped(self) -> list[tuple[str, str]]:
        return [skip for partial in self.partials for skip in partial.skipped]
