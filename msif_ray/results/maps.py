"""Names of tracked maps as a table of layers and kinds."""

from collections.abc import Sequence


def place_of(name: str) -> tuple[int | None, str]:
    """A map's layer, the first number in its dotted name (None: it has none), and its kind, what comes after that:
    `gpt_neox.layers.3.mlp.dense_4h_to_h` is `(3, "mlp.dense_4h_to_h")`."""
    layer, _, kind = _split(name)
    return layer, kind or name


def short_names(names: Sequence[str]) -> list[str]:
    """The maps' layers and kinds; whole names where these are not enough to tell all of them apart."""
    places = [place_of(name) for name in names]
    found = [kind if layer is None else f"{layer}.{kind}" for layer, kind in places]
    return found if len(set(found)) == len(found) else list(names)


def grid(names: Sequence[str]) -> tuple[list[int | None], list[str], list[tuple[int, int]]]:
    """The layers and the kinds there are, and the place `(layer, kind)` of every map in a table of them, one for each.

    Of a model with several stacks of layers, such as a vision tower's, kinds are whole names with `*` for the layer.
    """
    places = [place_of(name) for name in names]
    if len(set(places)) < len(places):
        places = [
            (layer, stack if layer is None else f"{stack}.*.{kind}".strip("."))
            for layer, stack, kind in map(_split, names)
        ]
    layers = sorted({layer for layer, _ in places}, key=lambda layer: -1 if layer is None else layer)
    kinds = list(dict.fromkeys(kind for _, kind in places))
    return layers, kinds, [(layers.index(layer), kinds.index(kind)) for layer, kind in places]


def _split(name: str) -> tuple[int | None, str, str]:
    """The first number in a dotted name, and what is before and after it; all of it is before where there is none."""
    parts = name.split(".")
    number = next((place for place, part in enumerate(parts) if part.isdigit()), None)
    if number is None:
        return None, name, ""
    return int(parts[number]), ".".join(parts[:number]), ".".join(parts[number + 1 :])
