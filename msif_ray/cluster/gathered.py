"""What autograd keeps of a sharded model's weights for the backward pass: which they are, and not their numbers.

DeepSpeed frees a gathered weight when its module has run and gathers it again before that module's backward pass. Its
own `F.linear` keeps the parameter alone meanwhile, whose memory goes. Of a weight that is used in any other way (an
expert's part of one, a transposed one) autograd would keep the gathered numbers: in the end the whole model.
"""

import functools
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks


def keep_no_gathered_weights(model: nn.Module) -> None:
    """Has the sharded model's forward passes keep places in weights for the backward pass, and no gathered weights.

    Called once DeepSpeed has set its hooks, after which those that are set here run.
    """
    saved = _Saved()
    model.register_forward_pre_hook(saved.begin)
    for module in model.modules():
        if any(_is_sharded(weight) for weight in module.parameters(recurse=False)):
            module.register_forward_pre_hook(saved.gathered)
    forward: Any = model.forward

    @functools.wraps(forward)
    def lean(*arguments: Any, **options: Any) -> Any:
        with saved_tensors_hooks(saved.pack, _unpack):
            return forward(*arguments, **options)

    model.forward = lean


@dataclass(frozen=True)
class _Part:
    """A tensor in a weight's memory, which begins so many elements after the weight does."""

    weight: nn.Parameter
    size: tuple[int, ...]
    stride: tuple[int, ...]
    start: int


@dataclass
class _Saved:
    """Where the weights are that were gathered in this pass; those freed since are no longer there."""

    weights: dict[int, nn.Parameter] = field(default_factory=dict)

    def begin(self, _: nn.Module, __: Any) -> None:
        self.weights = {}

    def gathered(self, module: nn.Module, _: Any) -> None:
        self.weights |= {_place(each): each for each in module.parameters(recurse=False) if _is_sharded(each)}

    def pack(self, tensor: Tensor) -> Tensor | _Part:
        weight = self.weights.get(_place(tensor)) if tensor.numel() else None
        if weight is None or _place(weight) != _place(tensor) or weight.dtype != tensor.dtype:
            return tensor
        if tensor.shape == weight.shape and tensor.stride() == weight.stride():
            return weight
        start = int(tensor.storage_offset()) - int(weight.storage_offset())
        return _Part(weight, tuple(tensor.shape), tensor.stride(), start)


def _unpack(packed: Tensor | _Part) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    weight = packed.weight.detach()
    return weight.as_strided(packed.size, packed.stride, weight.storage_offset() + packed.start)


def _is_sharded(weight: Any) -> bool:
    return not weight.ds_persist


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
