"""A container's memory limit counts, whatever its host has; and of a GPU what PyTorch keeps does not."""

from pathlib import Path

import pytest
import torch

from msif_ray.cluster import node_memory
from msif_ray.cluster.memory import free_memory

GIB = 2**30


@pytest.fixture(autouse=True)
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "meminfo").write_text(f"MemTotal: {GIB // 4} kB\nMemAvailable: {100 * GIB // 1024} kB\n")
    monkeypatch.setattr(node_memory, "MEMORY", tmp_path / "meminfo")
    monkeypatch.setattr(node_memory, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(node_memory, "OWN", tmp_path / "own")


def group(tmp_path: Path, name: str, files: dict[str, str]) -> None:
    folder = tmp_path / "cgroup" / name
    folder.mkdir(parents=True, exist_ok=True)
    for file, content in files.items():
        (folder / file).write_text(content)


def v2(limit: str, used: int, cache: int) -> dict[str, str]:
    return {"memory.max": limit, "memory.current": str(used), "memory.stat": f"anon 1\ninactive_file {cache}\n"}


def test_without_a_limit_it_is_the_host_s(tmp_path: Path) -> None:
    assert node_memory.available_memory() == 100 * GIB
    (tmp_path / "own").write_text("0::/\n")
    assert node_memory.available_memory() == 100 * GIB
    group(tmp_path, "pod", v2("max", GIB, 0))
    (tmp_path / "own").write_text("0::/pod\n")
    assert node_memory.available_memory() == 100 * GIB


def test_a_container_s_own_view_is_its_root(tmp_path: Path) -> None:
    group(tmp_path, "", v2(str(8 * GIB), 3 * GIB, GIB))
    (tmp_path / "own").write_text("0::/\n")
    assert node_memory.available_memory() == 6 * GIB


def test_the_limit_of_a_group_above_counts(tmp_path: Path) -> None:
    group(tmp_path, "pod", v2(str(8 * GIB), 6 * GIB, 0))
    group(tmp_path, "pod/container", v2("max", 2 * GIB, 0))
    (tmp_path / "own").write_text("0::/pod/container\n")
    assert node_memory.available_memory() == 2 * GIB


def test_a_full_container_has_nothing_left(tmp_path: Path) -> None:
    group(tmp_path, "", v2(str(GIB), 2 * GIB, 0))
    (tmp_path / "own").write_text("0::/\n")
    assert node_memory.available_memory() == 0


def test_the_first_version_s_limit_counts_even_if_only_its_root_is_seen(tmp_path: Path) -> None:
    files = {
        "memory.limit_in_bytes": str(4 * GIB),
        "memory.usage_in_bytes": str(3 * GIB),
        "memory.stat": f"cache 1\ninactive_file 5\ntotal_inactive_file {GIB}\n",
    }
    group(tmp_path, "memory", files)
    (tmp_path / "own").write_text("5:cpu,cpuacct:/a\n4:memory:/docker/abc\n0::/\n")
    assert node_memory.available_memory() == 2 * GIB


def test_what_pytorch_keeps_of_a_gpu_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """An earlier stage's passes and model, in a process that has begun the next."""
    kept = [60 * GIB]
    monkeypatch.setattr(torch.cuda, "empty_cache", kept.clear)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (70 * GIB - sum(kept), 80 * GIB))
    assert free_memory(torch.device("cuda"), 1) == 70 * GIB
