"""Models and folders of object storage, fetched once per node, and never another state of them."""

import socket
from pathlib import Path
from typing import Any

import boto3
import models
import object_storage
import pytest
import s3fs

from msif_ray import fetch, store
from msif_ray.checkpoint import check_checkpoint
from msif_ray.config import Stage
from msif_ray.errors import UserError


def test_a_model_is_fetched_once_for_each_state_of_its_files(bucket: str, tmp_path: Path) -> None:
    saved = models.save(models.build_model("gpt_neox", 1), models.build_tokenizer(), tmp_path / "model")
    (saved / "code.py").write_text("raise SystemExit")
    (saved / "old.bin").write_bytes(b"pickle")
    url = object_storage.put_folder(saved, bucket, "models/one")
    checked = check_checkpoint(Stage(name="s", model=url), None, "stages.0")
    local = check_checkpoint(Stage(name="s", model=str(saved)), None, "stages.0")
    assert (checked.model_hash, checked.maps) == (local.model_hash, local.maps)
    assert checked.files == local.files and checked.files.keys() >= {"config.json", "tokenizer.json"}
    source = checked.source
    assert source.endswith(f"@{url}") and fetch.named(local.source) == str(saved) and checked.tokenizer_source == source
    folder = Path(fetch.local_model(source))
    assert folder == Path(checked.model_path) and {file.suffix for file in folder.iterdir()} == {
        ".json",
        ".safetensors",
    }
    written = (folder / "config.json").stat().st_mtime_ns
    assert fetch.local_model(source) == str(folder) and (folder / "config.json").stat().st_mtime_ns == written
    assert not list(Path(fetch.local_tokenizer(source)).glob("*.safetensors"))
    boto3.client("s3").put_object(Bucket=bucket, Key="models/one/config.json", Body=b"{}")
    assert (fetch.obtain(url, None)[0] / "config.json").read_bytes() == b"{}"
    assert not list(fetch.cache_folder().glob("*.tmp"))
    with pytest.raises(UserError, match=r"stages\.1\.model: s3://.*none: there is no such folder"):
        check_checkpoint(Stage(name="s", model=f"s3://{bucket}/none"), None, "stages.1")


def test_a_folder_whose_weights_are_overwritten_is_refused(tmp_path: Path) -> None:
    saved = models.save(models.build_model("gpt_neox", 1), models.build_tokenizer(), tmp_path / "model")
    found = check_checkpoint(Stage(name="s", model=str(saved)), None, "stages.0")
    assert fetch.named(found.source) == str(saved)
    weights = saved / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content)  # a copy, with a time of its own
    (saved / "trainer_state.json").write_text("{}")
    assert fetch.local_model(found.source) == fetch.local_tokenizer(found.tokenizer_source) == str(saved)
    models.save(models.build_model("gpt_neox", 2), models.build_tokenizer(), saved)
    assert weights.stat().st_size == len(content)
    with pytest.raises(UserError, match=rf"^{saved}: its files have changed since this run was started; put them"):
        fetch.local_model(found.source)
    assert fetch.local_tokenizer(found.tokenizer_source) == str(saved)


def test_a_node_that_has_not_the_folder_is_named(tmp_path: Path) -> None:
    saved = models.save(models.build_model("gpt_neox", 1), models.build_tokenizer(), tmp_path / "model")
    found = check_checkpoint(Stage(name="s", model=str(saved)), None, "stages.0")
    saved.rename(tmp_path / "elsewhere")
    for attempt in (fetch.local_model, fetch.local_tokenizer):
        with pytest.raises(UserError, match=rf"^{saved}: not there on {socket.gethostname()}; every node reads it"):
            attempt(found.source)


