"""Factors of other runs: whole, and fitted to the same model, maps and objective, in the same type."""

from pathlib import Path
from typing import Any

from pydantic import BaseModel

from msif_ray import layout, stages
from msif_ray.checkpoint import Checkpoint
from msif_ray.config import Run
from msif_ray.errors import UserError
from msif_ray.manifests import Warn, check_files, check_type
from msif_ray.objectives import objective_identity, same_objective
from msif_ray.paths import exists, missing
from msif_ray.shapes import Pair
from msif_ray.store import json_hash, read_json


class _Map(BaseModel):
    shape: Pair[int]


class _Manifest(BaseModel):
    model_sha256: str
    maps: dict[str, _Map]
    files: dict[str, Any] | None = None
    dtype: str = ""
    objective: dict[str, Any] | None = None


def check_reused_factors(
    run: Run, checkpoints: list[Checkpoint], references: dict[int, Checkpoint], warn: Warn
) -> dict[str, str]:
    """Checks the factors of other runs that are needed; the hash of each stage's manifest. `warn` is told what of an
    earlier version's could not be compared."""
    reused = {}
    for index in stages.stages_with_factors(run):
        stage = run.stages[index]
        if stage.factors is not None:
            folder, mend = layout.factors(stage.factors, stage.name), f"finish or repeat the run in {stage.factors}"
            try:
                objective = objective_identity(run, index, references)
                reused[stage.name] = _check_factors(
                    folder, checkpoints[index], run.cluster.dtype, objective, mend, warn
                )
            except UserError as error:
                raise UserError(f"stages.{index}.factors: {error}") from None
    return reused


def _check_factors(
    folder: Path, checkpoint: Checkpoint, dtype: str, objective: dict[str, Any] | None, mend: str, warn: Warn
) -> str:
    """Factors are whole, of this type, and fitted to this model over these maps; the hash of their manifest.

    Which documents, and which tokens of them, they were fitted to is the user's choice.
    """
    path = layout.factors_manifest(folder)
    if not exists(path):
        raise UserError(f"{folder} holds no finished factors; {mend}")
    manifest = read_json(path, mend, _Manifest, {"stage": folder.name})
    maps = {name: tuple(about["shape"]) for name, about in manifest["maps"].items()}
    if manifest["model_sha256"] != checkpoint.model_hash:
        raise UserError(f"{folder} was fitted to another model than {checkpoint.model_path}")
    check_files(manifest, checkpoint, f"{folder} was fitted", warn, tokenizer=False)
    if maps != checkpoint.maps:
        raise UserError(f"{folder} was fitted over other maps; use the same `modules` and `blocks`")
    check_type(manifest.get("dtype", dtype), dtype, f"{folder} was fitted")
    if not same_objective(manifest.get("objective"), objective):
        raise UserError(f"{folder} was fitted with another objective; use the same `objective` and reference model")
    gone = missing(layout.factor_files(folder, maps))
    if gone:
        raise UserError(f"{gone[0]} is not there ({len(gone)} files in all that {path.name} names are missing); {mend}")
    return json_hash(manifest)
