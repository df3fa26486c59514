"""Linear datamodeling scores against a computation by hand and against scipy's correlations."""

import numpy as np
import pytest
from scipy.stats import spearmanr

from msif_ray.validate.lds import lds


def test_by_hand() -> None:
    included = np.array([[True, True, False], [True, False, True], [False, True, True]])
    scores = np.array([[3.0, 2.0, 1.0], [1.0, 0.0, 0.0]])
    # The first query's sums are 5, 4, 3; the second's 1, 1, 0, with ranks 2.5, 2.5, 1 against 3, 1, 2.
    measured = np.array([[-1.0, -1.0], [-2.0, -5.0], [-3.0, -3.0]])
    found = lds(scores, included, measured)
    assert found.by_query == pytest.approx([1.0, 0.0], abs=1e-12)
    assert found.mean == pytest.approx(0.5)


def test_against_scipy_and_intervals() -> None:
    rng = np.random.default_rng(0)
    models, queries, documents = 80, 40, 30
    truth = rng.standard_normal((queries, documents))
    included = rng.random((models, documents)) < 0.5
    measured = included @ truth.T + rng.standard_normal((models, queries))
    found = lds(truth, included, measured)
    wanted = [spearmanr(included @ truth[q], measured[:, q]).statistic for q in range(queries)]
    assert found.by_query == pytest.approx(wanted)
    low, high = found.interval
    assert low < found.mean < high and high - low < 0.1
    noise = lds(rng.standard_normal(truth.shape), included, measured)
    low, high = noise.interval
    assert low < 0 < high and abs(noise.mean) < 0.1
    assert found.above(noise)[0] > 0.7 and found.above(found) == [0.0, 0.0]


def test_an_explicit_bootstrap_has_the_same_spread() -> None:
    rng = np.random.default_rng(3)
    models, queries, documents = 40, 6, 10
    truth = rng.standard_normal((queries, documents))
    included = rng.random((models, documents)) < 0.5
    measured = included @ truth.T + 2 * rng.standard_normal((models, queries))
    found, draws = lds(truth, included, measured), []
    for _ in range(200):
        chosen, asked = rng.integers(0, models, models), rng.integers(0, queries, queries)
        each = [spearmanr((included @ truth[q])[chosen], measured[chosen, q]).statistic for q in asked]
        draws.append(np.mean(each))
    assert found.standard_error == pytest.approx(np.std(draws), rel=0.2)


def test_scores_that_say_nothing_predict_nothing() -> None:
    included = np.array([[True, False], [False, True], [True, False]])
    found = lds(np.ones((1, 2)), included, np.array([[1.0], [2.0], [3.0]]))
    assert found.mean == 0 and found.interval == [0, 0]
