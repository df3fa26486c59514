"""What came of a block, and of one rank's passes over it."""

from collections.abc import Set
from dataclasses import dataclass, field

from msif_ray.corpus.windows import Skipped
from msif_ray.influence.batch import WindowKey


@dataclass(frozen=True)
class Counts:
    """How many documents of a block were used, how many tokens and windows these have, and which ones were skipped."""

    documents: int
    tokens: int
    windows: int
    skipped: tuple[Skipped, ...]


@dataclass(frozen=True)
class Outcome:
    """What came of one block: documents' token counts in order, those skipped with the reason, and how many windows
    the others have."""

    tokens: dict[str, int]
    skipped: tuple[Skipped, ...]
    windows: int

    @property
    def counts(self) -> Counts:
        """What is to be kept of it where blocks are many: no entry for each document."""
        return Counts(len(self.tokens), sum(self.tokens.values()), self.windows, self.skipped)


@dataclass(frozen=True)
class Passed:
    """What came of one rank's passes over a block, or over some of its windows: token counts and numbers of windows of
    all the block's documents in order, and those skipped.

    `not_finite` names documents with a window whose loss is not finite. `refused` are the windows of other batches
    that were left out, to be processed again: whether each one's loss was finite.
    """

    tokens: dict[str, int]
    windows: dict[str, int]
    skipped: tuple[Skipped, ...]
    not_finite: frozenset[str] = frozenset()
    refused: dict[WindowKey, bool] = field(default_factory=dict)

    def outcome(self, not_finite: Set[str] = frozenset()) -> Outcome:
        """The block's, with these documents skipped."""
        tokens = {document: count for document, count in self.tokens.items() if document not in not_finite}
        found = tuple(Skipped(document, "its loss is not finite") for document in self.tokens if document in not_finite)
        return Outcome(tokens, self.skipped + found, sum(self.windows[document] for document in tokens))
