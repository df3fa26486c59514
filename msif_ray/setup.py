"""What steps need to know of a stage and of a corpus, from the run."""

from dataclasses import replace
from pathlib import Path

from msif_ray import layout, stages
from msif_ray.cluster.rank import ModelSetup
from msif_ray.config import Documents, Run
from msif_ray.corpus.blocks import CorpusBlocks
from msif_ray.corpus.preferences import Pairs
from msif_ray.preflight import Resolved
from msif_ray.references import ReferencePass, references_folder


def model_setup(resolved: Resolved, index: int, documents: Documents, max_tokens: int | None) -> ModelSetup:
    """How stage `index`'s model reads these documents, in windows of `max_tokens` (None: one window each)."""
    run = resolved.run
    stage, cluster, model = run.stages[index], run.cluster, resolved.stages[index]
    return ModelSetup(
        stage=stage.name,
        model=model.source,
        tokenizer=model.tokenizer_source,
        modules=None if run.modules is None else tuple(run.modules),
        blocks=run.blocks,
        dtype=cluster.dtype,
        max_tokens=max_tokens,
        append_eos=documents.ends_with_eos,
        tokens_per_batch=cluster.tokens_per_batch,
        seed=run.seed,
        threads=cluster.cpus_per_rank,
        cuda=bool(cluster.gpus_per_rank),
        offload=cluster.offload,
        objective=stages.objective_of(run, index, documents, model.classes),
    )


def query_setup(resolved: Resolved) -> ModelSetup:
    """How the last stage's model reads the queries: as one window each."""
    run = resolved.run
    return model_setup(resolved, len(run.stages) - 1, run.queries.documents, stages.query_tokens(run))


def reference_setup(resolved: Resolved, each: ReferencePass) -> ModelSetup:
    """How a stage's reference model reads its pairs: the stage's own tokens, each sequence by itself."""
    setup = model_setup(resolved, each.stage, each.documents, each.max_tokens)
    if not isinstance(setup.objective, Pairs):
        raise ValueError(f"{setup.stage} has no preferences")
    apart = replace(setup.objective, apart=True)
    return replace(setup, model=resolved.references[each.stage].source, objective=apart)


def factors_folder(run: Run, index: int) -> Path:
    """Where a stage's factors are: in the run's directory, or in the run that they are reused from."""
    stage = run.stages[index]
    return layout.factors(stage.factors or run.run_dir, stage.name)


def corpus_blocks(resolved: Resolved, corpus: str, documents: Documents, limit: int | None = None) -> CorpusBlocks:
    """The blocks of a checked corpus (`stages.<i>`, `index.<i>` or `score.<i>`), or of its first `limit` documents."""
    return CorpusBlocks(
        tuple(resolved.corpora[corpus]),
        resolved.rows[corpus],
        documents,
        resolved.run.cluster.documents_per_block,
        f"{corpus}.documents",
        limit,
        references_folder(resolved.run, resolved.corpora, corpus),
    )
