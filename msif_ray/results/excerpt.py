"""What of a document is shown: its strongest tokens with what stands around them, within a bound."""

import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from msif_ray.corpus.objectives import LABEL, REJECTED

# Tokens shown on either side of a strong one.
AROUND = 8
# Characters shown of one token: some tokenizers have tokens of a whole line of dashes.
TOKEN_CHARACTERS = 80

# What would reorder or hide the text around it, shown by name. Marks and joiners, which scripts need, stay.
_HIDDEN = {"\n": "↵", "\r": "␍", "\t": "⇥"}


@dataclass(frozen=True)
class Segment:
    """Neighbouring tokens of a document and their scores; `before` tokens are left out in front of them."""

    before: int
    texts: list[str]
    scores: list[float]


@dataclass(frozen=True)
class Excerpt:
    """The segments shown of a document, in its order, and the number of tokens left out behind the last."""

    segments: list[Segment]
    after: int


def excerpt(texts: Sequence[str], scores: Sequence[float], limit: int) -> Excerpt:
    """At most about `limit` tokens: the strongest, by |score|, with those around them. Whole where that is enough.

    An empty text belongs to the character of the token before it (`corpus.pieces`): they are shown as one, and their
    scores are added. What is left out is counted in tokens. Where a pair's rejected sequence begins, and a text's
    class, is always shown.
    """
    starts = [place for place, text in enumerate(texts) if text or place == 0]
    bounds = [*starts, len(texts)]
    merged = [texts[start] for start in starts]
    sums = np.add.reduceat(np.asarray(scores, dtype=np.float64), starts) if starts else np.zeros(0)
    marked = [place for place, text in enumerate(merged) if REJECTED in text or LABEL in text]
    keep = _strongest(np.abs(sums), limit, marked)
    segments, end = [], 0
    for start, stop in _runs(keep):
        shown = [visible(text) for text in merged[start:stop]]
        segments.append(Segment(bounds[start] - end, shown, sums[start:stop].tolist()))
        end = bounds[stop]
    return Excerpt(segments, len(texts) - end)


def _strongest(sizes: np.ndarray, limit: int, marked: Sequence[int]) -> np.ndarray:
    """Which of the places to show, those `marked` among them."""
    keep = np.zeros(len(sizes), dtype=bool)
    if len(sizes) <= limit:
        keep[:] = True
        return keep
    keep[: min(AROUND, limit)] = True  # how a document begins says what it is
    keep[list(marked)] = True
    # The strongest `limit` are enough: every one of them adds at least itself.
    for place in np.argsort(-sizes, kind="stable")[:limit].tolist():
        around = slice(max(0, place - AROUND), place + AROUND + 1)
        if keep.sum() + (~keep[around]).sum() > limit:
            break
        keep[around] = True
    return keep


def _runs(keep: np.ndarray) -> Iterable[tuple[int, int]]:
    changes = np.flatnonzero(np.diff(np.concatenate([[False], keep, [False]]).astype(np.int8)))
    return zip(changes[::2].tolist(), changes[1::2].tolist(), strict=True)


def visible(text: str, limit: int | None = TOKEN_CHARACTERS) -> str:
    """Untrusted text as characters that stay where they are: control characters and those that reorder or hide what
    is around them are shown by name. Of more than `limit` characters the first."""
    cut = text if limit is None or len(text) <= limit else text[: limit - 1] + "…"
    return "".join(_characters(cut))


def _characters(text: str) -> Iterator[str]:
    for character in text:
        if character in _HIDDEN:
            yield _HIDDEN[character]
        elif unicodedata.category(character) == "Cc":
            yield chr(0x2400 + ord(character)) if ord(character) < 0x20 else f"⟨{ord(character):02X}⟩"
        elif unicodedata.bidirectional(character) in _REORDERING:
            yield f"⟨{ord(character):04X}⟩"
        else:
            yield character


_REORDERING = frozenset({"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"})
