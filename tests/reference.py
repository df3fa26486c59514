"""The dense float64 reference of multi-stage influence: slow, simple, and sharing no code with msif_ray.

One window at a time, batch size 1, no padding. Gradients come from autograd on the weights themselves; the
curvature of a map is a dense [o*i, o*i] matrix to which responses are applied by linear solves and matrix
exponentials, never through eigenvalues. Formulas: DESIGN §2 (Bao et al. 2025, arXiv 2505.05017).

A map's matrices are [o, i], i counting the bias as its last column; vec() is row-major:
vec(Q_S X Q_Aᵀ) = (Q_S ⊗ Q_A) vec(X). Where an eigenvalue of A or S is (nearly) repeated, the eigenbasis, and
with it Λ and H, is arbitrary: compare those, and scores, only where eigenvalues are well apart.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

Document = Mapping[str, Any]
Maps = Sequence[str]  # dotted names of the tracked linear maps
Ids = list[int]  # tokens of a window
Flags = list[bool]  # whether token t is a target, predicted at position t - 1
MASKED = -1


@dataclass
class Fit:
    """EK-FAC of one map: A, QA [i, i]; S, QS [o, o]; corrected eigenvalues Lambda [o, i]."""

    A: Tensor
    S: Tensor
    QA: Tensor
    QS: Tensor
    Lambda: Tensor

    def hessian(self) -> Tensor:
        """H = (Q_S ⊗ Q_A) diag(vec Λ) (Q_S ⊗ Q_A)ᵀ, [o·i, o·i]."""
        basis = torch.kron(self.QS, self.QA)
        return (basis * self.Lambda.reshape(-1)) @ basis.T


@dataclass
class StageSpec:
    """A training stage: `response` is its part in scores of earlier stages, `scored_response` its own (None:
    scored_unrolled if `response` is unrolled, else damped). `strength`: the proximal alpha, `damping`: c, if
    relative times the map's mean corrected eigenvalue. `append_eos` None: only of completions."""

    name: str
    model: nn.Module
    tokenizer: Any
    documents: Sequence[Document]
    max_tokens: int | None = None
    labels: str = "sampled"  # or empirical
    seed: int = 0
    response: str = "proximal"  # damped, unrolled, identity
    strength: float = 0.1
    relative: bool = True
    rate: float = 0.0
    steps: int = 0
    damping: float = 0.1
    damping_relative: bool = True
    append_eos: bool | None = None
    scored_response: str | None = None  # damped, scored_unrolled, identity


def tokenise(tokenizer: Any, document: Document, append_eos: bool | None = None) -> tuple[Ids, Flags]:
    """All tokens of a document and which of them are targets: of a text all but the first, of a prompt and
    completion the completion's and the EOS, but never the sequence's first, which nothing predicts; or `ids` and
    `targets` as they are."""
    if "ids" in document:
        return list(document["ids"]), list(document["targets"])
    if "completion" in document:
        prompt = list(tokenizer(document["prompt"])["input_ids"])
        ids = prompt + list(tokenizer(document["completion"], add_special_tokens=False)["input_ids"])
        append_eos = True if append_eos is None else append_eos
    else:
        prompt, ids = [], list(tokenizer(document["text"])["input_ids"])
    if append_eos:
        ids.append(tokenizer.eos_token_id)
    return ids, [t > 0 and t >= len(prompt) for t in range(len(ids))]


def windows(
    tokenizer: Any, document: Document, max_tokens: int | None = None, append_eos: bool | None = None
) -> list[tuple[Ids, Flags]]:
    """tokens[0:M], tokens[M-1:2M-1], ...: neighbours share a token, a target only in the earlier of the two.
    Windows without a target come first in a prompted document and are left out. M None: one window."""
    ids, targets = tokenise(tokenizer, document, append_eos)
    max_tokens = max(len(ids), 2) if max_tokens is None else max_tokens
    cut = []
    for start in range(0, len(ids), max_tokens - 1):
        part = [False, *targets[start + 1 : start + max_tokens]]
        if any(part):
            cut.append((ids[start : start + max_tokens], part))
    return cut


