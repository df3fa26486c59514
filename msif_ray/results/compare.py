"""Two sets of scores of the same queries and documents: how alike their rankings are, and what moved most."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console
from rich.table import Table
from rich.text import Text

from msif_ray.errors import UserError
from msif_ray.results.complete import check_complete
from msif_ray.results.excerpt import visible
from msif_ray.results.facts import Facts, Query, Scored, read_facts
from msif_ray.results.of_queries import query_scores

# Documents at an end that make up the top, and of those that moved, how many are named.
TOP = 20
MOVED = 3
# Of both runs' scores that are in memory at a time, beside their documents' ids.
COMPARED_BYTES = 2**30


@dataclass(frozen=True)
class Moved:
    """A document of either top, with its ranks (1: the highest score) and scores in both."""

    doc_id: str
    ranks: tuple[int, int]
    scores: tuple[float, float]


@dataclass(frozen=True)
class Compared:
    """One query in two sets of scores, over the documents of both.

    `alone` counts the documents of either side alone, and `no_numbers` those of both that are left out, either of whose
    scores is infinite or not a number. `spearman` and `pearson` are None where either side's scores are all equal.
    `overlap` is the share of the `top` documents with the highest scores that both have, None where there are no more
    than that many, which would all be in common; `moved` the documents of either top, highest or lowest, the farthest
    first.
    """

    query_id: str
    documents: int
    alone: tuple[int, int]
    no_numbers: int
    spearman: float | None
    pearson: float | None
    overlap: float | None
    moved: list[Moved]


def compare_scores(
    query_id: str, one: tuple[pa.Array, np.ndarray], other: tuple[pa.Array, np.ndarray], top: int = TOP
) -> Compared:
    """Compares the `(document ids, scores)` of one query. Equal scores share their mean rank in the correlation, and
    are ranked in the first one's order of documents otherwise."""
    places = pc.index_in(one[0], value_set=other[0])
    common = np.flatnonzero(places.is_valid().to_numpy(zero_copy_only=False))
    ids = one[0].take(pa.array(common))
    scores = one[1][common], other[1][places.drop_null().to_numpy().astype(np.int64)]
    finite = np.isfinite(scores[0]) & np.isfinite(scores[1])
    ids, scores = ids.filter(pa.array(finite)), (scores[0][finite], scores[1][finite])
    alone = (len(one[0]) - len(common), len(other[0]) - len(common))
    left_out = len(common) - len(ids)
    if not len(ids):
        return Compared(query_id, 0, alone, left_out, None, None, None, [])
    ranks = [_ranks(each) for each in scores]
    k = min(top, len(ids))
    tops = [set(np.flatnonzero(each <= k).tolist()) for each in ranks]
    ends = set().union(*tops, *(np.flatnonzero(each > len(ids) - k).tolist() for each in ranks))
    farthest = sorted(ends, key=lambda place: (-abs(int(ranks[0][place]) - int(ranks[1][place])), place))
    moved = [
        Moved(
            ids[place].as_py(),
            (int(ranks[0][place]), int(ranks[1][place])),
            (float(scores[0][place]), float(scores[1][place])),
        )
        for place in farthest
    ]
    mean_ranks = [pd.Series(each).rank().to_numpy() for each in scores]
    spearman, pearson = (_correlation(*pair) for pair in (mean_ranks, scores))
    overlap = len(tops[0] & tops[1]) / top if len(ids) > top else None
    return Compared(query_id, len(ids), alone, left_out, spearman, pearson, overlap, moved)


def _ranks(scores: np.ndarray) -> np.ndarray:
    """1 for the highest score."""
    ranks = np.empty(len(scores), dtype=np.int64)
    ranks[np.argsort(-scores, kind="stable")] = np.arange(1, len(scores) + 1)
    return ranks


def _correlation(one: np.ndarray, other: np.ndarray) -> float | None:
    one, other = one.astype(np.float64), other.astype(np.float64)  # in which differences are finite, too
    if len(one) < 2 or np.ptp(one) == 0 or np.ptp(other) == 0:
        return None
    return float(np.corrcoef(one, other)[0, 1])


