"""The dense float64 reference of a stage's Gauss-Newton Hessian over all tracked maps together, and of carrying
queries back through it by linear solves. Beside tests/reference.py, and like it sharing no code with msif_ray.

It is built as the expected Fisher matrix, Σ_y p(y) ∇log p(y) ∇log p(y)ᵀ at every target, which equals the
Gauss-Newton Hessian of a softmax's negative log-likelihood, from gradients in the weights, one window at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import reference
import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D


def weight_gradients(stage: reference.StageSpec, names: reference.Maps, outputs: Tensor) -> Tensor:
    """d outputs / d vec of all maps' [W b] in the order of `names`, [len(outputs), P]."""
    modules = [stage.model.get_submodule(name) for name in names]
    parameters = [p for m in modules for p in (m.weight, m.bias) if p is not None]
    each = torch.eye(len(outputs), dtype=outputs.dtype)
    found = list(torch.autograd.grad(outputs, parameters, each, retain_graph=True, is_grads_batched=True))
    columns = []
    for module in modules:
        weight = found.pop(0)
        weight = weight.transpose(1, 2) if isinstance(module, Conv1D) else weight
        if module.bias is not None:
            weight = torch.cat([weight, found.pop(0)[:, :, None]], dim=2)
        columns.append(weight.flatten(1))
    return torch.cat(columns, dim=1)


def gauss_newton(stage: reference.StageSpec, names: reference.Maps) -> Tensor:
    """H = (1/N) Σ_documents Σ_windows Σ_targets Σ_y p(y) ∇log p(y) ∇log p(y)ᵀ, [P, P] over all maps."""
    total: Tensor | float = 0.0
    documents = reference.labelled_windows(stage)
    for ids, _, labels in (window for document in documents for window in document):
        table = reference.log_probabilities(stage.model, ids)
        for t, label in enumerate(labels):
            if label != reference.MASKED:
                slopes = weight_gradients(stage, names, table[t])
                total = total + slopes.T @ (table[t].detach().exp()[:, None] * slopes)
    return total / len(documents)


def strengths(stage: reference.StageSpec, fit: Mapping[str, reference.Fit], scored: bool) -> Tensor:
    """The damping of a scored stage, or the α of a later one, of every parameter, [P]."""
    strength, relative = (stage.damping, stage.damping_relative) if scored else (stage.strength, stage.relative)
    of_maps = [strength * (float(f.Lambda.mean()) if relative else 1.0) for f in fit.values()]
    return torch.cat([torch.full((f.Lambda.numel(),), s) for f, s in zip(fit.values(), of_maps, strict=True)]).double()


def solved(
    stage: reference.StageSpec, fit: Mapping[str, reference.Fit], right: Mapping[str, Tensor], scored: bool
) -> dict[str, Tensor]:
    """(H + C)⁻¹ b of a scored stage, or A (H + A)⁻¹ b of a later one, [q, o, i] by map; A holds each map's α."""
    diagonal = strengths(stage, fit, scored)
    flat = torch.cat([vectors.flatten(1) for vectors in right.values()], dim=1).T
    answer = torch.linalg.solve(gauss_newton(stage, list(right)) + torch.diag(diagonal), flat)
    if not scored:
        answer = diagonal[:, None] * answer
    parts = answer.T.split([vectors[0].numel() for vectors in right.values()], dim=1)
    return {name: part.reshape(right[name].shape) for name, part in zip(right, parts, strict=True)}


def query_gradients(
    stage: reference.StageSpec, names: reference.Maps, queries: Sequence[reference.Document]
) -> dict[str, Tensor]:
    """Each query's gradient, [q, o, i] by map."""
    found = [reference.query_gradients(stage.model, names, stage.tokenizer, query) for query in queries]
    return {name: torch.stack([each[name] for each in found]) for name in names}
