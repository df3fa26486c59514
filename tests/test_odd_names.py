"""Names that a glob would take for patterns, and others that are odd: on S3 and locally each stands for itself."""

import json
from pathlib import Path

import numpy
import object_storage
import pytest
import torch
from datasets import Dataset

from msif_ray import fetch, paths, store
from msif_ray.cluster import partials
from msif_ray.cluster.outcomes import Outcome
from msif_ray.config import Documents
from msif_ray.corpus.census import take_census
from msif_ray.results import parts, top

# What each of the first would match, were it a pattern.
OTHER = "a1b"
PATTERNS = ["a[1]b", "a?b", "**"]
ODD = [*PATTERNS, "a[!x]b", "a*b", "a[b", "{a1b}", "a#1", "a%31b", "a+ b", "ü", "a//b"]


@pytest.fixture(params=["s3", "local"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A folder of either storage; of S3 in a new bucket (as `bucket: str`)."""
    return f"s3://{request.getfixturevalue('bucket')}/in" if request.param == "s3" else str(tmp_path / "in")


def fill(folder: Path, value: float) -> Path:
    """A folder with a file, a file of tensors, and a partial that took another's place; gives the partials' folder."""
    store.write_json(folder / "a.json", value)
    store.save_tensors(folder / "t.safetensors", {"x": torch.tensor([value])})
    step, replaced = folder / "partials", None
    for name in ("first", "second"):
        partials.publish(step / name, [["m"]], [(f"{value}", Outcome({"d": 2}, (), 1).counts)], replaced)
        replaced = step / name
    return step


def check_whole(folder: Path, value: float) -> None:
    assert paths.missing([folder / "a.json", folder / "t.safetensors"]) == []
    assert paths.matching(folder, "*.json") == [folder / "a.json"] and store.read_json(folder / "a.json") == value
    assert store.load_tensors(folder / "t.safetensors")["x"].item() == value
    step = folder / "partials"
    found = {partial.folder: partial.blocks for partial in partials.read_disjoint(step)}
    assert found == {step / "second": {f"{value}"}} and paths.subfolders(step) == [step / "second"]
    assert paths.size_of(folder) > 100


@pytest.mark.parametrize("name", ODD)
def test_a_folder_is_read_and_deleted_and_no_other(root: str, name: str) -> None:
    own, other = (paths.path_of(f"{root}/{each}") for each in (name, OTHER))
    fill(other, 1.0)
    step = fill(own, 2.0)
    check_whole(own, 2.0)
    store.delete_folder(step, first="none")
    assert not paths.exists(step) and partials.read_disjoint(step) == [] == paths.subfolders(step)
    check_whole(other, 1.0)
    fill(own, 2.0)
    store.delete(own / "a.json")
    assert not paths.exists(own / "a.json") and paths.exists(own / "t.safetensors")
    check_whole(other, 1.0)
    store.delete_folder(own)
    assert not paths.exists(own)
    check_whole(other, 1.0)


@pytest.mark.parametrize("name", PATTERNS)
def test_scores_are_those_of_the_run_that_is_named(root: str, name: str) -> None:
    for number, run_dir in enumerate((f"{root}/{OTHER}", f"{root}/{name}")):
        part = parts.part_path(run_dir, "s", "0-0")
        parts.write_part(part, ["q"], [f"d{number}"], numpy.ones((1, 1)), numpy.ones(1), [3], [], {})
    assert {pair.doc_id for pair in top.top_pairs(f"{root}/{name}", "s", 5)} == {"d1"}
    assert parts.done_blocks(f"{root}/{name}", "s") == {"0-0"}


@pytest.mark.parametrize("name", PATTERNS)
def test_a_file_and_a_saved_folder_that_are_there_are_meant(root: str, name: str, tmp_path: Path) -> None:
    for rows, each in ((1, OTHER), (2, name)):
        lines = "".join(json.dumps({"text": f"text {row}"}) + "\n" for row in range(rows))
        store.write_atomic(f"{root}/{each}/c.jsonl", lines.encode())
        saved = tmp_path / "saved"
        Dataset.from_list([{"text": f"text {row}"} for row in range(rows)]).save_to_disk(saved)
        for file in saved.iterdir():
            store.write_atomic(f"{root}/{each}/saved/{file.name}", file.read_bytes())
    for kind in ("c.jsonl", "saved"):
        census = take_census(Documents(path=f"{root}/{name}/{kind}", text="text"), "key")
        assert census.rows == (2,) and len(census.files) == 1


@pytest.mark.parametrize("name", PATTERNS)
def test_a_model_s_folder_is_fetched(bucket: str, name: str) -> None:
    for each in (OTHER, name):
        store.write_atomic(f"s3://{bucket}/{each}/config.json", each.encode())
        store.write_atomic(f"s3://{bucket}/{each}/model.safetensors", each.encode())
    folder, source = fetch.obtain(f"s3://{bucket}/{name}", None)
    assert (folder / "config.json").read_text() == name and fetch.local_model(source) == str(folder)


def test_google_s_storage_deletes_what_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with object_storage.serving_gs(tmp_path / "server.log", "bucket") as port:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
        for name in ("a[1]b", "a?b", "plain"):
            own, other = (paths.path_of(f"gs://bucket/{each}") for each in (name, OTHER))
            fill(other, 1.0)
            step = fill(own, 2.0)
            check_whole(own, 2.0)
            store.delete(own / "a.json")
            store.delete(own / "a.json")
            store.delete_folder(step)
            store.delete_folder(step)
            assert not paths.exists(own / "a.json") and not paths.exists(step) and paths.exists(own / "t.safetensors")
            check_whole(other, 1.0)
