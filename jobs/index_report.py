"""What an index costs and how well it agrees: `python jobs/index_report.py runs/demo/run.yaml`.

For a finished run, scores some of its documents exactly and from indexes of several ranks and types, all in this
process, and prints for each the rank correlation with the exact scores, bytes, and times over those of the exact
scores. `--join` makes long documents of several short ones. Times are CPU time, so other processes do not count.
"""

import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, get_args

import numpy as np
import torch
import typer

from msif_ray import layout, stages
from msif_ray.cluster.factors import mean_eigenvalues
from msif_ray.cluster.index import IndexJob, IndexTask
from msif_ray.cluster.index_metric import write_metric
from msif_ray.cluster.indexed import IndexBlock, indexed_scorers
from msif_ray.cluster.jobs import Job
from msif_ray.cluster.outcomes import Outcome
from msif_ray.cluster.rank import Rank
from msif_ray.cluster.score_jobs import ScoreJob
from msif_ray.config import Index, load_run
from msif_ray.corpus.blocks import CorpusBlocks
from msif_ray.corpus.reader import Block, Document
from msif_ray.demo.metrics import overlap, spearman
from msif_ray.errors import UserError
from msif_ray.paths import exists
from msif_ray.preflight import check
from msif_ray.setup import corpus_blocks, factors_folder, model_setup

TOP = 10
VARIANTS = "1:int8 2:int8 4:int8 8:int8 16:int8 1:float16 2:float16 4:float16 8:float16 16:float16 8:bfloat16 8:float32"


@dataclass
class Clock:
    """Seconds of this process's time."""

    seconds: float = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        began = time.process_time()
        yield
        self.seconds += time.process_time() - began


@dataclass(frozen=True)
class Case:
    """A loaded rank, its blocks, and where its run's factors and directions are."""

    rank: Rank
    blocks: list[Block]
    factors: Path
    directions: Path
    damping: dict[str, float]

    def each(self, job: Job, clock: Clock) -> Iterator[tuple[Block, Outcome, Any]]:
        """What the job gives for every block."""
        self.rank.start(job)
        for block in self.blocks:
            with clock.running():
                passed = self.rank.process(block.documents)
                taken = self.rank.take()
            if passed.not_finite or passed.refused:
                lost = {*passed.not_finite, *(key.document_id for key in passed.refused)}
                raise UserError(f"--documents: {min(lost)} has a loss that is not finite; take the documents before it")
            yield block, passed.outcome(), taken


def load_case(description: str, count: int, join: int) -> Case:
    """The first score entry of the run and its first `count` documents, of `join` documents of the corpus each.

    Raises UserError where the run is not finished, and for documents that cannot be joined.
    """
    resolved = check(load_run(description))
    run, entry = resolved.run, resolved.run.score[0]
    index, documents = run.stage_index(entry.stage), run.scored_documents(entry)
    directions, factors = layout.directions(run.run_dir, entry.label), factors_folder(run, index)
    if not exists(layout.directions_manifest(directions)):
        raise UserError(f"{description}: {run.run_dir} has no queries carried back to {entry.label}; finish the run")
    if join > 1 and (documents.text is None or documents.label is not None):
        raise UserError("--join: only a corpus of plain texts can be joined; leave it out")
    corpus = corpus_blocks(resolved, "score.0", documents)
    corpus = replace(corpus, limit=count * join, size=corpus.size * join)
    blocks = [joined(block, join) for block in corpus.left(frozenset())]
    strength = run.stages[index].damping
    damping = {
        name: stages.metric_damping(strength, mean, "damping", name) for name, mean in mean_eigenvalues(factors).items()
    }
    rank = Rank(model_setup(resolved, index, documents, entry.max_tokens))
    return Case(rank, blocks, factors, directions, damping)


def joined(block: Block, join: int) -> Block:
    """Each `join` documents in a row as one, of the first one's id; documents as they were read where that is one."""
    if join == 1:
        return block
    groups = (block.documents[start : start + join] for start in range(0, len(block.documents), join))
    return Block(block.id, tuple(join_documents(group) for group in groups))


def join_documents(documents: Sequence[Document]) -> Document:
    texts = [each.text for each in documents if isinstance(each.text, str)]
    return replace(documents[0], text="\n".join(texts) if texts else None)


