"""What reference models make of a run's preferences: at its beginning, and of an index's top documents at its end."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from msif_ray import layout
from msif_ray.cluster.pool import ReplicaPool
from msif_ray.cluster.references import ReferenceTask
from msif_ray.cluster.stream import stream
from msif_ray.config import Run, Score
from msif_ray.corpus.blocks import CorpusBlocks
from msif_ray.preflight import Resolved
from msif_ray.progress import Reporter
from msif_ray.references import ReferencePass, reference_passes
from msif_ray.results.top import top_pairs
from msif_ray.setup import corpus_blocks, reference_setup


@dataclass(frozen=True)
class Referring:
    """The preferences of one resolved run, read by replicas of `pool`; `scored` gives the blocks that a `score`
    entry sees."""

    resolved: Resolved
    pool: ReplicaPool
    reporter: Reporter
    scored: Callable[[Score], CorpusBlocks]

    @property
    def config(self) -> Run:
        return self.resolved.run

    def run(self, kinds: tuple[str, ...]) -> None:
        """Reads the corpora of these kinds (`stages`, `index`, `score`) with their reference models, unless that is
        done."""
        for each in self._passes(late=False):
            if not any(corpus.partition(".")[0] in kinds for corpus in each.corpora):
                continue
            blocks = corpus_blocks(self.resolved, each.key, each.documents, each.limit)
            self._read(each, blocks if each.entry is None else self.scored(self.config.score[each.entry]))

    def run_late(self) -> None:
        """Of what is scored from an index, reads the blocks of the top documents."""
        for each in self._passes(late=True):
            entries = [self.config.score[int(corpus.partition(".")[2])] for corpus in each.corpora]
            found = (top_pairs(self.config.run_dir, entry.label, self.config.top) for entry in entries)
            wanted = frozenset(pair.block_id for pairs in found for pair in pairs)
            self._read(each, self.scored(entries[0]), wanted)

    def _passes(self, late: bool) -> list[ReferencePass]:
        return [each for each in reference_passes(self.config, self.resolved.corpora) if each.late == late]

    def _read(self, each: ReferencePass, blocks: CorpusBlocks, wanted: frozenset[str] | None = None) -> None:
        folder, setup = layout.references(self.config.run_dir, each.key), reference_setup(self.resolved, each)
        task = ReferenceTask(setup, replace(blocks, references=None), folder, wanted)
        with self.reporter.step(f"{setup.stage}: reference model", blocks.count) as step:
            stream(task, self.pool, step)
