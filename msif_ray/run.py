"""A run from description to Parquet: every step in order, none twice (DESIGN.md §4)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from msif_ray import layout, lease, stages
from msif_ray.carrying import Carrying
from msif_ray.checkpoint import load_tokenizer
from msif_ray.cluster.curvature import Curvature, stage_curvature
from msif_ray.cluster.factors import mean_eigenvalues
from msif_ray.cluster.fit import FitTask, drop_partials, fit, is_fitted
from msif_ray.cluster.index import IndexPlan, build
from msif_ray.cluster.indexed import indexed_task
from msif_ray.cluster.metrics import publish
from msif_ray.cluster.pool import ReplicaPool
from msif_ray.cluster.rank import ModelSetup
from msif_ray.cluster.score import ScoreTask
from msif_ray.cluster.score_jobs import ScoreJob, Shares
from msif_ray.cluster.stream import BlockTask, stream
from msif_ray.cluster.top import Row, TopTask, top_rows
from msif_ray.config import Documents, Run, Score
from msif_ray.connection import connected, decide_gpus
from msif_ray.corpus.blocks import CorpusBlocks
from msif_ray.corpus.candidates import CandidateBlocks, ChosenFile, by_bm25, write_chosen
from msif_ray.errors import UserError
from msif_ray.indexes import corpus_identity, describe, index_folder, read_manifest, summary
from msif_ray.manifests import made_with
from msif_ray.objectives import objective_identity
from msif_ray.paths import exists, path_of
from msif_ray.preflight import Resolved, check
from msif_ray.progress import Reporter
from msif_ray.record import keep_index, keep_record, meaning
from msif_ray.referring import Referring
from msif_ray.results.parts import write_skipped
from msif_ray.results.report import write_report
from msif_ray.results.signals import signal_lines
from msif_ray.results.statistics import STATISTICS, write_statistics
from msif_ray.results.top import has_top, top_pairs, write_top
from msif_ray.setup import corpus_blocks, factors_folder, model_setup
from msif_ray.store import sweep

Until = Literal["fit", "index", "score"]


def run(config: Run, until: Until | None = None, reporter: Reporter | None = None) -> None:
    """Runs what is left of a run: all of it, or up to the factors (`fit`) or the scores (`score`), or the indexes
    with no more than they need (`index`).

    Runs on the Ray cluster of `connected`.

    Raises UserError for anything the user can mend, before any replica is started wherever it
    can be seen by then.
    """
    reporter = reporter or Reporter(observe=publish)
    if until == "index" and not config.index:
        raise UserError("index: the run describes none; name a stage there")
    resolved = check(config, reporter.say)
    with connected():
        cluster = decide_gpus(resolved.run.cluster)
        resolved = Resolved(**{**vars(resolved), "run": resolved.run.model_copy(update={"cluster": cluster})})
        with lease.held(resolved.run.run_dir, reporter.say) as own:
            keep_record(resolved, reporter.say)
            sweep(resolved.run.run_dir)
            _Driver(resolved, reporter.checking(own.check)).run(until)
            reporter.summarise()


@dataclass
class _Driver:
    """The steps of one resolved run."""

    resolved: Resolved
    reporter: Reporter
    config: Run = field(init=False)

    def __post_init__(self) -> None:
        self.config = self.resolved.run

    def run(self, until: Until | None) -> None:
        only_index = until == "index"
        if until in (None, "score"):
            self._choose_candidates()
        kinds = {"fit": ("stages",), "index": ("stages", "index")}
        with ReplicaPool(self.config.cluster) as pool:
            referring = Referring(self.resolved, pool, self.reporter, lambda entry: self._score_task([entry]).blocks)
            referring.run(kinds.get(until or "", ("stages", "index", "score")))
            fitted = stages.indexed_stages(self.config) if only_index else stages.stages_with_factors(self.config)
            for index in fitted:
                self._fit(index, pool)
            if until == "fit":
                return
            if not only_index:
                Carrying(self.resolved, pool, self.reporter).run()
            for position in range(len(self.config.index)):
                self._index(position, pool)
            if only_index:
                return
            passes = self._passes()
            for entries in passes:
                self._score(entries, pool)
            write_skipped(self.config.run_dir, [entries[0].label for entries in passes])
            if until == "score":
                return
            if not has_top(self.config.run_dir, self.config.top):
                referring.run_late()
            self._top(pool)
        self._report()

    def _setup(self, index: int, documents: Documents, max_tokens: int | None) -> ModelSetup:
        return model_setup(self.resolved, index, documents, max_tokens)

    def _fit(self, index: int, pool: ReplicaPool) -> None:
        stage, folder = self.config.stages[index], factors_folder(self.config, index)
        if stage.factors is not None:
            return  # of another run, and checked before this one began
        if is_fitted(folder):
            drop_partials(folder)  # of a driver that died when it had written the manifest
            self.reporter.say(f"{stage.name}: factors are there")
            return
        documents, cluster = stage.documents, self.config.cluster
        if documents is None:
            raise UserError(f"stages.{index}.documents: {stage.name!r} needs documents to fit its factors")
        blocks = corpus_blocks(self.resolved, f"stages.{index}", documents, stage.fit.documents)
        objective = objective_identity(self.config, index, self.resolved.references)
        task = FitTask(
            self._setup(index, documents, stage.fit.max_tokens),
            stage.fit.labels,
            blocks,
            sum(self.resolved.rows[f"stages.{index}"]),
            folder,
            self.resolved.maps,
            cluster.factor_memory,
            cluster.activations_memory,
            made_with(self.resolved.stages[index])
            | {
                "fit": stage.fit.model_dump(mode="json"),
                "stage": stage.name,
                "seed": self.config.seed,
                "dtype": cluster.dtype,
            }
            | ({} if objective is None else {"objective": objective}),
        )
        fit(task, pool, lambda step: self.reporter.step(f"{stage.name}: {step}", blocks.count), self.reporter.say)

    def _directions(self, entry: Score) -> Path:
        return layout.directions(self.config.run_dir, entry.label)

    def _passes(self) -> list[list[Score]]:
        return stages.passes(self.config)

    def _score_task(self, entries: Sequence[Score]) -> ScoreTask:
        """The pass of entries that differ in their responses alone."""
        entry = entries[0]
        position = self.config.score.index(entry)
        documents = self.config.scored_documents(entry)
        index = self.config.stage_index(entry.stage)
        blocks = corpus_blocks(self.resolved, f"score.{position}", documents)
        about: dict[str, str] = {}
        if entry.index is not None:
            manifest = read_manifest(index_folder(entry))
            blocks = replace(blocks, size=manifest["documents_per_block"])  # a part is named after the index's block
            about = {"index": str(index_folder(entry))}
            about |= {f"index_{key}": str(manifest[key]) for key in ("rank", "dtype")}
        chosen = ChosenFile.found(self._chosen(entry, blocks)) if entry.candidates is not None else None
        if chosen is not None:
            blocks = blocks.as_a(CandidateBlocks, chosen=chosen)
            about["candidates"] = chosen.path
        setup = self._setup(index, documents, entry.max_tokens or self.config.stages[index].fit.max_tokens)
        detail, maps = self.config.detail, tuple(self.resolved.maps)
        wanted = Shares(detail.tokens, (setup.max_tokens or 1) - 1) if detail.tokens or detail.modules else None
        return ScoreTask(
            run_dir=self.config.run_dir,
            setup=setup,
            job=ScoreJob(
                tuple(self._directions(entry) for entry in entries),
                self.config.cluster.directions_memory,
                tracked=maps,
                shares=wanted,
                norms=detail.norm,
                curvature=self._curvature(entry) if detail.curvature_norm else None,
            ),
            blocks=blocks,
            queries=tuple(query.id for query in self.resolved.queries),
            labels=tuple(entry.label for entry in entries),
            maps=maps,
            detail=detail,
            metadata=meaning(self.config) | about,
            candidates=chosen,
        )

    def _curvature(self, entry: Score) -> Curvature:
        factors = factors_folder(self.config, self.config.stage_index(entry.stage))
        return stage_curvature(self.config, entry, factors, self.resolved.maps)

    def _choose_candidates(self) -> None:
        """At once, so that queries which share no word with the corpus are told before any replica is started."""
        for first, *_ in self._passes():
            if first.candidates is not None:
                documents = self.config.scored_documents(first)
                self._chosen(first, corpus_blocks(self.resolved, f"score.{self.config.score.index(first)}", documents))

    def _chosen(self, entry: Score, blocks: CorpusBlocks) -> Path:
        """The file of the documents that are scored for each query, chosen now unless it is there."""
        first = next(entries[0] for entries in self._passes() if entry in entries)
        path = layout.candidates(self.config.run_dir, first.label)
        if not exists(path):
            wanted, queries = entry.candidates, self.resolved.queries
            if wanted is None:
                raise ValueError(f"{entry.label} has no candidates")
            if wanted.path is not None:
                table = self.resolved.listed[f"score.{self.config.score.index(first)}"]
            else:
                blocks = replace(blocks, references=None)  # which come later
                checkpoint = self.resolved.stages[self.config.stage_index(entry.stage)]
                tokenizer = load_tokenizer(checkpoint.tokenizer_path, "tokenizer")
                table = by_bm25(blocks, queries, wanted.top, lambda ids: str(tokenizer.decode(list(ids))))
            write_chosen(path, table)
            self.reporter.say(f"{first.label}: {len(table):,} candidates of {len(queries):,} queries")
        return path

    def _score(self, entries: Sequence[Score], pool: ReplicaPool) -> None:
        task: BlockTask = self._score_task(entries)
        total = task.blocks.count
        if entries[0].index is not None:
            task = indexed_task(self._score_task(entries), index_folder(entries[0]))
        with self.reporter.step(f"{', '.join(entry.label for entry in entries)}: scores", total) as step:
            stream(task, pool, step)

    def _index(self, position: int, pool: ReplicaPool) -> None:
        """Builds one index, unless it is there, and says in run.json what it is."""
        config, entry, key = self.config, self.config.index[position], f"index.{position}"
        stage, documents = config.stage_index(entry.stage), config.scored_documents(entry)
        folder, blocks = layout.index(config.run_dir, entry.stage), corpus_blocks(self.resolved, key, documents)
        means = mean_eigenvalues(factors_folder(self.config, stage)).items()
        strength, at_fault = config.stages[stage].damping, f"stages.{stage}.damping"
        plan = IndexPlan(
            setup=self._setup(stage, documents, entry.max_tokens),
            blocks=blocks,
            folder=folder,
            factors=factors_folder(self.config, stage),
            maps=self.resolved.maps,
            damping={name: stages.metric_damping(strength, mean, at_fault, name) for name, mean in means},
            rank=entry.rank,
            dtype=entry.dtype,
            memory=config.cluster.factor_memory,
            record=made_with(self.resolved.stages[stage])
            | {
                "stage": entry.stage,
                "corpus": corpus_identity(
                    documents,
                    self.resolved.census(key),
                    entry.max_tokens,
                    objective_identity(config, stage, self.resolved.references),
                ),
            },
        )
        build(plan, pool, lambda step: self.reporter.step(f"{entry.stage}: {step}", blocks.count))
        keep_index(config.run_dir, entry.stage, summary(folder))
        self.reporter.say(f"{entry.stage}: index of {describe(folder)}")

    def _top(self, pool: ReplicaPool) -> None:
        if has_top(self.config.run_dir, self.config.top):
            self.reporter.say("top documents are there")
            return
        norms = self.config.detail.curvature_norm
        write_top(self.config.run_dir, self._top_rows(pool), self.config.top, norms)

    def _report(self) -> None:
        run_dir = self.config.run_dir
        if not exists(path_of(run_dir) / STATISTICS):
            write_statistics(run_dir, [entry.label for entry in self.config.score])
        report, signals = write_report(run_dir)
        for line in signal_lines(signals):
            self.reporter.say(f"note: {line}")
        self.reporter.say(f"done: {report}")

    def _top_rows(self, pool: ReplicaPool) -> Iterator[Row]:
        for entry in self.config.score:
            pairs = top_pairs(self.config.run_dir, entry.label, self.config.top)
            documents = len({pair.doc_id for pair in pairs})
            with self.reporter.step(f"{entry.label}: top documents", documents) as progress:
                rows = top_rows(TopTask(self._score_task([entry]), pairs), pool, progress)
            yield from rows
