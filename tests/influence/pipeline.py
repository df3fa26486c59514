"""msif_ray's functions composed for one process: documents -> factors -> directions -> scores.

Stages are described by `reference.StageSpec`, so that the package and the reference are given the same.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from reference import StageSpec
from torch import Tensor

from msif_ray.corpus.batches import pack
from msif_ray.corpus.objectives import encode_for
from msif_ray.corpus.reader import Document
from msif_ray.corpus.switches import switches_of
from msif_ray.corpus.windows import Encoded, Skipped, Window, to_batch
from msif_ray.influence.batch import Batch
from msif_ray.influence.blocks import Blocks
from msif_ray.influence.capture import Capture, Captured
from msif_ray.influence.curvature import CurvatureMetric, curvature_squares
from msif_ray.influence.ekfac import Basis, CorrectionSums, CovarianceSums, Factor, eigenbasis
from msif_ray.influence.labels import batch_uniforms
from msif_ray.influence.modules import find_linear_maps
from msif_ray.influence.queries import carry_back, query_tokens, truncate
from msif_ray.influence.response import (
    DampedInverse,
    Identity,
    Proximal,
    Response,
    UnrolledFilter,
    UnrolledInverse,
)
from msif_ray.influence.scoring import Directions, Scorer

TOGETHER = 10**9  # tokens per batch: all windows in one padded batch
ALONE = 1  # every window a batch of its own

Factors = dict[str, Factor]


@dataclass(frozen=True)
class Fitted:
    """A stage's factors and what they were made of; `covariances` are means."""

    covariances: dict[str, Tensor]
    factors: Factors


def in_dtype(stage: StageSpec, dtype: torch.dtype) -> StageSpec:
    return replace(stage, model=copy.deepcopy(stage.model).to(dtype))


def encode_rows(stage: StageSpec, rows: Sequence[Mapping[str, Any]]) -> tuple[list[Encoded], list[Skipped]]:
    """Rows with a label, or with a rejected completion, are read as the stage's `objective` does."""
    found: list[Encoded | Skipped] = []
    for row in rows:
        completion = "completion" in row
        pair = "rejected" in row
        text = row["completion" if completion else "chosen" if pair else "text"]
        eos = (completion or pair) if stage.append_eos is None else stage.append_eos
        more = {name: row.get(name) for name in ("label", "rejected", "reference")}
        document = Document(row["id"], row.get("prompt"), text, has_prompt="prompt" in row, **more)
        objective = getattr(stage, "objective", None) if pair or "label" in row else None
        found.append(encode_for(objective, stage.tokenizer, document, eos, stage.max_tokens))
    return [e for e in found if isinstance(e, Encoded)], [e for e in found if isinstance(e, Skipped)]


def batches(stage: StageSpec, documents: Sequence[Encoded], tokens_per_batch: int) -> list[list[Window]]:
    windows = [w for document in documents for w in document.windows(stage.max_tokens or len(document.ids))]
    return pack(windows, tokens_per_batch, switches_of(stage.model.config))


def uniforms(stage: StageSpec, batch: Batch) -> Tensor | None:
    return batch_uniforms(stage.seed, stage.name, batch) if stage.labels == "sampled" else None


def fit(stage: StageSpec, tokens_per_batch: int = 150, blocks: Blocks | None = None) -> Fitted:
    """Covariances, bases and corrected eigenvalues of every map; two passes over the stage's documents."""
    maps = find_linear_maps(stage.model, None, blocks)
    encoded, _ = encode_rows(stage, stage.documents)
    batched = [to_batch(windows) for windows in batches(stage, encoded, tokens_per_batch)]
    covariances = CovarianceSums()
    with Capture(stage.model, maps) as capture:
        for batch in batched:
            covariances.add(capture.run(batch, uniforms(stage, batch)))
        means = {key: total / max(covariances.counts[key], 1) for key, total in covariances.sums.items()}
        bases = {
            name: Basis(*(eigenbasis(means[f"{side}/{name}"])[1].to(means[f"A/{name}"].dtype) for side in "AS"))
            for name in maps
        }
        corrections = CorrectionSums(bases)
        for batch in batched:
            corrections.add(capture.run(batch, uniforms(stage, batch)))
    factors = {name: Factor(bases[name], corrections.sums[f"E/{name}"] / len(encoded)) for name in maps}
    return Fitted(means, factors)


