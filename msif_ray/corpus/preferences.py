"""Pairs of completions of which one was chosen, as tokens of two sequences side by side.

Tokens that both sequences begin with are no targets: what they add to both log-probabilities is the same and cancels in
the margin, and in its gradient. So it is all one whether a corpus names its prompts or repeats them in both.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from msif_ray.corpus.chat import chat_fault, encode_chat
from msif_ray.corpus.reader import Document, is_unicode
from msif_ray.corpus.windows import Encoded, Preferred, Skipped, Window, value_fault
from msif_ray.influence.batch import WindowKey

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Sequence = tuple[list[int], list[bool]]
"""Tokens, and which of them are targets."""


@dataclass(frozen=True)
class Pairs:
    """A stage of preferences with its β. `apart`: the two sequences of a pair as windows of their own, as a reference
    model is to read them."""

    beta: float
    apart: bool = False


@dataclass(frozen=True)
class EncodedPair(Encoded):
    """The tokens of a chosen sequence and, from `split` on, of a rejected one; one window, as its loss is no sum."""

    split: int
    pairs: Pairs
    reference: float | None

    def windows(self, max_tokens: int) -> Iterator[Window]:
        if not self.pairs.apart:
            preferred = Preferred(self.split, self.pairs.beta, self.reference)
            yield Window(WindowKey(self.document_id, 0), self.ids, self.targets, preference=preferred)
            return
        for number, part in enumerate((slice(0, self.split), slice(self.split, None))):
            if any(self.targets[part]):
                yield Window(WindowKey(self.document_id, number), self.ids[part], self.targets[part])


def encode_pair(
    pairs: Pairs, tokenizer: "PreTrainedTokenizerBase", document: Document, append_eos: bool, max_tokens: int | None
) -> EncodedPair | Skipped:
    """Both sequences of a pair, or the reason why there are none. Texts follow their prompt as any completion does, of
    messages the assistant's are targets."""
    sequences = []
    for what, completion in (("chosen", document.text), ("rejected", document.rejected)):
        try:
            sequences.append(_sequence(what, completion, tokenizer, document, append_eos))
        except ValueError as error:
            return Skipped(document.id, str(error))
    (first, first_targets), (second, second_targets) = sequences
    longest = max(len(first), len(second))
    if max_tokens is not None and longest > max_tokens:
        return Skipped(document.id, f"longer than max_tokens ({max_tokens}), and a preference is of whole sequences")
    differing = (place for place, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    shared = max(1, next(differing, min(len(first), len(second))))
    targets = [
        *(wanted and place >= shared for place, wanted in enumerate(first_targets)),
        *(wanted and place >= shared for place, wanted in enumerate(second_targets)),
    ]
    if not any(targets):
        return Skipped(document.id, "chosen and rejected do not differ")
    return EncodedPair(document.id, (*first, *second), tuple(targets), len(first), pairs, document.reference)


def _sequence(
    what: str, completion: Any, tokenizer: "PreTrainedTokenizerBase", document: Document, append_eos: bool
) -> Sequence:
    """A prompt and one completion. Raises ValueError, which says why, for what is neither text nor a conversation."""
    if isinstance(completion, list):
        return _conversation(what, completion, tokenizer, document)
    prompt = document.prompt if document.has_prompt else ""
    fault = value_fault("prompt", prompt) or value_fault(what, completion)
    if fault is not None:
        raise ValueError(fault)
    before = list(tokenizer(prompt)["input_ids"]) if document.has_prompt else []
    after = list(tokenizer(completion, add_special_tokens=not document.has_prompt)["input_ids"])
    ends = [tokenizer.eos_token_id] if append_eos else []
    return [*before, *after, *ends], [False] * len(before) + [True] * (len(after) + len(ends))


def _conversation(what: str, messages: list[Any], tokenizer: "PreTrainedTokenizerBase", document: Document) -> Sequence:
    prompt = document.prompt if document.has_prompt else []
    if not isinstance(prompt, list):
        raise ValueError(f"{what} is a conversation, and its prompt is not")
    whole = [*prompt, *messages]
    fault = chat_fault(whole)
    if fault is None and not all(is_unicode(message["content"]) for message in whole):
        fault = "messages is not valid Unicode"
    if fault is not None:
        raise ValueError(f"{what}: {fault}")
    if tokenizer.chat_template is None:
        raise ValueError(f"{what} is a conversation, and the tokenizer has no chat template")
    return encode_chat(tokenizer, whole)
