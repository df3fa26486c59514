"""The blocks of a corpus: known by name from the files' row counts alone, read in order."""

from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, TypeVar

from pydantic import BaseModel

from msif_ray import layout
from msif_ray.config import Documents
from msif_ray.corpus.files import CorpusFile
from msif_ray.corpus.reader import Block, block_id, document_ids, read_file_blocks
from msif_ray.corpus.states import Watched
from msif_ray.errors import UserError

Kind = TypeVar("Kind", bound="CorpusBlocks")

# Under which a block of references has each pair's number: beside it, a document may have any name.
LOG_RATIOS = "log_ratios"


class Blocks(Protocol):
    """The units of one step."""

    @property
    def ids(self) -> frozenset[str]: ...

    def left(self, done: AbstractSet[str]) -> Iterator[Block]:
        """The blocks that are not done, in order."""
        ...


@dataclass(frozen=True)
class CorpusBlocks:
    """Blocks of `size` documents of each file of a corpus, over its first `limit` documents.

    `rows` counts the documents of each file; `key` names the corpus in errors. `references` is the folder of what the
    reference model made of each block of preferences, which is read with it.
    """

    files: tuple[CorpusFile, ...]
    rows: tuple[int, ...]
    documents: Documents
    size: int
    key: str
    limit: int | None = None
    references: Path | None = None

    @property
    def ids(self) -> frozenset[str]:
        return frozenset(name for file in range(len(self.files)) for name in self._names(file))

    def left(self, done: AbstractSet[str]) -> Iterator[Block]:
        for file in range(len(self.files)):
            yield from self.left_in(file, done)

    def left_in(self, file: int, done: AbstractSet[str]) -> Iterator[Block]:
        """One file's blocks that are not done; the file is not opened when there are none.

        Raises UserError, naming the file, where it is shorter than `rows` says.
        """
        if done >= set(self._names(file)):
            return
        for block in self._read(file):
            if block.id not in done:
                yield block if self.references is None else _with_references(block, self.references)

    def named(self) -> Iterator[tuple[str, str]]:
        """The id of every document and its block's, in order; of the files the ids alone are read."""
        for index, file in enumerate(self.files):
            names = islice(document_ids(file, self.documents, self.key), self._taken[index])
            for number, name in enumerate(names):
                yield name, block_id(index, number // self.size)

    @property
    def count(self) -> int:
        """Documents in all blocks."""
        return sum(self._taken)

    def documents_in(self, block: str) -> int:
        """How many documents a block has."""
        file, number = (int(part) for part in block.split("-"))
        return min(self.size, self._taken[file] - number * self.size)

    def as_a(self, kind: type[Kind], **more: Any) -> Kind:
        """The same blocks as another class has them, which takes `more` than they are made of."""
        return kind(**{each.name: getattr(self, each.name) for each in fields(CorpusBlocks)}, **more)

    def _read(self, file: int) -> Iterator[Block]:
        """One file's blocks. Raises UserError where it is no longer what was counted, before a block is handed out that
        may have been read since, and where it ends before the documents that were counted in it: those that are missing
        could never be done."""
        watched = Watched(self.files[file], self.key)
        left = taken = self._taken[file]
        for block in read_file_blocks(self.files, file, self.documents, self.size, self.key, taken):
            whole = len(block.documents) == min(self.size, left)
            left -= len(block.documents)
            if not whole:
                break
            watched.check()
            yield block
        if left:
            raise UserError(
                f"{self.key}.path: {self.files[file].path} has become shorter since the run was checked: it has "
                f"{taken - left:,} of its {self.rows[file]:,} documents; put it back as it was and run the same "
                "command again, or name a new run_dir"
            )

    def _names(self, file: int) -> list[str]:
        return [block_id(file, number) for number in range(-(-self._taken[file] // self.size))]

    @cached_property
    def _taken(self) -> list[int]:
        """How many of each file's documents are within the limit; asked for every block, of any number of files."""
        left = sum(self.rows) if self.limit is None else self.limit
        taken = []
        for rows in self.rows:
            taken.append(min(rows, left))
            left -= taken[-1]
        return taken


def references_said(folder: Path, block: str) -> dict[str, str]:
    """What the file of a block's references says of itself beside them."""
    return {"block": block, "corpus": folder.name}


class _References(BaseModel):
    log_ratios: dict[str, float] = {}  # LOG_RATIOS


def _with_references(block: Block, folder: Path) -> Block:
    from msif_ray.store import AGAIN, read_json  # here: it imports PyTorch, and who reads blocks needs none

    path, said = layout.reference_block(folder, block.id), references_said(folder, block.id)
    about = read_json(path, AGAIN, _References, said)
    found = about.get(LOG_RATIOS, about)  # that of an earlier version has the pairs alone
    return Block(block.id, tuple(replace(each, reference=found.get(each.id)) for each in block.documents))


@dataclass(frozen=True)
class ListedBlocks:
    """Blocks that are in memory."""

    blocks: Sequence[Block]

    @property
    def ids(self) -> frozenset[str]:
        return frozenset(block.id for block in self.blocks)

    def left(self, done: AbstractSet[str]) -> Iterator[Block]:
        return (block for block in self.blocks if block.id not in done)
