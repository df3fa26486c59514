"""Files of factors in each other's places: their checksums fit, and so do their shapes."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from msif_ray import layout
from msif_ray.cluster.factors import BASIS, load_factor, mean_eigenvalues, save_basis, save_eigenvalues
from msif_ray.errors import UserError
from msif_ray.store import save_tensors, write_json


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Two stages of two maps each, of one shape."""
    generator = torch.Generator().manual_seed(1)
    for stage in ("pretrain", "tune"):
        folder = layout.factors(str(tmp_path), stage)
        for name in ("a", "b"):
            sides = [torch.rand(3, 3, generator=generator) for _ in BASIS]
            save_basis(folder, name, dict(zip(BASIS, sides, strict=True)))
            save_eigenvalues(folder, name, torch.rand(3, 3, generator=generator))
        maps = {name: {"shape": [3, 3], "mean_eigenvalue": 0.5} for name in ("a", "b")}
        write_json(layout.factors_manifest(folder), {"stage": stage, "maps": maps})
    return tmp_path


FILES: list[Callable[[Path, str], Path]] = [layout.basis_file, layout.eigenvalues_file]
PLACES = {
    "another map's": ("pretrain", "b", "its map is b, not a"),
    "another stage's": ("tune", "a", "its stage is tune, not pretrain"),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("file", FILES)
def test_a_file_of_another_map_or_stage_is_named(run: Path, file: Callable[[Path, str], Path], place: str) -> None:
    folder = layout.factors(str(run), "pretrain")
    load_factor(folder, "a")
    stage, name, said = PLACES[place]
    shutil.copy(file(layout.factors(str(run), stage), name), file(folder, "a"))
    message = f"{file(folder, 'a')} is in the wrong place: {said}; delete it, and run the same command again"
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        load_factor(folder, "a")


@pytest.mark.parametrize("file", FILES)
def test_a_file_of_the_same_map_of_another_run_is_named(run: Path, file: Callable[[Path, str], Path]) -> None:
    folder, other = (layout.factors(str(run / where), "pretrain") for where in (".", "other"))
    save_basis(other, "a", {side: torch.eye(3) for side in BASIS})
    save_eigenvalues(other, "a", torch.ones(3, 3))
    shutil.copy(file(other, "a"), file(folder, "a"))
    eigenvalues = re.escape(str(layout.eigenvalues_file(folder, "a")))
    with pytest.raises(UserError, match=rf"^{eigenvalues} is in the wrong place: its basis is \w+, not \w+; delete it"):
        load_factor(folder, "a")


def test_a_file_of_another_kind_is_named(run: Path) -> None:
    folder = layout.factors(str(run), "pretrain")
    basis, eigenvalues = layout.factor_files(folder, ["a"])
    shutil.copy(basis, eigenvalues)
    with pytest.raises(UserError, match=f"^{eigenvalues} is in the wrong place: it has no tensor eigenvalues; delete"):
        load_factor(folder, "a")


def test_a_manifest_of_another_stage_is_named(run: Path) -> None:
    folders = [layout.factors(str(run), stage) for stage in ("pretrain", "tune")]
    assert mean_eigenvalues(folders[0]) == {"a": 0.5, "b": 0.5}
    own, other = map(layout.factors_manifest, folders)
    shutil.copy(other, own)
    with pytest.raises(UserError, match=f"^{own}: in the wrong place: its stage is tune, not pretrain; delete it"):
        mean_eigenvalues(folders[0])


def test_files_of_an_earlier_version_are_read(run: Path) -> None:
    """They say of which map they are, and no more."""
    folder = layout.factors(str(run), "pretrain")
    factor = load_factor(folder, "a")
    save_tensors(layout.basis_file(folder, "a"), {side: torch.eye(3) for side in BASIS}, {"map": "a"})
    save_tensors(layout.eigenvalues_file(folder, "a"), {"eigenvalues": factor.eigenvalues}, {"map": "a"})
    assert torch.equal(load_factor(folder, "a").basis.activations, torch.eye(3))
