"""Mixtures of experts whose experts are fused: one parameter `[experts, out, in]` for a matrix of all of them.

Each expert's matrices are maps of their own, named `<module>.<expert>.<parameter>`, and only tokens that the router
sent to the expert are positions of them: A and S are means over those of them that predict a target, and an expert
that no such token reached has A = S = 0 (EK-FAC's mean of nothing; its corrected eigenvalues are zero as well). The
choice of experts is taken as fixed, as the model's own gradient takes it; routers' weights are not tracked.

While a model is captured, its fused experts compute one expert after the other, which is what transformers' "eager"
and "grouped_mm" compute.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from msif_ray.influence.linear import Expert, LinearMap

Observe = Callable[[str, Tensor, Tensor, Tensor], Tensor]
"""Takes a map's name, its inputs `[tokens, in]`, outputs `[tokens, out]` and which tokens of the batch these are,
counted row after row; gives the outputs to go on with."""


@dataclass(frozen=True)
class _Layout:
    """The parameters' names of the first and the second matrix, and whether they are stored `[experts, in, out]`."""

    first: str
    second: str
    transposed: bool
    bias: bool


def is_fused(module: nn.Module) -> bool:
    """Whether the module holds fused experts of a kind that is known here."""
    return _layout(module) is not None


def expert_maps(name: str, module: nn.Module) -> Iterator[LinearMap]:
    """The maps of all experts of a fused module, expert by expert."""
    layout = _known(module)
    for expert in range(_shape(module, layout.second)[0]):
        for weight in (layout.first, layout.second):
            rows, columns = _shape(module, weight)[1:]
            out, width = (columns, rows) if layout.transposed else (rows, columns)
            of = Expert(name, weight)
            yield LinearMap(f"{name}.{expert}.{weight}", width, out, layout.bias, expert=of)


def run_one_by_one(model: nn.Module, maps: Mapping[str, LinearMap], observe: Observe) -> Callable[[], None]:
    """Has all fused experts of the model compute expert by expert, and `observe` the tracked maps; gives what undoes
    that."""
    replaced: list[tuple[nn.Module, Any]] = []
    for name, module in model.named_modules():
        if is_fused(module):
            replaced.append((module, module.__dict__.get("forward")))
            module.forward = partial(_forward(module), _Experts(name, module, _known(module), maps, observe))

    def undo() -> None:
        for module, before in replaced:
            del module.forward
            if before is not None:
                module.forward = before

    return undo


def unknown_experts(model: nn.Module) -> str | None:
    """The first parameter inside the blocks that looks like many matrices in one and is not known to be experts: one
    of three dimensions, or one of two among experts that belongs to no linear map."""
    for name, module in model.named_modules():
        parts = name.split(".")
        known = is_fused(module) or isinstance(module, nn.Linear | nn.modules.conv._ConvNd)
        if not known and any(part.isdigit() for part in parts):
            for own, _ in module.named_parameters(recurse=False):
                shape = _shape(module, own)
                if (len(shape) == 3 and min(shape[1:]) > 1) or (len(shape) == 2 and "experts" in parts):
                    return f"{name}.{own}"
    return None


def _shape(module: nn.Module, parameter: str) -> tuple[int, ...]:
    """A parameter's shape, which a sharded one keeps under another name."""
    held = getattr(module, parameter)
    return tuple(getattr(held, "ds_shape", held.shape))


def _layout(module: nn.Module) -> _Layout | None:
    if type(module).__name__ == "Llama4TextExperts":
        return _Layout("gate_up_proj", "down_proj", transposed=True, bias=False)
    # What transformers' `use_experts_implementation` says of every class that it decorates.
    if all(hasattr(module, each) for each in ("has_gate", "has_bias", "is_transposed", "_apply_gate", "down_proj")):
        first = "gate_up_proj" if module.has_gate else "up_proj"
        return _Layout(first, "down_proj", bool(module.is_transposed), bool(module.has_bias))
    return None


def _known(module: nn.Module) -> _Layout:
    layout = _layout(module)
    if layout is None:
        raise ValueError(f"{type(module).__name__} holds no fused experts")
    return layout


