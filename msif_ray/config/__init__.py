"""The run description (DESIGN.md §4): types, defaults and the validation that needs no files."""

from msif_ray.config.base import Positive, Strength, Strict
from msif_ray.config.cluster import Cluster, Replicas
from msif_ray.config.entries import Candidates, Detail, Index, Queries, Score
from msif_ray.config.objective import Classification, Preference
from msif_ray.config.packed import Packed
from msif_ray.config.run import Run, load_run, parse_run
from msif_ray.config.stage import (
    CgSolver,
    Documents,
    EkfacSolver,
    Fit,
    IdentityResponse,
    ProximalResponse,
    Response,
    Stage,
    UnrolledResponse,
)

__all__ = [
    "Candidates",
    "CgSolver",
    "Classification",
    "Cluster",
    "Detail",
    "Documents",
    "EkfacSolver",
    "Fit",
    "IdentityResponse",
    "Index",
    "Packed",
    "Positive",
    "Preference",
    "ProximalResponse",
    "Queries",
    "Replicas",
    "Response",
    "Run",
    "Score",
    "Stage",
    "Strength",
    "Strict",
    "UnrolledResponse",
    "load_run",
    "parse_run",
]
