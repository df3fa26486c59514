"""What a rank needs to know of a stage, from the run: the same for a run and for its plan."""

from msif_ray.cluster.rank import ModelSetup
from msif_ray.config import Documents
from msif_ray.preflight import Resolved


def model_setup(resolved: Resolved, index: int, documents: Documents, max_tokens: int | None) -> ModelSetup:
    """How stage `index`'s model reads these documents, in windows of `max_tokens` (None: one window each)."""
    run = resolved.run
    stage, cluster, model = run.stages[index], run.cluster, resolved.stages[index]
    return ModelSetup(
        stage=stage.name,
        model=model.source,
        tokenizer=model.tokenizer_source,
        modules=None if run.modules is None else tuple(run.modules),
        dtype=cluster.dtype,
        max_tokens=max_tokens,
        append_eos=documents.ends_with_eos,
        tokens_per_batch=cluster.tokens_per_batch,
        seed=run.seed,
        threads=cluster.cpus_per_rank,
        cuda=bool(cluster.gpus_per_rank),
        offload=cluster.offload,
    )
