"""Stages with an objective: what is wrong with their description or their files is one line, before any work."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import pytest
from corpora import write_lines
from descriptions import Description, changed, edit_config
from safetensors.torch import load_file, save_file

from msif_ray.config import parse_run
from msif_ray.errors import UserError
from msif_ray.preflight import check

NAMES = {0: "negative", 1: "positive"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    base, tokenizer = models.build_model("gpt_neox", 1), models.build_tokenizer(pad=True)
    models.save(base, tokenizer, folder / "base")
    tuned = models.classifier(models.perturb(base, 2), 3, labels=2, id2label=NAMES)
    models.save(tuned, tokenizer, folder / "classifier")
    write_lines(folder / "base.jsonl", models.random_documents(1, 4, prefix="base"))
    write_lines(folder / "labelled.jsonl", models.random_texts(2, 4, labels=2))
    models.save(models.perturb(base, 3), tokenizer, folder / "preferring")
    write_lines(folder / "pairs.jsonl", models.random_pairs(4, 4))
    write_lines(folder / "queries.jsonl", models.random_documents(3, 2, (3, 6), completions=True, prefix="query"))
    asked = models.random_texts(3, 2, (2, 5), labels=2)
    write_lines(folder / "asked.jsonl", [{**text, "label": NAMES[int(str(text["label"]))]} for text in asked])
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    return tmp_path


def describe(folder: Path) -> Description:
    labelled = {"path": str(folder / "labelled.jsonl"), "text": "text", "label": "label", "id": "id"}
    base = {"path": str(folder / "base.jsonl"), "text": "text", "id": "id"}
    return {
        "run_dir": str(folder / "run"),
        "stages": [
            {"name": "pre", "model": str(folder / "base"), "documents": base},
            {
                "name": "tune",
                "model": str(folder / "classifier"),
                "documents": labelled,
                "objective": "classification",
            },
        ],
        "queries": {"path": str(folder / "asked.jsonl"), "text": "text", "label": "label", "id": "id"},
        "score": [{"stage": "pre"}, {"stage": "tune"}],
    }


def test_a_classifier_shares_its_backbone_s_maps_and_has_classes(folder: Path) -> None:
    resolved = check(parse_run(describe(folder)))
    assert resolved.stages[0].maps == resolved.stages[1].maps and "score" not in resolved.maps
    assert resolved.stages[1].classes == ("negative", "positive") and resolved.stages[0].classes == ()
    assert resolved.completion_tokens == (1, 1)


DESCRIPTIONS: dict[str, tuple[str, Any, str]] = {
    "no label": (
        "stages.1.documents.label",
        ...,
        r"stages\.1\.documents: the objective of 'tune' is classification; name a text and its class: `text` and",
    ),
    "a label for a language model": (
        "stages.0.documents.label",
        "label",
        r"stages\.0\.documents: these are of the objective classification, which 'pre' has not; give",
    ),
    "scored documents without a label": (
        "score.1.documents",
        {"path": "x.jsonl", "text": "text"},
        r"score\.1\.documents: the objective of 'tune' is classification; name",
    ),
    "a label without a text": (
        "stages.1.documents",
        {"path": "x.jsonl", "completion": "c", "label": "label"},
        r"stages\.1\.documents: `label` goes with `text`",
    ),
    "an unknown objective": (
        "stages.1.objective",
        "regression",
        r"stages\.1\.objective\.kind: give one of classification, dpo, not 'regression'",
    ),
    "an unknown key": (
        "stages.1.objective",
        {"kind": "classification", "cut": True},
        r"stages\.1\.objective\.cut: unknown key",
    ),
    "queries without a class": ("queries.label", ..., r"queries: `text` and `label` go together"),
    "queries of completions": (
        "queries",
        {"path": "q.jsonl"},
        r"queries: the last stage, 'tune', classifies; name `text` and `label`",
    ),
    "a language model that is said to classify": (
        "stages.1.model",
        "{folder}/base",
        r"stages\.1\.objective: the model is GPTNeoXForCausalLM, which has no classification head; name",
    ),
    "a tracked head": ("modules", ["*.mlp.*", "score"], r"modules: score is a classification head, which no other"),
}


@pytest.mark.parametrize("case", DESCRIPTIONS)
def test_a_fault_in_the_description_is_one_line(folder: Path, case: str) -> None:
    key, value, message = DESCRIPTIONS[case]
    value = value.replace("{folder}", str(folder)) if isinstance(value, str) else value
    modules = key == "modules"
    with pytest.raises(UserError, match=f"^(run description: )?{message}") as error:
        found = changed(describe(folder), key, value)
        check(
            parse_run(found | {"stages": found["stages"][::-1][:1], "score": [{"stage": "tune"}]} if modules else found)
        )
    assert "\n" not in str(error.value)


def test_a_classifier_that_is_not_said_to_classify_is_refused(folder: Path) -> None:
    description = changed(describe(folder), "stages.1.objective", ...)
    description["stages"][1]["documents"] = description["stages"][0]["documents"]
    description["queries"] = {"path": write_lines(folder / "q.jsonl", [{"prompt": "the", "completion": " sea"}])}
    with pytest.raises(UserError, match=r"^stages\.1\.model: GPTNeoXForSequenceClassification has a classification"):
        check(parse_run(description))


def test_a_class_is_not_asked_of_a_language_model(folder: Path) -> None:
    description = describe(folder) | {"score": [{"stage": "pre"}]}
    description["stages"] = description["stages"][:1]
    with pytest.raises(UserError, match=r"queries\.label: the last stage, 'pre', does not classify; name `prompt`"):
        parse_run(description)


def drop_head(path: Path) -> None:
    tensors = load_file(path)
    save_file({name: tensor for name, tensor in tensors.items() if name != "score.weight"}, path, {"format": "pt"})


CONFIG, MODEL = "classifier/config.json", "classifier/model.safetensors"
FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "regression": (
        lambda f: edit_config(f / CONFIG, problem_type="regression"),
        r"stages\.1\.objective: GPTNeoXForSequenceClassification is of problem_type regression; only",
    ),
    "several labels": (
        lambda f: edit_config(f / CONFIG, problem_type="multi_label_classification"),
        r"stages\.1\.objective: .* is of problem_type multi_label_classification; only",
    ),
    "one label": (
        lambda f: edit_config(f / CONFIG, id2label={"0": "a"}, label2id={"a": 0}, num_labels=1),
        r"stages\.1\.objective: .* is of problem_type a single label, which is a regression; only",
    ),
    "an encoder and a decoder": (
        lambda f: edit_config(
            f / CONFIG, model_type="bart", architectures=["BartForSequenceClassification"], is_encoder_decoder=True
        ),
        r"stages\.1\.model: BartForSequenceClassification has an encoder and a decoder; only one stack of blocks",
    ),
    "classes from 1": (
        lambda f: edit_config(f / CONFIG, id2label={"1": "a", "2": "b"}),
        r"stages\.1\.model: id2label of its config\.json does not number its classes from 0",
    ),
    "classes of one name": (
        lambda f: edit_config(f / CONFIG, id2label={"0": "a", "1": "a"}),
        r"stages\.1\.model: id2label of its config\.json calls several classes 'a'; rename all but one",
    ),
    "no named kind": (
        lambda f: edit_config(f / CONFIG, architectures=None),
        r"stages\.1\.objective: the model is a model of no named kind, which has no classification head; name",
    ),
    "no head": (lambda f: drop_head(f / MODEL), r"stages\.1\.model: .*classifier has no tensor score\.weight, which"),
    "an unknown class": (
        lambda f: write_lines(f / "asked.jsonl", [{"id": "q", "text": "the", "label": "good"}]),
        r"queries: 'q': label 'good' is no class of the model: negative, positive",
    ),
    "a null text": (
        lambda f: write_lines(f / "asked.jsonl", [{"id": "q", "text": None, "label": 1}]),
        r"queries: .*asked\.jsonl row 0 \(id 'q'\): 'text' is null, not text",
    ),
    "an empty text": (
        lambda f: write_lines(f / "asked.jsonl", [{"id": "q", "text": "", "label": 1}]),
        r"queries: .*asked\.jsonl row 0 \(id 'q'\): the text is empty",
    ),
    "a long text": (
        lambda f: write_lines(f / "asked.jsonl", [{"id": "q", "text": "the" + " sea" * 70, "label": 1}]),
        rf"queries: 'q' has \d+ tokens, more than the {models.CONTEXT} of 'tune'.*; shorten its text",
    ),
    "no column": (
        lambda f: write_lines(f / "labelled.jsonl", [{"id": "a", "text": "b"}]),
        r"stages\.1\.documents: .*labelled\.jsonl has no column 'label'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FILES)
def test_a_fault_in_a_file_is_one_line(folder: Path, case: str) -> None:
    spoil, message = FILES[case]
    spoil(folder)
    with pytest.raises(UserError, match=f"^{message}") as error:
        check(parse_run(describe(folder)))
    assert "\n" not in str(error.value)


def test_a_long_query_is_cut_where_the_stage_s_texts_are(folder: Path) -> None:
    write_lines(folder / "asked.jsonl", [{"id": "q", "text": "the" + " sea" * 70, "label": 1}])
    description = describe(folder)
    description["stages"][1] |= {"objective": {"kind": "classification", "truncate": True}, "fit": {"max_tokens": 9}}
    assert check(parse_run(description)).query_tokens == (9,)
