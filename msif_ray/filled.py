"""What a run leaves open, said: absolute paths, and every `max_tokens` by its model's context."""

import os

from msif_ray.checkpoint import Checkpoint
from msif_ray.config import Documents, Index, Run, Score
from msif_ray.errors import UserError
from msif_ray.indexes import index_location

# Windows are this long unless the run says otherwise, or the model's context is shorter.
DEFAULT_MAX_TOKENS = 512


def fill_in(run: Run, checkpoints: list[Checkpoint]) -> Run:
    """The run with absolute paths and with every `max_tokens` said.

    Raises UserError, naming the key, for a `max_tokens` that is more than the model's context.
    """
    filled = []
    for index, (stage, checkpoint) in enumerate(zip(run.stages, checkpoints, strict=True)):
        key = f"stages.{index}.fit.max_tokens"
        fit = stage.fit.model_copy(
            update={"max_tokens": _max_tokens(stage.fit.max_tokens, checkpoint, key, stage.documents)}
        )
        paths = {"tokenizer": _absolute(stage.tokenizer), "factors": _absolute(stage.factors)}
        filled.append(stage.model_copy(update={"fit": fit, **paths}))

    def max_tokens(entry: Index | Score, key: str) -> int:
        at, documents = run.stage_index(entry.stage), run.scored_documents(entry)
        asked = entry.max_tokens or run.stages[at].fit.max_tokens
        return _max_tokens(asked, checkpoints[at], f"{key}.max_tokens", documents)

    indexes = [e.model_copy(update={"max_tokens": max_tokens(e, f"index.{i}")}) for i, e in enumerate(run.index)]
    scores = [
        e.model_copy(update={"max_tokens": max_tokens(e, f"score.{i}"), "index": index_location(e.index)})
        for i, e in enumerate(run.score)
    ]
    return run.model_copy(update={"stages": filled, "index": indexes, "score": scores})


def _absolute(name: str | None) -> str | None:
    """A path that is there, made absolute for processes with another working directory; names stay."""
    return os.path.abspath(name) if name is not None and os.path.exists(name) else name


def _max_tokens(asked: int | None, checkpoint: Checkpoint, key: str, documents: Documents | None) -> int:
    if asked is None and documents is not None and documents.packed is not None and checkpoint.context is not None:
        return checkpoint.context  # what training saw of a row
    if asked is None:
        return min(DEFAULT_MAX_TOKENS, checkpoint.context or DEFAULT_MAX_TOKENS)
    if checkpoint.context is not None and asked > checkpoint.context:
        raise UserError(f"{key}: {asked} is more than the {checkpoint.context} tokens of {checkpoint.name!r}'s context")
    return asked