def log_probabilities(model: nn.Module, ids: Ids) -> Tensor:
    """log p(token at t+1 | tokens up to t), [T, V], float64."""
    logits = model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]
    return torch.log_softmax(logits.double(), dim=-1)


def data_labels(ids: Ids, is_target: Flags) -> list[int]:
    """The data's own label of every position, MASKED where the position predicts no target. [T]"""
    following = [token if target else MASKED for token, target in zip(ids, is_target, strict=True)]
    return [*following[1:], MASKED]


def sample_labels(
    model: nn.Module, ids: Ids, is_target: Flags, seed: int, stage: str, document_id: Any, index: int
) -> list[int]:
    """Labels drawn from the model, [T], or MASKED: the number of tokens whose cumulative probability is
    <= u_t * total, at most V - 1; u = Generator(Philox(key)).random(T), key = blake2b-128 of
    json([seed, stage, document, window]), low byte first."""
    name = json.dumps([seed, stage, document_id, index]).encode("utf-8")
    key = int.from_bytes(hashlib.blake2b(name, digest_size=16).digest(), "little")
    uniform = np.random.Generator(np.random.Philox(key=key)).random(len(ids))
    with torch.no_grad():
        cumulative = np.cumsum(log_probabilities(model, ids).exp().numpy(), axis=-1)
    labels = []
    for t in range(len(ids)):
        wanted = t + 1 < len(ids) and is_target[t + 1]
        below = int((cumulative[t] <= uniform[t] * cumulative[t, -1]).sum())
        labels.append(min(below, cumulative.shape[1] - 1) if wanted else MASKED)
    return labels


def summed_nll(model: nn.Module, ids: Ids, labels: list[int]) -> Tensor:
    """loss = - Σ_t log p(label_t | tokens up to t) over the positions that have a label; nats."""
    table = log_probabilities(model, ids)
    return -torch.stack([table[t, label] for t, label in enumerate(labels) if label != MASKED]).sum()


def tracked_names(model: nn.Module) -> list[str]:
    """Every linear map inside the blocks: its dotted name has a numeric component."""
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    return [name for name in linear if any(part.isdigit() for part in name.split("."))]


def window_gradients(
    model: nn.Module, names: Maps, ids: Ids, is_target: Flags, labels: list[int] | None = None
) -> dict[str, Tensor]:
    """G = d loss / d [W b] of one window for every map, [o, i]; `labels` None: the data's own."""
    loss = summed_nll(model, ids, data_labels(ids, is_target) if labels is None else labels)
    modules = [model.get_submodule(name) for name in names]
    parameters = [p for m in modules for p in (m.weight, m.bias) if p is not None]
    found = list(torch.autograd.grad(loss, parameters))
    gradients = {}
    for name, module in zip(names, modules, strict=True):
        weight = found.pop(0).T if isinstance(module, Conv1D) else found.pop(0)
        gradients[name] = weight if module.bias is None else torch.cat([weight, found.pop(0)[:, None]], dim=1)
    return gradients


