"""Which tokens a span of characters is: those that overlap it, by the tokenizer's own offsets."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from msif_ray.corpus.template import Messages, rendered, rendered_before

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = Sequence[int]
"""From the first character to before the second."""


def overlapping(tokenizer: "PreTrainedTokenizerBase", text: str, *spans: Span) -> tuple[list[int], list[bool]]:
    """A text's tokens without special ones, and which of them have a character of one of the spans.

    Characters are Unicode code points. A token that is partly in the span is in it; several tokens of one character
    are all in it. Where a tokenizer's offsets leave out the space that a token begins with, so does this.
    """
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    wanted = bytearray(len(text))
    for start, stop in spans:
        wanted[start:stop] = b"\1" * (stop - start)
    return list(found["input_ids"]), [1 in wanted[first:last] for first, last in found["offset_mapping"]]


def overlapping_turn(
    tokenizer: "PreTrainedTokenizerBase", messages: Messages, span: Span
) -> tuple[list[int], list[bool]]:
    """A conversation's tokens, and which of them have a character of the span of its last turn's content.

    That begins where the template lets the assistant write, white space aside. Raises ValueError where the template
    writes something else there.
    """
    whole, before = rendered(tokenizer, messages), rendered_before(tokenizer, messages[:-1])
    content = messages[-1]["content"]
    body = content.strip()
    after = whole[len(before) :]
    if not whole.startswith(before) or not body or not after.lstrip().startswith(body):
        raise ValueError(
            "the chat template does not write the last turn's content where its generation prompt ends, so a span of "
            "it cannot be told; leave it null, or give prompt and completion"
        )
    moved = len(before) + len(after) - len(after.lstrip()) - (len(content) - len(content.lstrip()))
    # Of white space that the template leaves out, nothing is there to overlap.
    start, stop = max(span[0], len(content) - len(content.lstrip())), min(span[1], len(content.rstrip()))
    return overlapping(tokenizer, whole, (start + moved, stop + moved))
