"""The linear datamodeling score (Park et al. 2023, TRAK, §2): what attributions predict of models trained on parts of
the documents, against what these models do.

An attribution says that a model trained on the documents S gives query q the log-likelihood Σ_{z in S} score(q, z), but
for a constant and a factor. The score of a method is Spearman's correlation of that with the measured one over many
random S, for each query, and the mean over queries.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from msif_ray.validate.problem import Scores

RESAMPLES = 2000


@dataclass(frozen=True)
class Lds:
    """`by_query` `[queries]`, and the means of bootstrap resamples, `[resamples]`: of queries and of subsets, both
    drawn anew, the same ones for every method, so that methods may be compared draw by draw."""

    by_query: Scores
    resampled: Scores

    @property
    def mean(self) -> float:
        return float(self.by_query.mean())

    @property
    def standard_error(self) -> float:
        return float(self.resampled.std(ddof=1))

    @property
    def interval(self) -> list[float]:
        """95 %, over queries and subsets."""
        return percentiles(self.resampled)

    def above(self, other: "Lds") -> list[float]:
        """The 95 % interval of how much better this one is than the other."""
        return percentiles(self.resampled - other.resampled)


def lds(scores: Scores, included: NDArray[np.bool_], measured: Scores, seed: int = 0) -> Lds:
    """Of `scores` `[queries, documents]` against what models that read the documents `included` `[models, documents]`
    `measured`, `[models, queries]`.

    A resample weighs models and queries by how often they are drawn; ranks stay those among all models.
    """
    predicted, truth = (rankdata(each, axis=0) for each in (included @ scores.T, measured))
    models, queries = truth.shape
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(models, np.full(models, 1 / models), RESAMPLES).astype(np.float64)
    asked = rng.multinomial(queries, np.full(queries, 1 / queries), RESAMPLES)
    by_query = _correlations(np.ones((1, models)), predicted, truth)[0]
    return Lds(by_query, (_correlations(drawn, predicted, truth) * asked).sum(axis=1) / queries)


def _correlations(weights: Scores, left: Scores, right: Scores) -> Scores:
    """Pearson's of every column `[models]` of both, under weights `[resamples, models]`: `[resamples, queries]`. Zero
    where a column is constant, which predicts nothing."""
    shares = weights / weights.sum(axis=1, keepdims=True)
    middle = (len(left) + 1) / 2  # the mean rank: sums of squares lose no digits
    first, second = left - middle, right - middle
    means = shares @ first, shares @ second
    spread = (shares @ first**2 - means[0] ** 2) * (shares @ second**2 - means[1] ** 2)
    together = shares @ (first * second) - means[0] * means[1]
    return np.divide(together, np.sqrt(spread.clip(0)), out=np.zeros_like(together), where=spread > 1e-9)


def percentiles(draws: Scores) -> list[float]:
    low, high = np.quantile(draws, [0.025, 0.975])
    return [float(low), float(high)]
