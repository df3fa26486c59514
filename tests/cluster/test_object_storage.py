"""A whole run whose models, corpora, queries and run_dir are on object storage."""

import json
from collections.abc import Iterator
from pathlib import Path

import object_storage
import pytest
import ray
from cluster import runs

from msif_ray.config import parse_run
from msif_ray.errors import UserError
from msif_ray.progress import Step
from msif_ray.run import run


@pytest.fixture(scope="module")
def logs(no_shared_cluster: None, s3_port: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Of a cluster whose workers know the S3 server."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in object_storage.environment(s3_port).items():
            patch.setenv(name, value)
        patch.setenv("MSIF_CACHE", str(tmp_path_factory.mktemp("cache")))
        with runs.own_cluster():
            yield Path(ray._private.worker._global_node.get_logs_dir_path())


@pytest.mark.timeout(600)
def test_scores_equal_the_dense_reference_and_no_file_holds_the_secret(logs: Path, bucket: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    local = runs.two_stages(tmp_path / "in", "run")
    url = object_storage.put_folder(tmp_path / "in", bucket, "in")
    remote = json.loads(json.dumps(local).replace(str(tmp_path / "in"), url))
    assert remote["run_dir"] == f"{url}/run" and remote["stages"][0]["model"] == f"{url}/stage0"
    run(parse_run(remote))
    written = object_storage.objects(bucket, "in/run/")
    for key, content in written.items():
        path = tmp_path / "fetched" / key.removeprefix("in/run/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        assert object_storage.SECRET.encode() not in content, key
    for scored, stage in enumerate(("pretrain", "tune")):
        found = runs.read_scores(str(tmp_path / "fetched"), stage)
        assert runs.largest_error(found, runs.expected(tmp_path / "in", scored)) < runs.FLOAT32
    record = json.loads(written["in/run/run.json"])
    assert record["identity"]["run"]["stages"][0]["model"] == f"{url}/stage0"
    assert {"in/run/top.parquet", "in/run/skipped.parquet"} <= written.keys()
    for log in logs.rglob("*"):
        assert not log.is_file() or object_storage.SECRET.encode() not in log.read_bytes(), log


@pytest.mark.long
def test_a_storage_that_fails_workers_half_way_is_said_and_survived(
    logs: Path, bucket: str, s3_port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in").mkdir()
    local = runs.two_stages(tmp_path / "in", "run")
    local["stages"][1]["response"] = {"kind": "identity"}
    local["score"] = [{"stage": "pretrain"}]
    url, add = object_storage.put_folder(tmp_path / "in", bucket, "in"), Step.add
    remote = json.loads(json.dumps(local).replace(str(tmp_path / "in"), url))

    def refused_from_now_on(self: Step, documents: int, tokens: int, skipped: int = 0) -> None:
        add(self, documents, tokens, skipped)
        if self.name == "pretrain: covariance" and tokens:
            object_storage.check_credentials(s3_port, on=True)

    try:
        with monkeypatch.context() as patch, pytest.raises(UserError) as refused:
            patch.setattr(Step, "add", refused_from_now_on)
            run(parse_run(remote), until="score")
        object_storage.check_credentials(s3_port, on=False)
        assert str(refused.value).startswith(f"{url}/run/factors/pretrain/partials/")
        assert "check the credentials in the environment" in str(refused.value) and "\n" not in str(refused.value)
        run(parse_run(remote), until="score")
    finally:
        object_storage.check_credentials(s3_port, on=False)
    for key, content in object_storage.objects(bucket, "in/run/scores/").items():
        path = tmp_path / "fetched" / key.removeprefix("in/run/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    wanted = runs.expected(tmp_path / "in", 0, later="identity")
    assert runs.largest_error(runs.read_scores(str(tmp_path / "fetched"), "pretrain"), wanted) < 1e-6
