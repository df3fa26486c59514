"""One job of the calibration: a loaded rank does it on a few real batches, timed and weighed."""

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Literal

import torch

from msif_ray.cluster.directions import kept_entries
from msif_ray.cluster.iterates import ProductWork
from msif_ray.cluster.jobs import QueryJob
from msif_ray.cluster.rank import ModelSetup, Rank
from msif_ray.cluster.score_jobs import left_beside
from msif_ray.corpus.reader import Document
from msif_ray.corpus.windows import Encoded, Skipped, Window
from msif_ray.influence import onednn
from msif_ray.influence.capture import Captured
from msif_ray.influence.compress import Metric, compress
from msif_ray.influence.curvature import CurvatureMetric, curvature_squares
from msif_ray.influence.ekfac import CorrectionSums, CovarianceSums
from msif_ray.influence.gauss_newton import ProductSums
from msif_ray.influence.groups import Shapes, module_groups
from msif_ray.influence.scoring import Scorer, squared_norms
from msif_ray.plan import counts
from msif_ray.plan.memory import Gauge
from msif_ray.plan.tokens import Tally, tally

# A job is timed on as many batches of its block as plain passes take this long over (seconds).
TIMED = 4.0
Kind = Literal["covariance", "correction", "indexing", "products", "queries", "scoring"]


@dataclass(frozen=True)
class Trial:
    """A job to be tried: how its documents are read, and some that are usable; for scoring how many queries of which
    `rank`, the bytes that they may take (None: a share of what is free), and whether with `norms` and with those in
    the inverse `curvature`; for indexing the index's `rank`."""

    name: str
    kind: Kind
    setup: ModelSetup
    documents: tuple[Document, ...]
    sampled_labels: bool = False
    queries: int = 0
    rank: int | None = None
    memory: int | None = None
    norms: bool = True
    curvature: bool = False


@dataclass(frozen=True)
class Measured:
    """One job: FLOP per second, and the bytes it took beyond the loaded model and what the formulas say it holds.

    `tokens` of documents were timed; `queries` were scored, fewer than asked for where those would not fit.
    """

    rate: float
    working: int
    tokens: float
    queries: int


@dataclass
class _Tried:
    """A job for a rank, and its work: what it is given goes to `work` alone."""

    sampled_labels: bool
    work: Any
    tracked: tuple[str, ...] | None = None

    def start(self, maps: Sequence[str], device: torch.device) -> Any:
        return self.work if isinstance(self.work, ProductWork) else self

    def add(self, captured: Captured) -> None:
        self.work.add(captured)

    def take(self) -> None:
        self.work = None


@dataclass
class _Passing:
    """No work beyond the pass."""

    def add(self, captured: Captured) -> None:
        pass


@dataclass
class _Scoring:
    scorer: Scorer
    metrics: dict[str, CurvatureMetric]

    def add(self, captured: Captured) -> None:
        self.scorer.score(captured)
        curvature_squares(self.metrics, captured)


@dataclass
class _Indexing:
    """As a rank builds an index, without packing."""

    metrics: dict[str, Metric]
    rank: int

    def add(self, captured: Captured) -> None:
        for name, metric in self.metrics.items():
            activations, gradients = captured.activations(name), captured.gradients(name)
            squared_norms(activations, gradients)
            compress(metric, activations, gradients, self.rank)


