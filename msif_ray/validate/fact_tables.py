"""How well each ranking finds the documents that state a fact: tables with intervals, split by shared words, and
examples where rankings part."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from msif_ray.demo.metrics import Marks, Scores, found_by_query, random_quality, ranking
from msif_ray.validate.agreement import interval
from msif_ray.validate.fact_settings import FactSetting
from msif_ray.validate.tracing import DOT_PRODUCT, FROBENIUS, INVERSE, PLAIN, SECOND, STEP, Traced

RECALL_AT, PRECISION_AT, TOP = 10, 5, 5
TOKENS, SPREAD, STANDARD = "/ tokens", "/ spread over queries", "standardised over queries"
ALL, NONE, SOME, MOST = "all", "no word of the question", "fewer than half of its words", "half of its words or more"

_STOP_WORDS = frozenset(("question", "what", "is", "the", "of", "a", "from", "in", "answer"))

Row = dict[str, Any]


class Ranking(NamedTuple):
    """A method, the damping of the scored stage (None: it has none), how its scores are normalised, and the scores
    `[queries, documents]`."""

    method: str
    damping: float | None
    normalised: str
    scores: Scores


def rankings(traced: Traced, others: Mapping[str, Scores], tokens: Scores) -> list[Ranking]:
    """Every method in every normalisation; what others than the gradients give is left as it is."""
    found = []
    for (method, damping), tensor in traced.scores.items():
        scores, norms = tensor.numpy(), norms_of(traced, method, damping, tokens)
        made = {PLAIN: scores} | {name: scores / norm for name, norm in norms.items()} | over_queries(scores)
        found += [Ranking(method, damping or None, name, values) for name, values in made.items()]
    return found + [Ranking(method, None, PLAIN, scores) for method, scores in others.items()]


def norms_of(traced: Traced, method: str, damping: float, tokens: Scores) -> dict[str, Scores]:
    """What a method's scores may be divided by, each `[documents]`."""
    stage = int(method == SECOND)
    keys = [(stage, FROBENIUS, 0.0)]
    if method != DOT_PRODUCT:
        keys += [(stage, norm, damping) for norm in (INVERSE, STEP)]
    roots = {key[1]: np.sqrt(np.maximum(traced.squares[key].numpy(), np.finfo(float).tiny)) for key in keys}
    return {TOKENS: tokens} | roots


def over_queries(scores: Scores) -> dict[str, Scores]:
    """Scores `[queries, documents]` in units of what the document scores for the other queries: over the root of their
    mean square, and over their standard deviation once their mean is taken off."""
    count = len(scores) - 1
    if count < 2:
        return {}
    mean = (scores.sum(0) - scores) / count
    square = ((scores**2).sum(0) - scores**2) / count
    deviation = np.sqrt(np.maximum(square - mean**2, 1e-30 * square))
    return {SPREAD: scores / np.sqrt(square), STANDARD: (scores - mean) / deviation}


def words(text: str) -> set[str]:
    """A text's words, in lower case, without those that every question has."""
    return set(re.findall(r"\w+", text.lower())) - _STOP_WORDS


def shared_words(setting: FactSetting) -> Scores:
    """The share of each question's words (the answer's not counted) that a document has, `[queries, documents]`."""
    documents = [words(document["text"]) for document in setting.documents]
    questions = [words(query["prompt"]) for query in setting.queries]
    return np.array([[len(asked & own) / len(asked) for own in documents] for asked in questions])


def groups(setting: FactSetting) -> dict[str, Marks]:
    """Of the documents that state a query's fact, all, and those that share so much with the question; `[queries,
    documents]`. Groups in which nothing is are left out."""
    states, shared = setting.states, shared_words(setting)
    found = {ALL: states, NONE: states & (shared == 0), SOME: states & (shared > 0) & (shared < 0.5)}
    found[MOST] = states & (shared >= 0.5)
    return {name: marks for name, marks in found.items() if marks.any()}