@dataclass(frozen=True)
class _Experts:
    """The experts of one module, to be computed one by one."""

    name: str
    module: nn.Module
    layout: _Layout
    maps: Mapping[str, LinearMap]
    observe: Observe

    @property
    def count(self) -> int:
        return _shape(self.module, self.layout.second)[0]

    def begin(self, hidden_states: Tensor) -> Tensor:
        """The module's inputs, which the backward pass comes to where a map of the module is tracked, whether or not a
        token is sent to that one: ranks that hold one model together must all take the same way back."""
        tracked = any(each.holder == self.name for each in self.maps.values())
        if hidden_states.requires_grad or not tracked:
            return hidden_states
        return hidden_states.detach().requires_grad_(True)

    def compute(self, expert: int, inputs: Tensor, tokens: Tensor) -> Tensor:
        """What one expert makes of its tokens, `[tokens, hidden]`."""
        middle = self._linear(expert, self.layout.first, inputs, tokens)
        return self._linear(expert, self.layout.second, self._activate(middle), tokens)

    def _activate(self, middle: Tensor) -> Tensor:
        module: Any = self.module
        if not getattr(module, "has_gate", True):
            return module.act_fn(middle)
        if hasattr(module, "_apply_gate"):
            return module._apply_gate(middle)
        gate, up = middle.chunk(2, dim=-1)
        return up * module.act_fn(gate)

    def _linear(self, expert: int, weight: str, inputs: Tensor, tokens: Tensor) -> Tensor:
        matrix = getattr(self.module, weight)[expert]
        bias = getattr(self.module, f"{weight}_bias")[expert] if self.layout.bias else None
        outputs = functional.linear(inputs, matrix.T if self.layout.transposed else matrix, bias)
        name = f"{self.name}.{expert}.{weight}"
        return self.observe(name, inputs, outputs, tokens) if name in self.maps else outputs


def _forward(module: nn.Module) -> Callable[..., Tensor]:
    return _weighted_inputs if type(module).__name__ == "Llama4TextExperts" else _weighted_outputs


def _weighted_outputs(experts: _Experts, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Σ over a token's chosen experts of weight times output, `[tokens, hidden]`; `top_k_index` and `top_k_weights`
    `[tokens, chosen]`. An index past the last expert chooses none."""
    hidden_states = experts.begin(hidden_states)
    flat, chosen = top_k_index.reshape(-1), top_k_index.shape[-1]
    order = flat.argsort(stable=True)
    sizes = torch.bincount(flat, minlength=experts.count)[: experts.count].tolist()
    tokens = order // chosen
    parts, start = [], 0
    for expert, size in enumerate(sizes):
        if size:
            own = tokens[start : start + size]
            parts.append(experts.compute(expert, hidden_states[own], own))
            start += size
    parts.append(hidden_states.new_zeros(len(order) - start, hidden_states.shape[-1]))
    outputs = torch.cat(parts)
    normed = getattr(experts.module, "post_expert_norm", None)
    if normed is not None and getattr(experts.module, "has_post_expert_norm", False):
        outputs = normed(outputs)
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    weighted = outputs[back] * top_k_weights.reshape(-1, 1)
    return weighted.unflatten(0, (-1, chosen)).sum(1).to(hidden_states.dtype)


def _weighted_inputs(experts: _Experts, hidden_states: Tensor) -> Tensor:
    """Llama 4: every expert gets every token, times its weight, zero where it is not chosen; `[experts · tokens,
    hidden]` in and out. Without biases an expert makes zero of zero, and no weight has a gradient from it."""
    every = experts.begin(hidden_states).unflatten(0, (experts.count, -1))
    outputs = []
    for expert, inputs in enumerate(every):
        own = inputs.any(dim=-1).nonzero()[:, 0]
        made = experts.compute(expert, inputs[own], own) if len(own) else inputs[own]
        outputs.append(torch.zeros_like(inputs).index_add(0, own, made))
    return torch.cat(outputs)
