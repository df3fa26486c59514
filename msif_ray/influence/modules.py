"""Tracked linear maps: which modules of a model influence is computed over, and their shapes."""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from msif_ray.errors import UserError


@dataclass(frozen=True)
class LinearMap:
    """One linear map y = W x (+ b) of the model, whatever the layout of its stored weight.

    Its gradient has shape `[out, columns]`: the weight's and, as the last column, the bias's.
    Dimensions come from the module's attributes, since a sharded weight has no shape of its own.
    """

    name: str
    in_features: int
    out_features: int
    bias: bool

    @property
    def columns(self) -> int:
        """Input features, plus one for the constant 1 that the bias multiplies."""
        return self.in_features + int(self.bias)

    @property
    def shape(self) -> tuple[int, int]:
        """`(out, columns)`, the shape of the map's gradient."""
        return self.out_features, self.columns

    @property
    def parameters(self) -> int:
        return self.out_features * self.columns


def find_linear_maps(model: nn.Module, patterns: Sequence[str] | None = None) -> dict[str, LinearMap]:
    """The model's tracked maps by name, in the order of `named_modules`.

    `patterns` are shell globs over dotted module names, and must each match a linear map. The
    default is every nn.Linear and Conv1D inside the blocks (a name with a layer number in it).
    Embeddings are not linear maps of activations; the LM head is tracked only when a pattern
    without wildcards names it.

    Raises UserError for a pattern that matches nothing, and for two maps that share one weight.
    """
    head, conv1d = output_head(model), _conv1d()
    candidates = {name: module for name, module in model.named_modules() if isinstance(module, (nn.Linear, conv1d))}
    if patterns is None:
        chosen = [
            name
            for name, module in candidates.items()
            if module is not head and any(part.isdigit() for part in name.split("."))
        ]
    else:
        chosen = _match(candidates, head, patterns)
    if not chosen:
        raise UserError("modules: the model has no linear map inside its blocks; name maps with `modules:`")
    _refuse_shared_weights(model, chosen)
    return {name: _describe(name, candidates[name]) for name in chosen}


def output_head(model: nn.Module) -> nn.Module | None:
    """The map from hidden states to logits, where the model says which that is."""
    getter = getattr(model, "get_output_embeddings", None)
    return getter() if getter is not None else None


def _match(candidates: dict[str, nn.Module], head: nn.Module | None, patterns: Sequence[str]) -> list[str]:
    names: set[str] = set()
    for pattern in patterns:
        found = {
            name
            for name, module in candidates.items()
            if fnmatchcase(name, pattern) and (module is not head or name == pattern)
        }
        if not found:
            raise UserError(
                f"modules: {pattern!r} matches no linear map; the model has, for example, "
                + ", ".join(list(candidates)[:4])
            )
        names |= found
    return [name for name in candidates if name in names]


def _refuse_shared_weights(model: nn.Module, chosen: list[str]) -> None:
    modules = dict(model.named_modules())
    owners: dict[int, list[str]] = {}
    for name, module in modules.items():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(name)
    for name in chosen:
        others = [owner for owner in owners[id(modules[name].weight)] if owner != name]
        if others:
            raise UserError(
                f"modules: {name} shares its weight with {others[0]}, so it has no gradient of its own; "
                "leave it out with `modules:`"
            )


def _conv1d() -> Any:
    """GPT-2's linear map, whose weight is transposed. Imported where there is a model: without one, what else this
    package does starts three times as fast."""
    from transformers.pytorch_utils import Conv1D

    return Conv1D


def _describe(name: str, module: nn.Module) -> LinearMap:
    if isinstance(module, _conv1d()):
        return LinearMap(name, in_features=module.nx, out_features=module.nf, bias=True)
    if isinstance(module, nn.Linear):
        return LinearMap(name, module.in_features, module.out_features, module.bias is not None)
    raise UserError(f"modules: {name} is a {type(module).__name__}, not a linear map")
