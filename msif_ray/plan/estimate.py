"""The plan of a run: its steps with what each costs, from a checked run and, where there is one, a calibration."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import torch

from msif_ray import stages
from msif_ray.cluster.carry import carry_bytes
from msif_ray.cluster.directions import kept_entries, shards
from msif_ray.cluster.queries import largest_block
from msif_ray.cluster.sharding import GLOO_COPIES
from msif_ray.config import Score
from msif_ray.indexes import index_folder, is_own, read_manifest
from msif_ray.influence.directions import Directions, join
from msif_ray.influence.groups import FREE_SHARE, Shapes, module_groups
from msif_ray.influence.scoring import Scorer
from msif_ray.plan import counts, curvature
from msif_ray.plan import solves as solving
from msif_ray.plan.inputs import Inputs
from msif_ray.plan.tokens import Tally

SECONDS = 3600.0


@dataclass(frozen=True)
class Step:
    """A step of the run. `tokens` of `documents` in each of `passes`; `flops` of all passes; `hours` of a rank's
    device, or of a `core` for what runs as one task per map (None: nothing was measured); `memory`: bytes at
    most per rank, or per task."""

    name: str
    documents: float
    tokens: float
    passes: int
    flops: float
    hours: float | None
    memory: float | None
    runs_on: Literal["rank", "core"] = "rank"


@dataclass
class Estimate:
    """The steps and their costs."""

    inputs: Inputs
    shapes: Shapes = field(init=False)
    itemsize: int = field(init=False)

    def __post_init__(self) -> None:
        self.run = self.inputs.resolved.run
        self.shapes = self.inputs.resolved.maps
        self.dtype = torch.promote_types(getattr(torch, self.run.cluster.dtype), torch.float32)
        self.itemsize = self.dtype.itemsize

    @cached_property
    def fitted(self) -> list[int]:
        """The stages whose factors this run fits itself."""
        return [i for i in stages.stages_with_factors(self.run) if self.run.stages[i].factors is None]

    @cached_property
    def solves(self) -> list[solving.StageSolves]:
        """The stages that conjugate gradients solve."""
        return solving.planned_solves(self.run, len(self.inputs.resolved.queries))

    def groups(self, index: int) -> list[tuple[str, ...]]:
        """A stage's maps in the groups that are fitted together."""
        budget: int | None = self.run.cluster.factor_memory
        calibration = self.inputs.calibrations.get(index)
        if budget is None and calibration is not None:
            budget = max(1, int(FREE_SHARE * (calibration.free + self._not_held(index))))
        return module_groups(self.shapes, budget, self.itemsize)

    def scorer(self, entries: Sequence[Score]) -> Scorer:
        """A scorer with the shapes of the entries' directions and no numbers, which keeps what fits in memory."""
        directions = {name: join([each] * len(entries)) for name, each in self.directions().items()}
        memory, norms = self.directions_memory(entries), self.run.detail.norm and entries[0].index is None
        if memory is None:
            return Scorer(directions, norms=norms)
        return Scorer(directions, kept_entries(counts.directions_bytes(directions), memory, self.itemsize), norms)

    def directions(self) -> dict[str, Directions]:
        """One entry's directions, with shapes and no numbers."""
        count, rank = len(self.inputs.resolved.queries), self.run.queries.rank
        return counts.make_directions(self.shapes, count, rank, self.dtype, torch.device("meta"))

    def directions_memory(self, entries: Sequence[Score]) -> int | None:
        """What a rank uses for directions at most in the entries' pass; None where that is not known."""
        index, given = self.run.stage_index(entries[0].stage), self.run.cluster.directions_memory
        calibration = self.inputs.calibrations.get(index)
        if given is not None or calibration is None:
            return given
        return max(1, int(FREE_SHARE * (calibration.free + self._not_held(index) - self.factors_held(entries))))

    def factors_held(self, entries: Sequence[Score]) -> int:
        """What a rank holds of the scored stage's factors in the entries' pass."""
        calibration = self.inputs.calibrations.get(index := self.run.stage_index(entries[0].stage))
        free = None if calibration is None else calibration.free + self._not_held(index)
        directions = len(entries) * counts.directions_bytes(self.directions())
        return curvature.held_bytes(self.run, self.shapes, self.itemsize, free, directions)

    def _directions_held(self, entries: Sequence[Score], needed: int) -> int:
        memory = self.directions_memory(entries)
        return needed if memory is None else min(needed, memory)

    def rank_memory(self, index: int) -> float:
        """A rank's bytes with stage `index`'s model loaded: its process, and its shard with what it gathers."""
        size, cluster = self.inputs.sizes[index], self.run.cluster
        calibration = self.inputs.calibrations.get(index)
        model = size.parameters * getattr(torch, cluster.dtype).itemsize
        loaded = model if calibration is None else calibration.loaded
        return loaded - self._not_held(index)

    def _not_held(self, index: int) -> float:
        """Bytes of a model that a rank does not hold because others do."""
        size, cluster = self.inputs.sizes[index], self.run.cluster
        if cluster.ranks_per_replica == 1:
            return 0.0
        on_host = cluster.offload and bool(cluster.gpus_per_rank)  # the shard, too, is not on the GPU
        shard = 0.0 if on_host else size.parameters / cluster.ranks_per_replica
        copies = 1 if cluster.gpus_per_rank else GLOO_COPIES
        return max(0.0, getattr(torch, cluster.dtype).itemsize * (size.parameters - shard - copies * size.gathered))

    def peak(self, index: int, job: str, held: float) -> float:
        """A rank's bytes at most in a job of stage `index` that holds so much beside the model."""
        calibration = self.inputs.calibrations.get(index)
        if calibration is None:
            return self.rank_memory(index) + held
        working = calibration.jobs[job].working if job in calibration.jobs else 0
        # A sharded model is read weight by weight, a whole one at once.
        loading = calibration.loading if self.run.cluster.ranks_per_replica == 1 else 0
        return max(loading, self.rank_memory(index) + working + held)

    def hours(self, index: int, job: str, flops: float) -> float | None:
        """None where nothing was measured; no time for no work, which is not tried."""
        calibration = self.inputs.calibrations.get(index)
        if calibration is None or not flops:
            return None if flops else 0.0
        return flops / calibration.jobs[job].rate / SECONDS

    def largest(self, index: int, size: Callable[[Shapes], int]) -> int:
        """The bytes of a stage's largest group."""
        return max(size({name: self.shapes[name] for name in group}) for group in self.groups(index))

    def queries(self) -> list[Step]:
        tally, last = self.inputs.tallies["queries"], len(self.run.stages) - 1
        flops = counts.pass_flops(self.inputs.sizes[last], tally)
        resolved, chosen = self.inputs.resolved, self.run.queries
        held = largest_block(resolved.queries, resolved.query_tokens, self.shapes, self.itemsize)
        steps = [
            Step(
                "queries: gradients",
                tally.documents,
                tally.tokens,
                1,
                flops,
                self.hours(last, "queries", flops),
                self.peak(last, "queries", held),
            )
        ]
        queries = len(resolved.queries)
        passed = [self._stages_passed(entry) for entry in self.run.score]
        product = counts.carry_flops(self.shapes, queries, sum(passed))
        product += sum(each.rotation_flops(self.shapes) for each in self.solves)
        svd = len(self.run.score) * counts.truncation_flops(self.shapes, queries, chosen.rank, chosen.energy)
        cut = shards(queries, self.shapes, chosen.rank, self.itemsize, self.run.cluster.directions_memory)
        shard = cut[0][1]
        memory = max(carry_bytes(shape, shard, max(passed), self.itemsize, chosen) for shape in self.shapes.values())
        seconds = self.seconds(product=product, svd=svd)
        steps += [self._solve(each) for each in self.solves]
        return [*steps, self.task("queries: carried back", product + svd, seconds, memory)]

    def _solve(self, each: solving.StageSolves) -> Step:
        """The products of a stage's solves, were no query solved before its last iteration."""
        index, memory = each.index, self.run.cluster.directions_memory
        tally = solving.solver_tally(self.run, index, self.inputs.tallies[f"stages.{index}"])
        flops = each.flops(self.inputs.sizes[index], self.shapes, tally)
        job, held = solving.products_job(index), solving.held_bytes(self.shapes, each.queries, memory, self.itemsize)
        name = f"queries: {self.run.stages[index].name}: conjugate gradients"
        hours, peak = self.hours(index, job, flops), self.peak(index, job, held)
        return Step(name, tally.documents, tally.tokens, each.passes, flops, hours, peak)

    def _stages_passed(self, entry: Score) -> int:
        """How many stages' factors a query meets on its way back."""
        variant, scored = self.run.answering(entry), self.run.stage_index(entry.stage)
        return sum(not stages.is_identity(variant, index) for index in stages.carried_through(variant, scored))

    def task(self, name: str, flops: float, seconds: float | None, held: float) -> Step:
        """A step of one task per map."""
        empty = max((c.empty for c in self.inputs.calibrations.values()), default=0)
        return Step(name, 0, 0, 0, flops, None if seconds is None else seconds / SECONDS, empty + held, "core")

    def seconds(self, eigen: float = 0.0, product: float = 0.0, svd: float = 0.0) -> float | None:
        """Core seconds of so many FLOPs of each kind, at the first calibration's rates."""
        measured = next(iter(self.inputs.calibrations.values()), None)
        if measured is None:
            return None
        return eigen / measured.eigen_rate + product / measured.product_rate + svd / measured.svd_rate

    def scored(self, entries: Sequence[Score]) -> Tally:
        """The documents of a pass; of candidates as many as there can be, each of one query alone."""
        tally, most = self._in_corpus(entries), self.candidates_at_most(entries[0])
        return tally if most is None or most >= tally.documents else tally.scaled(most)

    def pairs(self, entries: Sequence[Score]) -> float:
        """The pairs of a query and a document that each entry of a pass scores, at most."""
        tally, most = self._in_corpus(entries), self.candidates_at_most(entries[0])
        every = len(self.inputs.resolved.queries) * (tally.documents - tally.skipped)
        return every if most is None else min(every, most)

    def _in_corpus(self, entries: Sequence[Score]) -> Tally:
        return self.inputs.tallies[f"score.{self.run.score.index(entries[0])}"]

    def candidates_at_most(self, entry: Score) -> int | None:
        """The pairs that the first entry of a pass scores at most, where it does not score all."""
        chosen, resolved = entry.candidates, self.inputs.resolved
        if chosen is None:
            return None
        if chosen.path is None:
            return chosen.top * len(resolved.queries)
        return len(resolved.listed[f"score.{self.run.score.index(entry)}"])

    def scores(self, entries: Sequence[Score]) -> Step:
        tally, index = self.scored(entries), self.run.stage_index(entries[0].stage)
        scorer, job = self.scorer(entries), scoring_job(self.run.score.index(entries[0]))
        flops = counts.pass_flops(self.inputs.sizes[index], tally) + self._scoring_flops(scorer, tally)
        if entries[0].index is not None:
            rank = self._indexed_rank(entries[0])
            tally = replace(tally, lengths={rank: tally.documents - tally.skipped})
            flops = counts.scoring_flops(scorer, tally)
        held = self._directions_held(entries, counts.scorer_bytes(scorer, tally))
        return Step(
            f"{', '.join(entry.label for entry in entries)}: scores",
            tally.documents,
            tally.tokens,
            1,
            flops,
            self.hours(index, job, flops),
            self.peak(index, job, held + self.factors_held(entries)),
        )

    def _scoring_flops(self, scorer: Scorer, tally: Tally) -> float:
        """Of scores alone by the cheaper contraction of every map; with those of every token, token by token; and of
        norms in the inverse curvature where they are wanted."""
        norms = counts.curvature_flops(self.shapes, tally) if self.run.detail.curvature_norm else 0.0
        if not self.run.detail.tokens:
            return norms + counts.scoring_flops(scorer, tally)
        queries = len(next(iter(scorer.directions.values())))
        return norms + queries * counts.token_score_flops(scorer, tally.positions)

    def _indexed_rank(self, entry: Score) -> int:
        """The rank of the index that an entry scores from."""
        if is_own(self.run, entry):
            return next(index.rank for index in self.run.index if index.stage == entry.stage)
        return int(read_manifest(index_folder(entry))["rank"])

    def top(self, entry: Score) -> Step:
        """Per-token scores of the highest and lowest documents of every query, all of them different at most."""
        entries = next(entries for entries in stages.passes(self.run) if entry in entries)
        tally, index = self.scored(entries), self.run.stage_index(entry.stage)
        job = scoring_job(self.run.score.index(entries[0]))
        scored = max(1.0, tally.documents - tally.skipped)
        pairs = len(self.inputs.resolved.queries) * min(scored, 2 * self.run.top)
        shown = min(scored, pairs) / scored
        scorer = self.scorer([entry])
        flops = counts.pass_flops(self.inputs.sizes[index], tally) * shown
        flops += counts.token_score_flops(scorer, tally.positions * pairs / scored)
        return Step(
            f"{entry.label}: top documents",
            scored * shown,
            tally.tokens * shown,
            1,
            flops,
            self.hours(index, job, flops),
            self.peak(index, job, self._directions_held([entry], counts.directions_bytes(scorer.directions))),
        )


def scoring_job(position: int) -> str:
    """The name of the trial of the pass whose first entry is at `position` of `score`."""
    return f"scoring.{position}"


def indexing_job(position: int) -> str:
    """The name of the trial of the entry at `position` of `index`."""
    return f"indexing.{position}"
