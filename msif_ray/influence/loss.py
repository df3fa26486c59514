"""Summed negative log-likelihood of labels, and its gradient and Hessian at the logits in closed form."""

import torch
from torch import Tensor

from msif_ray.influence.products import wide

# Entries of logits turned into probabilities at once: on a CPU what stays in a core's cache, 1 MB of float32.
LOGIT_ENTRIES = {"cpu": 2**18, "cuda": 2**26}
# Probabilities under this lose digits before they underflow, in float32 under 1e-38.
SMALL = 1e-30


def differentiate(logits: Tensor, labels: Tensor) -> Tensor:
    """Backpropagates Σ −log p(label) from logits `[positions, vocabulary]`; gives each term in nats, `[positions]`.

    The gradient is softmax − one-hot: one exponential of each logit, where autograd's cross-entropy takes two and
    keeps the log-probabilities in between. Terms are in float32 (float64 for float64 logits), whatever the logits'
    type.
    """
    values = logits.detach()
    gradient = torch.empty_like(values)
    terms = []
    rows = max(1, LOGIT_ENTRIES[values.device.type] // values.shape[1])
    for part, chosen, into in zip(values.split(rows), labels.split(rows), gradient.split(rows), strict=True):
        part, chosen = wide(part), chosen[:, None]
        probabilities = torch.softmax(part, 1, out=into if into.dtype == part.dtype else None)
        terms.append(_nats(part, probabilities, chosen))
        probabilities.scatter_add_(1, chosen, probabilities.new_full(chosen.shape, -1.0))
        if probabilities is not into:
            into.copy_(probabilities)
    if logits.requires_grad:  # or there is no map before them, and nobody wants a gradient
        logits.backward(gradient)
    return torch.cat(terms)


def nats(logits: Tensor, labels: Tensor) -> Tensor:
    """−log p(label) of each position, `[positions]`, from logits `[positions, vocabulary]`, a few rows at a time."""
    rows = max(1, LOGIT_ENTRIES[logits.device.type] // logits.shape[1])
    parts = zip(logits.split(rows), labels.split(rows), strict=True)
    return torch.cat([_nats(wide(part), wide(part).softmax(1), chosen[:, None]) for part, chosen in parts])


def softmax_curvature(logits: Tensor, tangents: Tensor) -> Tensor:
    """(diag p − p pᵀ) t of each position, `[positions, vocabulary]`, in the logits' type: the Hessian of −log p(label)
    at the logits, which no label takes part in, times a vector."""
    curved = torch.empty_like(logits)
    rows = max(1, LOGIT_ENTRIES[logits.device.type] // logits.shape[1])
    for part, tangent, into in zip(logits.split(rows), tangents.split(rows), curved.split(rows), strict=True):
        probabilities = wide(part).softmax(1)
        product = probabilities * wide(tangent)
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
