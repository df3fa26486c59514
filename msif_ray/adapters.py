"""A stage whose model is an adapter: which base it belongs to, and the merged model that takes its place."""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from msif_ray.config import Stage
from msif_ray.errors import UserError
from msif_ray.fetch import merged, named

if TYPE_CHECKING:
    from msif_ray.checkpoint import Checkpoint


def find_base(stage: Stage, adapter: Path, trained_on: str, earlier: Sequence["Checkpoint"]) -> "Checkpoint":
    """The checked stage whose model the adapter is merged into: the one that `base` names, or else the stage before,
    where that is what the adapter says it was trained on.

    Raises UserError where there is none, and where the adapter names another model.
    """
    names = [checkpoint.name for checkpoint in earlier]
    if not earlier:
        raise UserError(f"{adapter} is an adapter, and no stage before it has its base; add that as a stage")
    base = earlier[names.index(stage.base) if stage.base is not None else -1]
    if stage.base is None and not _same(trained_on, base.source):
        raise UserError(
            f"the adapter {adapter} was trained on {trained_on or 'a model that it does not name'}, and the stage "
            f"before is {named(base.source)}; if these are the same weights, say `base: {base.name}`"
        )
    return base


def merge_into(base: "Checkpoint", adapter_source: str, digest: str) -> tuple[Path, str]:
    """The merged model's folder and source; `digest` stands for the adapter's files."""
    state = json.dumps([digest, base.model_hash, sorted(base.files.items())]).encode()
    return merged(hashlib.sha256(state).hexdigest()[:32], adapter_source, base.source, base.tokenizer_source)


def _same(trained_on: str, source: str) -> bool:
    name = named(source)
    return trained_on == name or (os.path.isdir(trained_on) and os.path.realpath(trained_on) == os.path.realpath(name))
