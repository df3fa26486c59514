"""Names of tracked maps as a table of layers and kinds."""

from collections.abc import Sequence


def place_of(name: str) -> tuple[int | None, str]:
    """A map's layer, the first number in its dotted name (None: it has none), and its kind, what comes after that:
    `gpt_neox.layers.3.mlp.dense_4h_to_h` is `(3, "mlp.dense_4h_to_h")`."""
    parts = name.split(".")
    number = next((place for place, part in enumerate(parts) if part.isdigit()), None)
    if number is None:
        return None, name
    return int(parts[number]), ".".join(parts[number + 1 :]) or name


def short_name(name: str) -> str:
    """A map's layer and kind."""
    layer, kind = place_of(name)
    return kind if layer is None else f"{layer}.{kind}"


def grid(names: Sequence[str]) -> tuple[list[int | None], list[str], list[tuple[int, int]]]:
    """The layers and the kinds there are, and the place `(layer, kind)` of every map in a table of them."""
    places = [place_of(name) for name in names]
    layers = sorted({layer for layer, _ in places}, key=lambda layer: -1 if layer is None else layer)
    kinds = list(dict.fromkeys(kind for _, kind in places))
    return layers, kinds, [(layers.index(layer), kinds.index(kind)) for layer, kind in places]
