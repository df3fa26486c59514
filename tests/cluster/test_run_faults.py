"""A full disk and damaged files: a clear message, then a clean resume."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from cluster import runs

from msif_ray.config import parse_run
from msif_ray.errors import UserError
from msif_ray.progress import Reporter, Step
from msif_ray.run import run

pytestmark = pytest.mark.usefixtures("ray_cluster")


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
    """What every run of one stage says that is not disturbed, by the dense reference."""
    folder = tmp_path_factory.mktemp("undisturbed")
    one_stage(folder, "run")
    return runs.expected(folder, 0, later="identity")


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


@pytest.mark.long
@pytest.mark.timeout(600)
def test_damaged_directions_are_named(tmp_path: Path, undisturbed: dict[runs.Pair, tuple[float, float, int]]) -> None:
    description = one_stage(tmp_path, "run")
    run(parse_run(description), until="score")
    directions = Path(description["run_dir"]) / "queries" / "stage=pretrain"
    damaged = sorted(directions.glob("*/*.safetensors"))[-1]
    flip(damaged)
    part = sorted(Path(description["run_dir"]).glob("scores/*/part-*"))[0]
    for ranks in (1, 2):  # in the replica's own process, or in rank actors
        part.unlink(missing_ok=True)
        description["cluster"]["ranks_per_replica"] = ranks
        message = refusal(description)
        assert message.startswith(f"{damaged} is damaged") and "delete it" in message
    damaged.unlink()
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


@pytest.mark.long
def test_a_full_disk_is_said_and_survived(
    small_disk: Path, tmp_path: Path, undisturbed: dict[runs.Pair, tuple[float, float, int]]
) -> None:
    description = one_stage(tmp_path, "disk/run")
    with pytest.raises(UserError, match=rf"^{small_disk}/run/.*: .*No space left on device"):
        run(parse_run(description), until="score")
    assert not list((small_disk / "run").rglob("*.tmp"))
    subprocess.run(["mount", "-o", "remount,size=50m", str(small_disk)], check=True)
    finishes(description, undisturbed)


@pytest.mark.long
def test_a_disk_that_fills_up_during_scoring_is_said_and_survived(
    small_disk: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    undisturbed: dict[runs.Pair, tuple[float, float, int]],
) -> None:
    subprocess.run(["mount", "-o", "remount,size=5m", str(small_disk)], check=True)
    description, filler, add = one_stage(tmp_path, "disk/run"), small_disk / "filler", Step.add

    def fills(self: Step, documents: int, tokens: int, skipped: int = 0) -> None:
        if self.name == "pretrain: scores" and not filler.exists():
            with open(filler, "wb", buffering=0) as file, suppress(OSError):
                while file.write(bytes(4096)):
                    pass
            os.truncate(filler, filler.stat().st_size - 2 * 4096)  # room for two parts of the four
        add(self, documents, tokens, skipped)

    with monkeypatch.context() as patch:
        patch.setattr(Step, "add", fills)
        message = refusal(description)
    assert message.startswith(f"{small_disk}/run/scores/") and "No space left on device" in message
    parts = {path: path.stat().st_mtime_ns for path in (small_disk / "run").glob("scores/*/part-*")}
    filler.unlink()
    finishes(description, undisturbed)
    assert parts and {path: path.stat().st_mtime_ns for path in parts} == parts, "what was scored was scored again"
