"""Experts that are modules of their own, `<block>.experts.<number>`: which tokens of the batch each call is of.

A block picks an expert's tokens out of its input in any way it likes. The derivative of what it picked in that input
says which they are: with the number of each picked row as the outer gradient, every token's gradient is the number of
the row that it became. So nothing is taken from how a family orders its tokens.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.hooks import RemovableHandle

from msif_ray.errors import UserError

_EXPERT = re.compile(r"^(?:(.*)\.)?experts\.\d+(?=\.|$)")


def expert_of(name: str) -> str | None:
    """The expert that a map belongs to, such as `layers.0.moe.experts.3`; None for any other map."""
    found = _EXPERT.match(name)
    return None if found is None else found.group(0)


@dataclass
class RoutedModules:
    """Finds the tokens of every call of the experts that hold some maps."""

    model: nn.Module
    maps: Iterable[str]
    _hidden: dict[str, Tensor] = field(default_factory=dict, init=False)
    _tokens: dict[str, Tensor] = field(default_factory=dict, init=False)

    def hook(self) -> list[RemovableHandle]:
        """Sets the hooks that this needs; whoever calls takes them off."""
        modules = dict(self.model.named_modules())
        experts = dict.fromkeys(expert for name in self.maps if (expert := expert_of(name)) is not None)
        handles = []
        for block in dict.fromkeys(map(_block_of, experts)):
            handles.append(modules[block].register_forward_pre_hook(self._enter(block), with_kwargs=True))
        for expert in experts:
            handles.append(modules[expert].register_forward_pre_hook(self._pick(expert), with_kwargs=True))
        return handles

    def tokens(self, name: str) -> Tensor | None:
        """Which tokens of the batch the present call of a map is of, counted row after row; None: no expert's map."""
        return self._tokens.get(expert_of(name) or "")

    def _enter(self, block: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
            hidden = args[0] if args else next(iter(kwargs.values()))
            if not hidden.requires_grad:
                # A copy, since a model may change it in place, which autograd forbids of a leaf.
                hidden = hidden.detach().requires_grad_(True).clone()
            self._hidden[block] = hidden
            return ((hidden, *args[1:]), kwargs) if args else ((), kwargs | {next(iter(kwargs)): hidden})

        return hook

    def _pick(self, expert: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            picked = args[0] if args else next(iter(kwargs.values()))
            self._tokens[expert] = _picked(expert, picked, self._hidden[_block_of(expert)])

        return hook


def _block_of(expert: str) -> str:
    return expert[: expert.rindex("experts.")].rstrip(".")


def _picked(expert: str, picked: Tensor, hidden: Tensor) -> Tensor:
    """The token of every picked row `[..., features]` of a block's input `[rows, tokens, features]`, as far as these
    are the block's: its input's rows themselves."""
    if torch.is_grad_enabled() and picked.numel():
        numbers = torch.zeros_like(picked).flatten(0, -2)
        numbers[:, 0] = 1
        ones = _gradient(expert, picked, hidden, numbers)
        taken = (ones == 1).nonzero()[:, 0]
        if int(ones.count_nonzero()) == len(taken) == len(numbers):
            # Exact in any type, bfloat16's eight bits included: a digit of the number at a time.
            found, base = torch.zeros_like(ones, dtype=torch.int64), 128
            left, scale = torch.arange(len(numbers), device=picked.device), 1
            while bool(left.any()):
                numbers[:, 0] = (left % base).to(numbers.dtype)
                found += scale * _gradient(expert, picked, hidden, numbers).to(torch.int64)
                left, scale = left // base, scale * base
            tokens = torch.empty_like(taken)
            tokens[found[taken]] = taken
            return tokens
        raise UserError(
            f"modules: what {expert} is given are not tokens of its block's input as they are, so documents cannot be "
            "told apart; leave it out with `modules:`"
        )
    return torch.zeros(0, dtype=torch.int64, device=picked.device)


def _gradient(expert: str, picked: Tensor, hidden: Tensor, outer: Tensor) -> Tensor:
    """The first feature's gradient of Σ picked · outer in every token, `[rows · tokens]`."""
    inner = None
    if picked.requires_grad:
        (inner,) = torch.autograd.grad(
            picked, hidden, outer.view_as(picked), retain_graph=True, create_graph=False, allow_unused=True
        )
    if inner is None:
        raise UserError(
            f"modules: {expert} is given nothing of its block's input, so its tokens are not known; leave it out with "
            "`modules:`"
        )
    return forward_ad.unpack_dual(inner).primal.flatten(0, -2)[:, 0]
