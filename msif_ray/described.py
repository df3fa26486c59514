"""A run's description as run.json keeps it: what a score depends on, and no more of it than is not as by default."""

from collections.abc import Mapping
from typing import Any

from msif_ray.config import Detail, EkfacSolver, Run

# Keys of a run, of its `detail` and of a stage that a record does not name where they are as they are by default: a run
# without is the run that it was before there were such keys.
_UNNAMED: dict[str, Any] = {"index": [], "detail": Detail().model_dump(), "blocks": None}
_UNNAMED_DETAIL = Detail().model_dump(include={"curvature_norm", "norm"})
_UNNAMED_STAGE = {"base": None, "solver": EkfacSolver().model_dump()}

# Keys of the cluster that say where a run is computed and not what.
_PLACEMENT = (
    "replicas",
    "ranks_per_replica",
    "gpus_per_rank",
    "cpus_per_rank",
    "offload",
    "factor_memory",
    "directions_memory",
    "activations_memory",
)


def description_of(run: Run) -> dict[str, Any]:
    """The run's description without what changes no score, and without later versions' keys where they are not set: a
    run without such a key is the run that it was before there was one."""
    found = run.model_dump(mode="json", exclude={"run_dir", "top"})
    for key in _PLACEMENT:
        found["cluster"].pop(key)
    _unname(found, _UNNAMED)
    _unname(found.get("detail", {}), _UNNAMED_DETAIL)
    for entry in found["score"]:
        entry.pop("out_of")
    for stage in found["stages"]:
        _unname(stage, _UNNAMED_STAGE)
    return found


def named(identity: dict[str, Any]) -> dict[str, Any]:
    """An identity that names those keys, too, to tell what they were."""
    run = _UNNAMED | identity["run"]
    stages = [_UNNAMED_STAGE | stage for stage in run.get("stages", [])]
    return identity | {"run": run | {"detail": _UNNAMED["detail"] | run["detail"], "stages": stages}}


def _unname(found: dict[str, Any], unnamed: Mapping[str, Any]) -> None:
    for key in [key for key, default in unnamed.items() if found.get(key) == default]:
        found.pop(key, None)
