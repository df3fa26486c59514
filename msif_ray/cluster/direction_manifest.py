"""The manifest of a folder of directions: its shards, the form that each has at each map, and what was used."""

from pathlib import Path
from typing import Any

from pydantic import BaseModel

from msif_ray import layout
from msif_ray.errors import DamagedError
from msif_ray.shapes import Pair
from msif_ray.store import AGAIN, read_json


class _Map(BaseModel):
    shape: Pair[int]
    vectors: list[int | None]


class _Manifest(BaseModel):
    shards: list[Pair[int]]
    itemsize: int
    maps: dict[str, _Map]
    log_likelihood: dict[str, float] = {}
    strengths: dict[str, dict[str, float]] = {}
    solvers: dict[str, dict[str, Any]] = {}


def read_directions(folder: Path) -> dict[str, Any]:
    """The manifest of a folder of directions. Raises UserError for one that is damaged, or of other scores."""
    path = layout.directions_manifest(folder)
    found: dict[str, Any] = read_json(path, AGAIN, _Manifest, {"scores": folder.name})
    if any(len(of_map["vectors"]) != len(found["shards"]) for of_map in found["maps"].values()):
        raise DamagedError(f"{path}: not as this version writes it: see maps and shards; {AGAIN}")
    return found
