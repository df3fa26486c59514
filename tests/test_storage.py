"""Files, corpora and models on a real S3 server, and what its faults say."""

import json
import os
from pathlib import Path
from typing import Any

import boto3
import models
import numpy
import object_storage
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3fs
import torch
from corpora import write_lines, write_rows
from test_preflight import describe
from typer.testing import CliRunner
from upath import UPath

from msif_ray import fetch, layout, paths, store
from msif_ray.cli import app
from msif_ray.cluster.carry import is_carried
from msif_ray.cluster.fit import is_fitted
from msif_ray.config import Documents, parse_run
from msif_ray.corpus.blocks import CorpusBlocks
from msif_ray.corpus.census import take_census
from msif_ray.corpus.files import corpus_files
from msif_ray.corpus.reader import read_documents
from msif_ray.errors import UserError
from msif_ray.preflight import check
from msif_ray.results import parts, top
from msif_ray.tensorfile import TensorFile

ROWS = [{"id": f"r{i}", "text": f"text {i}", "other": i} for i in range(3000)]


@pytest.mark.parametrize("command", ["run", "plan"])
def test_a_description_may_be_there_too(command: str, bucket: str) -> None:
    address = f"s3://{bucket}/{command}/run.yaml"
    missing = CliRunner().invoke(app, [command, address])
    assert (
        str(missing.exception) == f"{address}: cannot be read (no such file or bucket); name a run description in YAML"
    )
    paths.path_of(address).write_text("run_dirr: s3://x/y\n")
    assert str(CliRunner().invoke(app, [command, address]).exception).startswith(f"{address}: run_dirr: unknown key")


