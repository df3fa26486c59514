"""A preconditioner of all maps together, which the truth alone can afford: the operator's likeliest labels, inverted.

The Gauss-Newton Hessian is H = (1/N) Σ_targets Σ_y u uᵀ with u = √p_y Jᵀ(e_y − p) of every target and label y, J the
derivative of the target's logits. Most of it is in few labels: with those of the largest p_y ‖e_y − p‖² as the rows of
U / √N, M = Uᵀ U / N + C is inverted exactly (Woodbury), covariance between maps and between tokens included, where
EK-FAC has neither. What M leaves out is small, and conjugate gradients on H itself make up for it.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from msif_ray.influence.batch import Batch
from msif_ray.influence.conjugate import Vectors
from msif_ray.influence.modules import LinearMap
from msif_ray.validate.problem import Problem

ALL = "all maps"
"""The one map that a joint system is over: vectors are `[queries, 1, parameters]`."""


@dataclass(frozen=True)
class JointSystem:
    """H + C of all maps as one, C a `multiple` of a diagonal D: `roots` `[labels, parameters]`, the rows of
    U D^(−1/2) / √N, their `gram` matrix `[labels, labels]` (float64), and `diagonal` `[parameters]`, that of D."""

    roots: Tensor
    gram: Tensor
    diagonal: Tensor
    multiple: float

    @cached_property
    def _small(self) -> Tensor:
        """The Cholesky factor of 1 + U C⁻¹ Uᵀ / N, `[labels, labels]`."""
        return torch.linalg.cholesky(self.gram / self.multiple + torch.eye(len(self.gram), dtype=torch.float64))

    def of(self, name: str, maps: Mapping[str, LinearMap]) -> "JointSystem":
        """One map's block of it."""
        start = sum(maps[before].parameters for before in list(maps)[: list(maps).index(name)])
        own = slice(start, start + maps[name].parameters)
        roots = self.roots[:, own]
        return JointSystem(roots, (roots @ roots.T).double(), self.diagonal[own], self.multiple)

    def precondition(self, vectors: Tensor) -> Tensor:
        """M⁻¹ v."""
        scaled = vectors[:, 0] / self.diagonal.sqrt()
        inside = torch.cholesky_solve((self.roots @ scaled.T).double(), self._small).to(vectors.dtype)
        outside = inside.T @ self.roots / self.multiple
        return ((scaled - outside) / self.diagonal.sqrt() / self.multiple)[:, None]

    def damped(self, product: Tensor, vectors: Tensor) -> Tensor:
        """(H + C) v from H v."""
        return product + self.multiple * self.diagonal * vectors


def joint_system(problem: Problem, means: dict[str, float], labels: int) -> JointSystem:
    """From so many targets' labels of the operator's documents, the weightiest; `means` are each map's D."""
    maps = problem.setting.maps
    diagonal = torch.cat([torch.full((each.parameters,), means[name]) for name, each in maps.items()])
    roots = label_gradients(problem, labels)
    roots /= (len(problem.setting.documents) * diagonal).sqrt()
    return JointSystem(roots, (roots @ roots.T).double(), diagonal, 1.0)


def joined(vectors: Vectors) -> Vectors:
    """The vectors of all maps as those of one."""
    return {ALL: torch.cat([each.flatten(1) for each in vectors.values()], dim=1)[:, None]}


def parted(vectors: Vectors, maps: Mapping[str, LinearMap]) -> Vectors:
    """The vectors of one as those of all maps."""
    parts = vectors[ALL][:, 0].split([each.parameters for each in maps.values()], dim=1)
    return {name: part.reshape(-1, *maps[name].shape) for name, part in zip(maps, parts, strict=True)}


def label_gradients(problem: Problem, labels: int) -> Tensor:
    """u of the weightiest labels of all targets, `[labels, parameters]`; of fewer where more have no weight."""
    with torch.no_grad():
        weights = [_weights(_probabilities(problem, batch), batch) for batch in problem.operator_batches]
    every = torch.cat([each.flatten() for each in weights])
    least = max(float(every.topk(min(labels, len(every))).values[-1]), torch.finfo(every.dtype).tiny)
    count = int((every >= least).sum())
    # Filled in place: a few hundred rows are gigabytes.
    found = every.new_empty(count, sum(each.parameters for each in problem.setting.maps.values()))
    start = 0
    for batch, each in zip(problem.operator_batches, weights, strict=True):
        for gradients in _batch_gradients(problem, batch, each >= least):
            found[start : start + len(gradients)] = gradients
            start += len(gradients)
    return found


def _weights(probabilities: Tensor, batch: Batch) -> Tensor:
    """p_y ‖e_y − p‖² where a target is predicted, `[rows, tokens, vocabulary]`."""
    squares = 1 - 2 * probabilities + probabilities.square().sum(-1, keepdim=True)
    return probabilities * squares * batch.predicts[..., None]


def _probabilities(problem: Problem, batch: Batch) -> Tensor:
    return _logits(problem, batch).detach().softmax(-1)


def _logits(problem: Problem, batch: Batch) -> Tensor:
    found: Tensor = problem.setting.model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask.long(), use_cache=False
    ).logits
    return found


def _batch_gradients(problem: Problem, batch: Batch, chosen: Tensor) -> Iterator[Tensor]:
    """u of the `chosen` labels `[rows, tokens, vocabulary]` (bool), `[some, parameters]`: in each pass one of a row."""
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            inputs[name], outputs[name] = torch.cat([args[0].detach(), torch.ones_like(args[0][..., :1])], -1), output

        return hook

    maps = problem.setting.maps
    handles = [problem.setting.model.get_submodule(name).register_forward_hook(keep(name)) for name in maps]
    logits = _logits(problem, batch)
    for handle in handles:
        handle.remove()
    probabilities = logits.detach().softmax(-1)
    by_row = [row.nonzero() for row in chosen]  # [labels of the row, (token, label)]
    for turn in range(max(map(len, by_row))):
        rows = [row for row, labels in enumerate(by_row) if turn < len(labels)]
        slopes = torch.zeros_like(probabilities)
        for row in rows:
            token, label = by_row[row][turn].tolist()
            slopes[row, token] = -probabilities[row, token]
            slopes[row, token, label] += 1
            slopes[row, token] *= probabilities[row, token, label].sqrt()
        found = torch.autograd.grad(logits, list(outputs.values()), slopes, retain_graph=True)
        gradients = [
            (gradient[rows].transpose(1, 2) @ inputs[name][rows]).flatten(1)
            for name, gradient in zip(outputs, found, strict=True)
        ]
        yield torch.cat(gradients, dim=1)