@dataclass
class Bench:
    """One trial on a loaded rank; maps are those of `shapes`. `budget`: bytes for query directions; `factors`: bytes
    for a scored stage's factors."""

    rank: Rank
    trial: Trial
    shapes: Shapes
    size: counts.ModelSize
    gauge: Gauge
    loaded: int
    budget: int
    factors: int

    def run(self) -> Measured:
        trial = self.trial
        every_map = self.rank.maps
        self.rank.setup = trial.setup
        self.rank.maps = {name: every_map[name] for name in self.shapes}
        try:
            documents = self._choose()
            seen = tally(map(self._encode, documents), trial.setup.max_tokens)
            gc.collect()
            self.gauge.reset()
            work, held, flops = self._work(seen)
            seconds = self._time(documents, work)
            # Threads and buffers that outlive a job are not given back, so the first job's are every job's.
            working = max(0, self.gauge.peak() - self.loaded - held) + self._of_products
        finally:
            self.rank.maps = every_map
        total = counts.pass_flops(self.size, seen) + flops
        return Measured(total / seconds, working, seen.tokens, self._queries)

    def _choose(self) -> tuple[Document, ...]:
        """The documents of batches at even distances in the block, the one of the longest windows among them."""
        batches = self._batches(self.trial.documents)
        longest = self._of(batches[:1])
        self._time(longest, _Passing())  # loads kernels and libraries
        seconds = self._time(longest, _Passing())
        count = max(1, min(len(batches), int(TIMED / seconds)))
        return self._of([batches[len(batches) * i // count] for i in range(count)])

    def _batches(self, documents: Sequence[Document]) -> list[list[Window]]:
        setup = self.trial.setup
        windows: list[Window] = []
        for encoded in map(self._encode, documents):
            if isinstance(encoded, Encoded):
                windows += encoded.windows(setup.max_tokens or len(encoded.ids))
        return self.rank.pack(windows)

    def _encode(self, document: Document) -> Encoded | Skipped:
        return self.trial.setup.encode(self.rank.tokenizer, document)

    def _of(self, batches: Sequence[Sequence[Window]]) -> tuple[Document, ...]:
        names = {window.key.document_id for batch in batches for window in batch}
        return tuple(document for document in self.trial.documents if document.id in names)

    def _time(self, documents: Sequence[Document], work: Any) -> float:
        """Seconds that the rank takes over the documents."""
        job = _Tried(self.trial.sampled_labels, work)
        self.rank.start(job)
        began = perf_counter()
        self.rank.process(documents)
        if self.rank.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = perf_counter() - began
        job.take()
        return seconds

    def _work(self, seen: Tally) -> tuple[Any, int, float]:
        """The trial's work, the bytes that it holds by formula, and its FLOPs beyond the pass."""
        shapes, device, dtype = self.shapes, self.rank.device, self._accumulating
        if self.trial.kind == "covariance":
            held = counts.covariance_bytes(shapes, dtype.itemsize)
            return CovarianceSums(), held, counts.covariance_flops(shapes, seen)
        if self.trial.kind == "correction":
            bases = counts.make_bases(shapes, dtype, device)
            held = counts.covariance_bytes(shapes, dtype.itemsize) + counts.corrected_bytes(shapes, dtype.itemsize)
            return CorrectionSums(bases), held, counts.correction_flops(shapes, seen)
        if self.trial.kind == "indexing":
            rank = self.trial.rank or 1
            work = _Indexing(counts.make_metrics(shapes, dtype, device), rank)
            return work, counts.covariance_bytes(shapes, dtype.itemsize), counts.compress_flops(shapes, seen, rank)
        if self.trial.kind == "products":
            one = counts.make_directions(shapes, 1, None, dtype, device)
            products = ProductWork(ProductSums({name: each.dense for name, each in one.items()}))
            held = 2 * counts.corrected_bytes(shapes, dtype.itemsize)
            return products, held, counts.product_flops(self.size, shapes, seen) - counts.pass_flops(self.size, seen)
        if self.trial.kind == "queries":
            held = int(counts.gradient_bytes(shapes, seen.positions, dtype.itemsize))
            return QueryJob().start(list(shapes), device), held, 0.0
        return self._scoring(seen)

    def _scoring(self, seen: Tally) -> tuple[_Scoring, int, float]:
        """As `_work`; norms in the inverse curvature of as many maps as there is room for beside the directions."""
        device, dtype = self.rank.device, self._accumulating
        directions = counts.make_directions(self.shapes, self._queries, self.trial.rank, dtype, device)
        taken = counts.directions_bytes(directions)
        measured: Shapes = {}
        if self.trial.curvature:
            room = left_beside(taken, self.factors)
            measured = {name: self.shapes[name] for name in module_groups(self.shapes, room, dtype.itemsize)[0]}
        bases = counts.make_bases(measured, dtype, device)
        ones = {name: torch.ones(shape, dtype=dtype, device=device) for name, shape in measured.items()}
        metrics = {name: CurvatureMetric(bases[name], ones[name]) for name in measured}
        held = counts.curvature_bytes(measured, dtype.itemsize)
        scorer = Scorer(directions, kept_entries(taken, self.budget - held, dtype.itemsize), self.trial.norms)
        flops = counts.scoring_flops(scorer, seen) + counts.curvature_flops(measured, seen)
        return _Scoring(scorer, metrics), held + counts.scorer_bytes(scorer, seen), flops

    @property
    def _of_products(self) -> int:
        """Bytes that products of other lengths than those tried come to hold."""
        return onednn.HELD if self.rank.device.type == "cpu" and onednn.available() else 0

    @property
    def _accumulating(self) -> torch.dtype:
        return torch.promote_types(getattr(torch, self.trial.setup.dtype), torch.float32)

    @property
    def _queries(self) -> int:
        """As many of the queries as fit beside the model."""
        if self.trial.kind != "scoring":
            return 0
        one = counts.make_directions(self.shapes, 1, self.trial.rank, self._accumulating, torch.device("meta"))
        return max(1, min(self.trial.queries, self.budget // max(1, counts.directions_bytes(one))))