def quality_rows(found: Sequence[Ranking], setting: FactSetting, seed: int) -> tuple[list[Row], list[Row]]:
    """A row per ranking and group, and a row per ranking, group and query.

    Of a group, documents of the other groups are neither looked for nor in the way; queries that have none in it are
    left out. `gain` is how much the reciprocal rank differs from that of the same method's plain score, by query.
    """
    rows, by_query = [], []
    ids = np.array([query["id"] for query in setting.queries])
    for group, marks in groups(setting).items():
        kept, plain = marks.any(axis=1), {}
        away = (setting.states & ~marks)[kept]
        for each in found:
            scores = np.where(away, -np.inf, each.scores[kept])
            ten, five = (found_by_query(scores, marks[kept], k) for k in (RECALL_AT, PRECISION_AT))
            name: Row = {"method": each.method, "damping": each.damping, "normalised": each.normalised, "group": group}
            if each.normalised == PLAIN:
                plain[each.method, each.damping] = ten.reciprocal
            gain = ten.reciprocal - plain[each.method, each.damping]
            columns = {"mrr": ten.reciprocal, "recall": ten.recall, "precision": five.precision, "gain": gain}
            row = name | {"queries": int(kept.sum())}
            for column, values in columns.items():
                row[column] = float(values.mean())
                row[f"{column}_interval"] = interval(values.astype(np.float64), seed)
            rows.append(row)
            by_query += [
                name | {"query_id": str(query)} | {column: float(values[i]) for column, values in columns.items()}
                for i, query in enumerate(ids[kept])
            ]
        rows.append(_chance(marks[kept], group))
    return rows, by_query


def _chance(marks: Marks, group: str) -> Row:
    expected = random_quality(marks, RECALL_AT)
    precision = float(marks.mean())
    values = {"mrr": expected.mrr, "recall": expected.recall, "precision": precision, "gain": 0.0}
    name = {"method": "random (expected)", "damping": None, "normalised": PLAIN, "group": group, "queries": len(marks)}
    return name | values | {f"{column}_interval": [value] * 2 for column, value in values.items()}


def leanings(found: Sequence[Ranking], traced: Traced, tokens: Scores) -> list[Row]:
    """Which documents each ranking puts first whatever is asked: the mean percentile, by norm and by length, of the
    first five (0.5: no leaning), and how many different documents are first for some query, over the queries."""
    measures = {"norm": traced.squares[0, FROBENIUS, 0.0].numpy(), "length": tokens}
    places = {name: values.argsort(kind="stable").argsort() for name, values in measures.items()}
    percentiles = {name: values / (len(values) - 1) for name, values in places.items()}
    rows = []
    for each in found:
        first = np.argsort(-each.scores, axis=1, kind="stable")[:, :TOP]
        row = {"method": each.method, "damping": each.damping, "normalised": each.normalised}
        row |= {f"{name}_percentile": float(values[first].mean()) for name, values in percentiles.items()}
        rows.append(row | {"different_firsts": len(set(first[:, 0])) / len(first)})
    return rows


def spreads(traced: Traced, tokens: Scores, states: Marks) -> list[Row]:
    """How well each norm foretells the size of a document's scores for queries that it does not answer: over the
    documents, the correlation of its logarithm with that of the root of the scores' mean square, and how much of one a
    unit of the other is (`slope`; 1 for a norm that, divided by, leaves every document the same spread)."""
    rows = []
    for (method, damping), tensor in traced.scores.items():
        elsewhere = np.where(states, np.nan, tensor.numpy())
        size = np.log(np.sqrt(np.nanmean(elsewhere**2, axis=0)))
        for norm, values in norms_of(traced, method, damping, tokens).items():
            own = np.log(values)
            correlation = float(np.corrcoef(own, size)[0, 1])
            row = {"method": method, "damping": damping or None, "norm": norm, "correlation": correlation}
            rows.append(row | {"slope": correlation * float(size.std() / own.std())})
    return rows


def examples(one: Ranking, other: Ranking, setting: FactSetting, count: int = 3) -> list[Row]:
    """Queries that one ranking answers with a stating document first and the other does not, `count` each way: the
    question and both rankings' first documents."""
    states = setting.states
    order = [np.stack([ranking(row, marks) for row, marks in zip(r.scores, states, strict=True)]) for r in (one, other)]
    right = [np.take_along_axis(states, each[:, :1], axis=1)[:, 0] for each in order]
    rows = []
    for winner in (0, 1):
        chosen = np.flatnonzero(right[winner] & ~right[1 - winner])
        for query in chosen[:count]:
            names = (f"{one.method} ({one.normalised})", other.method)
            row = {"query": setting.queries[query]["prompt"] + setting.queries[query]["completion"]}
            row |= {"right": names[winner], "wrong": names[1 - winner], "such_queries": len(chosen)}
            firsts = [list(_texts(setting, each[query, :3], states[query])) for each in order]
            rows.append(row | dict(zip(names, firsts, strict=True)))
    return rows


def _texts(setting: FactSetting, places: NDArray[np.intp], states: Marks) -> Iterator[str]:
    for place in places:
        yield ("[states it] " if states[place] else "[does not] ") + setting.documents[place]["text"]
