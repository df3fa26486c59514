"""How well scores agree with others: correlations over documents, averaged over queries, with intervals."""

from typing import Any

import numpy as np
from scipy import stats

from msif_ray.validate.problem import Scores

RESAMPLES = 2000


def agreement(scores: Scores, truth: Scores, seed: int = 0) -> dict[str, Any]:
    """Pearson and Spearman of every query over its documents, both `[queries, documents]`: the mean over queries with a
    95 % bootstrap interval over queries, and Pearson and Spearman over all pairs at once (`pooled`)."""
    found: dict[str, Any] = {}
    for name, correlation in (("pearson", stats.pearsonr), ("spearman", stats.spearmanr)):
        each = np.array([correlation(row, own).statistic for row, own in zip(scores, truth, strict=True)])
        found[name] = float(each.mean())
        found[f"{name}_interval"] = interval(each, seed)
        found[f"{name}_pooled"] = float(correlation(scores.ravel(), truth.ravel()).statistic)
    return found


def interval(values: Scores, seed: int) -> list[float]:
    """The 95 % bootstrap interval of the mean of `[n]` values."""
    if len(values) < 2:
        return [float(values.mean())] * 2
    draws = np.random.default_rng(seed).integers(0, len(values), (RESAMPLES, len(values)))
    low, high = np.quantile(values[draws].mean(axis=1), [0.025, 0.975])
    return [float(low), float(high)]
