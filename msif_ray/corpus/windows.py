"""From a document's text to windows of tokens, and to tensors of some of these (DESIGN.md §2, Tokens)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from msif_ray.corpus.chat import chat_fault, encode_chat
from msif_ray.corpus.ends import appended, prompt_tokens
from msif_ray.corpus.packed import NoParts, Part
from msif_ray.corpus.queries import Query
from msif_ray.corpus.reader import Document
from msif_ray.corpus.spans import overlapping, overlapping_turn
from msif_ray.corpus.switches import Switches, side
from msif_ray.influence.batch import Batch, WindowKey
from msif_ray.unicode import is_unicode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Skipped:
    """A document that cannot be scored, and why."""

    document_id: str
    reason: str


@dataclass(frozen=True)
class Encoded:
    """A document's tokens, and which of them are targets (never the first)."""

    document_id: str
    ids: tuple[int, ...]
    targets: tuple[bool, ...]

    def windows(self, max_tokens: int) -> "Iterator[Window]":
        """Windows of at most `max_tokens` tokens that share one token, so that every target is
        predicted exactly once. A window without a target has no gradient and is left out; window n
        begins at token n·(max_tokens − 1) all the same."""
        for number, start in enumerate(range(0, len(self.ids) - 1, max_tokens - 1)):
            ids = self.ids[start : start + max_tokens]
            targets = (False, *self.targets[start + 1 : start + max_tokens])
            if any(targets):
                yield Window(WindowKey(self.document_id, number), ids, targets)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence that the model is given without cuts."""
        return len(self.ids)

    @property
    def explained(self) -> int:
        """Targets that the document, as a query, is about."""
        return sum(self.targets)


@dataclass(frozen=True)
class Margin(Encoded):
    """A query's completion and another, each after the prompt: two sequences, of which the first has `first` tokens.

    `ids` and `targets` are of both, one after the other. Window 0 is the completion, window 1 (`queries.OTHER`) the
    other; they are never cut.
    """

    first: int

    def windows(self, max_tokens: int) -> "Iterator[Window]":
        for number, part in enumerate((slice(0, self.first), slice(self.first, None))):
            yield Window(WindowKey(self.document_id, number), self.ids[part], self.targets[part])

    @property
    def longest(self) -> int:
        return max(self.first, len(self.ids) - self.first)

    @property
    def explained(self) -> int:
        return sum(self.targets[: self.first])


@dataclass(frozen=True)
class Window:
    """Consecutive tokens of one document; `targets[t]` says that token t is a target."""

    key: WindowKey
    ids: tuple[int, ...]
    targets: tuple[bool, ...]
    label: int | None = None  # the class of a text to be classified, all of whose tokens count
    preference: "Preferred | None" = None

    @property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """The sequences that the tokens are, from the first token to before the last's next."""
        if self.preference is None:
            return ((0, len(self.ids)),)
        return ((0, self.preference.split), (self.preference.split, len(self.ids)))

    @property
    def width(self) -> int:
        """Tokens of a row that holds it, padding included."""
        return len(self.spans) * self.longest

    @property
    def longest(self) -> int:
        """Tokens of its longest sequence."""
        return max(stop - start for start, stop in self.spans)


@dataclass(frozen=True)
class Preferred:
    """Of a window that holds two sequences, the chosen one before token `split` and the rejected one from there on: β
    and log π_ref(chosen) − log π_ref(rejected), None where it is not known. `length_normalised`: with each of its
    log-probabilities divided by the number of its targets."""

    split: int
    beta: float
    reference: float | None
    length_normalised: bool = False


