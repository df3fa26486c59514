"""Lengths beyond which a model computes all that it is given at once in another way.

`rope_type: longrope` (Phi-3, Phi-4) has one set of rotary frequencies for sequences of at most
`original_max_position_embeddings` tokens and another for longer ones, and transformers takes one of them for a whole
batch, by its padded width. So no sequence may stand beside one from the other side of such a length.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Switches = tuple[int, ...]


def switches_of(config: Any) -> Switches:
    """The lengths in tokens, ascending, after which a model of this configuration computes otherwise; mostly none."""
    text = config.get_text_config()
    return tuple(sorted({int(_original(each, text)) for each in _rotary(text) if _type(each) == "longrope"}))


def side(length: int, switches: Sequence[int]) -> int:
    """How many of the lengths a sequence of so many tokens is beyond."""
    return sum(length > each for each in switches)


def _rotary(config: Any) -> Iterator[Mapping[str, Any]]:
    """The settings of rotary embeddings: one, or one for each type of layer."""
    for name in ("rope_parameters", "rope_scaling"):
        found = getattr(config, name, None)
        if isinstance(found, Mapping):
            yield found
            yield from (each for each in found.values() if isinstance(each, Mapping))


def _type(settings: Mapping[str, Any]) -> Any:
    return settings.get("rope_type") or settings.get("type")


def _original(settings: Mapping[str, Any], config: Any) -> int:
    own = settings.get("original_max_position_embeddings")
    return own or getattr(config, "original_max_position_embeddings", None) or config.max_position_embeddings
