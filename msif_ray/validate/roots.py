"""The largest directions of the Gauss-Newton Hessian of an operator's documents, as vectors that are at hand.

Whatever tracked maps do to a target's logits they do through the state h_t `[hidden]` that the output head E is given:

    H = (1/N) Σ_targets J_tᵀ R_t J_t,    R_t = Eᵀ (diag p_t − p_t p_tᵀ) E = Σ_k λ_k w_k w_kᵀ,    J_t = ∂h_t/∂θ

which is Uᵀ U / N with a row u = √λ_k J_tᵀ w_k for every target t and eigenvector k: the expectation over all labels,
and none is drawn. Those of the largest λ are kept. Of a map a row is G = Σ_s g_s a_sᵀ over the positions s of t's
document, with activations that all rows of the document share. So a row is kept as its g, and of two documents

    u·u' = Σ_s Σ_s' (g_s·g'_s') (a_s·a'_s')

takes rows · rows' · tokens · out multiplications, where gradients themselves would take columns / tokens times as many.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from msif_ray.corpus.windows import Encoded
from msif_ray.influence.batch import Batch
from msif_ray.influence.conjugate import Vectors
from msif_ray.influence.modules import output_head
from msif_ray.influence.onednn import model_products
from msif_ray.influence.products import mm, with_ones
from msif_ray.validate.problem import Problem
from msif_ray.validate.setting import batches

# Rows whose gradients one backward pass takes.
ROWS = 512


@dataclass(frozen=True)
class DocumentRoots:
    """A document's rows u: by map its `activations` `[tokens, columns]` and the rows' `gradients`
    `[rows, tokens, out]`."""

    activations: Vectors
    gradients: Vectors

    def __len__(self) -> int:
        return len(next(iter(self.gradients.values())))

    def times(self, vectors: Mapping[str, Tensor]) -> Tensor:
        """U v of the maps that vectors `[queries, out, columns]` name, `[queries, rows]`."""
        parts = [
            mm(self._moved(name, every).flatten(1), self.gradients[name].flatten(1).T)
            for name, every in vectors.items()
        ]
        return torch.stack(parts).sum(0)

    def transposed(self, weights: Tensor, names: Sequence[str]) -> Vectors:
        """Uᵀ w of some maps for weights `[queries, rows]`."""
        found = {}
        for name in names:
            gradients = self.gradients[name]
            summed = mm(weights, gradients.flatten(1)).unflatten(1, gradients.shape[1:])
            found[name] = self._outer(name, summed)
        return found

    def _moved(self, name: str, vectors: Tensor) -> Tensor:
        """V a_s, `[queries, tokens, out]`."""
        return torch.stack([mm(self.activations[name], each.T) for each in vectors])

    def _outer(self, name: str, gradients: Tensor) -> Tensor:
        """Σ_s g_s a_sᵀ of gradients `[queries, tokens, out]`."""
        return torch.stack([mm(each.T, self.activations[name]) for each in gradients])


def largest_roots(problem: Problem, rows: int) -> list[DocumentRoots]:
    """Of every document of the operator; so many rows in all, or fewer where fewer have a weight. Raises ValueError for
    a document of several windows."""
    spectra = [_spectrum(problem, _batch(document)) for document in problem.setting.documents]
    every = torch.cat([values.flatten() for values, _ in spectra])
    least = max(float(every.topk(min(rows, len(every))).values[-1]), torch.finfo(torch.float32).tiny)
    found = []
    for document, (values, vectors) in zip(problem.setting.documents, spectra, strict=True):
        targets, numbers = (values >= least).nonzero(as_tuple=True)
        pulls = values[targets, numbers].sqrt()[:, None] * vectors[targets, :, numbers]
        found.append(_document_roots(problem, _batch(document), targets, pulls.float()))
    return found


def gram(roots: Sequence[DocumentRoots], weights: Mapping[str, float]) -> Tensor:
    """Σ over the maps that are named of weight · u·u', `[rows, rows]`, of which the lower triangle is filled."""
    ends = torch.tensor([0, *map(len, roots)]).cumsum(0).tolist()
    made = next(iter(roots[0].gradients.values())).new_zeros(ends[-1], ends[-1])
    for number, left in enumerate(roots):
        for other, right in enumerate(roots[: number + 1]):
            block = made[ends[number] : ends[number + 1], ends[other] : ends[other + 1]]
            for name, weight in weights.items():
                between = weight * (right.activations[name] @ left.activations[name].T)  # [tokens', tokens]
                met = between @ left.gradients[name]  # [rows, tokens', out]
                block += mm(met.flatten(1), right.gradients[name].flatten(1).T)
    return made


def _batch(document: Encoded) -> Batch:
    (batch,) = batches([document], 1)
    return batch


def _head(problem: Problem) -> nn.Linear:
    head = output_head(problem.setting.model)
    if not isinstance(head, nn.Linear):
        raise ValueError("the model has no linear output head")
    return head


def _spectrum(problem: Problem, batch: Batch) -> tuple[Tensor, Tensor]:
    """λ `[targets, hidden]` and w `[targets, hidden, hidden]` (columns) of each target's R, in float64."""
    weight = _head(problem).weight.detach()
    with torch.no_grad():
        logits = problem.setting.model(input_ids=batch.input_ids, use_cache=False).logits[batch.predicts]
    curved = []
    for probabilities in logits.softmax(-1):
        mean = weight.T @ probabilities
        curved.append(mm(weight.T, probabilities[:, None] * weight) - torch.outer(mean, mean))
    values, vectors = torch.linalg.eigh(torch.stack(curved).double())
    return values.clamp_min(0), vectors


def _document_roots(problem: Problem, batch: Batch, targets: Tensor, pulls: Tensor) -> DocumentRoots:
    """Rows J_tᵀ w of a document from its `targets` `[rows]`, counted along it, and w, `pulls` `[rows, hidden]`."""
    inputs, outputs, state = _passed(problem, batch)
    positions = batch.predicts[0].nonzero()[:, 0][targets]
    gradients = {name: output.new_empty(len(pulls), *output.shape[1:]) for name, output in outputs.items()}
    for start in range(0, len(pulls), ROWS):
        some = pulls[start : start + ROWS]
        pulled = some.new_zeros(len(some), *state.shape)
        pulled[torch.arange(len(some)), 0, positions[start : start + ROWS]] = some
        with model_products(state.device):
            found = torch.autograd.grad(state, list(outputs.values()), pulled, retain_graph=True, is_grads_batched=True)
        for into, each in zip(gradients.values(), found, strict=True):
            into[start : start + ROWS] = each[:, 0]
    return DocumentRoots(inputs, gradients)


def _passed(problem: Problem, batch: Batch) -> tuple[Vectors, Vectors, Tensor]:
    """Of one forward pass over a document: maps' inputs `[tokens, columns]`, their outputs, and what the head is given,
    differentiable in these."""
    inputs: Vectors = {}
    outputs: Vectors = {}
    states: list[Tensor] = []
    model, maps = problem.setting.model, problem.setting.maps

    def keep(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            inputs[name] = with_ones(args[0][0].detach()) if maps[name].bias else args[0][0].detach()
            outputs[name] = output
            return output

        return hook

    def hooks() -> Iterator[torch.utils.hooks.RemovableHandle]:
        for name in maps:
            yield model.get_submodule(name).register_forward_hook(keep(name))
        yield _head(problem).register_forward_pre_hook(lambda _, args: states.append(args[0]))

    handles = list(hooks())
    with sdpa_kernel(SDPBackend.MATH):  # fused attention has no backward pass of many rows at once
        model(input_ids=batch.input_ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return inputs, outputs, states[0]
