"""The losses of a batch's rows at the model's logits, by what the batch is of: their gradient and their curvature.

* Windows of tokens: Σ over the positions that predict a target of −log p(token).
* Texts with classes: −log p(class | text), one term each.
* Preferences: −log σ(m) of the margin m = β[log π(w) − log π(l) − (log π_ref(w) − log π_ref(l))] of the sequence w that
  was chosen over l that was rejected (DPO: Rafailov et al. 2023, arXiv 2305.18290, eq. 7). It is the likelihood of
  one outcome of two, so its Gauss-Newton Hessian is σ(m)(1 − σ(m)) ∇m ∇mᵀ, and its label is which was preferred.
  Length-normalised, every log-probability is divided by the number of its sequence's targets (Tülu 3: Lambert et al.
  2024, arXiv 2411.15124, on preference finetuning).

Labels are the data's own, or drawn from the model by uniform numbers (`labels.batch_uniforms`).
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from msif_ray.influence.batch import Batch
from msif_ray.influence.loss import (
    differentiate,
    differentiate_sampled,
    nats,
    slopes,
    slopes_along,
    softmax_curvature,
)


@dataclass(frozen=True)
class Losses:
    """In nats, `of_rows` `[rows]`; and their `labels`, `[targets]` row after row, or `[rows]` where a row has one: a
    class, or of a preference 0 where the chosen sequence was preferred and 1 where the other."""

    of_rows: Tensor
    labels: Tensor


def differentiate_losses(logits: Tensor, batch: Batch, uniforms: Tensor | None = None) -> Losses:
    """Backpropagates the sum of all losses from the logits of `data_labels`."""
    if batch.reference is not None:
        return _differentiate_preferences(logits, batch, uniforms)
    if uniforms is not None:
        return _by_row(batch, *differentiate_sampled(logits, uniforms))
    labels = data_labels(batch)
    return _by_row(batch, differentiate(logits, labels), labels)


def curvature(logits: Tensor, tangents: Tensor, batch: Batch) -> tuple[Tensor, Losses]:
    """The Gauss-Newton Hessian of the losses at the logits, times tangents: in the logits' shape and type. It is the
    same for any labels; the losses beside it are the data's own."""
    labels = data_labels(batch)
    if batch.reference is not None:
        margins = _Margins.of(logits, batch)
        chance = margins.values.sigmoid()
        moved = chance * (1 - chance) * margins.summed(slopes_along(logits, labels, tangents))
        weights = moved[margins.rows] * margins.signs
        return slopes(logits, labels, weights), Losses(functional.softplus(-margins.values), _chosen(batch))
    return softmax_curvature(logits, tangents), _by_row(batch, nats(logits, labels), labels)


def data_labels(batch: Batch) -> Tensor:
    """The class of each row, `[rows]`, or the token that follows each position that predicts one, `[targets]`."""
    return batch.input_ids.roll(-1, dims=1)[batch.predicts] if batch.classes is None else batch.classes


def _by_row(batch: Batch, terms: Tensor, labels: Tensor) -> Losses:
    if batch.has_row_labels:
        return Losses(terms, labels)
    rows = batch.predicts.nonzero(as_tuple=True)[0]
    return Losses(terms.new_zeros(len(batch.keys)).index_add_(0, rows, terms), labels)


def _differentiate_preferences(logits: Tensor, batch: Batch, uniforms: Tensor | None) -> Losses:
    """One coefficient, dℓ/dm, couples the gradients of a pair's two sequences."""
    margins = _Margins.of(logits.detach(), batch)
    labels = _chosen(batch)
    if uniforms is not None:  # the inverse of the cumulative distribution, as everywhere (`labels.draw`)
        labels = (margins.values.double().sigmoid() <= uniforms.to(logits.device)).long()
    towards = 1 - 2 * labels
    toward_labels = towards * margins.values
    weights = (-towards * torch.sigmoid(-toward_labels))[margins.rows] * margins.signs
    if logits.requires_grad:
        logits.backward(slopes(logits.detach(), data_labels(batch), weights))
    return Losses(functional.softplus(-toward_labels), labels)


def _chosen(batch: Batch) -> Tensor:
    return torch.zeros(len(batch.keys), dtype=torch.int64, device=batch.input_ids.device)


@dataclass(frozen=True)
class _Margins:
    """`values` `[rows]`; the row of each target, and what its −log p counts in the row's margin: −β in the chosen
    sequence, β in the rejected one, or those divided by the sequence's number of targets, `[targets]` each."""

    values: Tensor
    rows: Tensor
    signs: Tensor

    @classmethod
    def of(cls, logits: Tensor, batch: Batch) -> "_Margins":
        if batch.reference is None or batch.beta is None:
            raise ValueError("the batch is not of preferences")
        rows, columns = batch.predicts.nonzero(as_tuple=True)
        terms = nats(logits, data_labels(batch))
        beta = batch.beta.to(terms.dtype)
        half = batch.predicts.shape[1] // 2
        signs = torch.where(columns < half, -beta[rows], beta[rows])
        if batch.length_normalised:
            lengths = batch.apart(batch.predicts).sum(dim=1)  # of both sequences of each row in turn
            signs = signs / lengths[2 * rows + columns // half]
        begun = cls(-beta * batch.reference.to(terms.dtype), rows, signs)
        return cls(begun.values + begun.summed(terms), rows, signs)

    def summed(self, terms: Tensor) -> Tensor:
        """Σ over a row's targets of sign times term, `[rows]`."""
        return torch.zeros_like(self.values).index_add_(0, self.rows, self.signs * terms)
