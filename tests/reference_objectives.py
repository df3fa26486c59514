"""The dense float64 reference of stages that classify texts or learn preferences. Beside tests/reference.py, and like
it slow, simple and sharing no code with msif_ray: a sequence at a time, unpadded, gradients by autograd on the weights.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import reference
import reference_solve
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

Flags = list[bool]
Vectors = dict[str, tuple[Tensor, Tensor]]


@dataclass
class Classified(reference.StageSpec):
    """Documents and queries are {"id", "text", "label"}, the label a class's number."""


@dataclass
class Preferred(reference.StageSpec):
    """Documents are {"id", "prompt", "chosen", "rejected"}, texts; without a prompt both begin alike. `per_token`: a
    sequence's log-probability is its completion's mean."""

    beta: float = 0.1
    per_token: bool = False
    reference_model: nn.Module | None = None


def uniform(stage: reference.StageSpec, document: reference.Document) -> float:
    """The number that a document's label is drawn by: the first of Philox keyed by (seed, stage, id, window 0)."""
    name = json.dumps([stage.seed, stage.name, document["id"], 0]).encode("utf-8")
    key = int.from_bytes(hashlib.blake2b(name, digest_size=16).digest(), "little")
    return float(np.random.Generator(np.random.Philox(key=key)).random(1)[0])


def log_classes(stage: reference.StageSpec, document: reference.Document) -> Tensor:
    """log p(class | text), [classes]."""
    ids = list(stage.tokenizer(document["text"])["input_ids"])
    return torch.log_softmax(stage.model(input_ids=torch.tensor([ids])).logits[0].double(), dim=-1)


def sequences(stage: Preferred, document: reference.Document) -> list[tuple[list[int], Flags]]:
    """The tokens of the chosen and of the rejected sequence, with EOS, and which are targets: those of the completion,
    and unless they are averaged, from where the two differ."""
    found = []
    for what in ("chosen", "rejected"):
        before = list(stage.tokenizer(document["prompt"])["input_ids"]) if "prompt" in document else []
        after = list(stage.tokenizer(document[what], add_special_tokens="prompt" not in document)["input_ids"])
        ids = [*before, *after, stage.tokenizer.eos_token_id]
        found.append((ids, [t > 0 and t >= len(before) for t in range(len(ids))]))
    alike = 0
    while (
        not stage.per_token and alike < min(len(ids) for ids, _ in found) and found[0][0][alike] == found[1][0][alike]
    ):
        alike += 1
    return [(ids, [flag and t >= alike for t, flag in enumerate(flags)]) for ids, flags in found]


def log_ratio(model: nn.Module, stage: Preferred, document: reference.Document) -> Tensor:
    """log π(chosen) − log π(rejected), of sums or of means."""
    of_each = []
    for ids, flags in sequences(stage, document):
        table = reference.log_probabilities(model, ids)
        terms = [table[t - 1, ids[t]] for t in range(1, len(ids)) if flags[t]]
        of_each.append(sum(terms, torch.zeros(())) / (len(terms) if stage.per_token else 1))
    return of_each[0] - of_each[1]


def margin(stage: Preferred, document: reference.Document) -> Tensor:
    """β times what the model prefers the chosen sequence by, beyond the reference model."""
    with torch.no_grad():
        before = log_ratio(stage.reference_model, stage, document)
    return stage.beta * (log_ratio(stage.model, stage, document) - before)


def loss(stage: reference.StageSpec, document: reference.Document, sampled: bool = False) -> Tensor:
    """−log p(label) of a document, its own label or one drawn from the model."""
    if isinstance(stage, Preferred):
        found = margin(stage, document)
        flipped = sampled and uniform(stage, document) >= float(found.detach().sigmoid())
        return -torch.nn.functional.logsigmoid(-found if flipped else found)
    table = log_classes(stage, document)
    label = document["label"]
    if sampled:
        cumulative = np.cumsum(table.detach().exp().numpy())
        label = int((cumulative <= uniform(stage, document) * cumulative[-1]).sum())
    return -table[label]


def counted(stage: reference.StageSpec, document: reference.Document) -> list[Flags]:
    """Which tokens of each sequence of a document count in A and S: all of a text, those of a pair that predict a
    target."""
    if isinstance(stage, Preferred):
        return [[*flags[1:], False] for _, flags in sequences(stage, document)]
    return [[True] * len(stage.tokenizer(document["text"])["input_ids"])]