def encode(tokenizer: "PreTrainedTokenizerBase", document: Document, append_eos: bool) -> Encoded | Skipped:
    """A document's tokens by the tokenizer's own defaults, or the reason why it has none.

    With a prompt, prompt and completion are tokenised separately and joined, the completion
    verbatim and without special tokens; only its tokens are targets. `append_eos` ends the
    sequence with the EOS token as a target, unless the tokenizer itself does; one that it adds
    to a prompt is left out. Of a conversation the assistant's tokens are targets (`chat`). Of a query
    those are targets that it asks about, of a conversation's the last turn's, and it may be two sequences (`Margin`).
    """
    if isinstance(document, Query) and document.rather_than is not None:
        return _encode_margin(tokenizer, document, append_eos)
    if isinstance(document.text, Part | NoParts):
        return _encode_part(tokenizer, document.id, document.text)
    if document.is_chat:
        return _encode_chat(tokenizer, document)
    fault = text_fault(document)
    if fault is not None:
        return Skipped(document.id, fault)
    if isinstance(document, Query) and document.span is not None:
        return _encode_span(tokenizer, document, append_eos)
    if document.has_prompt:
        before = prompt_tokens(tokenizer, document.prompt)
        after = list(tokenizer(document.text, add_special_tokens=False)["input_ids"])
    else:
        before, after = [], list(tokenizer(document.text)["input_ids"])
    after += appended(tokenizer, append_eos, by_defaults=not document.has_prompt)
    return _encoded(document.id, [*before, *after], [False] * len(before) + [True] * len(after))


def _encode_margin(tokenizer: "PreTrainedTokenizerBase", query: Query, append_eos: bool) -> Encoded | Skipped:
    completion = encode(tokenizer, replace(query, rather_than=None), append_eos)
    other = encode(tokenizer, query.other, append_eos)
    if isinstance(completion, Skipped):
        return completion
    if isinstance(other, Skipped):
        return Skipped(query.id, f"the other completion: {other.reason}")
    return Margin(query.id, completion.ids + other.ids, completion.targets + other.targets, len(completion.ids))


def _encode_span(tokenizer: "PreTrainedTokenizerBase", query: Query, append_eos: bool) -> Encoded | Skipped:
    """The completion's tokens that overlap the query's span as targets; those after it stay, as training has them."""
    before = prompt_tokens(tokenizer, query.prompt)
    after, inside = overlapping(tokenizer, query.text, query.span)
    ends = appended(tokenizer, append_eos, by_defaults=False)
    targets = [False] * len(before) + inside + [False] * len(ends)
    return _of_span(query, _encoded(query.id, [*before, *after, *ends], targets))


def _of_span(query: Query, found: Encoded | Skipped) -> Encoded | Skipped:
    if isinstance(found, Encoded):
        return found
    return Skipped(query.id, f"no token that is predicted overlaps the span {list(query.span)} of {query.completion!r}")


def _encoded(name: str, ids: Sequence[int], targets: Sequence[bool]) -> Encoded | Skipped:
    if len(ids) < 2:
        return Skipped(name, "fewer than two tokens")
    if not any(targets[1:]):
        return Skipped(name, "no target tokens")
    return Encoded(name, tuple(ids), (False, *targets[1:]))


def _encode_part(tokenizer: "PreTrainedTokenizerBase", name: str, part: Part | NoParts) -> Encoded | Skipped:
    """A document of a packed row: its tokens are targets, and those before it context."""
    if isinstance(part, NoParts):
        return Skipped(name, part.reason)
    ids, own = part.sequence
    last = last_token(tokenizer)
    if max(ids, default=0) > last:
        return Skipped(name, f"token {max(ids)} is not in the tokenizer's vocabulary, whose last is {last}")
    padding = _padding(tokenizer, part.own)
    return Skipped(name, padding) if padding is not None else _encoded(name, ids, own)


def _padding(tokenizer: "PreTrainedTokenizerBase", own: tuple[int, ...]) -> str | None:
    """What shows that some of a packed document's own tokens are padding, or None.

    One token of it may be a text's end, as it is of some models that also pad with it; where it is the EOS as well,
    several may be, after a text.
    """
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    if set(own) <= {pad, eos}:
        return "it has no token but the tokenizer's padding or EOS"
    if pad not in (None, eos) and (pad, pad) in (own[:2], own[-2:]):
        return (
            f"it begins or ends with padding ({tokenizer.pad_token}); cut that off the rows, or name the column of "
            "their mask in `packed.mask`"
        )
    return None


