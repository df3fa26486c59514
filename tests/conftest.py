"""Settings that all tests share: one thread each, no network, quiet libraries; a Ray cluster, the machine for itself or
object storage for those that ask; and which tests may run beside which."""

import gc
import os
import re
import sys
import uuid
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

os.environ |= {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "RAY_DEDUP_LOGS": "0",
    # Ray ends processes that have been idle for a second; each new one imports torch for some, and runs follow runs.
    "RAY_idle_worker_killing_time_threshold_ms": "300000",
    # Or Ray's processes, which the longest tests wait for, would leave the cores to the tests in the other process.
    "RAY_worker_niceness": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    # In place of ten seconds, which a test would wait for what its metrics are told.
    "RAY_metrics_report_interval_ms": "2000",
}
sys.path.insert(0, str(Path(__file__).parent))

# What its modules ask for, by group: never are tests of two modules of a group run at once.
MACHINE = "the machine"
GROUPS = {
    MACHINE: re.compile(r"\b(ray_cluster|no_shared_cluster|own_cluster|chaos)\b"),
    "the S3 server": re.compile(r"\b(s3_port|bucket: str)\b"),
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kill-seeds", type=int, default=2, help="seeds of the test that kills at random (default: 2)")


def pytest_collection_finish() -> None:
    """What all the imports made stays, and is not gone through for garbage again and again: that takes 0.3 s a time."""
    gc.collect()
    gc.freeze()


@cache
def shares_a_cluster(module: Path) -> bool:
    return "ray_cluster" in module.read_text(encoding="utf-8")


@cache
def group_of(module: Path) -> str:
    """The tests of a group run one after another in one process of `-n 2`; most modules are one of their own."""
    content = module.read_text(encoding="utf-8")
    return next((group for group, asks in GROUPS.items() if asks.search(content)), str(module))


# xdist's own `--dist loadgroup` does not group with pytest 9.2 (pytest-dev/pytest-xdist, issue 1386).
@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(config.rootpath / nodeid.partition("::")[0])

    return Scheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What needs the machine comes first, since it takes longest; and of that, modules that share a cluster."""
    items.sort(key=lambda item: (group_of(item.path) != MACHINE, not shares_a_cluster(item.path)))


@pytest.fixture(scope="module", autouse=True)
def no_cluster_beside_another(request: pytest.FixtureRequest) -> Iterator[None]:
    """A module that did not ask for the machine starts no cluster: there may be one in the other process."""
    import ray

    with pytest.MonkeyPatch.context() as patch:
        if group_of(request.path) != MACHINE:
            patch.setattr(ray, "init", refuse)
        yield


def refuse(*_: object, **__: object) -> None:
    raise RuntimeError("who starts a Ray cluster asks for `ray_cluster`, or `no_shared_cluster` to have its own")


@pytest.fixture(scope="session")
def end_of_session() -> Iterator[None]:
    """Ends the shared cluster."""
    import ray

    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def ray_cluster(end_of_session: None, request: pytest.FixtureRequest) -> Iterator[None]:
    """The Ray cluster that modules share, started for the first of them. After a failure the next has a new one."""
    import ray
    from cluster import runs

    failed = request.session.testsfailed
    if not ray.is_initialized():
        runs.start_cluster()
    yield
    if request.session.testsfailed > failed:
        ray.shutdown()


@pytest.fixture(scope="module")
def no_shared_cluster() -> None:
    """For tests with clusters or ranks of their own, and for those that measure memory."""
    import ray

    ray.shutdown()


@pytest.fixture(scope="session")
def s3_port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of an S3 server on loopback."""
    import object_storage

    with object_storage.serving_s3(tmp_path_factory.mktemp("s3") / "server.log") as port:
        yield port


@pytest.fixture
def bucket(s3_port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A new bucket's name, with the environment of a client of its server and a cache of the test's own."""
    import boto3
    import object_storage
    import s3fs

    for name, value in object_storage.environment(s3_port).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MSIF_CACHE", str(tmp_path / "cache"))
    s3fs.S3FileSystem.clear_instance_cache()
    name = f"test-{uuid.uuid4().hex}"
    boto3.session.Session().client("s3").create_bucket(Bucket=name)
    yield name
    s3fs.S3FileSystem.clear_instance_cache()