def test_a_node_refuses_what_has_changed_since_the_run_was_started(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = models.save(models.build_model("gpt_neox", 1), models.build_tokenizer(), tmp_path / "model")
    stage = Stage(name="s", model=object_storage.put_folder(saved, bucket, "m"))
    spare = stage.model_copy(update={"tokenizer": object_storage.put_folder(saved, bucket, "t")})
    first, second = check_checkpoint(stage, None, "stages.0"), check_checkpoint(spare, None, "stages.1")
    monkeypatch.setenv("MSIF_CACHE", str(tmp_path / "another node"))
    content = (saved / "model.safetensors").read_bytes()
    boto3.client("s3").put_object(Bucket=bucket, Key="m/model.safetensors", Body=content[:-1] + b"\1")
    for attempt in (fetch.local_model, fetch.local_tokenizer):
        with pytest.raises(UserError, match=r"^s3://[^/]*/m: its files have changed since this run was started"):
            attempt(first.source)
    assert Path(fetch.local_tokenizer(second.tokenizer_source), "tokenizer.json").exists()
    boto3.client("s3").put_object(Bucket=bucket, Key="m/model.safetensors", Body=content)
    assert Path(fetch.local_model(first.source), "model.safetensors").read_bytes() == content


def test_what_changes_while_it_is_fetched_is_no_copy(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    get_file = s3fs.S3FileSystem._get_file

    async def get_and_change(self: Any, source: str, target: str, **options: Any) -> None:
        await get_file(self, source, target, **options)
        boto3.client("s3").put_object(Bucket=bucket, Key="m/config.json", Body=b"{2}")

    monkeypatch.setattr(s3fs.S3FileSystem, "_get_file", get_and_change)
    store.write_atomic(f"s3://{bucket}/m/config.json", b"{1}")
    with pytest.raises(UserError, match=r"/m: its files have changed while they were fetched; run the same command"):
        fetch.fetched(f"s3://{bucket}/m")
    assert not [path for path in fetch.cache_folder().iterdir() if path.is_dir()]


def test_a_copy_that_has_lost_a_file_or_some_of_it_is_fetched_anew(bucket: str) -> None:
    content = {"config.json": b"{}", "model.safetensors": b"0123456789"}
    for name, data in content.items():
        store.write_atomic(f"s3://{bucket}/m/{name}", data)
    copy = fetch.fetched(f"s3://{bucket}/m")
    (copy / "config.json").unlink()
    assert fetch.fetched(f"s3://{bucket}/m") == copy
    (copy / "model.safetensors").write_bytes(b"01234")
    assert fetch.fetched(f"s3://{bucket}/m") == copy
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == content


@pytest.mark.parametrize("offset", [0, 70_000, 99_999])
def test_a_copy_with_another_bit_is_fetched_anew(bucket: str, offset: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a first run would take a bad disk's weights for the model's: its record has the hash of what it found."""
    content = bytes(100_000)
    store.write_atomic(f"s3://{bucket}/m/deep/er/model.safetensors", content)
    copied = fetch.fetched(f"s3://{bucket}/m") / "deep" / "er" / "model.safetensors"
    spoilt = bytearray(content)
    spoilt[offset] ^= 16
    copied.write_bytes(spoilt)
    monkeypatch.setattr(fetch, "_READ", set())  # as in another process
    fetch.fetched(f"s3://{bucket}/m")
    assert copied.read_bytes() == content


def test_an_object_cannot_lead_out_of_the_cache(bucket: str) -> None:
    boto3.client("s3").put_object(Bucket=bucket, Key="m/../../evil.json", Body=b"{}")
    with pytest.raises(UserError, match=r"'\.\./\.\./evil\.json' cannot be a file"):
        fetch.obtain(f"s3://{bucket}/m", None)


def test_a_node_fetches_the_commit_that_the_driver_found(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(name: str, revision: str, allow_patterns: list[str]) -> str:
        asked.append((name, revision, "*.safetensors" in allow_patterns))
        return "/cache/snapshots/abc"

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    source = fetch.obtain("org/model", None)[1]
    assert fetch.local_model(source) == fetch.local_tokenizer(source) == "/cache/snapshots/abc"
    assert asked[1:] == [("org/model", "abc", True), ("org/model", "abc", False)]
    assert fetch.local_model("/some/folder") == "/some/folder"


def test_a_mistyped_folder_beside_others_is_told_before_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^models/base: no such folder in models/, and the hub does not give it: .*\w"):
        fetch.obtain("models/base", None)
    with pytest.raises(UserError, match=r"^org/base is no local folder, and the hub does not give it: "):
        fetch.obtain("org/base", None)
    for name in ("models/a/base", "./base", "/models/base"):
        with pytest.raises(UserError, match=f"^{name}: no such folder$"):
            fetch.obtain(name, None)
