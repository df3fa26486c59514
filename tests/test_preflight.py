"""Whatever is wrong with a run is said in one line before any replica is asked for."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from corpora import write_lines
from descriptions import Description, changed, edit_config
from safetensors.torch import load_file, save_file

from msif_ray.config import parse_run
from msif_ray.corpus import reader
from msif_ray.errors import UserError
from msif_ray.preflight import Resolved, check

BASE = models.random_documents(1, 4, prefix="base")
TUNING = models.random_documents(2, 3, completions=True, prefix="tune")
QUERIES = models.random_documents(3, 2, (3, 6), completions=True, prefix="query")


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    models.save_pair(folder, "gpt_neox", seed=1, dtype=torch.float32)
    return folder


@pytest.fixture
def folder(pair: Path, tmp_path: Path) -> Path:
    """Two stages and their corpora, to be spoilt by the test."""
    shutil.copytree(pair, tmp_path, dirs_exist_ok=True)
    write_lines(tmp_path / "base.jsonl", BASE)
    write_lines(tmp_path / "tune.jsonl", TUNING)
    write_lines(tmp_path / "queries.jsonl", QUERIES)
    return tmp_path


def describe(folder: Path) -> Description:
    tuning = {"path": str(folder / "tune.jsonl"), "prompt": "prompt", "completion": "completion", "id": "id"}
    base = {"path": str(folder / "base.jsonl"), "text": "text", "id": "id"}
    return {
        "run_dir": str(folder / "run"),
        "stages": [
            {"name": "pre", "model": str(folder / "stage0"), "documents": base},
            {"name": "tune", "model": str(folder / "stage1"), "documents": tuning},
        ],
        "queries": {"path": str(folder / "queries.jsonl"), "id": "id"},
        "score": [{"stage": "pre"}],
    }


def resolve(description: Description) -> Resolved:
    return check(parse_run(description))


def test_what_is_right_is_resolved(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    resolved = resolve(describe(folder) | {"run_dir": "run"})
    assert resolved.run.run_dir == str(folder / "run")
    assert not list((folder / "run").iterdir())
    assert [stage.fit.max_tokens for stage in resolved.run.stages] == [models.CONTEXT] * 2
    assert resolved.run.score[0].max_tokens == models.CONTEXT
    assert resolved.documents == {"stages.0": 4, "stages.1": 3, "score.0": 4}
    assert [file.name for file in resolved.corpora["score.0"]] == ["base.jsonl"]
    assert [query.id for query in resolved.queries] == [query["id"] for query in QUERIES]
    assert resolved.maps["gpt_neox.layers.0.mlp.dense_h_to_4h"] == (24, 17)
    assert len(resolved.maps) == 8
    first, second = resolved.stages
    assert (first.name, first.context) == ("pre", models.CONTEXT)
    assert len(first.model_hash) == 64 and first.model_hash != second.model_hash


def test_the_hash_is_that_of_the_weights_wherever_they_lie(folder: Path) -> None:
    description = describe(folder)
    shutil.copytree(folder / "stage0", folder / "copy")
    description["stages"][1]["model"] = str(folder / "copy")
    first, second = resolve(description).stages
    assert first.model_hash == second.model_hash


def test_a_stage_that_answers_with_the_identity_needs_no_documents(folder: Path) -> None:
    description = describe(folder)
    description["stages"][1] |= {"documents": None, "response": {"kind": "identity"}}
    assert resolve(description).documents == {"stages.0": 4, "score.0": 4}


def test_parquet_without_ids_is_named_by_file_and_row(folder: Path) -> None:
    description = describe(folder)
    pq.write_table(pa.table({"text": ["the sea", None]}), folder / "base.parquet")
    description["stages"][0]["documents"] = {"path": str(folder / "*.parquet"), "text": "text"}
    assert resolve(description).documents["score.0"] == 2


def spoil_tensor(path: Path, value: float) -> None:
    tensors = load_file(path)
    tensors["gpt_neox.layers.1.mlp.dense_4h_to_h.weight"][3, 2] = value
    save_file(tensors, path, {"format": "pt"})


def rename(path: Path, name: str) -> None:
    path.rename(path.parent / name)


def other_stage(folder: Path, **options: int) -> None:
    shutil.rmtree(folder / "stage1")
    models.save(models.build_model("gpt_neox", 1, **options), models.build_tokenizer(), folder / "stage1")


def without_eos(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (folder / "stage1" / name).unlink(missing_ok=True)
    models.build_tokenizer(eos=False).save_pretrained(folder / "stage1")


def added_token(folder: Path) -> None:
    """A tokenizer that knows a token more than its model, and a query that uses it."""
    tokenizer = models.build_tokenizer()
    tokenizer.add_tokens(["<|user|>"])
    tokenizer.save_pretrained(folder / "stage1")
    query(folder, prompt="<|user|> the sea")


def query(folder: Path, **changes: Any) -> None:
    write_lines(folder / "queries.jsonl", [QUERIES[0], QUERIES[1] | changes])


MODEL, SIZE = "model.safetensors", len(models.VOCABULARY)
FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no corpus": (lambda f: (f / "base.jsonl").unlink(), r"stages\.0\.documents\.path: no file matches .*base"),
    "no document": (lambda f: write_lines(f / "base.jsonl", []), r"stages\.0\.documents.*no document"),
    "no column": (
        lambda f: write_lines(f / "base.jsonl", [{"id": "a", "words": "b"}]),
        r"stages\.0\.documents: .*base\.jsonl has no column 'text'",
    ),
    "not JSON": (
        lambda f: (f / "tune.jsonl").write_text('{"id": 1'),
        r"stages\.1\.documents\.path: .*tune\.jsonl line 1: not JSON",
    ),
    "duplicate id": (
        lambda f: write_lines(f / "base.jsonl", [*BASE, BASE[1]]),
        r"stages\.0\.documents\.id: .*base\.jsonl row 4 .*'base-1'.* of .*base\.jsonl row 1",
    ),
    "no id": (
        lambda f: write_lines(f / "base.jsonl", [*BASE, {"id": None, "text": "the"}]),
        r"stages\.0\.documents\.id: .*base\.jsonl row 4 has no 'id'",
    ),
    "no query": (lambda f: write_lines(f / "queries.jsonl", []), r"queries.*queries\.jsonl.*no document"),
    "duplicate query": (lambda f: query(f, id="query-0"), r"queries\.id: .*row 1 .*'query-0'.*row 0"),
    "empty completion": (lambda f: query(f, completion=""), r"queries: .*queries\.jsonl row 1 .*completion is empty"),
    "null prompt": (lambda f: query(f, prompt=None), r"queries: .*queries\.jsonl row 1 .*'prompt' is null"),
    "number for a completion": (lambda f: query(f, completion=3), r"queries: .*row 1 .*'completion' is int, not text"),
    "long query": (
        lambda f: query(f, prompt="the" + " sea" * models.CONTEXT),
        rf"queries: .*'query-1'.* tokens, more than the {models.CONTEXT} of 'tune'",
    ),
    "unknown token": (added_token, rf"queries: 'query-1': token {SIZE} is not among the model's {SIZE}"),
    "no model": (lambda f: shutil.rmtree(f / "stage1"), r"stages\.1\.model: .*stage1: no such folder"),
    "no configuration": (lambda f: (f / "stage1/config.json").unlink(), r"stages\.1\.model: .*has no config\.json"),
    "pickled weights": (
        lambda f: rename(f / "stage1" / MODEL, "pytorch_model.bin"),
        r"stages\.1\.model: .*stage1 has no \.?safetensors",
    ),
    "cut weights": (
        lambda f: (f / "stage1" / MODEL).write_bytes((f / "stage1" / MODEL).read_bytes()[:-9]),
        r"stages\.1\.model: .*model\.safetensors is not whole",
    ),
    "NaN in the weights": (
        lambda f: spoil_tensor(f / "stage1" / MODEL, float("nan")),
        r"stages\.1\.model: .*model\.safetensors: .*gpt_neox\.layers\.1\.mlp\.dense_4h_to_h\.weight .*not finite",
    ),
    "infinity in the weights": (
        lambda f: spoil_tensor(f / "stage0" / MODEL, float("-inf")),
        r"stages\.0\.model: .*dense_4h_to_h\.weight .*not finite",
    ),
    "unknown kind of model": (
        lambda f: edit_config(f / "stage1/config.json", model_type="nothing"),
        r"stages\.1\.model: .*stage1.*nothing",
    ),
    "code of the model's own": (
        lambda f: edit_config(f / "stage1/config.json", model_type="own", auto_map={"AutoConfig": "own.Own"}),
        r"stages\.1\.model: ",
    ),
    "other shapes": (
        lambda f: other_stage(f, intermediate=32),
        r"stages\.1\.model: gpt_neox\.layers\.0\.mlp\.dense_h_to_4h is 24 x 17 in 'pre' and 32 x 17 in 'tune'",
    ),
    "more layers": (
        lambda f: other_stage(f, layers=3),
        r"stages\.1\.model: gpt_neox\.layers\.2\.\S+ is not there in 'pre'",
    ),
    "no tokenizer": (
        lambda f: [path.unlink() for path in (f / "stage1").glob("*token*")],
        r"stages\.1\.tokenizer: ",
    ),
    "no EOS": (without_eos, r"stages\.1\.tokenizer: .*no EOS token.*append_eos"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_fault_in_a_file_is_one_line(folder: Path, case: str) -> None:
    spoil, message = FILES[case]
    spoil(folder)
    with pytest.raises(UserError, match=f"^{message}") as error:
        resolve(describe(folder))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("run_dir", "ftp://host/run", r"ftp://host/run: only local paths, s3:// and gs://"),
        ("run_dir", "{folder}/base.jsonl/run", r"run_dir: .*base\.jsonl/run: "),
        ("run_dir", "{folder}/a*b/run", r"run_dir: .*/a\*b/run: \* stands for other names .*; name a folder without"),
        ("run_dir", "s3://b/why?", r"run_dir: s3://b/why\?: \? stands for other names"),
        ("stages.1.documents", None, r"stages\.1\.documents: 'tune' needs documents .*`factors:`"),
        ("stages.0.documents.text", "body", r"stages\.0\.documents: .*base\.jsonl has no column 'body'"),
        ("stages.0.documents.path", "{folder}/stage0", r"stages\.0\.documents\.path: .*is a folder"),
        ("stages.0.fit", {"max_tokens": 65}, r"stages\.0\.fit\.max_tokens: 65 is more than the 64"),
        ("score.0.max_tokens", 65, r"score\.0\.max_tokens: 65 is more than the 64"),
        ("score.0.out_of", 3, r"score\.0\.out_of: 3 is less than the 4 documents there are"),
        ("modules", ["*.nothing"], r"modules: '\*\.nothing' matches no linear map"),
        ("queries.completion", "answer", r"queries: .*queries\.jsonl has no column 'answer'"),
        ("stages.0.tokenizer", "{folder}/none", r"stages\.0\.tokenizer: .*none"),
    ],
)
def test_a_fault_in_the_description_is_one_line(folder: Path, key: str, value: Any, message: str) -> None:
    description = describe(folder)
    value = value.replace("{folder}", str(folder)) if isinstance(value, str) else value
    changed(description, key, value)
    with pytest.raises(UserError, match=f"^{message}") as error:
        resolve(description)
    assert "\n" not in str(error.value)


def grow(folder: Path) -> None:
    """Two tokens more in the last stage's vocabulary."""
    model, tokenizer = models.load(folder / "stage1", torch.float32)
    model.resize_token_embeddings(SIZE + 2, mean_resizing=False)
    tokenizer.add_tokens(["<|user|>", "<|assistant|>"])
    models.save(model, tokenizer, folder / "stage1", torch.float32)


