"""Baselines that look at hidden states or at gradients' angles and not at curvature."""

import numpy as np
import torch
from torch import Tensor

from msif_ray.corpus.windows import Encoded
from msif_ray.influence.conjugate import Vectors, inner_by_query, sum_over_maps
from msif_ray.validate.problem import Scores
from msif_ray.validate.setting import Setting, batches


def gradient_cosine(scores: Scores, norms: Scores, gradients: Vectors) -> Scores:
    """Gradient dot products over the norms of both."""
    own = sum_over_maps(inner_by_query(vectors, vectors) for vectors in gradients.values()).sqrt().numpy()
    return np.asarray(scores / np.maximum(norms, 1e-30) / own[:, None])


def hidden_cosine(setting: Setting) -> Scores:
    """Cosine of the mean last hidden states of query and document, `[queries, documents]`."""
    queries, documents = (
        torch.stack([states.mean(0) for states in _hidden_states(setting, rows)])
        for rows in (setting.queries, setting.scored)
    )
    return (_unit(queries) @ _unit(documents).T).numpy()


def linear_cka(setting: Setting) -> Scores:
    """Linear CKA of the last hidden states of query and document, `[queries, documents]` (Kornblith et al. 2019).

    CKA compares two matrices with the same rows. A query and a document differ in their tokens and share the hidden
    units, so a row is a unit and a column a token: X `[units, tokens]`, each column centred over the units, gives
    ‖XᵀY‖²_F / (‖XᵀX‖_F ‖YᵀY‖_F), the cosine of the second moments X Xᵀ of the two texts' hidden states.
    """
    queries, documents = (
        torch.stack([_second_moment(states) for states in _hidden_states(setting, rows)])
        for rows in (setting.queries, setting.scored)
    )
    return (_unit(queries) @ _unit(documents).T).numpy()


def _second_moment(states: Tensor) -> Tensor:
    """X Xᵀ of states `[tokens, units]`, flat."""
    centred = states - states.mean(1, keepdim=True)
    return (centred.T @ centred).flatten()


def _unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=1, keepdim=True)


def _hidden_states(setting: Setting, rows: list[Encoded]) -> list[Tensor]:
    """What the output head is given for each text, `[tokens, units]` in float64."""
    found = []
    with torch.no_grad():
        for row in rows:
            (batch,) = batches([row], 1)
            out = setting.model(input_ids=batch.input_ids, output_hidden_states=True, use_cache=False)
            found.append(out.hidden_states[-1][0].double())
    return found
