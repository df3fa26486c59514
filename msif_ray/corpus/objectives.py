"""What a stage's objective makes of a document: its tokens, and what they are to predict."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from msif_ray.corpus.chat import chat_text, turns_text
from msif_ray.corpus.ends import appended
from msif_ray.corpus.packed import Part
from msif_ray.corpus.preferences import EncodedPair, Pairs, encode_pair
from msif_ray.corpus.reader import Document
from msif_ray.corpus.windows import Encoded, Preferred, Skipped, Window, encode, text_fault
from msif_ray.influence.batch import WindowKey

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# What is shown before the two sequences of a pair, and before a text's class.
CHOSEN, REJECTED, LABEL = "\n\n[chosen] ", "\n\n[rejected] ", "\n\n[label: "


@dataclass(frozen=True)
class Classes:
    """A text has one of these classes, by number; one longer than allowed is skipped, or cut where `truncate`."""

    names: tuple[str, ...]
    truncate: bool = False

    def number(self, label: Any) -> int:
        """The class that a label names, or is the number of. Raises ValueError, which says why it is none."""
        if label is None:
            raise ValueError("label is null")
        if isinstance(label, str) and label in self.names:
            return self.names.index(label)
        if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < len(self.names):
            return label
        if not isinstance(label, str | int) or isinstance(label, bool):
            raise ValueError(f"label is not a class's name or number but {type(label).__name__}")
        some = ", ".join(self.names[:5]) + (" and more" if len(self.names) > 5 else "")
        raise ValueError(f"label {str(label)[:50]!r} is no class of the model: {some}")

    def name(self, label: Any) -> str:
        """The name of the class that a label means."""
        return self.names[self.number(label)]


Objective = Classes | Pairs | None
"""None: a language model's, whose documents are windows of tokens."""


@dataclass(frozen=True)
class EncodedText(Encoded):
    """A text's tokens and its class: one window, and every token counts (`Batch.predicts`)."""

    label: int = 0

    def windows(self, max_tokens: int) -> Iterator[Window]:
        yield Window(WindowKey(self.document_id, 0), self.ids, self.targets, self.label)


def encode_for(
    objective: Objective,
    tokenizer: "PreTrainedTokenizerBase",
    document: Document,
    append_eos: bool,
    max_tokens: int | None,
) -> Encoded | Skipped:
    """A document as the objective reads it, or the reason why it cannot; `max_tokens` None: however long it is."""
    if objective is None:
        return encode(tokenizer, document, append_eos)
    if isinstance(objective, Pairs):
        return encode_pair(objective, tokenizer, document, append_eos, max_tokens)
    return _encode_text(objective, tokenizer, document, append_eos, max_tokens)


def as_text(objective: Objective, document: Document, tokenizer: "PreTrainedTokenizerBase") -> str:
    """A document to be read: a text with its class, its prompt with its completion or with two, its messages, or its
    own tokens of a packed row."""
    if isinstance(objective, Classes):
        return f"{document.text}{_label(objective, document)}"
    if isinstance(objective, Pairs):
        prompt = _read(document.prompt) if document.has_prompt else ""
        return f"{prompt}{CHOSEN}{_read(document.text)}{REJECTED}{_read(document.rejected)}".lstrip("\n")
    if isinstance(document.text, Part):
        return str(tokenizer.decode(document.text.own))
    if document.is_chat:
        return chat_text(document.text)
    return f"{document.prompt}{document.text}" if document.has_prompt else str(document.text)


Frame = dict[int, tuple[str, str]]
"""What is put before and after some tokens to be read: what is no token stands with the one beside it."""


def frame(objective: Objective, document: Document, encoded: Encoded | Skipped) -> Frame:
    """What tells a document's sequences apart, or its label, where its tokens are shown."""
    if isinstance(objective, Classes) and isinstance(encoded, Encoded):
        return {len(encoded.ids) - 1: ("", _label(objective, document))}
    if isinstance(encoded, EncodedPair):
        return {0: (CHOSEN.lstrip("\n"), ""), encoded.split: (REJECTED, "")}
    return {}


def framed(shown: list[str], around: Frame) -> list[str]:
    """What each token stands for, with what is put around some of them."""
    found = list(shown)
    for place, (before, after) in around.items():
        found[place] = f"{before}{shown[place]}{after}"
    return found


def _label(classes: Classes, document: Document) -> str:
    return f"{LABEL}{classes.name(document.label)}]"


def _read(value: Any) -> str:
    return turns_text(value) if isinstance(value, list) else str(value)


def empty_window(objective: Objective) -> Window:
    """What a rank without work runs beside others."""
    key = WindowKey("", 0)
    if isinstance(objective, Classes):
        return Window(key, (0, 0), (True, True), 0)
    if isinstance(objective, Pairs) and not objective.apart:
        preferred = Preferred(2, objective.beta, 0.0, objective.length_normalised)
        return Window(key, (0, 0, 0, 0), (False, True, False, True), preference=preferred)
    return Window(key, (0, 0), (False, True))


def _encode_text(
    classes: Classes,
    tokenizer: "PreTrainedTokenizerBase",
    document: Document,
    append_eos: bool,
    max_tokens: int | None,
) -> Encoded | Skipped:
    fault = text_fault(document)
    if fault is not None:
        return Skipped(document.id, fault)
    try:
        label = classes.number(document.label)
    except ValueError as error:
        return Skipped(document.id, str(error))
    ends = appended(tokenizer, append_eos, by_defaults=True)
    cut: dict[str, Any] = {}
    if classes.truncate and max_tokens is not None:
        cut = {"truncation": True, "max_length": max_tokens - len(ends)}
    ids = (*tokenizer(document.text, **cut)["input_ids"], *ends)
    if not ids:
        return Skipped(document.id, "no tokens")
    if max_tokens is not None and len(ids) > max_tokens:
        return Skipped(document.id, f"longer than max_tokens ({max_tokens}), and a classifier reads a text whole")
    return EncodedText(document.id, ids, (True,) * len(ids), label)