def test_a_grown_vocabulary_is_refused_only_where_the_head_is_tracked(folder: Path) -> None:
    grow(folder)
    first, second = resolve(describe(folder)).stages
    assert (first.vocabulary, second.vocabulary) == (SIZE, SIZE + 2) and first.maps == second.maps
    with pytest.raises(UserError) as error:
        resolve(describe(folder) | {"modules": ["*.mlp.*", "lm_head"]})
    assert str(error.value) == (
        f"stages.1.model: lm_head is {SIZE} x 16 in 'pre' and {SIZE + 2} x 16 in 'tune'; all stages need the same "
        "tracked maps: leave the head of a vocabulary that grew out of `modules`"
    )


def test_a_corpus_is_read_once_whatever_it_is_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    lines = reader._lines
    monkeypatch.setattr(reader, "_lines", lambda path: opened.append(Path(path).name) or lines(path))
    description = describe(folder)
    documents = description["stages"][1]["documents"]
    description["score"] += [
        {"stage": "tune"},
        {"stage": "tune", "name": "b", "documents": documents | {"append_eos": 0}},
    ]
    resolved = resolve(description)
    assert resolved.documents == {"stages.0": 4, "stages.1": 3, "score.0": 4, "score.1": 3, "score.2": 3}
    assert sorted(opened) == ["base.jsonl", "queries.jsonl", "queries.jsonl", "tune.jsonl"]
