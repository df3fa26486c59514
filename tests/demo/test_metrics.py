"""MRR, recall@k and what a random order has, against counts by hand and by enumeration."""

from itertools import permutations

import numpy as np
import pytest

from msif_ray.demo.metrics import found_by_query, overlap, quality, random_quality, ranking


def test_counts_by_hand():
    scores = np.array([[0.9, 0.1, 0.5, 0.7], [0.1, 0.2, 0.3, 0.4]])
    states = np.array([[False, True, True, False], [False, False, False, True]])
    # First query: order 0, 3, 2, 1, so ranks 3 and 4; second: rank 1.
    assert quality(scores, states, k=1) == pytest.approx(((1 / 3 + 1) / 2, 0.5))
    assert quality(scores, states, k=3) == pytest.approx(((1 / 3 + 1) / 2, 0.75))
    assert quality(scores, states, k=10).recall == 1


def test_each_query_by_hand():
    scores = np.array([[0.9, 0.1, 0.5, 0.7], [0.1, 0.2, 0.3, 0.4]])
    states = np.array([[False, True, True, False], [False, False, False, True]])
    found = found_by_query(scores, states, k=3)
    assert found.reciprocal == pytest.approx([1 / 3, 1])
    assert found.recall == pytest.approx([0.5, 1])
    assert found.precision == pytest.approx([1 / 3, 1 / 3])


def test_equal_scores_gain_nothing():
    states = np.array([[True, False, False, True]])
    assert quality(np.zeros((1, 4)), states, k=2) == pytest.approx((1 / 3, 0))
    assert list(ranking(np.zeros(4), states[0])[:2]) == [1, 2]


def test_a_document_without_a_score_comes_last():
    assert list(ranking(np.array([-np.inf, -5.0, 2.0]), np.array([True, False, False]))) == [2, 1, 0]


def test_random_is_the_mean_over_all_orders():
    states = np.array([[True, False, True, False, False], [False, False, False, True, False]])
    every_order = np.array(list(permutations(range(5))), dtype=float)
    means = np.mean([quality(np.tile(order, (2, 1)), states, k=2) for order in every_order], axis=0)
    assert random_quality(states, k=2) == pytest.approx(tuple(means))


def test_a_query_without_a_stating_document_is_refused():
    with pytest.raises(ValueError, match="every query"):
        quality(np.zeros((1, 3)), np.zeros((1, 3), dtype=bool))


@pytest.mark.parametrize("k", [3, 10])
def test_the_same_scores_overlap_wholly_of_however_few_documents(k):
    scores = np.array([[0.9, 0.1, 0.5], [0.1, 0.2, 0.3]])
    assert list(overlap(scores, scores, k)) == [1, 1]
    assert list(overlap(scores, -scores, 1)) == [0, 0]
