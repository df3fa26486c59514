"""What a plan tries before it tells hours: the run's jobs, on a block of each corpus, with each stage's model."""

from dataclasses import replace
from itertools import islice

import torch

from msif_ray import stages
from msif_ray.corpus.reader import Document, read_documents
from msif_ray.plan.bench import Trial
from msif_ray.plan.estimate import Estimate, indexing_job, scoring_job
from msif_ray.plan.measure import Calibration, Request, calibrate
from msif_ray.plan.solves import products_job
from msif_ray.preflight import Resolved
from msif_ray.setup import model_setup, query_setup

# Queries whose passes are timed: a block of the run's.
QUERIES_TRIED = 8


def calibrations(estimate: Estimate, notes: list[str]) -> dict[int, Calibration]:
    """Each needed stage's calibration, with a note for one that this machine has no room for."""
    run, resolved = estimate.run, estimate.inputs.resolved
    if run.cluster.gpus_per_rank and not torch.cuda.is_available():
        notes.append("The run wants GPUs and this machine has none: nothing is measured, so there are no hours.")
        return {}
    found = {}
    for index in range(len(run.stages)):
        trials = _trials(estimate, index)
        if not trials:
            continue
        memory, sharded = run.cluster.factor_memory, run.cluster.ranks_per_replica > 1
        try:
            found[index] = calibrate(Request(tuple(trials), resolved.maps, memory, sharded))
        except MemoryError as error:
            notes.append(
                f"{run.stages[index].name}: its model has no room here, so nothing of it is measured "
                f"({' '.join(str(error).split())[:120]})."
            )
    return found


def _trials(estimate: Estimate, index: int) -> list[Trial]:
    """What is tried with a stage's model: the jobs that the run has for it, but those over nothing usable."""
    run, resolved, trials = estimate.run, estimate.inputs.resolved, []

    def first(key: str) -> tuple[Document, ...]:
        return tuple(first_block(resolved, key)) if estimate.inputs.tallies[key].tokens else ()

    stage = run.stages[index]
    if index in estimate.fitted and stage.documents is not None:
        setup = model_setup(resolved, index, stage.documents, stage.fit.max_tokens)
        documents = first(f"stages.{index}")[: stage.fit.documents]
        sampled = stage.fit.labels == "sampled"
        trials += [
            Trial("covariance", "covariance", setup, documents, sampled),
            Trial("correction", "correction", setup, documents, sampled),
        ]
    if any(each.index == index for each in estimate.solves) and stage.documents is not None:
        setup = model_setup(resolved, index, stage.documents, stage.fit.max_tokens)
        documents = first(f"stages.{index}")[: stages.solver_of(run, index).documents]
        trials.append(Trial(products_job(index), "products", setup, documents))
    for position, indexed in enumerate(run.index):
        if run.stage_index(indexed.stage) == index:
            setup = model_setup(resolved, index, run.scored_documents(indexed), indexed.max_tokens)
            documents = first(f"index.{position}")
            trials.append(Trial(indexing_job(position), "indexing", setup, documents, rank=indexed.rank))
    if index == len(run.stages) - 1:
        trials.append(Trial("queries", "queries", query_setup(resolved), tuple(resolved.queries[:QUERIES_TRIED])))
    for entries in stages.passes(run):
        entry = entries[0]
        if run.stage_index(entry.stage) == index:
            position = run.score.index(entry)
            setup = model_setup(resolved, index, run.scored_documents(entry), entry.max_tokens)
            documents = first(f"score.{position}")
            queries = len(entries) * len(resolved.queries)
            name = scoring_job(position)
            memory = run.cluster.directions_memory
            norms = run.detail.curvature_norm
            trials.append(Trial(name, "scoring", setup, documents, False, queries, run.queries.rank, memory, norms))
    return [trial for trial in trials if trial.documents]


def first_block(resolved: Resolved, key: str) -> list[Document]:
    """The documents of the first block of a corpus (`stages.<i>`, `index.<i>` or `score.<i>`)."""
    run = resolved.run
    kind, _, number = key.partition(".")
    stage_documents = run.stages[int(number)].documents if kind == "stages" else None
    entry = run.index[int(number)] if kind == "index" else run.score[int(number) if kind == "score" else 0]
    documents = stage_documents or run.scored_documents(entry)
    rows = (row for file in resolved.corpora[key] for row in read_documents(file, documents, f"{key}.documents"))
    first = islice(rows, run.cluster.documents_per_block)
    # What the reference model makes of a pair is a number that costs nothing to be with.
    return [document if document.rejected is None else replace(document, reference=0.0) for document in first]
