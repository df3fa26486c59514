"""Summed negative log-likelihood of labels, and its gradient and Hessian at the logits in closed form."""

from collections.abc import Callable

import torch
from torch import Tensor

from msif_ray.influence.labels import draw
from msif_ray.influence.products import wide

# Entries of logits turned into probabilities at once: on a CPU 16 MB of float32, enough to be worth the
# calls.
LOGIT_ENTRIES = {"cpu": 2**22, "cuda": 2**26}
# Probabilities under this lose digits before they underflow, in float32 under 1e-38.
SMALL = 1e-30
# What 1 − p leaves of a probability over this is rounded (in float32 wholly from 1 − 6e-8 on), and is all the gradient
# there is: there it is the sum of the other probabilities.
SURE = 0.9

# From probabilities [some positions, vocabulary] and the first of the positions, to their labels.
_Choice = Callable[[Tensor, int], Tensor]


def differentiate(logits: Tensor, labels: Tensor) -> Tensor:
    """Backpropagates Σ −log p(label) from logits `[positions, vocabulary]`; gives each term in nats, `[positions]`.

    The gradient is softmax − one-hot: one exponential of each logit, where autograd's cross-entropy takes two and
    keeps the log-probabilities in between; unlike autograd's it is exact where p(label) rounds to 1, too. Terms are in
    float32 (float64 for float64 logits), whatever the logits' type.
    """
    return _differentiate(logits, _given(labels))[0]


def slopes(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """The gradient of Σ weight · −log p(label) at the logits, `[positions, vocabulary]`, in their type."""
    return _gradient(logits, _given(labels), weights)[0]


def slopes_along(logits: Tensor, labels: Tensor, tangents: Tensor) -> Tensor:
    """The derivative of each −log p(label) along tangents of the logits, `[positions]`."""
    parts = zip(*(tensor.split(_rows(logits)) for tensor in (logits, labels, tangents)), strict=True)
    found = []
    for part, chosen, tangent in parts:
        tangent = wide(tangent)
        found.append((wide(part).softmax(1) * (tangent - tangent.gather(1, chosen[:, None]))).sum(1))
    return torch.cat(found)


def differentiate_sampled(logits: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """As `differentiate`, with labels drawn from the model by one uniform number each (`labels.draw`), from the
    probabilities that the gradient is made of; gives the terms and the labels, `[positions]` each."""
    numbers = uniforms.to(logits.device)
    return _differentiate(logits, lambda some, start: draw(some, numbers[start : start + len(some)]))


def _given(labels: Tensor) -> _Choice:
    return lambda probabilities, start: labels[start : start + len(probabilities)]


def _rows(logits: Tensor) -> int:
    """Positions whose logits are turned into probabilities at once."""
    return max(1, LOGIT_ENTRIES[logits.device.type] // logits.shape[1])


def _differentiate(logits: Tensor, choose: _Choice) -> tuple[Tensor, Tensor]:
    gradient, terms, labels = _gradient(logits, choose)
    if logits.requires_grad:  # or there is no map before them, and nobody wants a gradient
        logits.backward(gradient)
    return terms, labels


def _gradient(logits: Tensor, choose: _Choice, weights: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of Σ weight · −log p(label) at the logits (weights are 1 unless given), its terms and the labels."""
    values = logits.detach()
    gradient = torch.empty_like(values)
    terms, labels = [], []
    rows = _rows(values)
    for start in range(0, len(values), rows):
        part, into = wide(values[start : start + rows]), gradient[start : start + rows]
        probabilities = torch.softmax(part, 1, out=into if into.dtype == part.dtype else None)
        labels.append(choose(probabilities, start))
        chosen = labels[-1][:, None]
        terms.append(_nats(part, probabilities, chosen))
        _subtract_one_hot(probabilities, chosen)
        if weights is not None:
            probabilities *= weights[start : start + rows, None]
        if probabilities is not into:
            into.copy_(probabilities)
    return gradient, torch.cat(terms), torch.cat(labels)


def _subtract_one_hot(probabilities: Tensor, labels: Tensor) -> None:
    """Takes 1 from the probability of each of `labels` `[positions, 1]`, in place."""
    chosen = probabilities.gather(1, labels)
    probabilities.scatter_(1, labels, 0.0)
    sure = chosen > SURE
    others = 1 - chosen
    if sure.any():
        others = torch.where(sure, probabilities.sum(1, keepdim=True), others)
    probabilities.scatter_(1, labels, -others)


def nats(logits: Tensor, labels: Tensor) -> Tensor:
    """−log p(label) of each position, `[positions]`, from logits `[positions, vocabulary]`, a few rows at a time."""
    parts = zip(logits.split(_rows(logits)), labels.split(_rows(logits)), strict=True)
    return torch.cat([_nats(wide(part), wide(part).softmax(1), chosen[:, None]) for part, chosen in parts])


def softmax_curvature(logits: Tensor, tangents: Tensor) -> Tensor:
    """(diag p − p pᵀ) t of each position, `[positions, vocabulary]`, in the logits' type: the Hessian of −log p(label)
    at the logits, which no label takes part in, times a vector."""
    curved = torch.empty_like(logits)
    rows = _rows(logits)
    for part, tangent, into in zip(logits.split(rows), tangents.split(rows), curved.split(rows), strict=True):
        probabilities, tangent = wide(part).softmax(1), wide(tangent)
        # What is the same for all is not curved: without the likeliest one's, nothing is left of it where it is sure.
        product = probabilities * (tangent - tangent.gather(1, probabilities.argmax(1, keepdim=True)))
        into.copy_(product - probabilities * product.sum(1, keepdim=True))
    return curved


def _nats(logits: Tensor, probabilities: Tensor, labels: Tensor) -> Tensor:
    """−log p of labels `[positions, 1]`. Where p is so small that it rounds, from the logits themselves."""
    chosen = probabilities.gather(1, labels)
    nats = -chosen.log()
    small = (chosen < SMALL).squeeze(1)
    if small.any():
        nats[small] = logits[small].logsumexp(1, keepdim=True) - logits[small].gather(1, labels[small])
    return nats.squeeze(1)