def compare_runs(
    one: tuple[Facts, Scored], other: tuple[Facts, Scored], queries: list[str], top: int = TOP
) -> Iterator[Compared]:
    """Compares two runs query by query; the scores of as many queries as `COMPARED_BYTES` have room for are in memory,
    so that few passes over the parts are made."""
    documents = max(scored.documents for _, scored in (one, other))
    at_once = max(1, COMPARED_BYTES // (8 * documents))
    for start in range(0, len(queries), at_once):
        some = queries[start : start + at_once]
        sides = [query_scores(facts.run_dir, scored.label, some) for facts, scored in (one, other)]
        for (query, first), (_, second) in zip(*sides, strict=True):
            yield compare_scores(query, first, second, top)


def compare(
    run_a: str | Path,
    run_b: str | Path,
    console: Console,
    labels: tuple[str | None, str | None] = (None, None),
    query: str | None = None,
    top: int = TOP,
) -> None:
    """Prints how alike two runs' rankings are, query by query, and the documents that moved most.

    `labels` name the scores of each run (default: its first). Raises UserError for runs that have no query in common,
    and for one that is not finished.
    """
    sides = [_side(run, label) for run, label in zip((run_a, run_b), labels, strict=True)]
    queries = _common(sides[0][0], sides[1][0], query)
    for letter, (facts, scored) in zip("AB", sides, strict=True):
        console.print(Text(f"{letter}: {scored.label} of {facts.run_dir}"), soft_wrap=True)
        for passed in scored.passed:
            console.print(Text(f"   {passed.stage}: {passed.response}", style="dim"), soft_wrap=True)
    table = Table(box=None, padding=(0, 1), header_style="dim")
    table.add_column("query", overflow="fold")
    for name in ("documents", "Spearman", "Pearson", f"top-{top} in common"):
        table.add_column(name, justify="right", no_wrap=True)
    found = list(compare_runs(sides[0], sides[1], queries, top))
    for each in found:
        row = (f"{each.documents:,}", _number(each.spearman), _number(each.pearson), _share(each.overlap))
        table.add_row(Text(visible(each.query_id)), *row)
    if len(found) > 1:
        spearman, pearson, overlap = (
            _mean([getattr(each, name) for each in found]) for name in ("spearman", "pearson", "overlap")
        )
        table.add_row("mean", "", _number(spearman), _number(pearson), _share(overlap), style="bold")
    console.print(table)
    _print_moved(console, found, MOVED if query is None else top)
    _print_left_out(console, found)
    if not _same_documents(*sides):
        words = "Documents are called by file and row, and the two corpora differ: equal names may be other documents. "
        console.print(Text(words + "Give them an `id` column to compare by.", style="yellow"))


def _side(run: str | Path, label: str | None) -> tuple[Facts, Scored]:
    facts = read_facts(run)
    scored = facts.scored[0] if label is None else facts.scored_as(label)
    check_complete(facts, scored)
    return facts, scored


def _same_documents(*sides: tuple[Facts, Scored]) -> bool:
    """Whether equal names are of the same documents: where a corpus names its rows, or both have the same content."""
    contents = []
    for facts, scored in sides:
        place = facts.scored.index(scored)
        if facts.run.scored_documents(facts.run.score[place]).id is not None:
            return True
        contents.append(list(facts.corpora.get(f"score.{place}", {}).values()))
    return contents[0] == contents[1]


def _common(one: Facts, other: Facts, query: str | None) -> list[str]:
    asked = [{each.id: _asked(each) for each in facts.queries} for facts in (one, other)]
    if query is not None and not all(query in each for each in asked):
        raise UserError(f"--query: {query!r} is not a query of both runs")
    common = [each for each in asked[0] if each in asked[1] and query in (None, each)]
    if not common:
        raise UserError(f"{one.run_dir} and {other.run_dir} have no query in common")
    changed = next((each for each in common if asked[0][each] != asked[1][each]), None)
    if changed is not None:
        raise UserError(
            f"{other.run_dir}: the query {changed!r} has another prompt or completion there, or "
            "another span of it, or is about it rather than another"
        )
    return common


def _asked(query: Query) -> tuple[object, ...]:
    return query.prompt, query.completion, query.rather_than, query.span


def _print_left_out(console: Console, found: list[Compared]) -> None:
    left_out = {f"scores in {'AB'[side]} alone": [each.alone[side] for each in found] for side in (0, 1)}
    left_out["a score that is no number in A or in B"] = [each.no_numbers for each in found]
    for what, counts in left_out.items():
        if most := max(counts):
            number = f"{most:,}" if min(counts) == most else f"up to {most:,}"
            console.print(Text(f"{number} documents of a query have {what}, and are left out.", style="yellow"))


def _print_moved(console: Console, found: list[Compared], count: int) -> None:
    title = "what moved most of either's top"
    table = Table(box=None, padding=(0, 1), header_style="dim", title=title, title_justify="left")
    table.add_column("query", overflow="fold")
    table.add_column("document", overflow="fold")
    for name in ("rank in A", "in B", "score in A", "in B"):
        table.add_column(name, justify="right", no_wrap=True)
    for each in found:
        for place, moved in enumerate(each.moved[:count]):
            name = visible(each.query_id) if place == 0 else ""
            ranks, scores = (f"{rank:,}" for rank in moved.ranks), (f"{score:+.4g}" for score in moved.scores)
            table.add_row(Text(name), Text(visible(moved.doc_id)), *ranks, *scores)
    console.print(table)


def _mean(values: list[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return float(np.mean(there)) if there else None


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.0%}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
