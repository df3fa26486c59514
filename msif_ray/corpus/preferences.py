"""Pairs of completions of which one was chosen, as tokens of two sequences side by side.

Tokens that both sequences begin with are no targets: what they add to both log-probabilities is the same and cancels in
the margin, and in its gradient. So it is all one whether a corpus names its prompts or repeats them in both.

Not so where the log-probabilities are divided by their completions' lengths: every token of a completion then counts,
those that both begin with, too, and none of the prompt. The prompt is what its column has; where there is none, the
turns that both conversations begin with, up to and with the last of them that is the user's. Texts need the column.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from msif_ray.corpus.chat import chat_fault, encode_chat
from msif_ray.corpus.ends import appended, prompt_tokens
from msif_ray.corpus.reader import Document
from msif_ray.corpus.windows import Encoded, Preferred, Skipped, Window, value_fault
from msif_ray.influence.batch import WindowKey

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Sequence = tuple[list[int], list[bool]]
"""Tokens, and which of them are targets."""


@dataclass(frozen=True)
class Pairs:
    """A stage of preferences with its β. `length_normalised`: log-probabilities are divided by their completions'
    tokens. `apart`: the two sequences of a pair as windows of their own, as a reference model is to read them."""

    beta: float
    length_normalised: bool = False
    apart: bool = False


@dataclass(frozen=True)
class EncodedPair(Encoded):
    """The tokens of a chosen sequence and, from `split` on, of a rejected one; one window, as its loss is no sum."""

    split: int
    pairs: Pairs
    reference: float | None

    @property
    def parts(self) -> tuple[slice, slice]:
        """The places of the chosen and of the rejected sequence."""
        return slice(0, self.split), slice(self.split, None)

    def windows(self, max_tokens: int) -> Iterator[Window]:
        if not self.pairs.apart:
            preferred = Preferred(self.split, self.pairs.beta, self.reference, self.pairs.length_normalised)
            yield Window(WindowKey(self.document_id, 0), self.ids, self.targets, preference=preferred)
            return
        for number, part in enumerate(self.parts):
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
            sequences.append(_sequence(pairs, what, completion, tokenizer, document, append_eos))
        except ValueError as error:
            return Skipped(document.id, str(error))
    (first, first_targets), (second, second_targets) = sequences
    longest = max(len(first), len(second))
    if max_tokens is not None and longest > max_tokens:
        return Skipped(document.id, f"longer than max_tokens ({max_tokens}), and a preference is of whole sequences")
    same = sum(1 for _ in takewhile(lambda both: both[0] == both[1], zip(first, second, strict=False)))
    begin = 1 if pairs.length_normalised else max(1, same)
    targets = [
        *(wanted and place >= begin for place, wanted in enumerate(first_targets)),
        *(wanted and place >= begin for place, wanted in enumerate(second_targets)),
    ]
    if first == second or not any(targets):
        return Skipped(document.id, "chosen and rejected do not differ")
    found = EncodedPair(document.id, (*first, *second), tuple(targets), len(first), pairs, document.reference)
    for what, part in zip(("chosen", "rejected"), found.parts, strict=True):
        if pairs.length_normalised and not any(found.targets[part]):
            return Skipped(document.id, f"{what} has no tokens after its prompt")
    return found


def _sequence(
    pairs: Pairs,
    what: str,
    completion: Any,
    tokenizer: "PreTrainedTokenizerBase",
    document: Document,
    append_eos: bool,
) -> Sequence:
    """A prompt and one completion. Raises ValueError, which says why, for what is neither text nor a conversation."""
    if isinstance(completion, list):
        since = _prompt_turns(document) if pairs.length_normalised else 0
        return _conversation(what, completion, tokenizer, document, since)
    prompt = document.prompt if document.has_prompt else ""
    fault = value_fault("prompt", prompt) or value_fault(what, completion)
    if fault is None and pairs.length_normalised and not document.has_prompt:
        fault = f"{what} is text, whose length is counted after its prompt; name the `prompt` column"
    if fault is not None:
        raise ValueError(fault)
    before = prompt_tokens(tokenizer, prompt) if document.has_prompt else []
    after = list(tokenizer(completion, add_special_tokens=not document.has_prompt)["input_ids"])
    ends = appended(tokenizer, append_eos, by_defaults=not document.has_prompt)
    return [*before, *after, *ends], [False] * len(before) + [True] * (len(after) + len(ends))


def _prompt_turns(document: Document) -> int:
    """How many turns of both conversations are their prompt."""
    if document.has_prompt:
        return len(document.prompt) if isinstance(document.prompt, list) else 0
    if not isinstance(document.text, list) or not isinstance(document.rejected, list):
        return 0
    begun = takewhile(lambda both: both[0] == both[1], zip(document.text, document.rejected, strict=False))
    users = [n for n, (turn, _) in enumerate(begun, 1) if isinstance(turn, dict) and turn.get("role") == "user"]
    return users[-1] if users else 0


def _conversation(
    what: str, messages: list[Any], tokenizer: "PreTrainedTokenizerBase", document: Document, since: int
) -> Sequence:
    prompt = document.prompt if document.has_prompt else []
    if not isinstance(prompt, list):
        raise ValueError(f"{what} is a conversation, and its prompt is not")
    whole = [*prompt, *messages]
    fault = chat_fault(whole)
    if fault is not None:
        raise ValueError(f"{what}: {fault}")
    if tokenizer.chat_template is None:
        raise ValueError(f"{what} is a conversation, and the tokenizer has no chat template")
    return encode_chat(tokenizer, whole, since)
