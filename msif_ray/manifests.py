"""What manifests of factors and of indexes say of the model they were made with, and whether it is a stage's."""

from collections.abc import Callable, Mapping
from typing import Any

from msif_ray.checkpoint import Checkpoint
from msif_ray.errors import UserError
from msif_ray.influence.groups import accumulating_bytes

CONFIG = "config.json"

Warn = Callable[[str], None]
"""Told what could not be compared, one line each."""


def made_with(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a manifest says of a stage's model: the hash of its weights, and of each smaller file."""
    return {"model_sha256": checkpoint.model_hash, "files": checkpoint.files}


def check_files(manifest: Mapping[str, Any], checkpoint: Checkpoint, made: str, warn: Warn, tokenizer: bool) -> None:
    """Whether what the manifest is of was made with the checkpoint's config.json and, if so asked, its tokenizer.

    `made` begins the message ("… was built"). Of an earlier version's manifest, which has no hashes of these files, it
    is said that they are not compared. Raises UserError, naming the first file that differs.
    """
    wanted, kept = checkpoint.files, manifest.get("files")
    if not tokenizer:
        wanted = {CONFIG: wanted[CONFIG]}
    if kept is None:
        these = ", ".join(wanted)
        warn(f"{made} by an earlier version, which kept no hash of these files; see that they are the same: {these}")
        return
    names = dict.fromkeys([*wanted, *kept]) if tokenizer else wanted
    other = next((name for name in names if kept.get(name) != wanted.get(name)), None)
    if other is not None:
        raise UserError(f"{made} with another {other} than {checkpoint.name!r} has; use the same {other}")


def check_type(made_in: str, dtype: str, made: str) -> None:
    """Whether sums in a run's `dtype` are of the type of those of a model in `made_in`; bfloat16 has float32's.

    `made` begins the message. Raises UserError where they are not.
    """
    if accumulating_bytes(made_in) != accumulating_bytes(dtype):
        raise UserError(f"{made} in {made_in}, and cluster.dtype is {dtype}; use the same `dtype`")
