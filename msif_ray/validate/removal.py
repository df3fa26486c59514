"""Documents removed: what a query's log-likelihood loses when those that a method ranks highest are not read.

Queries go in groups: one training is without the highest documents of all the group's queries, which are about
different facts, and stands for each of them. What it is compared with is without as many random documents.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import numpy as np

from msif_ray.validate.agreement import interval
from msif_ray.validate.problem import Scores
from msif_ray.validate.retrained import FINETUNED, Trainings


@dataclass(frozen=True)
class Removals:
    """For each of `groups` of so many `queries` and each method one training without the `documents` that it ranks
    highest for every query of the group, and `random` ones without as many random documents."""

    groups: int = 4
    queries: int = 6
    documents: int = 5
    random: int = 4


def plan_removals(removals: Removals, scores: Mapping[str, Scores], seed: int) -> dict[str, Any]:
    """Which documents go, by the scores `[queries, documents]` of each method: all queries in groups in a random order,
    so that more groups go on where fewer ended."""
    count, documents = next(iter(scores.values())).shape
    rng, size = random.Random(seed), removals.queries * removals.documents
    order = rng.sample(range(count), count)
    groups = [order[start : start + removals.queries] for start in range(0, count, removals.queries)]
    return {
        "random": [rng.sample(range(documents), size) for _ in range(removals.random)],
        "groups": [
            {"queries": group, "documents": {m: highest(each[group], removals.documents) for m, each in scores.items()}}
            for group in groups
            if len(group) == removals.queries
        ],
    }


def highest(scores: Scores, count: int) -> list[list[int]]:
    """The places of each row's highest scores, none in two rows: each in turn takes what is left."""
    found: list[list[int]] = []
    for row in scores:
        taken = set(chain.from_iterable(found))
        ranked = (int(place) for place in np.argsort(-row, kind="stable"))
        found.append(list(islice((place for place in ranked if place not in taken), count)))
    return found


def removal_rows(
    trainings: Trainings, plan: Mapping[str, Any], groups: int, methods: Sequence[str], baseline: str
) -> list[dict[str, Any]]:
    """By kind of fine-tuning and method: the mean over queries of how much lower the log-likelihood is, in nats, than
    without random documents, and than without those of the method `baseline`, with 95 % intervals over queries; how
    many of a query's documents state its fact; and how much trainings without random ones differ, as a deviation."""
    chosen = plan["groups"][:groups]
    randomly = trainings.without("removed-random", [plan["random"]])
    lists = [[list(chain.from_iterable(group["documents"][method])) for method in methods] for group in chosen]
    without = trainings.without("removed", lists)
    asked = np.array([query for group in chosen for query in group["queries"]])
    own_group = np.arange(len(asked)) // len(chosen[0]["queries"])
    states, rows = trainings.pipeline.states, []
    for kind in FINETUNED:
        usual = randomly.log_likelihoods[kind][:, asked]
        after = without.log_likelihoods[kind].reshape(len(chosen), len(methods), -1)
        drops = {method: usual.mean(axis=0) - after[own_group, at, asked] for at, method in enumerate(methods)}
        for method, own in drops.items():
            removed = chain.from_iterable(group["documents"][method] for group in chosen)
            beyond = own - drops[baseline]
            rows.append(
                {
                    "kind": kind,
                    "method": method,
                    "queries": len(asked),
                    "drop": float(own.mean()),
                    "drop_interval": interval(own, trainings.seed),
                    "beyond_baseline": float(beyond.mean()),
                    "beyond_baseline_interval": interval(beyond, trainings.seed),
                    "stating": float(
                        np.mean([states[q, places].sum() for q, places in zip(asked, removed, strict=True)])
                    ),
                    "spread_of_random": float(usual.std(axis=0, ddof=1).mean()),
                }
            )
    return rows
