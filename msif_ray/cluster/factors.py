"""A map's factors on storage: its eigenbases, and its corrected eigenvalues, which say of which bases they are.

A folder of factors is named after its stage, and each file says of which stage and map it is.
"""

import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel

from msif_ray import layout
from msif_ray.errors import UserError
from msif_ray.influence.ekfac import Basis, Factor
from msif_ray.shapes import Pair
from msif_ray.store import checksums, load_tensors, read_json, save_tensors

BASIS = ("activation_basis", "gradient_basis")


class _Map(BaseModel):
    shape: Pair[int]
    mean_eigenvalue: float


class _Manifest(BaseModel):
    maps: dict[str, _Map]


def said(stage: str, map_name: str) -> dict[str, str]:
    """What a file of a map's factors says of itself."""
    return {"stage": stage, "map": map_name}


def save_basis(folder: Path, map_name: str, tensors: Mapping[str, torch.Tensor]) -> None:
    save_tensors(layout.basis_file(folder, map_name), tensors, said(folder.name, map_name))


def save_eigenvalues(folder: Path, map_name: str, eigenvalues: torch.Tensor) -> None:
    """Writes a map's corrected eigenvalues, in the bases that are there."""
    about = said(folder.name, map_name) | {"basis": bases_checksum(folder, [map_name])}
    save_tensors(layout.eigenvalues_file(folder, map_name), {"eigenvalues": eigenvalues}, about)


def load_basis(folder: Path, map_name: str, device: torch.device) -> Basis:
    """Raises UserError for a file that is damaged, or of another stage or map."""
    tensors = load_tensors(layout.basis_file(folder, map_name), about=said(folder.name, map_name), wanted=BASIS)
    return Basis(*(tensors[side].to(device) for side in BASIS))


def load_factor(folder: Path, map_name: str) -> Factor:
    """One map's factor as it is on storage, undamped. Raises UserError as `load_basis`, and for eigenvalues in other
    bases."""
    basis = load_basis(folder, map_name, torch.device("cpu"))
    about = said(folder.name, map_name) | {"basis": bases_checksum(folder, [map_name])}
    found = load_tensors(layout.eigenvalues_file(folder, map_name), about=about, wanted=["eigenvalues"])
    return Factor(basis, found["eigenvalues"])


def bases_checksum(folder: Path, maps: Sequence[str]) -> str:
    """One checksum of the bases of these maps, as they are on storage."""
    return checksum_of({name: checksums(layout.basis_file(folder, name)) for name in maps})


def checksum_of(sums: Mapping[str, Mapping[str, int]]) -> str:
    """`bases_checksum` from the checksums of each map's tensors."""
    return f"{zlib.crc32(json.dumps(sums, sort_keys=True).encode()):08x}"


def check_bases(folder: Path, maps: Sequence[str], expected: str) -> None:
    """Raises UserError where the bases are no longer those that a step began with."""
    if bases_checksum(folder, maps) != expected:
        raise UserError(
            f"{layout.basis_file(folder, maps[0]).parent}: the bases were replaced while they were in use; see that "
            "no other run writes there, and run the same command again"
        )


def read_factors(folder: Path) -> dict[str, Any]:
    """The manifest of a stage's finished factors. Raises UserError for one that is damaged, or of another stage."""
    found: dict[str, Any] = read_json(layout.factors_manifest(folder), shape=_Manifest, about={"stage": folder.name})
    return found


def mean_eigenvalues(folder: Path) -> dict[str, float]:
    """The mean corrected eigenvalue of each map of a fitted stage."""
    return {name: about["mean_eigenvalue"] for name, about in read_factors(folder)["maps"].items()}
