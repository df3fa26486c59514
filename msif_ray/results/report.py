"""report.html: the top documents of every query to look at, in one file that needs no network and no server.

The page's shell is a template, escaped by default; queries and documents travel as JSON and are set as text by the
page's own script. A Content-Security-Policy names that script and the style by their hashes and allows nothing else,
whatever a document holds.
"""

import base64
import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from math import isfinite
from pathlib import Path
from statistics import fmean
from typing import Any

import jinja2
import numpy as np
from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup

from msif_ray.paths import path_of
from msif_ray.results.by_stage import Key, Row, by_stage, stages_beside, write_by_stage
from msif_ray.results.excerpt import Excerpt, excerpt, visible
from msif_ray.results.facts import Facts, Query, Scored, explained, read_facts
from msif_ray.results.maps import grid, short_names
from msif_ray.results.signals import Signals, find_signals
from msif_ray.results.statistics import read_statistics
from msif_ray.results.top import count_top, read_top
from msif_ray.store import write_atomic

REPORT = "report.html"

# Documents and tokens shown in the whole page, about 300 and 12 bytes each, and tokens shown of one document.
DOCUMENTS_SHOWN = 4000
TOKENS_SHOWN = 160_000
LEAST_TOKENS, MOST_TOKENS = 40, 240
# Characters shown of a prompt or a completion: of a longer prompt its end, which the completion follows.
QUERY_CHARACTERS = 2000
MAPS_NAMED = 3
# What a map's share is given in: of thousands of experts' maps each has less than a thousandth, which all add up.
HEAT = 100_000
# Reasons for skipping that are told: some name a token or a label, and there may be as many as documents.
REASONS_NAMED = 5

Json = dict[str, Any]
Statistics = Mapping[Key, Mapping[str, Any]]
SIDES = {"highest": "supports", "lowest": "opposes"}


def write_report(run_dir: str | Path) -> tuple[Path, Signals]:
    """Writes `report.html` of a finished run, and `stages.parquet` where it scores several stages' documents; gives the
    report's path, and the signals in it.

    Raises UserError for a run without results.
    """
    path, gathered = path_of(run_dir) / REPORT, gather(run_dir)
    if gathered.by_stage:
        write_by_stage(run_dir, gathered.by_stage.values())
    write_atomic(path, render(gathered).encode("utf-8"))
    return path, gathered.signals


@dataclass
class Shown:
    """One query's documents as the page has them, by side, and what each map contributes to those of each side:
    the sums of its shares and of their sizes, `[maps]`."""

    documents: dict[str, list[Json]] = field(default_factory=lambda: {side: [] for side in SIDES.values()})
    by_map: dict[str, np.ndarray] = field(default_factory=dict)
    sizes: np.ndarray | float = 0.0


@dataclass(frozen=True)
class Gathered:
    """All that a report says."""

    facts: Facts
    statistics: Statistics
    shown: dict[Key, Shown]
    modules: list[str]
    signals: Signals
    by_stage: dict[Key, Row]


