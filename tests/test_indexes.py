"""An index that a run cannot score from is refused in one line, before any work."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from corpora import write_lines
from descriptions import Description
from test_preflight import BASE, QUERIES, TUNING, describe, resolve

from msif_ray import layout
from msif_ray.config import parse_run
from msif_ray.errors import UserError
from msif_ray.indexes import corpus_identity, is_own
from msif_ray.plan.make import make_plan
from msif_ray.preflight import Resolved
from msif_ray.record import keep_record
from msif_ray.store import read_json, write_atomic, write_json


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("index")
    models.save_pair(folder, "gpt_neox", seed=1, dtype=torch.float32)
    for name, rows in (("base", BASE), ("tune", TUNING), ("queries", QUERIES)):
        write_lines(folder / f"{name}.jsonl", rows)
    return folder


@pytest.fixture(scope="module")
def resolved(folder: Path) -> Resolved:
    return resolve(describe(folder))


def manifest(resolved: Resolved, **changes: Any) -> dict[str, Any]:
    entry = resolved.run.score[0]
    return {
        "model_sha256": resolved.stages[0].model_hash,
        "files": resolved.stages[0].files,
        "computed_in": resolved.run.cluster.dtype,
        "corpus": corpus_identity(resolved.run.scored_documents(entry), resolved.census("score.0"), entry.max_tokens),
        "maps": {name: list(shape) for name, shape in resolved.maps.items()},
        "groups": [list(resolved.maps)],
        "documents_per_block": 3,
    } | changes


def pretend(run_dir: Path, manifest: dict[str, Any]) -> Path:
    """A finished index, as far as preflight reads it: two blocks of four documents."""
    folder = layout.index(str(run_dir), "pre")
    for block in ("00000-0000000", "00000-0000001"):
        write_atomic(layout.index_block(layout.index_group(folder, 0), block), b"")
    for name in manifest["maps"]:
        write_atomic(layout.metric_file(folder, name), b"")
    write_json(layout.index_manifest(folder), manifest)
    return folder


def asking(folder: Path, run_dir: Path, **changes: Any) -> Description:
    return describe(folder) | {"score": [{"stage": "pre", "index": str(run_dir)} | changes]}


def refusal(description: Description) -> str:
    with pytest.raises(UserError) as refused:
        resolve(description)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_the_right_one_is_taken(
    folder: Path, tmp_path: Path, resolved: Resolved, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(tmp_path / "other", manifest(resolved))
    monkeypatch.chdir(tmp_path)
    run = resolve(asking(folder, Path("other"))).run
    assert run.score[0].index == str(tmp_path / "other") and not is_own(run, run.score[0])


MADE: dict[str, tuple[dict[str, Any], str]] = {
    "other model": ({"model_sha256": "x"}, r"score\.0\.index: {index} was built with another model than 'pre''s"),
    "other maps": (
        {"maps": {}},
        r"score\.0\.index: {index} was built over other maps; use the same `modules` and `blocks`",
    ),
    "other sums": (
        {"computed_in": "float64"},
        r"score\.0\.index: {index} was built in float64, and cluster.dtype is float32; use the same `dtype`",
    ),
}


@pytest.mark.parametrize("case", MADE)
def test_another_models_index(folder: Path, tmp_path: Path, resolved: Resolved, case: str) -> None:
    changes, message = MADE[case]
    index = pretend(tmp_path / "other", manifest(resolved, **changes))
    assert refusal(asking(folder, tmp_path / "other")) == message.replace("\\", "").format(index=index)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "chat_template.jinja"])
def test_an_index_of_another_configuration_or_tokenizer(
    folder: Path, tmp_path: Path, resolved: Resolved, name: str
) -> None:
    index = pretend(tmp_path / "other", manifest(resolved, files=resolved.stages[0].files | {name: "x"}))
    message = f"score.0.index: {index} was built with another {name} than 'pre' has; use the same {name}"
    assert refusal(asking(folder, tmp_path / "other")) == message


def test_of_an_older_index_it_is_said_once_that_no_more_than_the_weights_is_compared(
    folder: Path, tmp_path: Path, resolved: Resolved
) -> None:
    older = manifest(resolved, **FIGURES)
    del older["files"]
    index = pretend(tmp_path / "other", older)
    description = asking(folder, tmp_path / "other")
    description["score"] += [description["score"][0] | {"name": "again"}]
    (said,) = resolve(description).warnings
    assert said.startswith(f"{index} was built by an earlier version, ") and "tokenizer.json" in said
    assert make_plan(parse_run(description), measured=False).notes[0] == f"warning: {said}"
    heard: list[str] = []
    keep_record(resolve(description | {"run_dir": str(tmp_path / "run")}), heard.append)
    assert heard == [f"warning: {said}"]
    pretend(tmp_path / "other", manifest(resolved))
    assert resolve(description).warnings == ()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_index_of_the_same_sums_is_taken(folder: Path, tmp_path: Path, resolved: Resolved, dtype: str) -> None:
    pretend(tmp_path / "other", manifest(resolved, computed_in=dtype))
    assert resolve(asking(folder, tmp_path / "other")).warnings == ()


@pytest.mark.parametrize(
    ("what", "change", "message"),
    [
        (
            "files",
            [["base.jsonl", 1, 4]],
            "score.0.documents: {index} was built over other documents: its files differ",
        ),
        ("append_eos", True, "score.0.documents: {index} was built over other documents: its append_eos differ"),
        ("columns", {"text": "body"}, "score.0.documents: {index} was built over other documents: its columns differ"),
        ("max_tokens", 9, "score.0.max_tokens: {index} was built with 9, not 64; set it to 9"),
    ],
)
def test_other_documents(
    folder: Path, tmp_path: Path, resolved: Resolved, what: str, change: Any, message: str
) -> None:
    right = manifest(resolved)
    index = pretend(tmp_path / "other", right | {"corpus": right["corpus"] | {what: change}})
    assert refusal(asking(folder, tmp_path / "other")).startswith(message.format(index=index))


def unfinished(index: Path) -> None:
    layout.index_manifest(index).unlink()


def without_block(index: Path) -> None:
    layout.index_block(layout.index_group(index, 0), "00000-0000001").unlink()


@pytest.mark.parametrize(
    ("content", "at"), [([], ""), ({}, ": see model_sha256"), ({"model_sha256": "x"}, ": see computed_in")]
)
def test_a_manifest_that_says_too_little(
    folder: Path, tmp_path: Path, resolved: Resolved, content: Any, at: str
) -> None:
    index = pretend(tmp_path / "other", manifest(resolved))
    write_json(layout.index_manifest(index), content)
    path, mend = layout.index_manifest(index), f"delete it, and run `msif index` of the run whose index {index} is"
    assert refusal(asking(folder, tmp_path / "other")) == f"{path}: not as this version writes it{at}; {mend}"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (unfinished, "holds no finished index; run `msif index` of that run to its end"),
        (without_block, "lacks a file; run `msif index` of that run again"),
    ],
)
def test_an_index_that_is_not_whole(
    folder: Path, tmp_path: Path, resolved: Resolved, spoil: Callable[[Path], None], message: str
) -> None:
    index = pretend(tmp_path / "other", manifest(resolved))
    spoil(index)
    assert refusal(asking(folder, tmp_path / "other")) == f"score.0.index: {index} {message}"


def test_a_runs_own_index_must_be_described(folder: Path) -> None:
    own = asking(folder, folder / "run")
    assert refusal(own) == "score.0.index: this run has no index of 'pre'; add one under `index`"
    assert resolve(own | {"index": [{"stage": "pre"}]}).documents == {
        "stages.0": 4,
        "stages.1": 3,
        "index.0": 4,
        "score.0": 4,
    }
    message = "score.0: its documents or max_tokens are not those of this run's index of 'pre'"
    assert refusal(own | {"index": [{"stage": "pre", "max_tokens": 9}]}) == message


def test_an_indexed_stage_is_fitted_whatever_its_response(folder: Path) -> None:
    description = describe(folder) | {"index": [{"stage": "pre"}]}
    description["stages"][0]["response"] = {"kind": "identity"}
    description["stages"][1]["response"] = {"kind": "identity"}
    assert "stages.0" in resolve(description).corpora


FIGURES = {"rank": 16, "dtype": "int8", "bytes": 1000, "tokens": 50}


@pytest.mark.parametrize("earlier", [False, True])
def test_an_index_built_anew_is_told_from_the_one_that_a_run_began_with(
    folder: Path, tmp_path: Path, resolved: Resolved, earlier: bool
) -> None:
    description = asking(folder, tmp_path / "other") | {"run_dir": str(tmp_path / "run")}
    built = pretend(tmp_path / "other", manifest(resolved, **FIGURES, damping={"m": 0.1}))
    keep_record(resolve(description), print)
    path = layout.run_record(description["run_dir"])
    if earlier:  # a record of a version that kept no hash of the manifest
        record = read_json(path)
        del record["identity"]["indexes"]["score.0"]["manifest"]
        write_json(path, record)
    keep_record(resolve(description), print)
    write_json(layout.index_manifest(built), manifest(resolved, **FIGURES, damping={"m": 0.2}))
    with nullcontext() if earlier else pytest.raises(UserError, match=r"another run: indexes\.score\.0\.manifest was "):
        keep_record(resolve(description), print)
    write_json(layout.index_manifest(built), manifest(resolved, **FIGURES | {"rank": 8}))
    with pytest.raises(UserError, match=r"another run: indexes\.score\.0\.rank was 16 and is 8"):
        keep_record(resolve(description), print)
