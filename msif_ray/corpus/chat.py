"""Conversations as tokens: the tokenizer's own chat template, and which tokens the assistant wrote."""

from typing import TYPE_CHECKING, Any

from msif_ray.corpus.spans import overlapping
from msif_ray.corpus.template import Messages, marks_generation, rendered, rendered_and_marked, rendered_before
from msif_ray.unicode import is_unicode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def encode_chat(
    tokenizer: "PreTrainedTokenizerBase", messages: Messages, since: int = 0
) -> tuple[list[int], list[bool]]:
    """A conversation's tokens and which of them the assistant wrote in turn `since` and after it.

    Those are the tokens that overlap what the template marks (`{% generation %}`), where it marks any. Otherwise an
    assistant's turn is what the conversation up to and with it has more than the conversation before it with the
    generation prompt, and both must be the first tokens of the whole one exactly: so it holds the end of the turn, as
    training on assistant turns does, and no text is ever searched for. Before a first turn that is the assistant's, the
    template must write its generation prompt for a conversation without messages; not all do.

    Raises ValueError, which says why, where the template refuses the conversation or its turns are no such prefixes.
    """
    if marks_generation(tokenizer):
        return _marked(tokenizer, messages, since)
    whole = _tokens(tokenizer, rendered(tokenizer, messages))
    targets = [False] * len(whole)
    for number, message in enumerate(messages):
        if message["role"] == "assistant" and number >= since:
            before = _tokens(tokenizer, rendered_before(tokenizer, messages[:number]))
            after = _tokens(tokenizer, rendered(tokenizer, messages[: number + 1]))
            if whole[: len(before)] != before or whole[: len(after)] != after or len(after) < len(before):
                raise ValueError(
                    f"the chat template does not mark what the assistant writes, and turn {number} does not begin and "
                    "end between tokens of the whole conversation"
                )
            targets[len(before) : len(after)] = [True] * (len(after) - len(before))
    return whole, targets


def _marked(tokenizer: "PreTrainedTokenizerBase", messages: Messages, since: int) -> tuple[list[int], list[bool]]:
    """As `encode_chat`, where the template marks what the assistant writes."""
    if not tokenizer.is_fast:
        raise ValueError(
            f"the tokenizer ({type(tokenizer).__name__}) has no offsets that tell which tokens the chat template marks"
        )
    text, marked = rendered_and_marked(tokenizer, messages)
    whole, targets = overlapping(tokenizer, text, *marked)
    before = _tokens(tokenizer, rendered(tokenizer, messages[:since])) if since else []
    if whole[: len(before)] != before:
        raise ValueError(f"turn {since} does not begin between tokens of the whole conversation")
    return whole, [False] * len(before) + targets[len(before) :]


def _tokens(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def chat_fault(messages: Any) -> str | None:
    """What is wrong with the messages of one document, or None: a list of `{role, content}`, both text, and an
    assistant's among them. All that a message holds must be valid Unicode."""
    fault = turns_fault(messages)
    if fault is None and not any(message["role"] == "assistant" for message in messages):
        return "no message is the assistant's"
    return fault


def turns_fault(messages: Any) -> str | None:
    """The same of some turns of a conversation, whoever's they are."""
    if messages is None:
        return "messages is null"
    if not isinstance(messages, list):
        return f"messages is not a list but {type(messages).__name__}"
    for number, message in enumerate(messages):
        if not isinstance(message, dict):
            return f"message {number} is not a mapping but {type(message).__name__}"
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                return f"the {key} of message {number} is not text"
        if not is_unicode(message):  # all of it: a template may write more than its content
            return f"message {number} is not valid Unicode"
    return None


def chat_text(messages: Any) -> str:
    """A conversation to be read or searched: `role: content`, a paragraph each; empty for what is none."""
    return "" if chat_fault(messages) is not None else turns_text(messages)


def turns_text(messages: Messages) -> str:
    """As `chat_text`, of some turns, whoever's they are."""
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)
