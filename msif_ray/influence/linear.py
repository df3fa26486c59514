"""What a tracked linear map is: a whole module, some rows of one, or one expert's matrix of a fused module."""

import re
from dataclasses import dataclass

import torch
from torch import Tensor

Spans = tuple[tuple[int, int], ...]
"""Rows of a matrix: from the first number to before the second of each pair, one after the other."""


@dataclass(frozen=True)
class Rows:
    """The block of a module's map that makes some of its outputs."""

    module: str
    spans: Spans


@dataclass(frozen=True)
class Expert:
    """One expert's matrix of a module that holds those of all its experts in the parameter `weight`."""

    module: str
    weight: str


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
    rows: Rows | None = None
    expert: Expert | None = None

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

    @property
    def source(self) -> str:
        """Whose inputs and outputs are captured: the module of a block, else the map itself."""
        return self.name if self.rows is None else self.rows.module

    @property
    def holder(self) -> str:
        """The module that holds the map's weight."""
        return self.source if self.expert is None else self.expert.module

    def own(self, outputs: Tensor) -> Tensor:
        """The map's part of its source's outputs or their gradients: `[..., out]` of `[..., source's out]`."""
        if self.rows is None:
            return outputs
        parts = [outputs[..., start:stop] for start, stop in self.rows.spans]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def nothing(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """No inputs `[0, in]` and no outputs `[0, out]` of the source, in the type and on the device of `like`."""
        out = self.out_features if self.rows is None else max(stop for _, stop in self.rows.spans)
        return like.new_zeros(0, self.in_features), like.new_zeros(0, out)

    def put(self, outputs: Tensor, part: Tensor) -> None:
        """Writes the map's `part` `[..., out]` into its place in its source's `outputs`."""
        spans = ((0, self.out_features),) if self.rows is None else self.rows.spans
        for (start, stop), piece in zip(spans, part.split([b - a for a, b in spans], dim=-1), strict=True):
            outputs[..., start:stop] = piece


def is_routed(name: str) -> bool:
    """Whether a map is one of several experts, which see only the tokens that a router sends them."""
    return re.search(r"(^|\.)experts\.\d+\.", name) is not None
