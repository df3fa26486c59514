"""What a run directory says of how its scores were computed, read back for reports, signals and comparisons."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
from pydantic import BaseModel

from msif_ray import layout, stages
from msif_ray.config import IdentityResponse, Run, Score, Strength, UnrolledResponse, parse_run
from msif_ray.corpus.queries import Query as Asked
from msif_ray.corpus.queries import is_asked, query_of
from msif_ray.errors import UserError
from msif_ray.paths import exists, path_of
from msif_ray.record import PUT_BACK, read_record
from msif_ray.shapes import misfit
from msif_ray.store import read_json
from msif_ray.tables import AGAIN, read_table

# What is said in place of the scores of a query that has none: all documents were skipped, none is its candidate, or
# what there is are no numbers (`signals.py`).
NO_SCORE = "no document has a score that is a number; report.html says why"


class _Carried(BaseModel):
    log_likelihood: dict[str, float] = {}


class _Fitted(BaseModel):
    documents: int
    tokens: int
    skipped: list[Any]
    share_covered: float


class _Model(BaseModel):
    revision: str | None


class _Identity(BaseModel):
    models: dict[str, _Model]


@dataclass(frozen=True)
class Query:
    """A query, its completion's log-likelihood under the last stage's model (nats), and the completion's tokens;
    None where the run directory does not say.

    Where it is about the completion `rather_than` another, `log_likelihood` is how much larger its own is than that
    one's; with a `span` [start, end) of its characters, both numbers are of the tokens that overlap it. Of a query
    about a text's class, `is_class`, the completion is its name and counts as one token.
    """

    id: str
    prompt: str
    completion: str
    log_likelihood: float | None
    tokens: int | None
    rather_than: str | None = None
    span: tuple[int, int] | None = None
    is_class: bool = False


def explained(query: Query) -> tuple[str, str, str]:
    """The completion in three: before the span, the span, and after it. Without one all of it is the second."""
    start, stop = query.span or (0, len(query.completion))
    return query.completion[:start], query.completion[start:stop], query.completion[stop:]


@dataclass(frozen=True)
class Fitted:
    """What a stage's factors were estimated from."""

    documents: int
    tokens: int
    skipped: int
    share: float


@dataclass(frozen=True)
class StageFacts:
    """One stage: its model, what it was fitted on (None: it has no factors here)."""

    name: str
    model: str
    revision: str | None
    fitted: Fitted | None


@dataclass(frozen=True)
class Passed:
    """A stage as a scored entry's queries passed it: its response in words, and the smallest and largest damping or
    α over the maps (eigenvalue units; None where it has none)."""

    stage: str
    response: str
    strengths: tuple[float, float] | None


@dataclass(frozen=True)
class Kept:
    """A carried-back query at low rank: means over maps of its rank and of the share of its squared norm kept, and
    the smallest such share."""

    rank: float
    energy: float
    least_energy: float


@dataclass(frozen=True)
class Scored:
    """One entry of `score`. `documents` is the corpus's number, `out_of` the number that it was chosen from, where the
    run says so; `candidates` says which of them are scored for each query (None: all); `passed` is in the order of the
    query's way back. Unless `of_weight`, its own stage's response is the identity, and a score, the product of two
    gradients, says nothing of what a document's weight in the mean loss is worth."""

    label: str
    stage: str
    documents: int
    out_of: int | None
    of_weight: bool
    index: str | None
    candidates: str | None
    max_tokens: int | None
    passed: list[Passed]
    kept: Mapping[str, Kept]


@dataclass(frozen=True)
class Facts:
    """All of it. `corpora` has the files of each corpus where the run read them, as absolute paths and URLs, and what
    tells their contents, by its key (`score.<i>` and others); `maps` has the shape `(out, columns)` of every tracked
    map; `skipped` counts reasons by label."""

    run_dir: str
    run: Run
    device: str
    versions: dict[str, str]
    queries: list[Query]
    stages: list[StageFacts]
    scored: list[Scored]
    corpora: dict[str, dict[str, Any]]
    maps: dict[str, tuple[int, int]]
    skipped: dict[str, Counter[str]]

    def weighed(self, scored: Scored) -> int:
        """N: of how many documents one that is scored has its weight, 1/N, in the stage's mean loss."""
        return scored.out_of or scored.documents - self.skipped.get(scored.label, Counter()).total()

    def scored_as(self, label: str) -> Scored:
        """Raises UserError for a label that the run does not have."""
        found = next((each for each in self.scored if each.label == label), None)
        if found is None:
            have = ", ".join(each.label for each in self.scored)
            raise UserError(f"{self.run_dir}: no scores are called {label!r}; it has {have}")
        return found


def read_facts(run_dir: str | Path) -> Facts:
    """Raises UserError for a directory that holds no run, or one whose files are damaged."""
    path = layout.run_record(str(run_dir))
    if not exists(path):
        raise UserError(f"{run_dir}: no run.json there; name the run_dir of a run")
    record = read_record(path)
    identity = record["identity"]
    run = parse_run(identity["run"] | {"run_dir": str(run_dir)}, str(path))
    _check_whole(path, run, identity)
    about = next((found for entry in run.score if (found := _carried(run, entry)) is not None), {})
    likelihoods = about.get("log_likelihood", {})
    tokens = record.get("completion_tokens", {})
    return Facts(
        run_dir=str(run_dir),
        run=run,
        device=record["device"],
        versions=record["versions"],
        queries=[_query(run, query_of(entry), likelihoods, tokens) for entry in identity["queries"]],
        stages=[_stage(run, i, identity["models"]) for i in range(len(run.stages))],
        scored=[_scored(run, entry, identity["documents"][f"score.{i}"], record) for i, entry in enumerate(run.score)],
        corpora=identity.get("corpora", {}),
        maps={name: (shape[0], shape[1]) for name, shape in identity["maps"].items()},
        skipped=_skipped(run),
    )


