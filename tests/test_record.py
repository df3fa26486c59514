"""run.json tells a run from another one, whatever of it has changed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_preflight import BASE, describe, edit_config, folder, pair, write_lines
from test_reused_factors import reusing, save_factors

from msif_ray import layout, record
from msif_ray.config import parse_run
from msif_ray.errors import UserError
from msif_ray.preflight import check
from msif_ray.record import keep_record
from msif_ray.store import read_json, write_json

__all__ = ["folder", "pair"]  # fixtures


def keep(description: dict[str, Any]) -> list[str]:
    """What is said while the record of the run is kept."""
    said: list[str] = []
    keep_record(check(parse_run(description)), said.append)
    return said


def swapped(path: Path, old: bytes, new: bytes) -> None:
    """Another content of the same size."""
    content = path.read_bytes()
    assert len(old) == len(new) and old in content
    path.write_bytes(content.replace(old, new, 1))


def spare_tokenizer(folder: Path) -> Path:
    """A folder with a tokenizer alone."""
    models.build_tokenizer().save_pretrained(folder / "spare")
    return folder / "spare"


def with_tokenizer(folder: Path) -> dict[str, Any]:
    description = describe(folder)
    description["stages"][0]["tokenizer"] = str(spare_tokenizer(folder))
    return description


CHANGES: dict[str, tuple[Callable[[Path], Any], Callable[[Path], object], str]] = {
    "a corpus, in the same size": (
        describe,
        lambda f: swapped(f / "base.jsonl", BASE[2]["text"].encode()[-2:], b"XY"),
        r"corpora\.stages\.0\..*/base\.jsonl was '\w+' and is '\w+'",
    ),
    "another order of documents": (
        describe,
        lambda f: write_lines(f / "base.jsonl", BASE[::-1]),
        r"corpora\.stages\.0\..*/base\.jsonl was ",
    ),
    "a query": (
        describe,
        lambda f: swapped(f / "queries.jsonl", b"query-1", b"query-2"),
        r"queries\.1\.0 was 'query-1'",
    ),
    "the model's configuration": (
        describe,
        lambda f: edit_config(f / "stage1/config.json", layer_norm_eps=1e-3),
        r"models\.tune\.files\.config\.json was ",
    ),
    "the tokenizer": (
        describe,
        lambda f: edit_config(f / "stage0/tokenizer_config.json", add_prefix_space=True),
        r"models\.pre\.files\.tokenizer_config\.json was ",
    ),
    "a tokenizer that the stage names": (
        with_tokenizer,
        lambda f: swapped(f / "spare/tokenizer.json", b"Oran", b"Bonn"),
        r"models\.pre\.files\.tokenizer\.json was ",
    ),
    "reused factors": (
        reusing,
        lambda f: write_json(path := f / "other/factors/pre/manifest.json", read_json(path) | {"documents": 3}),
        r"factors\.pre was ",
    ),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_change_under_the_same_run_dir_is_refused(folder: Path, case: str) -> None:
    describe_it, change, message = CHANGES[case]
    if describe_it is reusing:
        save_factors(folder, check(parse_run(describe(folder))))
    description = describe_it(folder)
    assert keep(description) == keep(description) == []
    change(folder)
    with pytest.raises(UserError, match=rf"run\.json: this directory holds another run: {message}") as error:
        keep(description)
    assert "\n" not in str(error.value)


def test_norms_may_not_be_left_out_half_way_and_earlier_records_have_them(folder: Path) -> None:
    description = describe(folder) | {"detail": {"tokens": True}}
    keep(description)
    assert "norm" not in read_json(layout.run_record(description["run_dir"]))["identity"]["run"]["detail"]
    with pytest.raises(UserError, match=r"detail\.norm was True and is False"):
        keep(description | {"detail": {"tokens": True, "norm": False}})


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ({}, {"detail": {"tokens": True}}, r"detail\.tokens was False and is True"),
        ({"detail": {"norm": False}}, {}, r"detail\.norm was False and is True"),
        ({}, {"index": [{"stage": "pre"}]}, r"another run: index was \[\] and is \["),
        ({}, {"blocks": "heads"}, r"blocks was None and is 'heads'"),
        ({}, {"solver": {"kind": "cg", "iterations": 3}}, r"stages\.0\.solver\.kind was 'ekfac' and is 'cg'"),
    ],
)
def test_what_was_not_said_is_told_as_the_default_that_it_was(
    folder: Path, before: dict[str, Any], after: dict[str, Any], message: str
) -> None:
    def described(change: dict[str, Any]) -> dict[str, Any]:
        description = describe(folder)
        if "solver" in change:
            description["stages"][0] |= change
            return description
        return description | change

    keep(described(before))
    with pytest.raises(UserError, match=message):
        keep(described(after))


def test_a_longer_list_that_begins_alike_is_told_by_its_length(folder: Path) -> None:
    description = describe(folder)
    keep(description)
    (entry,) = description["score"]
    with pytest.raises(UserError, match=r"another run: score had 1 entries and has 2; name a new run_dir"):
        keep(description | {"score": [entry, entry | {"name": "again"}]})


def test_another_list_of_candidates_is_told_by_the_key_that_names_it(folder: Path) -> None:
    def listing(name: str, document: str) -> dict[str, Any]:
        path = folder / ("a folder whose name is as long as those of buckets are" * 2) / name
        path.parent.mkdir(exist_ok=True)
        pq.write_table(pa.table({"doc_id": [document]}), path)
        return describe(folder) | {"score": [{"stage": "pre", "candidates": {"path": str(path)}}]}

    keep(listing("some.parquet", BASE[0]["id"]))
    changed = r"score\.0\.candidates\.path was \.\.\..*/some\.parquet' and is \.\.\..*/other\.parquet'"
    with pytest.raises(UserError, match=changed):
        keep(listing("other.parquet", BASE[1]["id"]))
    with pytest.raises(UserError, match=r"another run: candidates\.score\.0 was "):
        keep(listing("some.parquet", BASE[1]["id"]))


def test_what_no_score_depends_on_may_change(folder: Path) -> None:
    keep(describe(folder))
    edit_config(folder / "stage1/generation_config.json", max_length=7)
    (folder / "stage1/trainer_state.json").write_text("{}")
    description = describe(folder)
    description["cluster"] = {"replicas": {"min": 1, "max": 5}, "cpus_per_rank": 2}
    assert keep(description | {"top": 3}) == []


def test_of_how_many_the_documents_were_chosen_may_change(folder: Path) -> None:
    description = describe(folder)
    keep(description)
    path = layout.run_record(description["run_dir"])
    for out_of in (50_000, 60_000, None):
        assert keep(description | {"score": [{"stage": "pre", "out_of": out_of}]}) == []
        assert read_json(path).get("out_of") == (None if out_of is None else {"pre": out_of})


def test_another_device_is_refused_by_its_key(folder: Path) -> None:
    description = describe(folder)
    keep(description | {"cluster": {"gpus_per_rank": 1}})
    assert keep(description | {"cluster": {"gpus_per_rank": 0.5}}) == []
    with pytest.raises(
        UserError, match=r"^cluster\.gpus_per_rank: .* was begun on cuda and would go on on cpu; set it"
    ):
        keep(description | {"cluster": {"gpus_per_rank": 0}})


def test_other_versions_are_said_in_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep(describe(folder))
    now = record.versions() | {"torch": "9.9", "numpy": "8.8"}
    monkeypatch.setattr(record, "versions", lambda: now)
    (said,) = keep(describe(folder))
    assert said.startswith("warning: ") and "(now 9.9)" in said and "(now 8.8)" in said and "ray" not in said


NOTHING = '{"identity": {}, "versions": {}, "device": "cpu", "strengths": {}}'


@pytest.mark.parametrize("content", ["", '{"identity', "[]", "{}", '{"identity": {}, "versions": {}}', NOTHING])
def test_a_damaged_record_is_not_to_be_deleted(folder: Path, content: str) -> None:
    keep(describe(folder))
    (folder / "run" / "run.json").write_text(content)
    with pytest.raises(UserError, match=r"run\.json: .*put it back from a copy, or name a new run_dir$") as error:
        keep(describe(folder))
    assert "delete" not in str(error.value)
    with pytest.raises(UserError, match=r"run\.json: .*put it back"):
        record.keep_carried(str(folder / "run"), {}, {})


@pytest.mark.parametrize(
    ("key", "value"),
    [("run.detail", 3), ("run.stages", ["pre"]), ("run.stages", None), ("models", {"pre": 1}), ("maps", {"m": [1]})],
)
def test_a_record_that_was_edited_is_said_by_its_key(folder: Path, key: str, value: Any) -> None:
    """Without a checksum, which who edits it may take out."""
    keep(describe(folder))
    path = folder / "run" / "run.json"
    record = json.loads(path.read_text())
    del record["crc32"]
    *parents, last = key.split(".")
    (record["identity"][parents[0]] if parents else record["identity"])[last] = value
    path.write_text(json.dumps(record))
    with pytest.raises(UserError, match=rf"run\.json: not as this version writes it: see identity\.{key}.*; .* put it"):
        keep(describe(folder))


@pytest.mark.parametrize(
    "name",
    ["factors", "references", "index", "candidates", "queries", "scores", "top.parquet", "statistics.parquet"],
)
def test_results_without_a_record_are_refused(folder: Path, name: str) -> None:
    keep(describe(folder))
    (folder / "run" / "run.json").unlink()
    (folder / "run" / name).mkdir()
    with pytest.raises(UserError, match=rf"^run_dir: .*/run has {name} but no run\.json, .* name a new run_dir"):
        keep(describe(folder))
    shutil.rmtree(folder / "run" / name)
    keep(describe(folder))
    assert json.loads((folder / "run" / "run.json").read_text())["device"] == "cpu"