def test_files_come_back_and_nothing_else_is_there(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    folder = paths.path_of(f"s3://{bucket}/run")
    assert not paths.exists(folder / "a.json") and paths.matching(folder, "*.json") == []
    store.write_json(folder / "a.json", {"name": "Köln"})
    store.write_json(folder / "a.json", {"name": "Ulm"})
    tensors = {"square": torch.arange(6.0).reshape(2, 3), "half": torch.ones(3).bfloat16(), "none": torch.empty(0, 3)}
    store.save_tensors(folder / "t.safetensors", tensors, {"about": "test"})
    assert store.read_json(folder / "a.json") == {"name": "Ulm"}
    loaded = store.load_tensors(str(folder / "t.safetensors"))
    assert loaded.keys() == tensors.keys() and all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    file = TensorFile(folder / "t.safetensors")
    assert torch.equal(file.tensor("square"), tensors["square"])
    assert file.metadata == {"about": "test"}
    assert object_storage.objects(bucket).keys() == {"run/a.json", "run/t.safetensors"}
    assert paths.matching(folder, "*.json") == [folder / "a.json"]
    store.delete(folder / "a.json")
    store.delete(folder / "a.json")
    assert not paths.exists(folder / "a.json") and not list(tmp_path.glob("msif-ray-*"))


def test_what_a_request_for_many_does_not_delete_is_deleted_or_said(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def leaves(self: Any, paths: list[str], **options: Any) -> list[str]:
        return []  # what s3fs makes of a refusal of each key

    def refused(files: Any, name: str) -> None:
        raise PermissionError("Access Denied")

    folder = paths.path_of(f"s3://{bucket}/run")
    for name in ("a.json", "deep/b.json"):
        store.write_atomic(folder / name, b"1")
    monkeypatch.setattr(s3fs.S3FileSystem, "_bulk_delete", leaves)
    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"run: cannot be deleted: Access Denied"):
        patch.setattr(store, "_delete_object", refused)
        store.delete_folder(folder)
    store.delete_folder(folder)
    assert not object_storage.objects(bucket)


def test_what_another_process_writes_is_seen(bucket: str) -> None:
    folder = paths.path_of(f"s3://{bucket}/run")
    store.write_atomic(folder / "a.json", b"1")
    assert len(paths.matching(folder, "*.json")) == 1
    client = boto3.client("s3")
    client.put_object(Bucket=bucket, Key="run/b.json", Body=b"2")
    client.put_object(Bucket=bucket, Key="run/a.json", Body=b"[1, 2, 3]")
    assert [path.name for path in paths.matching(folder, "*.json")] == ["a.json", "b.json"]
    assert store.read_json(folder / "a.json") == [1, 2, 3] and paths.size_of(folder / "a.json") == 9


def test_an_interrupted_write_puts_nothing(bucket: str) -> None:
    path = paths.path_of(f"s3://{bucket}/file")
    store.write_atomic(path, b"old")

    def interrupted() -> None:
        with store.replacing(path) as temporary:
            temporary.write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert object_storage.objects(bucket) == {"file": b"old"}


@pytest.mark.parametrize("name", ["rows.parquet", "rows.jsonl", "rows"])
def test_a_corpus_reads_as_it_does_locally(bucket: str, tmp_path: Path, name: str) -> None:
    (tmp_path / "in" / "deep").mkdir(parents=True)
    for place in ("in/deep/", "in/"):
        write_rows(tmp_path / f"{place}{name}", ROWS, row_group_size=1000)
    url = object_storage.put_folder(tmp_path / "in", bucket, "in")
    local, remote = ([f"{root}/{name}", f"{root}/*/{name}"] for root in (str(tmp_path / "in"), url))
    found = []
    for patterns in (local, remote):
        documents = Documents(path=patterns, text="text")
        files = corpus_files(documents, "key")
        sizes = [paths.size_of(paths.path_of(file.path)) for file in files]
        read = [(d.id, d.text) for file in files for d in read_documents(file, documents, "key")]
        found.append(([file.name for file in files], sizes, read))
    assert found[0] == found[1] and len(found[0][2]) == 6000
    with pytest.raises(UserError, match=r"key: s3://.*rows.* has no column 'nothing'"):
        read_all(f"{url}/{name}", text="nothing")


@pytest.mark.parametrize("name", ["rows.parquet", "rows.jsonl", "rows"])
def test_an_object_that_is_replaced_after_the_run_was_checked_is_refused(
    bucket: str, tmp_path: Path, name: str
) -> None:
    rows = [{"text": f"text {number}"} for number in range(9)]
    (tmp_path / "in").mkdir()
    write_rows(tmp_path / "in" / name, rows)
    documents = Documents(path=f"{object_storage.put_folder(tmp_path / 'in', bucket, 'in')}/{name}", text="text")
    census = take_census(documents, "key")
    blocks = CorpusBlocks(tuple(census.files), census.rows, documents, 3, "key")
    assert [document.text for block in blocks.left(set()) for document in block.documents] == [r["text"] for r in rows]
    write_rows(tmp_path / "in" / name, rows[::-1])
    object_storage.put_folder(tmp_path / "in", bucket, "in")
    with pytest.raises(UserError, match=rf"^key\.path: s3://{bucket}/in/{name} has changed since the run was checked"):
        next(blocks.left(set()))


def read_all(path: str, text: str = "text") -> int:
    documents = Documents(path=path, text=text)
    return sum(1 for file in corpus_files(documents, "key") for _ in read_documents(file, documents, "key"))


def test_parquet_is_read_by_the_columns_asked_for(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = pa.table({"text": ["a", "b"] * 500, "big": [os.urandom(2000) for _ in range(1000)]})
    pq.write_table(rows, tmp_path / "x.parquet")
    boto3.client("s3").upload_file(str(tmp_path / "x.parquet"), bucket, "x.parquet")
    fetched = []
    whole = s3fs.S3File._fetch_range

    def counting(file: Any, start: int, end: int) -> bytes:
        fetched.append(end - start)
        return whole(file, start, end)

    monkeypatch.setattr(s3fs.S3File, "_fetch_range", counting)
    assert read_all(f"s3://{bucket}/x.parquet") == 1000
    assert 0 < sum(fetched) < 300_000 < (tmp_path / "x.parquet").stat().st_size


def test_many_files_are_listed_by_one_request(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = paths.path_of(f"s3://{bucket}/scores")
    client = boto3.client("s3")
    names = [f"part-{i}.parquet" for i in range(9)]
    for name in (*names, "", "deep/part-x.parquet"):
        client.put_object(Bucket=bucket, Key=f"scores/{name}", Body=b"1")
    asked: list[str] = []
    call = s3fs.S3FileSystem._call_s3

    async def counting(self: Any, method: str, *arguments: Any, **options: Any) -> Any:
        asked.append(method)
        return await call(self, method, *arguments, **options)

    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", counting)
    assert [path.name for path in paths.matching(folder, "part-*")] == names and asked == ["list_objects_v2"]
    asked.clear()
    assert paths.missing([*(folder / name for name in names), folder / "none"]) == [folder / "none"]
    assert asked == ["list_objects_v2"]
    asked.clear()
    files = corpus_files(Documents(path=f"{folder}/part-*", text="text"), "key")
    assert [file.name for file in files] == names and len(asked) < len(names)
    assert paths.matching(folder / names[0], "*") == [] == paths.matching(folder / "nowhere", "*")


def test_preflight_passes_with_everything_on_object_storage(bucket: str, tmp_path: Path) -> None:
    models.save_pair(tmp_path / "in", "gpt_neox", seed=1, dtype=torch.float32)
    for name, rows in (
        ("base", models.random_documents(1, 4)),
        ("tune", models.random_documents(2, 3, completions=True)),
        ("queries", models.random_documents(3, 2, (3, 6), completions=True)),
    ):
        write_lines(tmp_path / "in" / f"{name}.jsonl", rows)
    url = object_storage.put_folder(tmp_path / "in", bucket, "in")
    description = json.loads(json.dumps(describe(tmp_path / "in")).replace(str(tmp_path / "in"), url))
    resolved = check(parse_run(description))
    assert resolved.run.run_dir == f"{url}/run" and resolved.documents["score.0"] == 4
    assert not object_storage.objects(bucket, "in/run")
    for key, message in (("run_dir", "run_dir: s3://nowhere/x: cannot be written: "), ("model", "s3://nowhere/x")):
        spoilt = description | {"run_dir": "s3://nowhere/x"} if key == "run_dir" else description
        if key == "model":
            spoilt["stages"][1]["model"] = "s3://nowhere/x"
        with pytest.raises(UserError, match=message) as error:
            check(parse_run(spoilt))
        assert "\n" not in str(error.value) and "bucket does not exist" in str(error.value)


def test_a_damaged_part_on_object_storage_is_named(bucket: str) -> None:
    run_dir = f"s3://{bucket}/run"
    path = parts.part_path(run_dir, "s", "b")
    scores, norms = numpy.array([[1.0], [2.0]]), numpy.ones(2)
    parts.write_part(path, ["q"], ["x", "y"], scores, norms, [3, 3], [("z", "text is null")], {})
    assert [pair.doc_id for pair in top.top_pairs(run_dir, "s", 1)] == ["y", "x"]
    assert parts.done_blocks(run_dir, "s") == {"b"} and parts.skipped_of(path) == [("z", "text is null")]
    content = bytearray(path.read_bytes())
    content[30] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(UserError, match=r"s3://.*part-b\.parquet: .*delete it"):
        top.top_pairs(run_dir, "s", 1)


def test_an_empty_object_is_a_damaged_file(bucket: str) -> None:
    """And no fault of the storage, which has no range of it."""
    path = paths.path_of(f"s3://{bucket}/basis.safetensors")
    store.write_atomic(path, b"")
    with pytest.raises(UserError, match=r"^s3://.*basis\.safetensors is not whole safetensors .*; delete it, and run"):
        store.load_tensors(path)


def test_google_s_storage_works_in_the_same_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MSIF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with object_storage.serving_gs(tmp_path / "server.log", "bucket") as port:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
        folder = paths.path_of("gs://bucket/run")
        assert isinstance(folder, UPath) and not paths.exists(folder / "a.json")
        store.write_json(folder / "a.json", [1])
        store.write_json(folder / "a.json", [2])
        store.save_tensors(folder / "t.safetensors", {"a": torch.ones(3)})
        assert store.read_json(folder / "a.json") == [2]
        assert store.load_tensors(folder / "t.safetensors")["a"].tolist() == [1, 1, 1]
        assert paths.matching(folder, "*.json") == [folder / "a.json"]
        store.write_atomic(folder / "rows.jsonl", b'{"text": "a"}\n{"text": "b"}\n')
        assert read_all("gs://bucket/run/*.jsonl") == 2
        assert (fetch.obtain("gs://bucket/run", None)[0] / "a.json").read_bytes() == (folder / "a.json").read_bytes()
        store.delete(folder / "a.json")
        assert not paths.exists(folder / "a.json")
        with pytest.raises(UserError, match=r"gs://none/x: cannot be written: no such file or bucket"):
            store.write_atomic("gs://none/x", b"1")


def test_a_deleted_file_of_a_finished_step_is_missed(bucket: str, tmp_path: Path) -> None:
    for root in (f"s3://{bucket}/run", str(tmp_path)):
        folder = layout.factors(root, "s")
        for file in (layout.basis_file, layout.eigenvalues_file):
            for name in ("a.b", "a.c"):
                store.save_tensors(file(folder, name), {"x": torch.ones(1)})
        assert not is_fitted(folder)
        about = {"shape": [1, 1], "mean_eigenvalue": 1.0}
        store.write_json(layout.factors_manifest(folder), {"maps": {"a.b": about, "a.c": about}})
        assert is_fitted(folder)
        store.delete(layout.basis_file(folder, "a.c"))
        assert not is_fitted(folder)
        carried = layout.directions(root, "s")
        maps = {"a.b": {"shape": [1, 1], "vectors": [None, None]}}
        about = {"maps": maps, "shards": [[0, 2], [2, 3]], "itemsize": 4}
        store.write_json(layout.directions_manifest(carried), about)
        for shard in ((0, 2), (2, 3)):
            assert not is_carried(carried)
            store.save_tensors(layout.direction_file(carried, "a.b", shard), {"x": torch.ones(1)})
        store.write_atomic(layout.energy_file(carried), b"")
        assert is_carried(carried)
