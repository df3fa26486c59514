"""`msif plan`: checks the run, counts its documents, calibrates where it may, and puts the figures together."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from msif_ray import stages
from msif_ray.config import Cluster, Index, Run, Score
from msif_ray.corpus.unusable import most_often, none_usable
from msif_ray.influence.groups import factor_bytes
from msif_ray.machines import with_gpus
from msif_ray.paths import is_remote
from msif_ray.plan import counts, curvature, driver
from msif_ray.plan.counts import ModelSize
from msif_ray.plan.estimate import Estimate, Step
from msif_ray.plan.inputs import Inputs
from msif_ray.plan.memory import HAND_MEMORY, resident_peak
from msif_ray.plan.refusals import refusals
from msif_ray.plan.steps import steps
from msif_ray.plan.storage import Stored, part_bytes, stored
from msif_ray.plan.tokens import Tally, corpus_tally, encoder, tally
from msif_ray.plan.trials import calibrations, first_block
from msif_ray.preflight import Resolved, check
from msif_ray.setup import model_setup, query_setup

GIBI = 2**30


@dataclass(frozen=True)
class Corpus:
    """A corpus as counted, or as estimated from `sampled` documents (None: counted)."""

    name: str
    documents: float
    tokens: float
    skipped: float
    sampled: int | None


@dataclass(frozen=True)
class Groups:
    """A stage's maps: how many, in how many passes of each fit step, and the largest group's bytes of factors."""

    stage: str
    maps: int
    passes: int
    largest: int


@dataclass(frozen=True)
class Plan:
    """What a run costs from its beginning; finished steps are not taken off. `device` is what was measured (None:
    nothing was). Memory is in bytes, `free` what a rank has left once its model is loaded."""

    run_dir: str
    device: str | None
    replicas: int
    ranks_per_replica: int
    pairs: float
    corpora: list[Corpus]
    steps: list[Step]
    groups: list[Groups]
    stored: list[Stored]
    free: dict[str, int]
    driver_memory: int
    hand_memory: int
    notes: list[str]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def make_plan(run: Run, measured: bool = True) -> Plan:
    """The plan of a run; `measured`: after a calibration of each stage's model in a process of its own.

    Leaves nothing behind. Raises UserError as the run itself would for what is wrong with it; that its `run_dir` holds
    another run, or that its replicas have no room on this machine, is a note.
    """
    import ray.data  # noqa: F401  # the driver's memory is this process's, with what the run imports

    import msif_ray.run  # noqa: F401

    with _no_new_folder(run.run_dir):
        resolved = _with_device(check(run))
    # The run's driver has done as much by now, and later holds no tensor larger than this check's, but what
    # `driver.growth` counts.
    driver_memory = resident_peak()
    tallies = _tallies(resolved)
    _check_fitted(resolved, tallies)
    sizes = {i: ModelSize.of(each.model_path, bool(each.classes)) for i, each in enumerate(resolved.stages)}
    inputs = Inputs(resolved, tallies, sizes, {}, part_bytes(resolved, first_block(resolved, "score.0")))
    notes = [f"warning: {line}" for line in resolved.warnings] + refusals(resolved)
    if measured:
        inputs = Inputs(resolved, tallies, sizes, calibrations(Estimate(inputs), notes), inputs.part)
    return _put_together(Estimate(inputs), driver_memory, notes)


@contextmanager
def _no_new_folder(run_dir: str) -> Iterator[None]:
    """Takes away the local folders that the check of `run_dir` makes to see whether it can."""
    path = Path(run_dir).expanduser().absolute()
    new = [] if is_remote(run_dir) else [each for each in (path, *path.parents) if not each.exists()]
    try:
        yield
    finally:
        for each in new:
            try:
                each.rmdir()
            except OSError:
                break


def decided(cluster: Cluster) -> Cluster:
    """The cluster with GPUs as the run would decide them, were this machine all of it."""
    return with_gpus(cluster, torch.cuda.device_count())


def _with_device(resolved: Resolved) -> Resolved:
    cluster = decided(resolved.run.cluster)
    return Resolved(**{**vars(resolved), "run": resolved.run.model_copy(update={"cluster": cluster})})


def _tallies(resolved: Resolved) -> dict[str, Tally]:
    run = resolved.run
    tallies = {}
    for key in _needed(resolved):
        kind, _, number = key.partition(".")
        entry: Score | Index | None = None
        if kind != "stages":
            entry = run.index[int(number)] if kind == "index" else run.score[int(number)]
        index = int(number) if entry is None else run.stage_index(entry.stage)
        stage, count = run.stages[index], resolved.documents[key]
        documents = stage.documents if entry is None else run.scored_documents(entry)
        max_tokens = stage.fit.max_tokens if entry is None else entry.max_tokens
        if documents is None:
            continue
        if entry is None:
            count = min(count, stage.fit.documents or count)
        setup = model_setup(resolved, index, documents, max_tokens)
        encode, files = encoder(resolved, index, setup), resolved.corpora[key]
        tallies[key] = corpus_tally(files, documents, count, f"{key}.documents", encode, max_tokens)
    asked = query_setup(resolved)
    encode = encoder(resolved, len(run.stages) - 1, asked)
    tallies["queries"] = tally(map(encode, resolved.queries), asked.max_tokens)
    return tallies


def _check_fitted(resolved: Resolved, tallies: Mapping[str, Tally]) -> None:
    """Raises UserError for a stage to be fitted or solved of whose documents, all of them counted, none is usable."""
    for index, stage in enumerate(resolved.run.stages):
        seen = tallies.get(key := f"stages.{index}")
        if seen is not None and stage.documents is not None and not seen.tokens and seen.sampled is None:
            raise none_usable(stage.documents, f"{key}.documents", stage.name, seen.reasons)


def _needed(resolved: Resolved) -> list[str]:
    """The corpora to be read: of stages to be fitted, of indexes, and of each scoring pass."""
    first = {f"score.{resolved.run.score.index(entries[0])}" for entries in stages.passes(resolved.run)}
    return [key for key in resolved.corpora if key in first or key.startswith(("stages.", "index."))]


def _put_together(estimate: Estimate, driver_memory: int, notes: list[str]) -> Plan:
    run, inputs = estimate.run, estimate.inputs
    calibrations = inputs.calibrations
    groups = []
    for index in estimate.fitted:
        found = estimate.groups(index)
        sizes = [sum(factor_bytes(estimate.shapes[name], estimate.itemsize) for name in group) for group in found]
        groups.append(Groups(run.stages[index].name, len(estimate.shapes), len(found), max(sizes)))
    return Plan(
        run_dir=run.run_dir,
        device=next((calibration.device for calibration in calibrations.values()), None),
        replicas=run.cluster.replicas.max,
        ranks_per_replica=run.cluster.ranks_per_replica,
        pairs=sum(len(entries) * estimate.pairs(entries) for entries in stages.passes(run)),
        corpora=_corpora(run, inputs.tallies),
        steps=steps(estimate),
        groups=groups,
        stored=stored(estimate),
        free={run.stages[index].name: calibration.free for index, calibration in calibrations.items()},
        driver_memory=driver_memory + int(driver.growth(estimate)),
        hand_memory=HAND_MEMORY,
        notes=notes + _notes(estimate),
    )


def _corpora(run: Run, tallies: Mapping[str, Tally]) -> list[Corpus]:
    corpora = []
    for key, seen in tallies.items():
        corpora.append(Corpus(_corpus_name(run, key), seen.documents, seen.tokens, seen.skipped, seen.sampled))
    return corpora


def _corpus_name(run: Run, key: str) -> str:
    kind, _, number = key.partition(".")
    if kind == "stages":
        return f"{run.stages[int(number)].name}, fitted"
    if kind == "score":
        return f"{run.score[int(number)].label}, scored"
    return f"{run.index[int(number)].stage}, indexed" if kind == "index" else "queries"


def _notes(estimate: Estimate) -> list[str]:
    run, calibrations, notes = estimate.run, estimate.inputs.calibrations, []
    for key, seen in estimate.inputs.tallies.items():
        if not seen.tokens:
            looked_at = f"{seen.sampled:,} sampled" if seen.sampled is not None else f"{seen.documents:,}"
            why = most_often(seen.reasons)
            notes.append(f"{_corpus_name(run, key)}: none of its {looked_at} documents can be used{why}.")
    if not calibrations:
        notes.append("Memory is the model and what a step holds, without the process itself and activations.")
        if run.cluster.factor_memory is None and estimate.fitted:
            notes.append(
                "One group of maps is assumed: how many there are depends on the memory that is free once the "
                "model is loaded, or on cluster.factor_memory."
            )
    recurrent = [run.stages[i].name for i, size in estimate.inputs.sizes.items() if not size.attention]
    if recurrent:
        notes.append(
            f"{', '.join(recurrent)}: the model has no attention heads; the FLOPs of what mixes its positions instead "
            "are not counted."
        )
    if run.queries.energy is not None:
        notes.append(
            "Queries are counted as dense: the rank that queries.energy asks for is known once they are carried."
        )
    for entries in stages.passes(run):
        needed = len(entries) * counts.directions_bytes(estimate.directions())
        memory = estimate.directions_memory(entries)
        if memory is not None and needed > memory:
            notes.append(
                f"{entries[0].stage}: of {needed / GIBI:.3g} GiB of query directions {memory / GIBI:.3g} GiB fit in "
                "cluster.directions_memory; the rest is read from local disk for every batch, and the time of that is "
                "not counted. Larger batches (cluster.tokens_per_batch) read less often."
            )
        held = estimate.factors_held(entries)
        notes += curvature.streaming_note(run, estimate.shapes, estimate.itemsize, held, entries[0].stage)
    if run.cluster.ranks_per_replica > 1 and calibrations:
        notes.append("The models were measured whole; the run shards them, and the time of its gathers is not counted.")
    return notes
