"""The Gauss-Newton Hessian of a stage's loss, times vectors: what EK-FAC is an approximation of.

    H = (1/N) Σ_documents Σ_windows Σ_targets Jᵀ (diag p − p pᵀ) J

with J the derivative of a target's logits in the weights of all tracked maps together (Schraudolph 2002; Martens 2020,
§8.1), N the documents, p the model's own probabilities: no label takes part. It is the mean over all labels that the
model might have drawn of what EK-FAC estimates from one (DESIGN.md §2).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from msif_ray.influence.batch import Batch
from msif_ray.influence.capture import Capture, Captured
from msif_ray.influence.products import mm, operand, wide_type, with_ones


@dataclass
class ProductSums:
    """Σ over documents of their share of N·H, times some directions.

    `directions` and `sums` hold `[queries, out, columns]` of every tracked map; a direction lies in all maps at once.
    """

    directions: Mapping[str, Tensor]
    sums: dict[str, Tensor] = field(default_factory=dict)

    def add(self, capture: Capture, batch: Batch) -> Tensor:
        """Adds a batch, which takes a pass per query, and gives its rows' losses, `[rows]`.

        Where a loss is not finite nothing is added.
        """
        losses = torch.zeros(0)
        for query in range(self.queries):
            captured = capture.curve(batch, {name: every[query] for name, every in self.directions.items()})
            losses = captured.losses
            if not torch.isfinite(losses).all():
                break
            for name in captured.maps:
                self._total(captured, name)[query] += _product(captured, name)
        return losses

    def negate(self) -> None:
        """Changes the sign of all sums: batches that are added until the next call are taken off."""
        for total in self.sums.values():
            total.neg_()

    @property
    def queries(self) -> int:
        return len(next(iter(self.directions.values())))

    def _total(self, captured: Captured, name: str) -> Tensor:
        if name not in self.sums:
            directions = self.directions[name]
            self.sums[name] = directions.new_zeros(directions.shape, dtype=wide_type(directions.dtype))
        return self.sums[name]


def _product(captured: Captured, name: str) -> Tensor:
    """Σ_rows Σ_t g_t a_tᵀ, `[out, columns]`: one product, since no document is told from another."""
    inputs, gradients = (operand(vectors.flatten(0, 1)) for vectors in captured.vectors(name))
    if captured.maps[name].bias:
        inputs = with_ones(inputs)
    if gradients.dtype == wide_type(gradients.dtype):
        return mm(gradients.T, inputs)
    return torch.mm(gradients.T, inputs, out_dtype=wide_type(gradients.dtype))
