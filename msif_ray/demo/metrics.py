"""How well a ranking finds the documents that state a fact: mean reciprocal rank, recall and precision at k."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Scores = NDArray[np.floating]
Marks = NDArray[np.bool_]


class Quality(NamedTuple):
    """Means over the queries: `mrr` of 1/rank of the first stating document, `recall` of the share of
    the stating documents that are among the first k.
    """

    mrr: float
    recall: float


class Found(NamedTuple):
    """Of each query, all `[queries]`: `reciprocal` 1/rank of the first stating document, `recall` the share of the
    stating documents that are among the first k, `precision` the share of the first k that state the fact.
    """

    reciprocal: Scores
    recall: Scores
    precision: Scores


def ranking(scores: Scores, states: Marks) -> NDArray[np.intp]:
    """Indices of the documents, highest score first.

    Of equal scores, documents that state the fact (`states`) come last, so that a method which cannot tell
    documents apart gains nothing by their order. Both arguments [documents].
    """
    return np.lexsort((states, -scores))


def found_by_query(scores: Scores, states: Marks, k: int = 10) -> Found:
    """What `scores` find of the documents marked in `states`, both [queries, documents].

    Raises
    ------
    ValueError
        A query has no document that states its fact.
    """
    if not states.any(axis=1).all():
        raise ValueError("every query needs a document that states its fact")
    found = np.stack([marks[ranking(row, marks)] for row, marks in zip(scores, states, strict=True)])
    among = found[:, :k].sum(axis=1)
    return Found(1 / (found.argmax(axis=1) + 1), among / found.sum(axis=1), among / k)


def quality(scores: Scores, states: Marks, k: int = 10) -> Quality:
    """MRR and recall@k of `scores` against `states`, both [queries, documents]: means of `found_by_query`."""
    found = found_by_query(scores, states, k)
    return Quality(float(found.reciprocal.mean()), float(found.recall.mean()))


def random_quality(states: Marks, k: int = 10) -> Quality:
    """What a random order of the documents has on average, exactly. `states` [queries, documents]."""
    documents = states.shape[1]
    reciprocals = []
    for stating in states.sum(axis=1):
        expected, none_before = 0.0, 1.0  # none_before: the probability that no stating document came earlier
        for rank in range(1, documents - int(stating) + 2):
            here = stating / (documents - rank + 1)
            expected += none_before * here / rank
            none_before *= 1 - here
        reciprocals.append(expected)
    return Quality(float(np.mean(reciprocals)), min(k / documents, 1.0))


def spearman(scores: Scores, others: Scores) -> Scores:
    """Each query's rank correlation of two scores over the documents, both `[queries, documents]`; `[queries]`.

    Equal scores are ranked in the order of the documents in both.
    """
    ranks = [np.argsort(np.argsort(each, axis=1, kind="stable"), axis=1).astype(float) for each in (scores, others)]
    first, second = (each - each.mean(axis=1, keepdims=True) for each in ranks)
    found: Scores = (first * second).sum(axis=1) / np.sqrt((first**2).sum(axis=1) * (second**2).sum(axis=1))
    return found


def overlap(scores: Scores, others: Scores, k: int) -> Scores:
    """The share of each query's k highest documents by `others`, or of all where there are fewer, that are among those
    by `scores`; `[queries]`."""
    highest = [np.argsort(-each, axis=1, kind="stable")[:, :k] for each in (scores, others)]
    return np.array([len(np.intersect1d(first, second)) / len(first) for first, second in zip(*highest, strict=True)])