def token_vectors(model: nn.Module, names: Maps, ids: Ids, labels: list[int]) -> dict[str, list[Tensor]]:
    """Inputs a_t [T, i] (1 appended for a bias) and g_t = d loss / d (W a_t + b) [T, o] of every map; of one used n
    times one use's after the other's, [n T, .]."""
    seen: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {}

    def keep(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        a = args[0].detach().flatten(0, -2)  # [1, T, i], or [T, i] in the MLP of opt
        if module.bias is not None:
            a = torch.cat([a, torch.ones_like(a[:, :1])], dim=1)
        seen.setdefault(module, []).append((a, output))

    modules = [model.get_submodule(name) for name in names]
    handles = [module.register_forward_hook(keep) for module in modules]
    loss = summed_nll(model, ids, labels)
    for handle in handles:
        handle.remove()
    found = iter(torch.autograd.grad(loss, [output for module in modules for _, output in seen[module]]))
    gradients = [torch.cat([next(found).flatten(0, -2) for _ in seen[module]]) for module in modules]
    inputs = [torch.cat([a for a, _ in seen[module]]) for module in modules]
    return {name: [a, g] for name, a, g in zip(names, inputs, gradients, strict=True)}


def labelled_windows(stage: StageSpec) -> list[list[tuple[Ids, Flags, list[int]]]]:
    """(ids, is_target, labels) of every window of every document that the stage is fitted on, by document."""
    fitted = []
    for document in stage.documents:
        cut = windows(stage.tokenizer, document, stage.max_tokens, stage.append_eos)
        labels = [data_labels(*window) for window in cut]
        if stage.labels == "sampled":
            key = (stage.seed, stage.name, document["id"])
            # A window's number counts those of the prompt before it, too.
            first = [*tokenise(stage.tokenizer, document, stage.append_eos)[1], True].index(True)
            left_out = (first - 1) // (stage.max_tokens - 1) if stage.max_tokens else 0
            labels = [sample_labels(stage.model, *window, *key, i + left_out) for i, window in enumerate(cut)]
        fitted.append([(*window, own) for window, own in zip(cut, labels, strict=True)])
    return [document for document in fitted if document]


def covariances(stage: StageSpec, names: Maps) -> dict[str, tuple[Tensor, Tensor]]:
    """A = mean of a_t a_tᵀ [i, i], S = mean of g_t g_tᵀ [o, o] over all positions that predict a target; of an expert,
    over those of them whose tokens are sent to it: its module's `routed` [T] says of which tokens that is true."""
    tokens: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in names}
    for ids, _, labels in (window for document in labelled_windows(stage) for window in document):
        for name, (a, g) in token_vectors(stage.model, names, ids, labels).items():
            routed = getattr(stage.model.get_submodule(name), "routed", torch.ones(len(ids), dtype=torch.bool))
            uses = len(a) // len(ids)
            wanted = [label != MASKED and bool(seen) for label, seen in zip(labels, routed, strict=True)] * uses
            tokens[name] += [(a[t], g[t]) for t, counts in enumerate(wanted) if counts]
    moments = {}
    for name, pairs in tokens.items():
        if not pairs:  # an expert that no token reached
            (out, columns), of_nothing = _shape(stage.model.get_submodule(name)), {"dtype": torch.float64}
            moments[name] = (torch.zeros(columns, columns, **of_nothing), torch.zeros(out, out, **of_nothing))
            continue
        a, g = (torch.stack(vectors) for vectors in zip(*pairs, strict=True))
        moments[name] = (a.T @ a / len(a), g.T @ g / len(g))
    return moments


def _shape(module: nn.Module) -> tuple[int, int]:
    """(out, in and one for a bias)."""
    out, inputs = reversed(module.weight.shape) if isinstance(module, Conv1D) else module.weight.shape
    return out, inputs + (module.bias is not None)


