"""A finished run in the terminal: each query with the documents that support and oppose it most."""

from collections.abc import Mapping, Sequence
from math import exp
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from msif_ray.errors import UserError
from msif_ray.results.by_stage import Row, by_stage, stages_beside
from msif_ray.results.excerpt import excerpt, visible
from msif_ray.results.facts import NO_SCORE, Query, explained, read_facts
from msif_ray.results.statistics import read_statistics
from msif_ray.results.top import read_top, top_k

# Tokens shown of a document, and documents of each side.
TOKENS = 60
DOCUMENTS = 5
# A token with this share of its document's strongest is set off.
STRONG = 0.4
STYLES = {"highest": "blue", "lowest": "dark_orange3"}
TITLES = {"highest": "supports", "lowest": "opposes"}
# What the numbers are, said once: of scores per unit of a document's weight, and of products of gradients.
OF_WEIGHT = (
    "scores: nats of the log-likelihood per unit of a document's weight in its stage's mean loss; leaving one of N out "
    "changes it by about -score/N"
)
OF_PRODUCTS = (
    "scores: products of gradients, without the curvature of their stage; no estimate of leaving a document out"
)
SHARE = "share: |score| of the sum of |score| of all documents; what is doubtful is in report.html"


def show(
    run_dir: str | Path, console: Console, query: str | None = None, label: str | None = None, top: int = DOCUMENTS
) -> None:
    """Prints one query, or all of them, with the `top` documents of each side by the scores of `label` (default: the
    run's first).

    Raises UserError for a query or a label that the run does not have.
    """
    facts = read_facts(run_dir)
    scored = facts.scored_as(label) if label is not None else facts.scored[0]
    queries = [each for each in facts.queries if query is None or each.id == query]
    if not queries:
        some = ", ".join(visible(each.id) for each in facts.queries[:5])
        raise UserError(f"--query: {run_dir} has no query {query!r}; it has {some}" + _more(len(facts.queries) - 5))
    wanted: dict[str, list[dict[str, Any]]] = {each.id: [] for each in queries}
    for row in read_top(run_dir):
        of_its_side = row["score"] > 0 if row["side"] == "highest" else row["score"] < 0
        if row["stage"] == scored.label and row["query_id"] in wanted and row["rank"] <= top and of_its_side:
            wanted[row["query_id"]].append(row)
    statistics = read_statistics(run_dir)
    shares = by_stage(facts, statistics)
    beside = stages_beside(facts, scored.label) if shares else []
    for each in queries:
        own = [shares[label, each.id] for label in beside if (label, each.id) in shares]
        _print(console, each, scored.label, wanted[each.id], statistics.get((scored.label, each.id), {}), own)
    meaning = OF_WEIGHT if scored.of_weight else OF_PRODUCTS
    console.print(Text(f"{meaning}. {SHARE}", style="dim"))
    most = max((row["documents"] for (label, _), row in statistics.items() if label == scored.label), default=0)
    if (kept := top_k(run_dir)) < min(top, most):
        words = f"top.parquet has {kept} documents of each side; for more, set `top` in the description and run it"
        console.print(Text(words, style="dim"))


def _more(count: int) -> str:
    return f" and {count} more" if count > 0 else ""


def _print(
    console: Console,
    query: Query,
    label: str,
    rows: list[dict[str, Any]],
    statistics: Mapping[str, Any],
    shares: list[Row],
) -> None:
    console.rule(Text(visible(query.id), style="bold"), align="left")
    before, inside, after = (visible(part, None) for part in explained(query))
    console.print(Text.assemble(visible(query.prompt, None), before, (inside, "bold underline"), after))
    if query.rather_than is not None:
        console.print(Text.assemble(("rather than ", "dim"), (visible(query.rather_than, None), "underline")))
    about = [f"scores of {label}"]
    if query.log_likelihood is not None:
        about.append(_likelihood(query, query.log_likelihood))
    about.append(
        f"{statistics['documents']:,} documents, deviation {statistics['deviation']:.3g}" if statistics else NO_SCORE
    )
    console.print(Text(", ".join(about), style="dim"))
    if parts := [f"{row.stage} {row.share:.0%}" for row in shares if row.share is not None]:
        console.print(Text(f"support by stage: {', '.join(parts)}", style="dim"))
    for side in ("highest", "lowest"):
        console.print(_side(side, rows, statistics.get("total_absolute") or 0.0))


def _likelihood(query: Query, nats: float) -> str:
    margin = query.rather_than is not None
    found = f"log-likelihood {nats:.3g} nats" + (" above the other's" if margin else "")
    if query.tokens and not margin:
        each = " per token" if query.tokens > 1 and not query.is_class else ""
        found += f" ({exp(nats / query.tokens):.0%}{each})"
    return found


def _side(side: str, rows: Sequence[Mapping[str, Any]], total: float) -> Table:
    """The documents of one side among a query's rows; `total` is the sum of all |score| of the query."""
    table = Table(box=None, padding=(0, 1), show_header=True, header_style="dim")
    table.add_column(TITLES[side], justify="right", style=STYLES[side], no_wrap=True)
    table.add_column("share", justify="right", style="dim", no_wrap=True)
    per_norm = any("curvature_norm" in row for row in rows)
    if per_norm:
        table.add_column("per curvature norm", justify="right", style="dim", no_wrap=True)
    table.add_column("document", ratio=1)
    for row in (row for row in rows if row["side"] == side):
        share = f"{abs(row['score']) / total:.1%}" if total else ""
        name = Text(visible(row["doc_id"], None), style="bold")
        divided = [f"{row['score'] / row['curvature_norm']:+.3g}" if row["curvature_norm"] else ""] if per_norm else []
        table.add_row(f"{row['score']:+.4g}", share, *divided, Group(name, _tokens(row)))
    if not table.row_count:
        table.add_row("–", "", *[""] * per_norm, Text("no document has a score on this side", style="dim"))
    return table


def _tokens(row: Mapping[str, Any]) -> Text:
    """The excerpt, its strongest tokens in the colour of their side."""
    found = excerpt(row["tokens"], row["token_scores"], TOKENS)
    largest = max((abs(score) for segment in found.segments for score in segment.scores), default=0.0)
    text = Text()
    for segment in found.segments:
        if segment.before:
            text.append(" … ", style="dim")
        for token, score in zip(segment.texts, segment.scores, strict=True):
            strong = largest > 0 and abs(score) >= STRONG * largest
            side = "highest" if score > 0 else "lowest"
            text.append(token, style=f"bold {STYLES[side]}" if strong else "")
    if found.after:
        text.append(" …", style="dim")
    return text
