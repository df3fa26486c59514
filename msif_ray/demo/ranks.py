"""What low rank costs in agreement and saves in time and memory, on the demo's model pair.

Every setting is scored by the code that a rank of a run uses, in this process and on one thread.
"""

import math
import random
import time
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from msif_ray import layout, stages
from msif_ray.cluster import partials
from msif_ray.cluster.directions import save_shard, stored_shards
from msif_ray.cluster.factors import load_factor, mean_eigenvalues
from msif_ray.cluster.fit import is_fitted
from msif_ray.cluster.jobs import QueryJob
from msif_ray.cluster.partials import Coverage
from msif_ray.cluster.queries import in_order, query_blocks
from msif_ray.cluster.rank import Rank
from msif_ray.cluster.score_jobs import ScoreJob
from msif_ray.config import Run, parse_run
from msif_ray.corpus.reader import Document, read_documents
from msif_ray.demo import run as demo
from msif_ray.demo.factbook import build_corpus
from msif_ray.demo.metrics import Scores, overlap, spearman
from msif_ray.demo.questions import Question, all_questions
from msif_ray.influence.capture import Captured
from msif_ray.influence.directions import DenseDirections, Directions, LowRankDirections
from msif_ray.influence.queries import carry_back, stays_dense, truncate
from msif_ray.paths import path_of
from msif_ray.preflight import Resolved, check
from msif_ray.run import run
from msif_ray.setup import model_setup
from msif_ray.store import write_json

SHARD = 50
BLOCK = 256
TOP = 10
TOKENS_PER_BATCH = 4096  # as many rows to a batch as many queries like


class Setting(NamedTuple):
    """A fixed rank or a kept energy; neither: exact."""

    rank: int | None = None
    energy: float | None = None

    def __str__(self) -> str:
        if self.energy is not None:
            return f"energy {self.energy:g}"
        return "exact" if self.rank is None else f"rank {self.rank}"


EXACT = Setting()
SETTINGS = (EXACT, *(Setting(rank) for rank in (1, 2, 4, 8, 16, 32)), *(Setting(None, e) for e in (0.5, 0.9, 0.99)))


@dataclass
class Row:
    """One setting. `kept` and `ranks`: of every map and query; `seconds` of a thread's time for the pass with all
    scores; `correlations` and `overlaps` with the exact scores by query."""

    setting: Setting
    kept: list[float] = field(default_factory=list)
    ranks: list[int] = field(default_factory=list)
    bytes: int = 0
    seconds: float = 0.0
    correlations: Scores = field(default_factory=lambda: np.ones(1))
    overlaps: Scores = field(default_factory=lambda: np.ones(1))


def rank_table(folder: str | Path, queries: int = 40, documents: int = 3000, memory: int = 2**31) -> None:
    """Prints the table of `queries` queries over the first `documents` documents of the demo's shuffled corpus.

    Rank correlation (Spearman) over the documents, per query; `memory` is what a rank may use for directions.
    The fit under `folder` is kept, and done once; directions are written there, too.
    """
    torch.set_num_threads(1)
    folder = Path(folder).resolve()
    corpus = build_corpus()
    random.Random(demo.SEED).shuffle(corpus)
    demo.write_inputs(folder, corpus, _questions(queries))
    config = _run(folder)
    if not all(is_fitted(folder / "fit" / "factors" / stage.name) for stage in config.stages):
        run(config, until="fit")
    resolved = check(config)
    folder = folder / f"{queries} queries"
    rows = [Row(setting) for setting in SETTINGS]
    _write_directions(folder, resolved, rows)
    found, passing = _score(folder, resolved, rows, documents, memory)
    for row, scores in zip(rows, found, strict=True):
        row.correlations, row.overlaps = spearman(scores, found[0]), overlap(scores, found[0], TOP)
    _print(rows, passing, f"{queries} queries, {found[0].shape[1]} documents, {memory / 2**30:g} GiB for directions")


