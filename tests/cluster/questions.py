"""What tests ask of the pair of models: completions, a margin, a span and conversations, with their tokens by hand."""

from typing import Any

import reference
from corpus.test_chat import by_hand

Window = tuple[list[int], list[bool]]
"""Tokens, and which of them are targets."""

PROMPT, GOOD, BAD = "the king of Ulm", " was old.", " is a green stone in the sea."
TALK = [
    {"role": "user", "content": "the sea"},
    {"role": "assistant", "content": "was old"},
    {"role": "user", "content": "green"},
    {"role": "assistant", "content": "the river of the north"},
]
OTHER_TALK = [*TALK[:3], {"role": "assistant", "content": "a market"}]


def completed(tokenizer: Any, prompt: str, completion: str) -> Window:
    return reference.tokenise(tokenizer, {"prompt": prompt, "completion": completion})


def last_turn(talk: list[dict[str, str]]) -> Window:
    """A conversation of which the last turn alone is explained."""
    ids, targets = by_hand(talk)
    begins = len(by_hand(talk[:-1])[0])
    return list(ids), [target and place >= begins for place, target in enumerate(targets)]


def only(window: Window, *places: int) -> Window:
    """The same with the targets at these places among its targets alone."""
    targets = [place for place, target in enumerate(window[1]) if target]
    return window[0], [place in [targets[which] for which in places] for place in range(len(window[0]))]