def exact_scores(case: Case, clock: Clock) -> tuple[np.ndarray, int]:
    """The scores `[documents, queries]` and the number of tokens. Raises UserError for fewer than two documents, which
    no rank correlation is over."""
    found: dict[str, torch.Tensor] = {}
    tokens = 0
    for _, outcome, windows in case.each(ScoreJob((case.directions,)), clock):
        tokens += sum(outcome.tokens.values())
        for window in windows:
            found[window.document_id] = found.get(window.document_id, torch.tensor(0.0)) + window.scores
    if len(found) < 2:
        raise UserError(f"--documents: {len(found)} of them has a score, and a rank correlation takes two; take more")
    return torch.stack(list(found[name] for name in sorted(found))).numpy(), tokens


def build(case: Case, folder: Path, rank: int, dtype: str, clock: Clock) -> int:
    """Builds an index of all maps in one pass; gives its bytes."""
    maps = tuple(case.rank.maps)
    job = IndexJob(folder, rank, getattr(torch, dtype), maps)
    with clock.running():
        for name in maps:
            write_metric(name, folder, case.factors, case.damping)
    group = layout.index_group(folder, 0)
    names = tuple(sorted({block.id for block in case.blocks}))
    task = IndexTask(case.rank.setup, job, CorpusBlocks((), (), None, 1, ""), group)  # type: ignore[arg-type]
    for block, outcome, taken in case.each(job, clock):
        with clock.running():
            task.write(block, outcome, taken)
    return sum(layout.index_block(group, name).stat().st_size for name in names)


def indexed_scores(case: Case, folder: Path, opening: Clock, asking: Clock) -> np.ndarray:
    """The scores `[documents, queries]` from an index; `opening`: the directions are loaded and rotated, once."""
    maps = list(case.rank.maps)
    dtype = torch.promote_types(getattr(torch, case.rank.setup.dtype), torch.float32)  # as directions are
    found: dict[str, torch.Tensor] = {}
    with opening.running():
        scorers = indexed_scorers((case.directions,), maps, torch.device("cpu"), None, folder)
    for block in case.blocks:
        with asking.running():
            index = IndexBlock(folder, [maps], block.id, dtype)
            found |= {window.document_id: window.scores for window in index.score(scorers)}
    return torch.stack(list(found[name] for name in sorted(found))).numpy()


def parse_variants(text: str) -> list[tuple[int, str]]:
    """Ranks and types. Raises UserError for what is not `rank:type`, of the types that an index may have."""
    types = get_args(Index.model_fields["dtype"].annotation)
    found = []
    for each in text.split():
        number, _, dtype = each.partition(":")
        if not number.isdecimal() or int(number) < 1 or dtype not in types:
            raise UserError(f"--variants: {each!r} is not a rank and a type, such as 8:int8; types: {', '.join(types)}")
        found.append((int(number), dtype))
    return found


def report(case: Case, variants: Sequence[tuple[int, str]]) -> None:
    scoring = Clock()
    exact, tokens = exact_scores(case, scoring)
    print(f"{exact.shape[0]} documents, {tokens} tokens, {exact.shape[1]} queries, exact {scoring.seconds:.1f} s CPU\n")
    columns = (
        "rank",
        "type",
        "Spearman mean",
        "min",
        f"top {TOP}",
        "MB/M tokens",
        "build/exact",
        "query/exact",
        "opening, s",
    )
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for number, dtype in variants:
        building, opening, asking = Clock(), Clock(), Clock()
        with tempfile.TemporaryDirectory() as folder:
            size = build(case, Path(folder), number, dtype, building)
            found = indexed_scores(case, Path(folder), opening, asking)
        agreement = spearman(found.T, exact.T)
        cells = [
            str(number),
            dtype,
            f"{agreement.mean():.4f}",
            f"{agreement.min():.4f}",
            f"{overlap(found.T, exact.T, TOP).mean():.3f}",
            f"{size / tokens:,.0f}",
            f"{building.seconds / scoring.seconds:.2f}",
            f"{asking.seconds / scoring.seconds:.3f}",
            f"{opening.seconds:.1f}",
        ]
        print(f"| {' | '.join(cells)} |", flush=True)


def main(
    description: Annotated[str, typer.Argument(help="The description of a finished run.")],
    documents: Annotated[int, typer.Option(min=1, help="How many documents, at most.")] = 1024,
    join: Annotated[int, typer.Option(min=1, help="Texts of the corpus that make one document.")] = 1,
    variants: Annotated[str, typer.Option(help="rank:type, separated by spaces.")] = VARIANTS,
) -> None:
    """What an index of a finished run costs, and how well it agrees with exact scores."""
    chosen = parse_variants(variants)
    report(load_case(description, documents, join), chosen)


if __name__ == "__main__":
    try:
        typer.run(main)
    except UserError as error:
        sys.exit(f"index_report: {error}")
