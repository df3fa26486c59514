"""Signs that a result should not be trusted, from what the run left. Thresholds are ours, and said with each sign."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import exp
from typing import Any

import numpy as np

from msif_ray.corpus.unusable import most_often
from msif_ray.results.excerpt import visible
from msif_ray.results.facts import Facts, Fitted, Query, Scored
from msif_ray.results.maps import short_names

# A covariance of dimension d is estimated from tokens, and the eigenvalues in its basis from documents: with fewer
# tokens than a few times d the smallest eigenvalues, which the response amplifies most, are noise.
TOKENS_PER_DIMENSION = 10
# Share of a query's squared norm that low rank should keep, on average over maps.
LEAST_ENERGY = 0.9
# Geometric mean probability of a completion's tokens, below which the model would hardly have said it.
LEAST_PROBABILITY = 0.05
# What one document's score may say that leaving it out would change the log-likelihood by, in nats for each token of
# the completion: this much is a factor of e in every token's probability, and no small change.
LARGEST_CHANGE = 1.0
# Share of the shown documents' scores in one map, and correlation of |score| with length.
ONE_MAP = 0.5
FEWEST_MAPS = 4
LENGTH_CORRELATION = 0.7
# Of few documents chance alone correlates as much, and of two any: of independent normal numbers in one query of 80
# where there are 10, in one of 100,000 where there are 30.
LENGTH_DOCUMENTS = 30
SKIPPED_SHARE = 0.05
# Queries named in a line of a terminal.
QUERIES_NAMED = 5


@dataclass(frozen=True)
class Signal:
    """What is doubtful in a few words, and why, with what can be done."""

    title: str
    detail: str


@dataclass(frozen=True)
class Signals:
    """Those of the whole run, and those of single queries by `(label, query id)`."""

    run: list[Signal]
    queries: Mapping[tuple[str, str], list[Signal]]


def find_signals(
    facts: Facts,
    statistics: Mapping[tuple[str, str], Mapping[str, Any]],
    module_shares: Mapping[tuple[str, str], tuple[list[str], np.ndarray]],
) -> Signals:
    """`statistics` has the rows of `statistics.parquet`; `module_shares` the maps' names and, `[maps]`, the sums of
    |share| over each query's top documents."""
    of_queries: dict[tuple[str, str], list[Signal]] = {}
    for scored in facts.scored:
        for query in facts.queries:
            key = (scored.label, query.id)
            found = [*_preferred(query), *_energy(scored, query)]
            found += [*_candidates(facts, scored, statistics, key), *_numbers(facts, scored, statistics.get(key, {}))]
            found += [*_modules(*module_shares[key])] if key in module_shares else []
            found += (
                [*_length(statistics[key]), *_size(facts, scored, query, statistics[key])] if key in statistics else []
            )
            of_queries[key] = found
    return Signals([*_factors(facts), *_skipped(facts, statistics)], of_queries)


def signal_lines(signals: Signals) -> list[str]:
    """The signals in lines for a terminal or a log: those of queries by title, with the queries that have them."""
    lines = [f"{signal.title}: {signal.detail}" for signal in signals.run]
    queries = list(dict.fromkeys(query for _, query in signals.queries))
    by_title: dict[str, dict[str, None]] = {}
    for (_, query), found in signals.queries.items():
        for signal in found:
            by_title.setdefault(signal.title, {})[query] = None
    for title, having in by_title.items():
        some = [*map(visible, list(having)[:QUERIES_NAMED]), *(["…"] if len(having) > QUERIES_NAMED else [])]
        lines.append(f"{title}: {len(having)} of {len(queries)} queries ({', '.join(some)})")
    return lines


def _factors(facts: Facts) -> Iterator[Signal]:
    largest = max(max(shape) for shape in facts.maps.values())
    for stage in facts.stages:
        fitted: Fitted | None = stage.fitted
        if fitted is not None and fitted.tokens < TOKENS_PER_DIMENSION * largest:
            yield Signal(
                f"Few documents for the factors of {stage.name}",
                f"{fitted.tokens:,} tokens of {fitted.documents:,} documents estimate covariances of up to {largest:,} "
                f"dimensions; below {TOKENS_PER_DIMENSION} tokens per dimension their small eigenvalues are noise. "
                "Fit on more documents, or raise the damping.",
            )


def _skipped(facts: Facts, statistics: Mapping[tuple[str, str], Mapping[str, Any]]) -> Iterator[Signal]:
    for scored in facts.scored:
        reasons: Mapping[str, int] = facts.skipped.get(scored.label, {})
        skipped, most = sum(reasons.values()), most_often(reasons)
        if skipped and (skipped == scored.documents or _has_no_score(scored, statistics)):
            yield Signal(
                f"No document of {scored.label} has a score",
                f"{skipped:,} were skipped{most}. skipped.parquet names each one.",
            )
        elif scored.candidates is None and skipped / scored.documents > SKIPPED_SHARE:
            yield Signal(
                f"Many documents of {scored.label} were skipped",
                f"{skipped:,} of {scored.documents:,} have no score{most}. skipped.parquet names each one.",
            )


