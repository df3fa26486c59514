"""How many tokens a corpus has: counted where it is small, else estimated from a sample spread over it."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

from msif_ray.checkpoint import load_tokenizer
from msif_ray.cluster.rank import ModelSetup
from msif_ray.config import Documents
from msif_ray.corpus.files import CorpusFile
from msif_ray.corpus.reader import Document, read_documents
from msif_ray.corpus.windows import Encoded, Skipped, within
from msif_ray.paths import path_of, size_of
from msif_ray.preflight import Resolved

# Documents that are counted one by one; of a larger corpus as many are sampled.
COUNTED = 2000
# A corpus up to this size is read from end to end for its sample; of a larger one the beginnings of some files.
READ_BYTES = 2**30
FILES, ROWS = 32, 5000


@dataclass(frozen=True)
class Tally:
    """Documents as the models see them: `lengths` counts windows, or the sequences of pairs, by their positions,
    `targets` the positions that predict one. `sampled` documents stand for the rest; None: all were counted. `reasons`
    counts why those that were looked at are skipped.

    Windows share a token, so positions are more than tokens; skipped documents have neither.
    """

    documents: float
    skipped: float
    tokens: float
    targets: float
    lengths: Mapping[int, float]
    sampled: int | None = None
    reasons: Mapping[str, int] = field(default_factory=dict)

    @property
    def positions(self) -> float:
        return sum(n * windows for n, windows in self.lengths.items())

    @property
    def squared_lengths(self) -> float:
        return sum(n * n * windows for n, windows in self.lengths.items())

    def scaled(self, documents: int) -> "Tally":
        """The same for a corpus of so many documents of which these are a sample."""
        by = documents / self.documents
        lengths = {n: windows * by for n, windows in self.lengths.items()}
        counted = (self.skipped * by, self.tokens * by, self.targets * by)
        return Tally(documents, *counted, lengths, int(self.documents), self.reasons)


Encode = Callable[[Document], Encoded | Skipped]


def encoder(resolved: Resolved, index: int, setup: ModelSetup) -> Encode:
    """What stage `index`'s model is given of a document, or why the run skips it."""
    checkpoint = resolved.stages[index]
    tokenizer = load_tokenizer(checkpoint.tokenizer_path, f"stages.{index}.tokenizer")
    return lambda document: within(setup.encode(tokenizer, document), checkpoint.vocabulary, checkpoint.switches)


def tally(found: Iterable[Encoded | Skipped], max_tokens: int | None) -> Tally:
    """Counts documents, cut into windows of `max_tokens` (None: one each)."""
    count = tokens = targets = 0
    lengths: Counter[int] = Counter()
    reasons: Counter[str] = Counter()
    for encoded in found:
        count += 1
        if isinstance(encoded, Skipped):
            reasons[encoded.reason] += 1
            continue
        tokens += len(encoded.ids)
        for window in encoded.windows(max_tokens or len(encoded.ids)):
            for start, stop in window.spans:
                lengths[stop - start] += 1
            targets += sum(window.targets)
    return Tally(count, reasons.total(), tokens, targets, dict(lengths), reasons=reasons)


def corpus_tally(
    files: Sequence[CorpusFile],
    documents: Documents,
    count: int,
    key: str,
    encode: Encode,
    max_tokens: int | None,
) -> Tally:
    """Counts the first `count` documents of a corpus, or estimates them from a sample."""
    sample = spread_documents(files, documents, count, key)
    counted = tally(map(encode, sample), max_tokens)
    return counted if counted.documents == count else counted.scaled(count)


def spread_documents(files: Sequence[CorpusFile], documents: Documents, count: int, key: str) -> Iterator[Document]:
    """All of a corpus's first `count` documents, or COUNTED of them (half as many at least) at even distances.

    Of many documents in more than READ_BYTES, from the first rows of files at even distances, so that a large
    corpus is not read twice.
    """
    if count <= FILES * ROWS or sum(size_of(path_of(file.path)) for file in files) <= READ_BYTES:
        rows = (document for file in files for document in read_documents(file, documents, key))
        yield from islice(rows, 0, count, max(1, -(-count // COUNTED)))
        return
    chosen = [files[i] for i in _even(len(files), FILES)]
    each = -(-COUNTED // len(chosen))
    for file in chosen:
        first = list(islice(read_documents(file, documents, key), ROWS))
        yield from (first[i] for i in _even(len(first), each))


def _even(size: int, count: int) -> list[int]:
    """At most `count` positions at even distances in a list of `size`."""
    return [size * i // count for i in range(count)] if size > count else list(range(size))
