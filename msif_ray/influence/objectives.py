"""The losses of a batch's rows at the model's logits, by what the batch is of: their gradient and their curvature.

* Windows of tokens: Σ over the positions that predict a target of −log p(token).
* Texts with classes: −log p(class | text), one term each.

Labels are the data's own, or drawn from the model by uniform numbers (`labels.batch_uniforms`).
"""

from dataclasses import dataclass

from torch import Tensor

from msif_ray.influence.batch import Batch
from msif_ray.influence.loss import differentiate, differentiate_sampled, nats, softmax_curvature


@dataclass(frozen=True)
class Losses:
    """In nats, `of_rows` `[rows]`; and their `labels`, `[targets]` row after row, or `[rows]` where a row has one."""

    of_rows: Tensor
    labels: Tensor


def differentiate_losses(logits: Tensor, batch: Batch, uniforms: Tensor | None = None) -> Losses:
    """Backpropagates the sum of all losses from the logits of `data_labels`."""
    if uniforms is not None:
        return _by_row(batch, *differentiate_sampled(logits, uniforms))
    labels = data_labels(batch)
    return _by_row(batch, differentiate(logits, labels), labels)


def curvature(logits: Tensor, tangents: Tensor, batch: Batch) -> tuple[Tensor, Losses]:
    """The Hessian of the losses at the logits, times tangents: in the logits' shape and type. It is the same for any
    labels; the losses beside it are the data's own."""
    labels = data_labels(batch)
    return softmax_curvature(logits, tangents), _by_row(batch, nats(logits, labels), labels)


def data_labels(batch: Batch) -> Tensor:
    """The class of each row, `[rows]`, or the token that follows each position that predicts one, `[targets]`."""
    return batch.input_ids.roll(-1, dims=1)[batch.predicts] if batch.classes is None else batch.classes


def _by_row(batch: Batch, terms: Tensor, labels: Tensor) -> Losses:
    if batch.has_row_labels:
        return Losses(terms, labels)
    rows = batch.predicts.nonzero(as_tuple=True)[0]
    return Losses(terms.new_zeros(len(batch.keys)).index_add_(0, rows, terms), labels)
