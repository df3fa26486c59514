"""Where a sequence ends: with one EOS, though a tokenizer may add its own to every text."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def prompt_tokens(tokenizer: "PreTrainedTokenizerBase", prompt: str) -> list[int]:
    """A prompt's tokens by the tokenizer's own defaults, but for the EOS: a completion follows."""
    ids = list(tokenizer(prompt)["input_ids"])
    return ids[:-1] if _adds_eos(tokenizer) else ids


def appended(tokenizer: "PreTrainedTokenizerBase", append_eos: bool, by_defaults: bool) -> list[int]:
    """The EOS to append, if any: none to a text that is tokenised `by_defaults` which add it."""
    return [tokenizer.eos_token_id] if append_eos and not (by_defaults and _adds_eos(tokenizer)) else []


def _adds_eos(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether the tokenizer's defaults end a text with EOS. No text's own tokens tell: it may end with EOS itself, and
    of an empty one EOS may be what begins it."""
    with_special, without = (tokenizer("a", add_special_tokens=special)["input_ids"][-1:] for special in (True, False))
    return bool(with_special == [tokenizer.eos_token_id] != without)
