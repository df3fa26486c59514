"""A full disk and damaged files: a clear message, then a clean resume."""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from cluster import runs

from msif_ray.config import parse_run
from msif_ray.errors import UserError
from msif_ray.progress import Reporter, Step
from msif_ray.run import run


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


class InterruptionError(Exception):
    pass


def interrupted_at(step_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver ends as soon as a block of the named step is done."""
    add = Step.add

    def ends(self: Step, documents: int, tokens: int, skipped: int = 0) -> None:
        add(self, documents, tokens, skipped)
        if self.name == step_name and tokens:
            raise InterruptionError

    monkeypatch.setattr(Step, "add", ends)


def one_stage(folder: Path, run_dir: str) -> dict[str, Any]:
    description = runs.two_stages(folder, run_dir)
    description["stages"][1]["response"] = {"kind": "identity"}
    description["score"] = [{"stage": "pretrain"}]
    return description


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[runs.Pair, tuple[float, float, int]]:
    description = one_stage(tmp_path_factory.mktemp("undisturbed"), "run")
    run(parse_run(description), until="score")
    return runs.read_scores(description["run_dir"], "pretrain")


def finishes(description: dict[str, Any], wanted: dict[runs.Pair, tuple[float, float, int]]) -> None:
    run(parse_run(description), until="score", reporter=Reporter())
    assert runs.largest_error(runs.read_scores(description["run_dir"], "pretrain"), wanted) < 1e-6


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(bytes(data))


def refusal(description: dict[str, Any]) -> str:
    with pytest.raises(UserError) as refused:
        run(parse_run(description), until="score")
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_damaged_files_are_named_and_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: dict[runs.Pair, tuple[float, float, int]]
) -> None:
    description = one_stage(tmp_path, "run")
    with monkeypatch.context() as patch, pytest.raises(InterruptionError):
        interrupted_at("pretrain: covariance", patch)
        run(parse_run(description), until="score")
    factors = Path(description["run_dir"]) / "factors" / "pretrain"

    partial = sorted(factors.glob("partials/*/*/*/*.rank0.safetensors"))[0]
    flip(partial)
    message = refusal(description)
    assert str(partial) in message and f"delete the folder {partial.parent}" in message
    shutil.rmtree(partial.parent)
    run(parse_run(description), until="fit")

    basis = sorted(factors.glob("basis/*.safetensors"))[0]
    flip(basis)
    message = refusal(description)
    assert str(basis) in message and "delete it" in message
    basis.unlink()
    finishes(description, undisturbed)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=160k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small disk takes root")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_full_disk_is_said_and_survived(
    small_disk: Path, tmp_path: Path, undisturbed: dict[runs.Pair, tuple[float, float, int]]
) -> None:
    description = one_stage(tmp_path, "disk/run")
    with pytest.raises(UserError, match=rf"^{small_disk}/run/.*: .*No space left on device"):
        run(parse_run(description), until="score")
    assert not list((small_disk / "run").rglob("*.tmp"))
    subprocess.run(["mount", "-o", "remount,size=50m", str(small_disk)], check=True)
    finishes(description, undisturbed)
