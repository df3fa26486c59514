"""What the faults of object storage say: one line that names the path, and never a credential."""

import os
from pathlib import Path

import object_storage
import pytest
from test_preflight import describe

from msif_ray import fetch, paths, store
from msif_ray.config import Documents, parse_run
from msif_ray.corpus.files import corpus_files
from msif_ray.errors import UserError


def faults(url: str) -> list[str]:
    """What reading, writing, listing, looking and fetching say, one line each."""
    path = paths.path_of(url)
    said = []
    for attempt in (
        lambda: store.read_json(path),
        lambda: store.write_atomic(path, b"1"),
        lambda: paths.matching(path.parent, "*"),
        lambda: paths.exists(path),
        lambda: fetch.fetched(url),
        lambda: store.load_tensors(path),
        lambda: corpus_files(Documents(path=f"{url}/*.parquet", text="text"), "key"),
    ):
        try:
            attempt()
        except UserError as error:
            said.append(str(error))
            assert url.split("/")[2] in said[-1] and "\n" not in said[-1]
            assert object_storage.SECRET not in said[-1] and os.environ.get("AWS_ACCESS_KEY_ID", "?") not in said[-1]
    return said


def test_a_missing_bucket_is_said(bucket: str) -> None:
    said = faults("s3://no-such-bucket-here/x/y.json")
    assert len(said) >= 4 and sum("bucket does not exist" in line for line in said) >= 3


def test_missing_credentials_are_said(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    said = faults(f"s3://{bucket}/x/y.json")
    assert len(said) == 7 and all("credentials" in line for line in said)


def test_refused_credentials_are_said(bucket: str, s3_port: int) -> None:
    object_storage.check_credentials(s3_port, on=True)
    try:
        said = faults(f"s3://{bucket}/x/y.json")
    finally:
        object_storage.check_credentials(s3_port, on=False)
    assert len(said) == 7 and all("check the credentials in the environment" in line for line in said)


def test_a_server_that_is_down_is_said(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(UserError, match=r"s3://b/x: cannot be read: Could not connect to the endpoint"):
        store.read_json("s3://b/x")


def test_what_a_client_says_is_told_without_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush")
    said = paths.reason(OSError("http://user:pass@host/x\nrefused the key hush"))
    assert said == "http://…@host/x refused the key …"


def test_a_long_reason_is_cut_at_a_word_and_says_so() -> None:
    said = paths.reason(OSError("nine words of a client that has much to say " * 9))
    assert 150 < len(said) <= 200 and said.endswith((" nine …", " words …", " of …", " say …", " much …", " client …"))
    assert paths.reason(OSError("x" * 300)) == "x" * 199 + "…"


@pytest.mark.parametrize("key", ["run_dir", "model", "documents", "queries", "factors", "tokenizer"])
def test_credentials_in_a_path_are_refused_and_not_repeated(tmp_path: Path, key: str) -> None:
    description, url = describe(tmp_path), "s3://AKIA:hush@bucket/x"
    stage = description["stages"][0]
    if key == "run_dir":
        description["run_dir"] = url
    elif key == "queries":
        description["queries"]["path"] = [url]
    elif key == "documents":
        stage["documents"]["path"] = url
    else:
        stage[key] = url
    with pytest.raises(UserError, match=r"credentials do not belong in a path") as error:
        parse_run(description)
    assert "hush" not in str(error.value) and key in str(error.value)
    with pytest.raises(UserError, match="credentials") as error:
        paths.path_of(url)
    assert "hush" not in str(error.value)