def response(stage: StageSpec, mean: float, scored: bool) -> Response:
    kind = stage.response
    if scored:
        kind = stage.scored_response or {"unrolled": "scored_unrolled"}.get(kind, "damped")
    time = stage.rate * stage.steps
    if kind in ("unrolled", "scored_unrolled"):
        return UnrolledInverse(time) if kind == "scored_unrolled" else UnrolledFilter(time)
    if kind == "identity":
        return Identity()
    if kind == "damped":
        return DampedInverse(stage.damping * (mean if stage.damping_relative else 1.0))
    return Proximal(stage.strength * (mean if stage.relative else 1.0))


def carry(
    stages: Sequence[StageSpec],
    factors: Sequence[Factors],
    queries: Sequence[Mapping[str, Any]],
    scored: int = 0,
    blocks: Blocks | None = None,
) -> dict[str, Tensor]:
    """Carried-back directions of every map, `[queries, out, columns]`; queries in as few padded batches as may be."""
    last = replace(stages[-1], max_tokens=None, append_eos=None)
    encoded, _ = encode_rows(last, queries)
    maps, found = find_linear_maps(last.model, None, blocks), {}
    with Capture(last.model, maps) as capture:
        for windows in batches(last, encoded, 10**6):
            captured = capture.run(to_batch(windows))
            found |= {window.key.document_id: query_tokens(captured, row) for row, window in enumerate(windows)}
    tokens = [found[query.document_id] for query in encoded]
    carried = {}
    for name in maps:
        passed = [
            (factors[k][name], response(stages[k], factors[k][name].mean_eigenvalue, k == scored))
            for k in range(len(stages) - 1, scored - 1, -1)
        ]
        carried[name] = carry_back(torch.stack([query[name].gradient for query in tokens]), passed)
    return carried


def captures(
    stage: StageSpec, rows: Sequence[Mapping[str, Any]], tokens_per_batch: int = 150, blocks: Blocks | None = None
) -> list[Captured]:
    """One capture per batch of the documents, with the data's own labels."""
    encoded, _ = encode_rows(stage, rows)
    with Capture(stage.model, find_linear_maps(stage.model, None, blocks)) as capture:
        return [capture.run(to_batch(windows)) for windows in batches(stage, encoded, tokens_per_batch)]


def score(
    directions: Mapping[str, Directions],
    stage: StageSpec,
    queries: Sequence[Mapping[str, Any]],
    rows: Sequence[Mapping[str, Any]],
    tokens_per_batch: int = 150,
    blocks: Blocks | None = None,
) -> tuple[dict[tuple[str, str], tuple[float, float, int]], dict[str, str]]:
    """({(query id, document id): (score, norm, n_tokens)}, {skipped document id: reason})."""
    encoded, skipped = encode_rows(stage, rows)
    scores = {document.document_id: torch.zeros(len(queries), dtype=torch.float64) for document in encoded}
    squares = dict.fromkeys(scores, 0.0)
    scorer = Scorer(directions)
    for captured in captures(stage, rows, tokens_per_batch, blocks):
        for key, row, square in zip(captured.batch.keys, *scorer.score(captured), strict=True):
            scores[key.document_id] += row
            squares[key.document_id] += float(square)
    lengths = {document.document_id: len(document.ids) for document in encoded}
    found = {
        (query["id"], name): (float(scores[name][q]), math.sqrt(squares[name]), lengths[name])
        for q, query in enumerate(queries)
        for name in scores
    }
    return found, {entry.document_id: entry.reason for entry in skipped}


def curvature_norms(
    stage: StageSpec,
    factors: Factors,
    rows: Sequence[Mapping[str, Any]],
    tokens_per_batch: int = 150,
    blocks: Blocks | None = None,
) -> dict[str, float]:
    """{document id: norm of its gradient in the stage's inverse curvature}."""
    metrics = {
        name: CurvatureMetric(factor.basis, response(stage, factor.mean_eigenvalue, True)(factor.eigenvalues))
        for name, factor in factors.items()
    }
    squares: dict[str, float] = {}
    for captured in captures(stage, rows, tokens_per_batch, blocks):
        for key, square in zip(captured.batch.keys, curvature_squares(metrics, captured).tolist(), strict=True):
            squares[key.document_id] = squares.get(key.document_id, 0.0) + square
    return {name: math.sqrt(square) for name, square in squares.items()}


def dense(carried: Mapping[str, Tensor]) -> dict[str, Directions]:
    return {name: truncate(directions)[0] for name, directions in carried.items()}
