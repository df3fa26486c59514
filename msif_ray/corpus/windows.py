"""From a document's text to windows of tokens and token-budget batches (DESIGN.md §2, Tokens)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from msif_ray.corpus.chat import chat_fault, encode_chat
from msif_ray.corpus.reader import Document, is_unicode
from msif_ray.influence.batch import Batch, WindowKey

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


@dataclass(frozen=True)
class Window:
    """Consecutive tokens of one document; `targets[t]` says that token t is a target."""

    key: WindowKey
    ids: tuple[int, ...]
    targets: tuple[bool, ...]


def encode(tokenizer: "PreTrainedTokenizerBase", document: Document, append_eos: bool) -> Encoded | Skipped:
    """A document's tokens by the tokenizer's own defaults, or the reason why it has none.

    With a prompt, prompt and completion are tokenised separately and joined, the completion
    verbatim and without special tokens; only its tokens are targets. `append_eos` ends the
    sequence with the EOS token as a target. Of a conversation the assistant's tokens are targets (`chat`).
    """
    if document.is_chat:
        return _encode_chat(tokenizer, document)
    fault = _fault(document)
    if fault is not None:
        return Skipped(document.id, fault)
    if document.has_prompt:
        before = list(tokenizer(document.prompt)["input_ids"])
        after = list(tokenizer(document.text, add_special_tokens=False)["input_ids"])
    else:
        before, after = [], list(tokenizer(document.text)["input_ids"])
    if append_eos:
        after.append(tokenizer.eos_token_id)
    return _encoded(document, [*before, *after], [False] * len(before) + [True] * len(after))


def _encoded(document: Document, ids: Sequence[int], targets: Sequence[bool]) -> Encoded | Skipped:
    if len(ids) < 2:
        return Skipped(document.id, "fewer than two tokens")
    if not any(targets[1:]):
        return Skipped(document.id, "no target tokens")
    return Encoded(document.id, tuple(ids), (False, *targets[1:]))


def within(encoded: Encoded | Skipped, vocabulary: int) -> Encoded | Skipped:
    """The same, but skipped where a token is none of the model's: a tokenizer may know more than its model."""
    if isinstance(encoded, Skipped) or max(encoded.ids) < vocabulary:
        return encoded
    return Skipped(encoded.document_id, f"token {max(encoded.ids)} is not among the model's {vocabulary}")


def _encode_chat(tokenizer: "PreTrainedTokenizerBase", document: Document) -> Encoded | Skipped:
    fault = chat_fault(document.text)
    if fault is None and not all(is_unicode(message["content"]) for message in document.text):
        fault = "messages is not valid Unicode"
    if fault is not None:
        return Skipped(document.id, fault)
    try:
        return _encoded(document, *encode_chat(tokenizer, document.text))
    except ValueError as error:
        return Skipped(document.id, str(error))


def _fault(document: Document) -> str | None:
    named = {"completion" if document.has_prompt else "text": document.text}
    if document.has_prompt:
        named = {"prompt": document.prompt} | named
    for what, value in named.items():
        if value is None:
            return f"{what} is null"
        if not isinstance(value, str):
            return f"{what} is not text but {type(value).__name__}"
        if not value and what != "prompt":
            return f"{what} is empty"
        if not is_unicode(value):
            return f"{what} is not valid Unicode"
    return None


def pack(windows: Sequence[Window], tokens_per_batch: int) -> list[list[Window]]:
    """Batches of windows of similar length, at most `tokens_per_batch` tokens each, padding included.

    A longer window is a batch of its own. The result depends on the windows alone.
    """
    ordered = sorted(windows, key=lambda window: len(window.ids), reverse=True)
    batches: list[list[Window]] = []
    for window in ordered:
        # Sorted longest first, so the first window of a batch sets its width.
        if batches and (len(batches[-1]) + 1) * len(batches[-1][0].ids) <= tokens_per_batch:
            batches[-1].append(window)
        else:
            batches.append([window])
    return batches


def to_batch(windows: Sequence[Window]) -> Batch:
    """Windows right-padded to the longest, as tensors `[rows, tokens]`."""
    width = max(len(window.ids) for window in windows)
    input_ids = torch.zeros(len(windows), width, dtype=torch.int64)
    attention_mask = torch.zeros(len(windows), width, dtype=torch.bool)
    targets = torch.zeros(len(windows), width, dtype=torch.bool)
    for row, window in enumerate(windows):
        length = len(window.ids)
        input_ids[row, :length] = torch.tensor(window.ids)
        attention_mask[row, :length] = True
        targets[row, :length] = torch.tensor(window.targets)
    return Batch(input_ids, attention_mask, targets, tuple(window.key for window in windows))
