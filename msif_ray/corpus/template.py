"""A conversation as the tokenizer's own chat template writes it."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from msif_ray.errors import one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = list[dict[str, Any]]

GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")  # the template's own mark of what the assistant writes

# A template is a program. These are what its expressions raise over messages that it was not written for.
FAULTS = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def rendered(tokenizer: "PreTrainedTokenizerBase", messages: Messages, add_generation_prompt: bool = False) -> str:
    """What the template writes. Raises ValueError, which says why, where it refuses the messages."""
    with _refusals():  # of a batch of one: by itself transformers takes no conversation without messages
        (text,) = tokenizer.apply_chat_template([messages], tokenize=False, add_generation_prompt=add_generation_prompt)
    return str(text)


def rendered_before(tokenizer: "PreTrainedTokenizerBase", messages: Messages) -> str:
    """What the template writes before it lets the assistant speak, after `messages`, which may be none."""
    try:
        return rendered(tokenizer, messages, add_generation_prompt=True)
    except ValueError as error:
        if messages:
            raise
        raise ValueError(
            f"the assistant speaks first, and the template does not say what comes before that: {error}"
        ) from None


def marks_generation(tokenizer: "PreTrainedTokenizerBase") -> bool:
    with _refusals():
        return GENERATION.search(tokenizer.get_chat_template()) is not None


def rendered_and_marked(tokenizer: "PreTrainedTokenizerBase", messages: Messages) -> tuple[str, list[tuple[int, int]]]:
    """What the template writes, and which characters of it `[start, end)` it marks as the assistant's."""
    from transformers.utils.chat_template_utils import render_jinja_template  # here: what only reads needs none of it

    # As `apply_chat_template` calls it, which makes tokens of the characters and then loses some at spaces.
    given = [{key: value for key, value in message.items() if value is not None} for message in messages]
    with _refusals():
        (text,), (marked,) = render_jinja_template(
            conversations=[given],
            chat_template=tokenizer.get_chat_template(),
            return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
        )
    return text, marked


@contextmanager
def _refusals() -> Iterator[None]:
    """What a template raises over a conversation as a ValueError that says so."""
    try:
        yield
    except TemplateError as error:
        raise ValueError(f"the chat template refuses it: {one_line(error)}") from None
    except FAULTS as error:
        raise ValueError(f"the chat template fails on it: {type(error).__name__}: {one_line(error)}") from None