@lru_cache(maxsize=8)
def last_token(tokenizer: "PreTrainedTokenizerBase") -> int:
    """The largest id of a tokenizer's vocabulary, in which there may be holes: it has fewer tokens than that says."""
    return max(tokenizer.get_vocab().values(), default=-1)


def within(encoded: Encoded | Skipped, vocabulary: int, switches: Switches = ()) -> Encoded | Skipped:
    """The same, but skipped where a token is none of the model's, as a tokenizer may know more than its model, and
    where two sequences of one window are on different sides of a length after which the model computes otherwise."""
    if isinstance(encoded, Skipped):
        return encoded
    if max(encoded.ids) >= vocabulary:
        return Skipped(encoded.document_id, f"token {max(encoded.ids)} is not among the model's {vocabulary}")
    for window in encoded.windows(len(encoded.ids)) if switches else ():
        if len({side(stop - start, switches) for start, stop in window.spans}) > 1:
            lengths = " and ".join(str(stop - start) for start, stop in window.spans)
            return Skipped(
                encoded.document_id,
                f"its two sequences have {lengths} tokens, and the model embeds positions otherwise beyond "
                + " and ".join(map(str, switches)),
            )
    return encoded


def _encode_chat(tokenizer: "PreTrainedTokenizerBase", document: Document) -> Encoded | Skipped:
    fault = chat_fault(document.text)
    if fault is not None:
        return Skipped(document.id, fault)
    try:
        if isinstance(document, Query) and document.span is not None:
            return _of_span(document, _encoded(document.id, *overlapping_turn(tokenizer, document.text, document.span)))
        since = len(document.text) - 1 if isinstance(document, Query) else 0  # of a query the last turn alone
        return _encoded(document.id, *encode_chat(tokenizer, document.text, since))
    except ValueError as error:
        return Skipped(document.id, str(error))


def text_fault(document: Document) -> str | None:
    """What is wrong with a document that should be text, or None."""
    named = {"completion" if document.has_prompt else "text": document.text}
    if document.has_prompt:
        named = {"prompt": document.prompt} | named
    faults = (value_fault(what, value) for what, value in named.items())
    return next((fault for fault in faults if fault is not None), None)


def value_fault(what: str, value: object) -> str | None:
    """What is wrong with a value that should be text, or None; a prompt may be empty."""
    if value is None:
        return f"{what} is null"
    if not isinstance(value, str):
        return f"{what} is not text but {type(value).__name__}"
    if not value and what != "prompt":
        return f"{what} is empty"
    return None if is_unicode(value) else f"{what} is not valid Unicode"


def to_batch(windows: Sequence[Window]) -> Batch:
    """Windows right-padded to the longest, as tensors `[rows, tokens]`; of two sequences each to the longest."""
    width = max(window.width for window in windows)
    input_ids = torch.zeros(len(windows), width, dtype=torch.int64)
    attention_mask = torch.zeros(len(windows), width, dtype=torch.bool)
    targets = torch.zeros(len(windows), width, dtype=torch.bool)
    for row, window in enumerate(windows):
        each = width // len(window.spans)
        for number, (start, stop) in enumerate(window.spans):
            place = slice(number * each, number * each + stop - start)
            input_ids[row, place] = torch.tensor(window.ids[start:stop])
            attention_mask[row, place] = True
            targets[row, place] = torch.tensor(window.targets[start:stop])
    batch = Batch(input_ids, attention_mask, targets, tuple(window.key for window in windows))
    labels = [window.label for window in windows if window.label is not None]
    preferences = [window.preference for window in windows if window.preference is not None]
    if labels:
        return replace(batch, classes=torch.tensor(labels))
    if preferences:
        known = [torch.nan if each.reference is None else each.reference for each in preferences]
        beta = torch.tensor([each.beta for each in preferences], dtype=torch.float64)
        reference, normalised = torch.tensor(known, dtype=torch.float64), preferences[0].length_normalised
        return replace(batch, reference=reference, beta=beta, length_normalised=normalised)
    return batch