def gather(run_dir: str | Path) -> Gathered:
    """Reads a finished run. Raises UserError where something is missing or damaged."""
    facts, statistics = read_facts(run_dir), read_statistics(run_dir)
    per_side = max(1, DOCUMENTS_SHOWN // max(1, 2 * len(facts.queries) * len(facts.scored)))
    rows = min(count_top(run_dir), 2 * per_side * len(facts.queries) * len(facts.scored))
    limit = min(MOST_TOKENS, max(LEAST_TOKENS, TOKENS_SHOWN // max(1, rows)))
    shown: dict[Key, Shown] = {}
    modules: list[str] = list(facts.maps)
    for row in read_top(run_dir):
        modules = row["modules"]
        key, side = (row["stage"], row["query_id"]), SIDES[row["side"]]
        # Of few documents all are at both ends: each is shown on the side of its sign.
        if row["rank"] > per_side or not (row["score"] > 0 if side == "supports" else row["score"] < 0):
            continue
        of_query, shares = shown.setdefault(key, Shown()), _finite(row["module_scores"])
        of_query.documents[side].append(_document(row, shares, float(statistics[key]["total_absolute"]), limit))
        of_query.by_map[side] = of_query.by_map.get(side, 0.0) + shares
        of_query.sizes = of_query.sizes + np.abs(shares)
    sizes = {key: (modules, np.asarray(each.sizes)) for key, each in shown.items()}
    signals = find_signals(facts, statistics, sizes)
    return Gathered(facts, statistics, shown, modules, signals, by_stage(facts, statistics))


def _finite(shares: Sequence[float]) -> np.ndarray:
    """Shares as numbers: what overflowed, where the score itself did not, counts nothing."""
    return np.nan_to_num(np.array(shares, dtype=np.float64), nan=0.0, posinf=0.0, neginf=0.0)


def _document(row: Mapping[str, Any], shares: np.ndarray, total: float, limit: int) -> Json:
    found: Excerpt = excerpt(row["tokens"], _finite(row["token_scores"]).tolist(), limit)
    largest = max((abs(score) for segment in found.segments for score in segment.scores), default=0.0) or 1.0
    carried = np.abs(shares).sum() or 1.0
    norms = {name: row.get(name) for name in ("norm", "curvature_norm")}
    return {
        "id": visible(row["doc_id"], QUERY_CHARACTERS),
        "rank": row["rank"],
        "score": _short(row["score"]),
        **{name: _short(norm) for name, norm in norms.items() if norm is not None and isfinite(norm)},
        "n_tokens": row["n_tokens"],
        "share": _short(abs(row["score"]) / total if total else 0.0),
        "largest": _short(largest),
        "segments": [
            [each.before, each.texts, [round(1000 * score / largest) for score in each.scores]]
            for each in found.segments
        ],
        "after": found.after,
        "maps": [[int(place), _short(shares[place] / carried)] for place in np.argsort(-np.abs(shares))[:MAPS_NAMED]],
    }


def render(gathered: Gathered) -> str:
    """The page as HTML."""
    page = files("msif_ray.results") / "page"
    style, script = ((page / name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string((page / "report.html.j2").read_text(encoding="utf-8"))
    facts = gathered.facts
    return template.render(
        facts=facts,
        said=_said(facts),
        scored=[_scored(gathered, each) for each in facts.scored],
        several_stages=bool(gathered.by_stage),
        parameters=sum(out * columns for out, columns in facts.maps.values()),
        run_signals=gathered.signals.run,
        data=htmlsafe_json_dumps(_data(gathered), ensure_ascii=False, separators=(",", ":"), allow_nan=False),
        style=Markup(style),
        script=Markup(script),
        style_hash=_hash(style),
        script_hash=_hash(script),
    )


def _said(facts: Facts) -> str:
    """What the queries are about."""
    return "completion" if facts.run.queries.label is None else "class"


def _hash(content: str) -> str:
    """As a Content-Security-Policy names an inline script or style."""
    return f"sha256-{base64.b64encode(hashlib.sha256(content.encode('utf-8')).digest()).decode()}"


def _scored(gathered: Gathered, about: Scored) -> Json:
    """What the foot of the page says of one entry of `score`."""
    rows = [row for (label, _), row in gathered.statistics.items() if label == about.label]
    kept = about.kept.values()
    skipped = gathered.facts.skipped.get(about.label, Counter[str]())
    return {
        "about": about,
        "documents": max((row["documents"] for row in rows), default=0),
        "skipped": skipped.most_common(REASONS_NAMED),
        "other_reasons": max(0, len(skipped) - REASONS_NAMED),
        "rank": fmean(each.rank for each in kept) if kept else None,
        "energy": fmean(each.energy for each in kept) if kept else None,
        "least": min((each.least_energy for each in kept), default=None),
    }


def _data(gathered: Gathered) -> Json:
    """What the page's script shows."""
    layers, kinds, cells = grid(gathered.modules)
    names = short_names(gathered.modules)
    return {
        "said": _said(gathered.facts),
        "queries": [_query(query) for query in gathered.facts.queries],
        "maps": {"layers": layers, "kinds": kinds, "cells": cells, "names": names, "whole": HEAT},
        "scored": [
            {
                "label": scored.label,
                "queries": [_results(gathered, scored, query.id) for query in gathered.facts.queries],
            }
            for scored in gathered.facts.scored
        ],
    }


def _query(query: Query) -> Json:
    prompt = query.prompt if len(query.prompt) <= QUERY_CHARACTERS else "…" + query.prompt[-QUERY_CHARACTERS:]
    return {
        "id": visible(query.id, QUERY_CHARACTERS),
        "prompt": visible(prompt, None),
        "completion": visible(query.completion, QUERY_CHARACTERS),
        "explained": [visible(part, QUERY_CHARACTERS) for part in explained(query)],
        "rather_than": None if query.rather_than is None else visible(query.rather_than, QUERY_CHARACTERS),
        "log_likelihood": None if query.log_likelihood is None else _short(query.log_likelihood),
        "tokens": query.tokens,
    }


def _results(gathered: Gathered, scored: Scored, query: str) -> Json:
    key = (scored.label, query)
    row, kept = gathered.statistics.get(key, {}), scored.kept.get(query)
    shown = gathered.shown.get(key, Shown())
    numbers = ("mean", "deviation", "lowest", "highest")
    heat = {}
    for side in SIDES.values():
        shares = shown.by_map.get(side)
        total = 0.0 if shares is None else float(np.abs(shares).sum())
        heat[side] = np.rint(HEAT * shares / total).astype(int).tolist() if total and shares is not None else None
    return {
        "documents": row.get("documents", 0),
        "histogram": row.get("histogram", []),
        **{name: _short(row.get(name, 0.0)) for name in numbers},
        "rank": None if kept is None else _short(kept.rank),
        "energy": None if kept is None else _short(kept.energy),
        "signals": [[signal.title, signal.detail] for signal in gathered.signals.queries.get(key, [])],
        "stages": _stages(gathered, scored.label, query),
        "heat": heat,
        **shown.documents,
    }


def _stages(gathered: Gathered, label: str, query: str) -> list[Json]:
    """The rows by stage that go with the scores of `label`; empty where no other stage's do. A share is null where no
    document supports."""
    beside = stages_beside(gathered.facts, label) if gathered.by_stage else []
    rows = [gathered.by_stage[each, query] for each in beside if (each, query) in gathered.by_stage]
    if len(rows) < 2:
        return []
    return [
        {
            "label": row.stage,
            "documents": row.documents,
            "out_of": row.out_of,
            "share": None if row.share is None else _short(row.share),
            **{name: _short(getattr(row, name)) for name in ("supports", "opposes", "net")},
        }
        for row in rows
    ]


def _short(value: float) -> float:
    return float(f"{value:.6g}")