def corrected_eigenvalues(stage: StageSpec, bases: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Λ[o,i] = (1/N) Σ_documents Σ_windows ((Q_Sᵀ G Q_A)[o,i])², N documents with targets; bases Q_A, Q_S."""
    total = {name: torch.zeros(len(qs), len(qa), dtype=torch.float64) for name, (qa, qs) in bases.items()}
    documents = labelled_windows(stage)
    for ids, is_target, labels in (window for document in documents for window in document):
        for name, gradient in window_gradients(stage.model, list(bases), ids, is_target, labels).items():
            qa, qs = bases[name]
            total[name] += (qs.T @ gradient @ qa) ** 2
    return {name: value / len(documents) for name, value in total.items()}


def fit(stage: StageSpec, names: Maps) -> dict[str, Fit]:
    """A = Q_A Λ_A Q_Aᵀ, S = Q_S Λ_S Q_Sᵀ (ascending) and the corrected eigenvalues of every map."""
    moments = covariances(stage, names)
    bases = {name: (torch.linalg.eigh(a)[1], torch.linalg.eigh(s)[1]) for name, (a, s) in moments.items()}
    corrected = corrected_eigenvalues(stage, bases)
    return {name: Fit(*moments[name], *bases[name], corrected[name]) for name in names}


def respond(hessian: Tensor, kind: str, vectors: Tensor, strength: float = 0.0, time: float = 0.0) -> Tensor:
    """r(H) V, V [n, q]: damped (H + c)⁻¹, proximal alpha (H + alpha)⁻¹, identity; with time = rate * steps:
    unrolled exp(-time H), scored_unrolled (1 - exp(-time H)) H⁻¹, a block of exp [[-time H, V], [0, 0]]."""
    n, q = vectors.shape
    shifted = hessian + strength * torch.eye(n, dtype=hessian.dtype)
    if kind == "damped":
        return torch.linalg.solve(shifted, vectors)
    if kind == "proximal":
        return strength * torch.linalg.solve(shifted, vectors)
    if kind == "unrolled":
        return torch.linalg.matrix_exp(-time * hessian) @ vectors
    if kind == "scored_unrolled":
        size = vectors.norm()
        block = torch.zeros(n + q, n + q, dtype=hessian.dtype)
        block[:n] = torch.cat([-time * hessian, vectors / size], dim=1)
        return torch.linalg.matrix_exp(block)[:n, n:] * time * size
    return {"identity": vectors}[kind]


def stage_respond(stage: StageSpec, hessian: Tensor, vectors: Tensor, scored: bool) -> Tensor:
    """The stage's response on V [o*i, q], as the scored stage or as a later one."""
    mean = float(hessian.trace()) / len(hessian)
    kind, strength, relative = stage.response, stage.strength, stage.relative
    if scored:
        kind = stage.scored_response or {"unrolled": "scored_unrolled"}.get(kind, "damped")
        strength, relative = stage.damping, stage.damping_relative
    strength = strength * mean if relative else strength
    return respond(hessian, kind, vectors, strength, stage.rate * stage.steps)


def carry_back(
    stages: Sequence[StageSpec], fits: Sequence[dict[str, Fit]], queries: Sequence[Document], scored: int = 0
) -> dict[str, Tensor]:
    """{name: [q, o, i]}: (H_j + c)⁻¹ r_{j+1}(H_{j+1}) ... r_K(H_K) g_q; g_q is the gradient of the query's
    completion's NLL at the last stage's model, in one window whatever that stage's `max_tokens`."""
    model, tokenizer = stages[-1].model, stages[-1].tokenizer
    gradients = [query_gradients(model, list(fits[-1]), tokenizer, query) for query in queries]
    carried = {}
    for name in fits[-1]:
        rows = torch.stack([gradient[name] for gradient in gradients])
        vectors = rows.flatten(1).T
        for k in range(len(stages) - 1, scored - 1, -1):
            vectors = stage_respond(stages[k], fits[k][name].hessian(), vectors, scored=k == scored)
        carried[name] = vectors.T.reshape(rows.shape)
    return carried


def query_gradients(model: nn.Module, names: Maps, tokenizer: Any, query: Document) -> dict[str, Tensor]:
    """Of a query's completion's NLL, or of Σ sign · NLL over its `windows`, (sign, ids, is_target) written by hand."""
    weighed = query.get("windows") or [(1.0, *tokenise(tokenizer, query))]
    found = [(sign, window_gradients(model, names, ids, is_target)) for sign, ids, is_target in weighed]
    return {name: torch.stack([sign * each[name] for sign, each in found]).sum(0) for name in names}


def scores(
    stages: Sequence[StageSpec],
    queries: Sequence[Document],
    documents: Sequence[Document],
    scored: int = 0,
    names: Maps | None = None,
    fits: Sequence[dict[str, Fit]] | None = None,
) -> tuple[dict[tuple[Any, Any], tuple[float, float, int]], dict[Any, str]]:
    """({(query id, document id): (score, norm, n_tokens)}, {skipped document id: reason});
    score = g_qᵀ r_K(H_K) ... r_{j+1}(H_{j+1}) (H_j + c)⁻¹ Σ_windows G, j = `scored`; norm = root of the sum
    of |G|² over windows and maps; n_tokens counts prompt, completion and EOS."""
    names = tracked_names(stages[-1].model) if names is None else names
    fits = [fit(stage, names) for stage in stages] if fits is None else fits
    carried = carry_back(stages, fits, queries, scored)
    stage, found, skipped = stages[scored], {}, {}
    for document in documents:
        n_tokens = len(tokenise(stage.tokenizer, document, stage.append_eos)[0])
        cut = windows(stage.tokenizer, document, stage.max_tokens, stage.append_eos)
        gradients = [window_gradients(stage.model, names, *window) for window in cut]
        if not gradients:
            skipped[document["id"]] = "fewer than two tokens" if n_tokens < 2 else "no target"
            continue
        norm = math.sqrt(sum(float((g**2).sum()) for window in gradients for g in window.values()))
        for row, query in enumerate(queries):
            score = float(sum((carried[name][row] * g[name]).sum() for g in gradients for name in names))
            found[query["id"], document["id"]] = (score, norm, n_tokens)
    return found, skipped


def curvature_norms(stage: StageSpec, fits: dict[str, Fit], documents: Sequence[Document]) -> dict[Any, float]:
    """{document id: root of Σ_windows Σ_maps vec(G)ᵀ (H + c)⁻¹ vec(G)} of documents with a target; c the scored
    stage's damping at each map."""
    owners, vectors = [], {name: [] for name in fits}
    for document in documents:
        for window in windows(stage.tokenizer, document, stage.max_tokens, stage.append_eos):
            owners.append(document["id"])
            for name, gradient in window_gradients(stage.model, list(fits), *window).items():
                vectors[name].append(gradient.flatten())
    squares = dict.fromkeys(owners, 0.0)
    for name, each in vectors.items():
        columns = torch.stack(each, dim=1)  # of all windows, since a solve takes longer than everything else
        by_window = (columns * stage_respond(stage, fits[name].hessian(), columns, scored=True)).sum(0)
        for owner, square in zip(owners, by_window.tolist(), strict=True):
            squares[owner] += square
    return {owner: math.sqrt(square) for owner, square in squares.items()}


def shares(
    stages: Sequence[StageSpec],
    queries: Sequence[Document],
    documents: Sequence[Document],
    scored: int = 0,
    fits: Sequence[dict[str, Fit]] | None = None,
) -> dict[tuple[Any, Any], tuple[dict[str, float], list[float]]]:
    """{(query id, document id): (score by map, score by token)}: Σ_windows ⟨D, G⟩ of each map from autograd's G on
    the weights, and Σ_maps g_tᵀ D a_t of each position, D the query carried back; of documents with a target."""
    names = tracked_names(stages[-1].model)
    fits = [fit(stage, names) for stage in stages] if fits is None else fits
    carried = carry_back(stages, fits, queries, scored)
    stage, found = stages[scored], {}
    for document in documents:
        ids, targets = tokenise(stage.tokenizer, document, stage.append_eos)
        size = max(len(ids), 2) if stage.max_tokens is None else stage.max_tokens
        by_map = {query["id"]: dict.fromkeys(names, 0.0) for query in queries}
        by_token = {query["id"]: [0.0] * len(ids) for query in queries}
        for start in range(0, len(ids), size - 1):
            part, own = ids[start : start + size], [False, *targets[start + 1 : start + size]]
            if not any(own):
                continue
            gradients = window_gradients(stage.model, names, part, own)
            vectors = token_vectors(stage.model, names, part, data_labels(part, own))
            for row, query in enumerate(queries):
                for name in names:
                    direction = carried[name][row]
                    by_map[query["id"]][name] += float((direction * gradients[name]).sum())
                    for t, (a, g) in enumerate(zip(*vectors[name], strict=True)):
                        by_token[query["id"]][start + t] += float(g @ direction @ a)
        found |= {(q["id"], document["id"]): (by_map[q["id"]], by_token[q["id"]]) for q in queries if any(targets)}
    return found
