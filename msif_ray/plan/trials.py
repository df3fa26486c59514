"""What a plan tries before it tells hours: the run's jobs, on a block of each corpus, with each stage's model."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

import torch

from msif_ray import stages
from msif_ray.cluster.rank import ModelSetup
from msif_ray.corpus.reader import Document, read_documents
from msif_ray.corpus.windows import Encoded
from msif_ray.errors import one_line
from msif_ray.plan.bench import Trial
from msif_ray.plan.estimate import Estimate, indexing_job, scoring_job
from msif_ray.plan.measure import Calibration, Request, calibrate
from msif_ray.plan.solves import products_job
from msif_ray.plan.tokens import encoder
from msif_ray.preflight import Resolved
from msif_ray.setup import model_setup, query_setup

# Queries whose passes are timed: a block of the run's.
QUERIES_TRIED = 8
# Documents of a corpus that are looked through for a block of usable ones, at most.
LOOKED_THROUGH = 20_000


def calibrations(estimate: Estimate, notes: list[str]) -> dict[int, Calibration]:
    """Each needed stage's calibration, with a note for one that this machine has no room for, or no document."""
    run, resolved = estimate.run, estimate.inputs.resolved
    if run.cluster.gpus_per_rank and not torch.cuda.is_available():
        notes.append("The run wants GPUs and this machine has none: nothing is measured, so there are no hours.")
        return {}
    found = {}
    for index in range(len(run.stages)):
        trials = _trials(estimate, index)
        if not trials:
            continue
        if idle := [trial.kind for trial in trials if not trial.documents]:
            notes.append(
                f"{run.stages[index].name}: of the documents for its {idle[0]} none of the first {LOOKED_THROUGH:,} is "
                "usable, so nothing of it is measured."
            )
            continue
        memory, sharded = run.cluster.factor_memory, run.cluster.ranks_per_replica > 1
        try:
            found[index] = calibrate(Request(tuple(trials), resolved.maps, memory, sharded))
        except MemoryError as error:
            notes.append(
                f"{run.stages[index].name}: its model has no room here, so nothing of it is measured "
                f"({one_line(error, 120)})."
            )
    return found


def _trials(estimate: Estimate, index: int) -> list[Trial]:
    """What is tried with a stage's model: the jobs that the run has for it, but those over nothing usable."""
    run, resolved, trials = estimate.run, estimate.inputs.resolved, []

    def counted(key: str) -> bool:
        return estimate.inputs.tallies[key].tokens > 0

    stage = run.stages[index]
    key = f"stages.{index}"
    if stage.documents is not None and key in estimate.inputs.tallies and counted(key):
        setup = model_setup(resolved, index, stage.documents, stage.fit.max_tokens)
        if index in estimate.fitted:
            documents = _usable(resolved, key, index, setup, stage.fit.documents)
            sampled = stage.fit.labels == "sampled"
            trials += [
                Trial("covariance", "covariance", setup, documents, sampled),
                Trial("correction", "correction", setup, documents, sampled),
            ]
        if any(each.index == index for each in estimate.solves):
            documents = _usable(resolved, key, index, setup, stages.solver_of(run, index).documents)
            trials.append(Trial(products_job(index), "products", setup, documents))
    for position, indexed in enumerate(run.index):
        if run.stage_index(indexed.stage) == index and counted(f"index.{position}"):
            setup = model_setup(resolved, index, run.scored_documents(indexed), indexed.max_tokens)
            documents = _usable(resolved, f"index.{position}", index, setup)
            trials.append(Trial(indexing_job(position), "indexing", setup, documents, rank=indexed.rank))
    if index == len(run.stages) - 1:
        trials.append(Trial("queries", "queries", query_setup(resolved), tuple(resolved.queries[:QUERIES_TRIED])))
    for entries in stages.passes(run):
        entry, position = entries[0], run.score.index(entries[0])
        if run.stage_index(entry.stage) == index and counted(f"score.{position}"):
            setup = model_setup(resolved, index, run.scored_documents(entry), entry.max_tokens)
            documents = _usable(resolved, f"score.{position}", index, setup)
            queries = len(entries) * len(resolved.queries)
            name = scoring_job(position)
            memory = run.cluster.directions_memory
            norms = {"norms": run.detail.norm, "curvature": run.detail.curvature_norm}
            rank = run.queries.rank
            trials.append(Trial(name, "scoring", setup, documents, False, queries, rank, memory, **norms))
    return trials


def _usable(
    resolved: Resolved, key: str, index: int, setup: ModelSetup, limit: int | None = None
) -> tuple[Document, ...]:
    """As many documents as a block has, the first that stage `index` does not skip, of a corpus's first `limit`."""
    encode, most = encoder(resolved, index, setup), min(LOOKED_THROUGH, limit or LOOKED_THROUGH)
    usable = (each for each in islice(_documents(resolved, key), most) if isinstance(encode(each), Encoded))
    return tuple(islice(usable, resolved.run.cluster.documents_per_block))


def first_block(resolved: Resolved, key: str) -> list[Document]:
    """The documents of the first block of a corpus (`stages.<i>`, `index.<i>` or `score.<i>`)."""
    return list(islice(_documents(resolved, key), resolved.run.cluster.documents_per_block))


def _documents(resolved: Resolved, key: str) -> Iterator[Document]:
    run = resolved.run
    kind, _, number = key.partition(".")
    stage_documents = run.stages[int(number)].documents if kind == "stages" else None
    entry = run.index[int(number)] if kind == "index" else run.score[int(number) if kind == "score" else 0]
    documents = stage_documents or run.scored_documents(entry)
    for file in resolved.corpora[key]:
        for document in read_documents(file, documents, f"{key}.documents"):
            # What the reference model makes of a pair is a number that costs nothing to be with.
            yield document if document.rejected is None else replace(document, reference=0.0)
