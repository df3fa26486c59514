"""The tables of fact tracing as Markdown, as docs/validation.md has them."""

from collections.abc import Mapping, Sequence
from typing import Any

from msif_ray.validate.fact_tables import ALL, PLAIN, RECALL_AT, Row
from msif_ray.validate.tracing import FROBENIUS, INVERSE


def markdown(found: Mapping[str, Any]) -> str:
    """All tables of a result of `fact_report.results`, with headings between them."""
    parts = {
        "MRR of all stating documents, by what the score is divided by": mrr_table(found["quality"]),
        f"Recall@{RECALL_AT} and precision@5": other_table(found["quality"]),
        "MRR by the words that documents share with the question": group_table(found["quality"]),
        "What foretells the spread of a document's scores": spread_table(found["spreads"]),
        "Which documents come first whatever is asked": leaning_table(found["leanings"]),
        "Where rankings part": example_list(found["examples"]),
    }
    return "\n\n".join(f"#### {title}\n\n{text}" for title, text in parts.items()) + "\n"


def named(row: Row) -> str:
    """A method with its damping, where it has one."""
    return str(row["method"]) if row["damping"] is None else f"{row['method']}, damping {row['damping']:g}"


def mrr_table(rows: Sequence[Row]) -> str:
    rows = [row for row in rows if row["group"] == ALL]
    normalised = list(dict.fromkeys(row["normalised"] for row in rows))
    cells = {(named(row), row["normalised"]): _with_interval(row, "mrr") for row in rows}
    names = dict.fromkeys(name for name, _ in cells)
    return _table(["method", *normalised], [[name, *(cells.get((name, n), "") for n in normalised)] for name in names])


def other_table(rows: Sequence[Row]) -> str:
    chosen = [row for row in rows if row["group"] == ALL and row["normalised"] in (PLAIN, FROBENIUS, INVERSE)]
    columns = ("recall", "precision", "gain")
    lines = [[named(row), row["normalised"], *(_with_interval(row, column) for column in columns)] for row in chosen]
    return _table(["method", "divided by", f"recall@{RECALL_AT}", "precision@5", "MRR gained over the score"], lines)


def group_table(rows: Sequence[Row]) -> str:
    groups = {row["group"]: row["queries"] for row in rows}
    cells = {(named(row), row["normalised"], row["group"]): _with_interval(row, "mrr") for row in rows}
    keys = dict.fromkeys((name, n) for name, n, _ in cells if n in (PLAIN, FROBENIUS, INVERSE))
    heads = [f"{group} ({queries} queries)" for group, queries in groups.items()]
    return _table(
        ["method", "divided by", *heads], [[*key, *(cells.get((*key, g), "") for g in groups)] for key in keys]
    )


def spread_table(rows: Sequence[Row]) -> str:
    norms = list(dict.fromkeys(row["norm"] for row in rows))
    cells = {(named(row), row["norm"]): f"{row['correlation']:.2f} (slope {row['slope']:.2f})" for row in rows}
    names = dict.fromkeys(name for name, _ in cells)
    return _table(["method", *norms], [[name, *(cells.get((name, n), "") for n in norms)] for name in names])


def leaning_table(rows: Sequence[Row]) -> str:
    columns = ("norm_percentile", "length_percentile", "different_firsts")
    lines = [[named(row), row["normalised"], *(f"{row[column]:.2f}" for column in columns)] for row in rows]
    return _table(["method", "divided by", "norm's percentile", "length's", "different firsts per query"], lines)


def example_list(rows: Sequence[Row]) -> str:
    texts = []
    for row in rows:
        lists = {name: value for name, value in row.items() if isinstance(value, list)}
        about = f"{row['right']} right, {row['wrong']} wrong ({row['such_queries']} queries)"
        firsts = [f"  - {name}: " + " · ".join(value) for name, value in lists.items()]
        texts.append("\n".join([f"* {row['query']} — {about}", *firsts]))
    return "\n".join(texts)


def _with_interval(row: Row, column: str) -> str:
    low, high = row[f"{column}_interval"]
    return f"{row[column]:.3f}" if low == high else f"{row[column]:.3f} ({low:.3f} to {high:.3f})"


def _table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [heads, ["---"] * len(heads), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