def _check_whole(path: Path, run: Run, identity: Mapping[str, Any]) -> None:
    """Raises UserError for a record that does not say of each stage, entry and query of its own what it should."""
    faults = [misfit(identity, _Identity)]
    faults += [f"models.{stage.name}" for stage in run.stages if stage.name not in identity["models"]]
    faults += [f"documents.score.{i}" for i in range(len(run.score)) if f"score.{i}" not in identity["documents"]]
    faults += [f"queries.{i}" for i, entry in enumerate(identity["queries"]) if not is_asked(entry)]
    if (at := next(filter(None, faults), None)) is not None:
        raise UserError(f"{path}: not as this version writes it: see identity.{at}; {PUT_BACK}")


def _query(run: Run, query: Asked, likelihoods: Mapping[str, float], tokens: Mapping[str, int]) -> Query:
    return Query(
        query.id,
        query.before if run.queries.label is None else f"{query.before} → ",  # a text and its class
        query.completion,
        likelihoods.get(query.id),
        tokens.get(query.id),
        query.other_completion,
        None if query.span is None else (query.span[0], query.span[1]),
        run.queries.label is not None,
    )


def _carried(run: Run, entry: Score) -> dict[str, Any] | None:
    folder = layout.directions(run.run_dir, entry.label)
    path = layout.directions_manifest(folder)
    return read_json(path, AGAIN, _Carried, {"scores": folder.name}) if exists(path) else None


def _stage(run: Run, index: int, models: Mapping[str, Any]) -> StageFacts:
    stage = run.stages[index]
    path = layout.factors_manifest(layout.factors(stage.factors or run.run_dir, stage.name))
    fitted = None
    if exists(path):
        mend = AGAIN if stage.factors is None else f"repeat the run in {stage.factors}"
        found = read_json(path, mend, _Fitted, {"stage": stage.name})
        fitted = Fitted(found["documents"], found["tokens"], len(found["skipped"]), found["share_covered"])
    return StageFacts(stage.name, stage.model, models[stage.name]["revision"], fitted)


def _scored(run: Run, entry: Score, documents: int, record: Mapping[str, Any]) -> Scored:
    scored, strengths = run.stage_index(entry.stage), record["strengths"].get(entry.label, {})
    answering = run.answering(entry)
    passed = [_passed(answering, index, scored, strengths) for index in stages.carried_through(run, scored)]
    chosen, candidates = entry.candidates, None
    if chosen is not None:
        candidates = f"listed in {chosen.path}" if chosen.path is not None else f"the first {chosen.top:,} by BM25"
    kept = _kept(run, entry)
    out_of = record.get("out_of", {}).get(entry.label)
    weight = not stages.is_identity(answering, scored)
    about = (entry.label, entry.stage, documents, out_of, weight, entry.index, candidates, entry.max_tokens)
    return Scored(*about, passed, kept)


def _passed(run: Run, index: int, scored: int, strengths: Mapping[str, Mapping[str, float]]) -> Passed:
    stage = run.stages[index]
    used = strengths.get(f"{stage.name}.{'damping' if index == scored else 'alpha'}", {}).values()
    between = (min(used), max(used)) if used else None
    response = stage.response
    if isinstance(response, IdentityResponse):
        words = "; a score is a product of gradients, and no estimate of leaving a document out"
        return Passed(stage.name, f"identity: its curvature is left out{words if index == scored else ''}", None)
    if isinstance(response, UnrolledResponse):
        return Passed(stage.name, f"unrolled: {response.steps} steps at rate {response.rate:g}", None)
    if index == scored:
        return Passed(stage.name, f"damped inverse, damping {_words(stage.damping)}", between)
    alpha = response.alpha if response is not None else Strength(relative=0.1)
    return Passed(stage.name, f"proximal, α {_words(alpha)}", between)


def _words(strength: Strength) -> str:
    if strength.absolute is not None:
        return f"{strength.absolute:g}"
    return f"{strength.relative:g} × each map's mean eigenvalue"


def _kept(run: Run, entry: Score) -> dict[str, Kept]:
    path = layout.energy_file(layout.directions(run.run_dir, entry.label))
    if not exists(path):
        return {}
    table = read_table(path, ["query_id", "rank", "energy_kept"], {"scores": path.parent.name})
    aggregates: list[tuple[str, str]] = [("rank", "mean"), ("energy_kept", "mean"), ("energy_kept", "min")]
    found = table.group_by("query_id").aggregate(aggregates).to_pylist()
    return {row["query_id"]: Kept(row["rank_mean"], row["energy_kept_mean"], row["energy_kept_min"]) for row in found}


def _skipped(run: Run) -> dict[str, Counter[str]]:
    """Reasons by label: a pass's skipped documents are written once, under its first label."""
    path = path_of(run.run_dir) / "skipped.parquet"
    if not exists(path):
        return {}
    table = read_table(path, ["stage", "reason"])
    found: dict[str, Counter[str]] = {}
    for entries in stages.passes(run):
        own = pc.value_counts(table.filter(pc.equal(table["stage"], entries[0].label))["reason"]).to_pylist()
        found |= {entry.label: Counter({each["values"]: each["counts"] for each in own}) for entry in entries}
    return found
