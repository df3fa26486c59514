"""Conversations as tokens: the tokenizer's own chat template, and which tokens the assistant wrote."""

from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from msif_ray.corpus.unicode import is_unicode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GENERATION = "generation"  # the template's own mark of what the assistant writes


def encode_chat(
    tokenizer: "PreTrainedTokenizerBase", messages: list[dict[str, Any]], since: int = 0
) -> tuple[list[int], list[bool]]:
    """A conversation's tokens and which of them the assistant wrote in turn `since` and after it.

    Those are what the template marks (`{% generation %}`), where it marks any. Otherwise an assistant's turn is what
    the conversation up to and with it has more than the conversation before it with the generation prompt, and both
    must be the first tokens of the whole one exactly: so it holds the end of the turn, as training on assistant turns
    does, and no text is ever searched for.

    Raises ValueError, which says why, where the template refuses the conversation or its turns are no such prefixes.
    """
    whole = _tokens(tokenizer, messages)
    if _marks_generation(tokenizer):
        marked = _apply(tokenizer, messages, return_assistant_tokens_mask=True)["assistant_masks"]
        first = _beginning(tokenizer, messages, since, whole) if since else 0
        return whole, [bool(mark) and place >= first for place, mark in enumerate(marked)]
    targets = [False] * len(whole)
    for number, message in enumerate(messages):
        if message["role"] == "assistant" and number >= since:
            before = _tokens(tokenizer, messages[:number], add_generation_prompt=True) if number else []
            after = _tokens(tokenizer, messages[: number + 1])
            if whole[: len(before)] != before or whole[: len(after)] != after or len(after) < len(before):
                raise ValueError(
                    f"the chat template does not mark what the assistant writes, and turn {number} does not begin and "
                    "end between tokens of the whole conversation"
                )
            targets[len(before) : len(after)] = [True] * (len(after) - len(before))
    return whole, targets


def _beginning(
    tokenizer: "PreTrainedTokenizerBase", messages: list[dict[str, Any]], turn: int, whole: list[int]
) -> int:
    """Where a turn, not the first, begins among the `whole` conversation's tokens."""
    before = _tokens(tokenizer, messages[:turn])
    if whole[: len(before)] != before:
        raise ValueError(f"turn {turn} does not begin between tokens of the whole conversation")
    return len(before)


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
    # All of it: a template may write more of a message than its content.
    return None if is_unicode(messages) else "messages is not valid Unicode"


def chat_text(messages: Any) -> str:
    """A conversation to be read or searched: `role: content`, a paragraph each; empty for what is none."""
    return "" if chat_fault(messages) is not None else turns_text(messages)


def turns_text(messages: list[dict[str, Any]]) -> str:
    """As `chat_text`, of some turns, whoever's they are."""
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)


def rendered_turns(tokenizer: "PreTrainedTokenizerBase", messages: list[dict[str, Any]]) -> tuple[str, str]:
    """A conversation as the template writes it, and what it writes before it lets the assistant take the last turn."""
    before = _apply(tokenizer, messages[:-1], tokenize=False, add_generation_prompt=True) if len(messages) > 1 else ""
    return _apply(tokenizer, messages, tokenize=False), before


def _marks_generation(tokenizer: "PreTrainedTokenizerBase") -> bool:
    template = tokenizer.get_chat_template()
    tags = [part.split("%}")[0].strip("-+ \n") for part in template.split("{%")[1:]]
    return GENERATION in tags


def _tokens(tokenizer: "PreTrainedTokenizerBase", messages: list[dict[str, Any]], **options: Any) -> list[int]:
    return list(_apply(tokenizer, messages, **options)["input_ids"])


def _apply(tokenizer: "PreTrainedTokenizerBase", messages: list[dict[str, Any]], **options: Any) -> Any:
    options = {"tokenize": True, "return_dict": True} | options
    try:
        return tokenizer.apply_chat_template(messages, **options)
    except TemplateError as error:
        raise ValueError(f"the chat template refuses it: {' '.join(str(error).split())[:200]}") from None