def _questions(count: int) -> list[Question]:
    """The demo's queries first, then other questions, then documents whose whole text is asked for."""
    chosen = demo.choose_queries()
    ids = {question["id"] for question in chosen}
    others = [question for question in all_questions() if question["id"] not in ids]
    texts = [
        Question(id=f"text/{document['id']}", prompt="", completion=document["text"], country="", relation="")
        for document in build_corpus()[: max(0, count - len(chosen) - len(others))]
    ]
    return [*chosen, *others, *texts][:count]


def _run(folder: Path) -> Run:
    description = demo.run_description(folder)
    description |= {"run_dir": str(folder / "fit"), "score": [{"stage": "pretrain"}]}
    description["cluster"]["tokens_per_batch"] = TOKENS_PER_BATCH
    return parse_run(description)


def _write_directions(folder: Path, resolved: Resolved, rows: Sequence[Row]) -> None:
    """Directions of every setting from one decomposition of each query at each map."""
    gradients, ids = _gradients(folder, resolved), [query.id for query in resolved.queries]
    cut = [(start, min(start + SHARD, len(ids))) for start in range(0, len(ids), SHARD)]
    maps: dict[str, dict[str, Any]] = {str(row.setting): {} for row in rows}
    factors = path_of(resolved.run.run_dir) / "factors"
    for name, shape in resolved.maps.items():
        chain = []
        for index in stages.carried_through(resolved.run, 0):
            stage = factors / resolved.run.stages[index].name
            response, _ = stages.response_of(resolved.run, index, 0, name, mean_eigenvalues(stage)[name])
            chain.append((load_factor(stage, name), response))
        stream = in_order(gradients, name, ids)
        vectors: dict[str, list[int | None]] = {str(row.setting): [] for row in rows}
        for shard in cut:
            full = torch.stack([tokens.gradient for tokens in islice(stream, shard[1] - shard[0])])
            carried = carry_back(full, chain)
            whole = all_vectors(carried)
            for row in rows:
                directions, ranks, kept = cut_to(row.setting, carried, whole)
                path = layout.direction_file(folder / str(row.setting), name, shard)
                save_shard(path, directions, ranks, kept, {})
                dense = isinstance(directions, DenseDirections)
                vectors[str(row.setting)].append(None if dense else int(ranks.sum()))
                row.kept += kept.tolist()
                row.ranks += ranks.tolist()
        for setting, of_map in vectors.items():
            maps[setting][name] = {"shape": list(shape), "vectors": of_map}
    for row in rows:
        path = folder / str(row.setting)
        write_json(layout.directions_manifest(path), {"shards": cut, "itemsize": 4, "maps": maps[str(row.setting)]})
        row.bytes = sum(sum(each.bytes.values()) for each in stored_shards(path, list(resolved.maps)))


def all_vectors(carried: torch.Tensor) -> Directions:
    """Every query with all its vectors, of which those of a query of few tokens are mostly rounding: a share of 1 may
    be reached before the last."""
    return truncate(carried, energy=math.inf)[0]


def cut_to(setting: Setting, carried: torch.Tensor, whole: Directions) -> tuple[Directions, torch.Tensor, torch.Tensor]:
    """What `truncate` would give, from all vectors of each query, with the ranks and the shares kept."""
    queries, out, columns = carried.shape
    full = min(out, columns)
    if setting == EXACT or not isinstance(whole, LowRankDirections):
        return DenseDirections(carried), torch.full((queries,), full), torch.ones(queries, dtype=torch.float64)
    long = whole.right if out <= columns else whole.left
    squares = long.double().square().sum(1).unflatten(0, (queries, full))
    shares = squares.cumsum(1) / squares.sum(1, keepdim=True)
    if setting.energy is None:
        ranks = torch.full((queries,), min(full, setting.rank or full))
    else:
        ranks = ((shares < setting.energy).sum(1) + 1).clamp_max(full)
        ranks = torch.where(torch.tensor([stays_dense(rank, out, columns) for rank in ranks.tolist()]), full, ranks)
    taken = torch.arange(full) < ranks[:, None]
    vectors = LowRankDirections(whole.left[taken.flatten()], whole.right[taken.flatten()], ranks)
    return vectors, ranks, shares.gather(1, ranks[:, None] - 1)[:, 0].clamp_max(1.0)


