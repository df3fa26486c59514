"""Tracked linear maps: which modules of a model influence is computed over, and their shapes."""

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from msif_ray.errors import UserError
from msif_ray.influence.blocks import Blocks, cut
from msif_ray.influence.experts import expert_maps, is_fused, unknown_experts
from msif_ray.influence.heads import classification_head
from msif_ray.influence.linear import LinearMap

__all__ = ["LinearMap", "find_linear_maps", "output_head"]

# Classes of what chooses a token's experts. Other gates choose nothing: a shared expert's, or a recurrence's.
_ROUTER = re.compile(r"(Router|(MoE|TopK)\w*(Gate|Gating))$", re.IGNORECASE)


def find_linear_maps(
    model: nn.Module, patterns: Sequence[str] | None = None, blocks: Blocks | None = None
) -> dict[str, LinearMap]:
    """The model's tracked maps by name, in the order of `named_modules`.

    `patterns` are shell globs over dotted module names, and must each match a linear map. The
    default is every nn.Linear and Conv1D inside the blocks (a name with a layer number in it), and every matrix of
    every expert there (`experts`), but for routers and what no text enters (a vision tower), which no pattern matches.
    Embeddings are not linear maps of activations; the LM head is tracked only when a pattern without wildcards names
    it, a classification head never.
    `blocks` cuts the maps of queries, keys and values (`blocks.cut`).

    Raises UserError for a pattern that matches nothing, for two maps that share one weight, by default for experts in
    a layout that is not known, and for what `blocks` cannot cut.
    """
    head = output_head(model)
    candidates = _candidates(model)
    for name in [name for name in candidates if name.partition(".")[0] in classification_head(model)]:
        del candidates[name]
        if patterns is not None and name in patterns:
            raise UserError(f"modules: {name} is a classification head, which no other stage has; leave it out")
    untracked = next((name for name, module in model.named_modules() if module is head), None)
    if patterns is None:
        unknown = unknown_experts(model)
        if unknown is not None:
            raise UserError(
                f"modules: {unknown} is a parameter of many matrices in a layout that is not known, which would be "
                "left out; name the maps to track with `modules:`"
            )
        chosen = [name for name in candidates if name != untracked and any(part.isdigit() for part in name.split("."))]
    else:
        chosen = _match(candidates, untracked, patterns)
    if not chosen:
        raise UserError("modules: the model has no linear map inside its blocks; name maps with `modules:`")
    found = {name: candidates[name] for name in chosen}
    _refuse_shared_weights(model, found)
    if blocks is None:
        return found
    config: Any = model.config
    return cut(found, config.get_text_config(), blocks)


def _candidates(model: nn.Module) -> dict[str, LinearMap]:
    found, linear = {}, (nn.Linear, _conv1d())
    routers = tuple(f"{name}." for name, module in model.named_modules() if _ROUTER.search(type(module).__name__))
    without_text = tuple(f"{name}." for name, module in model.named_modules() if _of_no_text(module))
    for name, module in model.named_modules():
        if isinstance(module, linear) and not f"{name}.".startswith(routers + without_text):
            found[name] = _describe(name, module)
        elif is_fused(module) and not name.startswith(without_text):
            found |= {described.name: described for described in expert_maps(name, module)}
    return found


def _of_no_text(module: nn.Module) -> bool:
    """Whether it is the part of a multimodal model that takes images or sounds: transformers says what a model takes,
    in several parts of it by their own classes, as a name or as several."""
    modalities = getattr(module, "input_modalities", None)
    return modalities is not None and "text" not in modalities


def output_head(model: nn.Module) -> nn.Module | None:
    """The map from hidden states to logits, where the model says which that is."""
    getter = getattr(model, "get_output_embeddings", None)
    return getter() if getter is not None else None


def _match(candidates: dict[str, LinearMap], head: str | None, patterns: Sequence[str]) -> list[str]:
    names: set[str] = set()
    for pattern in patterns:
        found = {name for name in candidates if fnmatchcase(name, pattern) and (name != head or name == pattern)}
        if not found:
            raise UserError(
                f"modules: {pattern!r} matches no linear map; the model has, for example, "
                + ", ".join(list(candidates)[:4])
            )
        names |= found
    return [name for name in candidates if name in names]


def _refuse_shared_weights(model: nn.Module, chosen: dict[str, LinearMap]) -> None:
    modules = dict(model.named_modules())
    owners: dict[int, list[str]] = {}
    for name, module in modules.items():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(name)
    for name, described in chosen.items():
        weight = "weight" if described.expert is None else described.expert.weight
        others = [o for o in owners[id(getattr(modules[described.holder], weight))] if o != described.holder]
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
    if isinstance(module, nn.Linear):
        return LinearMap(name, module.in_features, module.out_features, module.bias is not None)
    described: Any = module
    return LinearMap(name, in_features=described.nx, out_features=described.nf, bias=True)
