"""The steps of a run in order, those of a fit and of an index among them."""

import torch

from msif_ray import stages
from msif_ray.cluster.fit import EIGEN_COPIES
from msif_ray.influence.groups import factor_bytes
from msif_ray.influence.kept import KEPT_SHARE, bytes_per_token
from msif_ray.plan import counts
from msif_ray.plan.estimate import Estimate, Step, indexing_job
from msif_ray.plan.tokens import Tally
from msif_ray.references import ReferencePass, reference_passes


def steps(estimate: Estimate) -> list[Step]:
    """All steps of a run."""
    found = [_reference(estimate, each) for each in _reference_passes(estimate)]
    found += [step for index in estimate.fitted for step in _fit(estimate, index)]
    found += [_index(estimate, position) for position in range(len(estimate.run.index))]
    found += estimate.queries()
    found += [estimate.scores(entries) for entries in stages.passes(estimate.run)]
    return found + [estimate.top(entry) for entry in estimate.run.score]


def _reference_passes(estimate: Estimate) -> list[ReferencePass]:
    """Those over a corpus; of an index no more than the top documents are read."""
    found = reference_passes(estimate.run, estimate.inputs.resolved.corpora)
    return [each for each in found if not each.late]


def _reference(estimate: Estimate, each: ReferencePass) -> Step:
    """A forward pass by a reference model, which is taken to be as large and as fast as the stage's own."""
    corpus = next(corpus for corpus in each.corpora if corpus in estimate.inputs.tallies)
    entry = None if each.entry is None else estimate.run.score[each.entry]
    tally = estimate.inputs.tallies[corpus] if entry is None else estimate.scored([entry])
    flops = counts.forward_flops(estimate.inputs.sizes[each.stage], tally)
    calibration = estimate.inputs.calibrations.get(each.stage)
    hours = None if calibration is None else estimate.hours(each.stage, next(iter(calibration.jobs)), flops)
    memory = estimate.rank_memory(each.stage)
    name = f"{estimate.run.stages[each.stage].name}: reference model"
    return Step(name, tally.documents, tally.tokens, 1, flops, hours, memory)


def _fit(estimate: Estimate, index: int) -> list[Step]:
    name, tally = estimate.run.stages[index].name, estimate.inputs.tallies[f"stages.{index}"]
    passes = len(estimate.groups(index))
    once = passes * counts.pass_flops(estimate.inputs.sizes[index], tally)
    kept, share = _kept(estimate, index, tally)
    covariance = once + counts.covariance_flops(estimate.shapes, tally)
    correction = (1 - share) * once + counts.correction_flops(estimate.shapes, tally)
    sums = estimate.largest(index, lambda shapes: counts.covariance_bytes(shapes, estimate.itemsize))
    factors = estimate.largest(index, lambda shapes: sum(factor_bytes(s, estimate.itemsize) for s in shapes.values()))
    return [
        Step(
            f"{name}: covariance",
            tally.documents,
            tally.tokens,
            passes,
            covariance,
            estimate.hours(index, "covariance", covariance),
            estimate.peak(index, "covariance", sums + kept),
        ),
        estimate.task(
            f"{name}: eigendecomposition",
            counts.eigen_flops(estimate.shapes),
            estimate.seconds(eigen=counts.eigen_flops(estimate.shapes)),
            EIGEN_COPIES * 8 * max(max(shape) for shape in estimate.shapes.values()) ** 2,
        ),
        Step(
            f"{name}: correction",
            tally.documents,
            tally.tokens,
            passes,
            correction,
            estimate.hours(index, "correction", correction),
            estimate.peak(index, "correction", factors + kept),
        ),
    ]


def _kept(estimate: Estimate, index: int, tally: Tally) -> tuple[float, float]:
    """Bytes that a rank keeps of a fit's covariances for its corrections, and their share of the documents."""
    cluster, calibration = estimate.run.cluster, estimate.inputs.calibrations.get(index)
    memory = 0.0 if calibration is None else KEPT_SHARE * calibration.free
    if cluster.activations_memory is not None:
        memory = float(cluster.activations_memory)
    if cluster.gpus_per_rank or cluster.ranks_per_replica > 1:
        memory = 0.0
    narrow = getattr(torch, cluster.dtype).itemsize
    wanted = tally.positions * estimate.largest(index, lambda shapes: bytes_per_token(shapes, narrow))
    here = min(memory, wanted / cluster.replicas.max)
    return here, here * cluster.replicas.max / wanted if wanted else 0.0


def _index(estimate: Estimate, position: int) -> Step:
    """The pass that builds an index; in groups as the factors are fitted."""
    entry, tally = estimate.run.index[position], estimate.inputs.tallies[f"index.{position}"]
    index = estimate.run.stage_index(entry.stage)
    passes = len(estimate.groups(index))
    flops = passes * counts.pass_flops(estimate.inputs.sizes[index], tally)
    flops += counts.compress_flops(estimate.shapes, tally, entry.rank)
    held = estimate.largest(index, lambda shapes: counts.covariance_bytes(shapes, estimate.itemsize))
    job = indexing_job(position)
    hours, peak = estimate.hours(index, job, flops), estimate.peak(index, job, held)
    return Step(f"{entry.stage}: index", tally.documents, tally.tokens, passes, flops, hours, peak)