def gradient(stage: reference.StageSpec, names: reference.Maps, value: Tensor) -> dict[str, Tensor]:
    """d value / d [W b] of every map, [o, i]."""
    flat = reference_solve.weight_gradients(stage, names, value[None])[0]
    shapes = [_shape(stage.model.get_submodule(name)) for name in names]
    parts = flat.split([out * columns for out, columns in shapes])
    return {name: part.reshape(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}


def _shape(module: nn.Module) -> tuple[int, int]:
    out, inputs = reversed(module.weight.shape) if isinstance(module, Conv1D) else module.weight.shape
    return out, inputs + (module.bias is not None)


def token_vectors(model: nn.Module, names: reference.Maps, value: Callable[[], Tensor], flags: list[Flags]) -> Vectors:
    """Inputs [t, i] and d value / d outputs [t, o] of every map, of the tokens that count in each of its calls."""
    seen: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {}

    def keep(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        a = args[0].detach().flatten(0, -2)
        seen.setdefault(module, []).append(
            (torch.cat([a, torch.ones_like(a[:, :1])], dim=1) if module.bias is not None else a, output)
        )

    modules = [model.get_submodule(name) for name in names]
    handles = [module.register_forward_hook(keep) for module in modules]
    total = value()
    for handle in handles:
        handle.remove()
    found = iter(torch.autograd.grad(total, [output for module in modules for _, output in seen[module]]))
    gradients = [[next(found).flatten(0, -2) for _ in seen[module]] for module in modules]
    uses = len(seen[modules[0]]) // len(flags)
    masks = [torch.tensor(own) for own in flags for _ in range(uses)]
    return {
        name: (
            torch.cat([a[mask] for (a, _), mask in zip(seen[module], masks, strict=True)]),
            torch.cat([g[mask] for g, mask in zip(own, masks, strict=True)]),
        )
        for name, module, own in zip(names, modules, gradients, strict=True)
    }


def fit(stage: reference.StageSpec, names: reference.Maps) -> dict[str, reference.Fit]:
    """EK-FAC of every map, of a stage with an objective or of a language model's."""
    if type(stage) is reference.StageSpec:
        return reference.fit(stage, names)
    sampled = stage.labels == "sampled"
    vectors: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in names}
    for document in stage.documents:
        found = token_vectors(
            stage.model, names, lambda document=document: loss(stage, document, sampled), counted(stage, document)
        )
        for name in names:
            vectors[name].append(found[name])
    fits = {}
    for name in names:
        a, g = (torch.cat(each) for each in zip(*vectors[name], strict=True))
        moments = a.T @ a / len(a), g.T @ g / len(g)
        bases = [torch.linalg.eigh(moment)[1] for moment in moments]
        fits[name] = reference.Fit(*moments, *bases, torch.zeros(len(g.T), len(a.T), dtype=torch.float64))
    for document in stage.documents:
        for name, g in gradient(stage, names, loss(stage, document, sampled)).items():
            fits[name].Lambda += (fits[name].QS.T @ g @ fits[name].QA) ** 2 / len(stage.documents)
    return fits


def document_gradients(
    stage: reference.StageSpec, names: reference.Maps, document: reference.Document
) -> list[dict[str, Tensor]]:
    """The gradients of a document's windows; of one that has an objective's loss, of the whole."""
    if type(stage) is reference.StageSpec:
        cut = reference.windows(stage.tokenizer, document, stage.max_tokens, stage.append_eos)
        return [reference.window_gradients(stage.model, names, *window) for window in cut]
    return [gradient(stage, names, loss(stage, document))]


def query_gradient(stage: reference.StageSpec, names: reference.Maps, query: reference.Document) -> dict[str, Tensor]:
    """That of the query's completion, or of its class."""
    if "label" in query:
        return gradient(stage, names, loss(stage, query))
    return reference.window_gradients(stage.model, names, *reference.tokenise(stage.tokenizer, query))


def scores(
    stages: Sequence[reference.StageSpec],
    queries: Sequence[reference.Document],
    documents: Sequence[reference.Document],
    scored: int = 0,
) -> dict[tuple[Any, Any], tuple[float, float, int]]:
    """{(query id, document id): (score, norm, n_tokens)}, as `reference.scores`."""
    names = reference.tracked_names(stages[-1].model)
    fits = [fit(stage, names) for stage in stages]
    carried = {}
    gradients = [query_gradient(stages[-1], names, query) for query in queries]
    for name in names:
        vectors = torch.stack([own[name] for own in gradients]).flatten(1).T
        for k in range(len(stages) - 1, scored - 1, -1):
            vectors = reference.stage_respond(stages[k], fits[k][name].hessian(), vectors, scored=k == scored)
        carried[name] = vectors.T.reshape(len(queries), *gradients[0][name].shape)
    found = {}
    for document in documents:
        own = document_gradients(stages[scored], names, document)
        norm = float(sum((g**2).sum() for window in own for g in window.values()) ** 0.5)
        for row, query in enumerate(queries):
            score = float(sum((carried[name][row] * g[name]).sum() for g in own for name in names))
            found[query["id"], document["id"]] = (score, norm, n_tokens(stages[scored], document))
    return found


def n_tokens(stage: reference.StageSpec, document: reference.Document) -> int:
    if type(stage) is reference.StageSpec:
        return len(reference.tokenise(stage.tokenizer, document, stage.append_eos)[0])
    return sum(len(flags) for flags in counted(stage, document))


def gauss_newton(stage: reference.StageSpec, names: reference.Maps) -> Tensor:
    """(1/N) Σ_documents Σ_y p(y) ∇log p(y) ∇log p(y)ᵀ, [P, P] over all maps; y is a class, or which is preferred."""
    total = torch.zeros(())
    for document in stage.documents:
        if isinstance(stage, Preferred):
            found = margin(stage, document)
            table = torch.nn.functional.logsigmoid(torch.stack([found, -found]))
        else:
            table = log_classes(stage, document)
        slopes = reference_solve.weight_gradients(stage, names, table)
        total = total + slopes.T @ (table.detach().exp()[:, None] * slopes)
    return total / len(stage.documents)


def flat(gradients: Sequence[dict[str, Tensor]]) -> Tensor:
    """[len(gradients), P]: each one's maps one after the other."""
    return torch.stack([torch.cat([gradient.reshape(-1) for gradient in own.values()]) for own in gradients])