def _has_no_score(scored: Scored, statistics: Mapping[tuple[str, str], Mapping[str, Any]]) -> bool:
    """Whether no candidate of any query has a score: it has no row then."""
    return scored.candidates is not None and all(label != scored.label for label, _ in statistics)


def _candidates(
    facts: Facts, scored: Scored, statistics: Mapping[tuple[str, str], Mapping[str, Any]], key: tuple[str, str]
) -> Iterator[Signal]:
    skipped = facts.skipped.get(scored.label)
    if scored.candidates is not None and key not in statistics and not (skipped and _has_no_score(scored, statistics)):
        yield Signal(
            "No candidate has a score",
            "the query has none (no document shares a word with it, or the list has none of it), or all of them were "
            "skipped, or their scores are no numbers.",
        )


def _numbers(facts: Facts, scored: Scored, row: Mapping[str, Any]) -> Iterator[Signal]:
    """Of candidates it is not known how many scores a query should have."""
    wanted = scored.documents - sum(facts.skipped.get(scored.label, {}).values())
    there = row.get("documents", 0)
    if scored.candidates is None and there < wanted:
        yield Signal(
            "Some scores are no numbers",
            f"{wanted - there:,} of {wanted:,} are infinite or not a number, where the model's gradients overflow. "
            "They have no rank and are in no sum; compare another `dtype`, or a larger damping.",
        )


def _preferred(query: Query) -> Iterator[Signal]:
    if query.log_likelihood is None or not query.tokens:
        return
    if query.rather_than is not None:
        if query.log_likelihood < 0:
            yield Signal(
                "The model preferred the other completion",
                f"the log-likelihood of the completion is {-query.log_likelihood:.3g} nats below that of the one it is "
                "asked about rather than. What would turn that round is another question than why the model said it; "
                "check which of the two is which.",
            )
        return
    probability = exp(query.log_likelihood / query.tokens)
    if probability < LEAST_PROBABILITY and query.is_class:
        yield Signal(
            "The model did not prefer this class",
            f"it has a probability of {probability:.2g} (below {LEAST_PROBABILITY:g}). What would make an unlikely "
            "class likelier is another question than why the model chose another; check the label.",
        )
    elif probability < LEAST_PROBABILITY:
        yield Signal(
            "The model did not prefer this completion",
            f"its tokens have a geometric mean probability of {probability:.2g} (below {LEAST_PROBABILITY:g}). What "
            "would make an unlikely completion likelier is another question than why the model said it; check the "
            "completion's text and leading space.",
        )


def _energy(scored: Scored, query: Query) -> Iterator[Signal]:
    kept = scored.kept.get(query.id)
    if kept is not None and kept.energy < LEAST_ENERGY:
        yield Signal(
            "Much of the query was lost to low rank",
            f"{kept.energy:.0%} of its squared norm is kept on average over maps, {kept.least_energy:.0%} at least; "
            "raise queries.rank, or set queries.energy.",
        )


def _modules(names: list[str], shares: np.ndarray) -> Iterator[Signal]:
    total = float(shares.sum())
    if len(names) < FEWEST_MAPS or not total:
        return
    largest = int(shares.argmax())
    if shares[largest] / total > ONE_MAP:
        yield Signal(
            "One map carries most of the scores",
            f"{short_names(names)[largest]} has {shares[largest] / total:.0%} of the top documents' scores. A map with "
            "very small eigenvalues can do that; compare a larger damping, or leave it out with `modules`.",
        )


def _size(facts: Facts, scored: Scored, query: Query, row: Mapping[str, Any]) -> Iterator[Signal]:
    documents, tokens = facts.weighed(scored), query.tokens or 1
    change = max(-row["lowest"], row["highest"]) / documents
    if scored.of_weight and change > LARGEST_CHANGE * tokens:
        yield Signal(
            "Scores are too large for an estimate of first order",
            f"by its score, leaving out the strongest document alone, one of {documents:,}, would change the "
            f"log-likelihood by {change:.3g} nats (over {LARGEST_CHANGE:g} for each token that is explained), which is "
            "no small change. Take such scores for an order and not for sizes, and compare a larger damping. Where the "
            "stage was trained on more documents than these, the change is smaller in proportion.",
        )


def _length(row: Mapping[str, Any]) -> Iterator[Signal]:
    correlation = row["length_correlation"]
    if row["documents"] >= LENGTH_DOCUMENTS and correlation is not None and correlation > LENGTH_CORRELATION:
        yield Signal(
            "Long documents dominate",
            f"|score| and the number of tokens have a correlation of {correlation:.2f}; a score is a sum over tokens. "
            "Compare score / norm, or score / n_tokens.",
        )