def _gradients(folder: Path, resolved: Resolved) -> Coverage:
    """The queries' gradients, written as a replica writes them."""
    setup = model_setup(resolved, 1, resolved.run.queries.documents, None)
    rank = Rank(setup)
    rank.start(QueryJob())
    blocks = query_blocks(resolved.queries, resolved.query_tokens, resolved.maps, 4)
    step = folder / f"gradients-{len(resolved.queries)}"
    done = partials.covered_blocks(partials.read_disjoint(step))
    for block in blocks:
        if block.id not in done:
            outcome, partial = rank.process(block.documents).outcome(), partials.new_folder(step, block.id)
            partials.publish(partial, [rank.write_sums(partial)], [(block.id, outcome.counts)], None)
    return Coverage(tuple(partials.read_disjoint(step)), frozenset(block.id for block in blocks))


class _Passing:
    """A job that does nothing with a pass."""

    sampled_labels = False
    tracked = None

    def start(self, maps: Sequence[str], device: torch.device) -> "_Passing":
        return self

    def add(self, captured: Captured) -> None:
        pass

    def drop(self, documents: Set[str]) -> None:
        pass

    def take(self) -> list[Any]:
        return []


def _score(
    folder: Path, resolved: Resolved, rows: Sequence[Row], count: int, memory: int
) -> tuple[list[Scores], float]:
    """Every setting's scores `[queries, documents]`, and the seconds of the pass alone."""
    documents = resolved.run.scored_documents(resolved.run.score[0])
    rank = Rank(model_setup(resolved, 0, documents, resolved.run.score[0].max_tokens))
    corpus = list(islice(read_documents(resolved.corpora["score.0"][0], documents, "documents"), count))
    rank.start(_Passing())
    _seconds(lambda: rank.process(corpus[:BLOCK]))  # loads what the libraries load once
    passing = _seconds(lambda: _scores(rank, corpus))
    found: list[Scores] = []
    for row in rows:
        rank.start(ScoreJob((folder / str(row.setting),), memory))
        scores: dict[str, Scores] = {}
        row.seconds = _seconds(lambda into=scores: into.update(_scores(rank, corpus)))  # type: ignore[misc]
        found.append(np.stack(list(scores.values()), axis=1))
    return found, passing


def _scores(rank: Rank, corpus: Sequence[Document]) -> dict[str, Scores]:
    """Scores by document, block after block, in the corpus's order."""
    found: dict[str, Scores] = {}
    for start in range(0, len(corpus), BLOCK):
        rank.process(corpus[start : start + BLOCK])
        found |= {each.document_id: each.scores.numpy() for each in rank.take()}
    return {document.id: found[document.id] for document in corpus if document.id in found}


def _seconds(work: Callable[[], object]) -> float:
    """Time of this thread, which other processes on the machine do not lengthen."""
    began = time.process_time()
    work()
    return time.process_time() - began


def _print(rows: Sequence[Row], passing: float, title: str) -> None:
    table = Table(title=f"{title}; the pass alone: {passing / rows[0].seconds:.2f} of exact", title_justify="left")
    for column in ("", "mean rank", "kept, mean", "kept, least", "Spearman, mean", "least", "top 10", "time", "MiB"):
        table.add_column(column, justify="left" if not column else "right")
    for row in rows:
        table.add_row(
            str(row.setting),
            f"{np.mean(row.ranks):.1f}",
            f"{np.mean(row.kept):.3f}",
            f"{np.min(row.kept):.3f}",
            f"{row.correlations.mean():.4f}",
            f"{row.correlations.min():.4f}",
            f"{row.overlaps.mean():.2f}",
            f"{row.seconds / rows[0].seconds:.2f}",
            f"{row.bytes / 2**20:,.0f}",
        )
    Console(highlight=False, width=110).print(table)
