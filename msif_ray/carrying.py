"""Carrying queries back, as a run does it: their gradients, then the stages one entry after the other."""

from dataclasses import dataclass

from msif_ray import layout, stages
from msif_ray.cluster.carry import carried_solvers, carried_strengths, carry, is_carried
from msif_ray.cluster.directions import shards
from msif_ray.cluster.partials import Coverage
from msif_ray.cluster.passage import CarryTask, Gradients, Source, passed_means
from msif_ray.cluster.pool import ReplicaPool
from msif_ray.cluster.queries import query_blocks, query_gradients
from msif_ray.cluster.solve import SolvedStage, Solver
from msif_ray.cluster.solve_report import drop_solves, report_solves
from msif_ray.config import Run
from msif_ray.corpus.blocks import ListedBlocks
from msif_ray.errors import UserError
from msif_ray.influence.groups import accumulating_bytes
from msif_ray.preflight import Resolved
from msif_ray.progress import Reporter
from msif_ray.record import keep_carried
from msif_ray.setup import corpus_blocks, factors_folder, model_setup, query_setup


@dataclass(frozen=True)
class Carrying:
    """The queries of one resolved run, with the replicas of `pool`."""

    resolved: Resolved
    pool: ReplicaPool
    reporter: Reporter

    @property
    def config(self) -> Run:
        return self.resolved.run

    def run(self) -> None:
        """Carries the queries back to every entry's scored stage, unless they are there; says how in run.json."""
        folders = {entry.label: layout.directions(self.config.run_dir, entry.label) for entry in self.config.score}
        ids = tuple(query.id for query in self.resolved.queries)
        if not all(is_carried(folder) for folder in folders.values()):
            gradients = self._query_gradients()
            for query, why in gradients.skipped:
                raise UserError(f"queries: {query!r} has no gradient: {why}")
            itemsize = accumulating_bytes(self.config.cluster.dtype)
            memory = self.config.cluster.directions_memory
            cut = shards(len(ids), self.resolved.maps, self.config.queries.rank, itemsize, memory)
            for entry in self.config.score:
                variant, index = self.config.answering(entry), self.config.stage_index(entry.stage)
                factors = {
                    stage: None if stages.is_identity(variant, stage) else factors_folder(self.config, stage)
                    for stage in stages.carried_through(variant, index)
                }
                task = CarryTask(variant, index, factors, ids, folders[entry.label], tuple(cut))
                self._carry_entry(task, gradients)
                self.reporter.say(f"queries: carried back to {entry.label}")
        for folder in folders.values():
            drop_solves(folder)  # of a driver that died when it had written the manifest
        strengths, solvers = (
            {name: about(folder) for name, folder in folders.items()} for about in (carried_strengths, carried_solvers)
        )
        keep_carried(self.config.run_dir, strengths, solvers)

    def _carry_entry(self, task: CarryTask, gradients: Coverage) -> None:
        """Carries the queries back to one entry's scored stage, through its solved stages one by one."""
        if is_carried(task.folder):
            return
        source: Source = Gradients(gradients, len(self.config.stages))
        solved = [self._solved_stage(index) for index in stages.solved_stages(task.run, task.scored)]
        solver = Solver(task, self.resolved.maps, passed_means(task), self.pool, self.reporter.step, self.reporter.say)
        source = solver.solve(solved, source)
        solvers = report_solves(solver, solved)
        about = {"solvers": solvers} if solvers else {}
        carry(task, source, gradients, self.resolved.maps, about, self.pool.idle())
        drop_solves(task.folder)

    def _solved_stage(self, index: int) -> SolvedStage:
        stage, documents = self.config.stages[index], self.config.stages[index].documents
        solver = stages.solver_of(self.config, index)
        if documents is None:
            raise UserError(f"stages.{index}.documents: {stage.name!r} needs documents for its solver, cg")
        blocks = corpus_blocks(self.resolved, f"stages.{index}", documents, solver.documents or stage.fit.documents)
        return SolvedStage(index, model_setup(self.resolved, index, documents, stage.fit.max_tokens), blocks, solver)

    def _query_gradients(self) -> Coverage:
        resolved = self.resolved
        itemsize = accumulating_bytes(self.config.cluster.dtype)
        blocks = ListedBlocks(query_blocks(resolved.queries, resolved.query_tokens, resolved.maps, itemsize))
        setup = query_setup(resolved)
        with self.reporter.step("queries: gradients", len(resolved.queries)) as progress:
            return query_gradients(setup, blocks, layout.query_partials(self.config.run_dir), self.pool, progress)
