"""Stages of preferences: which model is their reference, and what is wrong with them is one line, before any work."""

import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import models
import pytest
from descriptions import Description, changed, edit_config
from test_objective_checks import describe, folder, saved

from msif_ray import layout, store
from msif_ray.cluster.references import ReferenceJob, ReferenceTask
from msif_ray.config import parse_run
from msif_ray.corpus.preferences import Pairs
from msif_ray.errors import UserError
from msif_ray.preflight import check
from msif_ray.record import keep_record
from msif_ray.references import reference_passes
from msif_ray.setup import corpus_blocks, model_setup, reference_setup

__all__ = ["folder", "saved"]  # fixtures

PAIR_COLUMNS = {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected", "id": "id"}


def preferring(folder: Path) -> Description:
    description = describe(folder) | {"queries": {"path": str(folder / "queries.jsonl"), "id": "id"}}
    description["stages"][1] = {
        "name": "prefer",
        "model": str(folder / "preferring"),
        "documents": {"path": str(folder / "pairs.jsonl")} | PAIR_COLUMNS,
        "objective": {"kind": "dpo", "beta": 0.2},
    }
    return description | {"score": [{"stage": "pre"}, {"stage": "prefer"}]}


def test_the_stage_before_is_the_reference_unless_another_is_named(folder: Path) -> None:
    description = preferring(folder)
    resolved = check(parse_run(description))
    assert {index: model.model_hash for index, model in resolved.references.items()} == {
        1: resolved.stages[0].model_hash
    }
    shutil.copytree(folder / "preferring", folder / "other")
    description["stages"][1]["objective"]["reference"] = str(folder / "other")
    named = check(parse_run(description)).references[1]
    assert (named.model_path, named.model_hash) == (str(folder / "other"), resolved.stages[1].model_hash)


def test_of_means_the_reference_is_of_means_and_of_sums_nothing_is_written_down(folder: Path) -> None:
    """So that a run of sums is the run that it was before there was the key."""
    for value in (False, True):
        run = parse_run(changed(preferring(folder), "stages.1.objective.length_normalised", value))
        written = {"kind": "dpo", "beta": 0.2, "reference": None} | ({"length_normalised": True} if value else {})
        assert run.model_dump(mode="json")["stages"][1]["objective"] == written
        resolved = check(run)
        (each,) = reference_passes(run, resolved.corpora)
        blocks = corpus_blocks(resolved, each.key, each.documents)
        assert ReferenceTask(reference_setup(resolved, each), blocks, folder).job == ReferenceJob(value)
        setup = model_setup(resolved, each.stage, each.documents, each.max_tokens)
        assert setup.objective == Pairs(0.2, length_normalised=value)


def save_small(folder: Path, **options: int) -> str:
    models.save(models.build_model("gpt_neox", 1, **options), models.build_tokenizer(), folder / "small")
    return str(folder / "small")


PREFERENCES: dict[str, tuple[str, Any, str]] = {
    "no rejected": ("stages.1.documents.rejected", ..., r"stages\.1\.documents: `chosen` and `rejected` go together"),
    "no pairs": (
        "stages.1.documents",
        {"path": "x.jsonl", "text": "text"},
        r"stages\.1\.documents: the objective of 'prefer' is dpo; name two completions: `chosen` and `rejected`",
    ),
    "pairs for a language model": (
        "stages.1.objective",
        ...,
        r"stages\.1\.documents: these are of the objective dpo, which 'prefer' has not; give",
    ),
    "a negative beta": ("stages.1.objective.beta", -1, r"stages\.1\.objective\.beta: input should be greater than 0"),
    "no reference": (
        "stages.1.objective.reference",
        "{folder}/none",
        r"stages\.1\.objective\.reference: .*none: no such folder",
    ),
    "a classifier as reference": (
        "stages.1.objective.reference",
        "{folder}/classifier",
        r"stages\.1\.objective\.reference: GPTNeoXForSequenceClassification has a classification head",
    ),
    "a label beside": ("stages.1.documents.label", "label", r"stages\.1\.documents: `label` goes with `text`"),
    "a class asked": (
        "queries",
        {"path": "q.jsonl", "text": "text", "label": "label"},
        r"queries\.label: the last stage, 'prefer', does not classify",
    ),
    "no column": (
        "stages.1.documents.chosen",
        "better",
        r"stages\.1\.documents: .*pairs\.jsonl has no column 'better'",
    ),
}


@pytest.mark.parametrize("case", PREFERENCES)
def test_a_fault_in_preferences_is_one_line(folder: Path, case: str) -> None:
    key, value, message = PREFERENCES[case]
    value = value.replace("{folder}", str(folder)) if isinstance(value, str) else value
    with pytest.raises(UserError, match=f"^(run description: )?{message}") as error:
        check(parse_run(changed(preferring(folder), key, value)))
    assert "\n" not in str(error.value)


def test_a_reference_with_fewer_tokens_is_refused(folder: Path) -> None:
    small = save_small(folder, vocab=40)
    description = changed(preferring(folder), "stages.1.objective.reference", small)
    message = r"^stages\.1\.objective\.reference: .*small knows 40 tokens, fewer than 'prefer'; name a reference model"
    with pytest.raises(UserError, match=message):
        check(parse_run(description))


@pytest.mark.parametrize("named", [False, True])
def test_a_reference_that_numbers_the_same_tokens_otherwise_is_refused(folder: Path, named: bool) -> None:
    reference = shutil.copytree(folder / "base", folder / "other") if named else folder / "base"
    description = changed(preferring(folder), "stages.1.objective.reference", str(reference) if named else None)
    path = reference / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    numbers = tokenizer["model"]["vocab"]
    the, a = numbers["the"], numbers["a"]
    numbers |= {"the": a, "a": the}
    path.write_text(json.dumps(tokenizer))
    message = rf"^stages\.1\.objective\.reference: \S+ has other tokens than 'prefer': 'the' is {a} by .*, and {the} by"
    with pytest.raises(UserError, match=message) as error:
        check(parse_run(description))
    assert "\n" not in str(error.value)
    if named:  # it is given tokens, and needs no tokenizer
        for file in reference.glob("*token*"):
            file.unlink()
        assert check(parse_run(description)).references[1].model_path == str(reference)


@pytest.mark.parametrize("of_index", [False, True])
def test_a_reference_with_a_shorter_context_is_refused(folder: Path, of_index: bool) -> None:
    small = save_small(folder)
    edit_config(folder / "small/config.json", max_position_embeddings=32)
    description = changed(preferring(folder), "stages.1.objective.reference", small)
    if of_index:
        description["stages"][1]["fit"] = {"max_tokens": 32}
        description["index"] = [{"stage": "prefer", "max_tokens": 64}]
    message = r"^stages\.1\.objective\.reference: max_tokens of 'prefer', 64, is more than the 32 tokens of its context"
    with pytest.raises(UserError, match=message):
        check(parse_run(description))


@pytest.mark.parametrize(
    ("before", "why"), [(None, "is the first stage"), ("tune", "follows 'tune', which classifies")]
)
def test_without_a_language_model_before_a_reference_is_named(folder: Path, before: str | None, why: str) -> None:
    description, other = preferring(folder), describe(folder)
    stages = [other["stages"][1]] if before else []
    description |= {"stages": [*stages, description["stages"][1]], "score": [{"stage": "prefer"}]}
    with pytest.raises(UserError, match=rf"stages\.{len(stages)}\.objective: 'prefer' {why}; name a `reference` model"):
        parse_run(description)


def test_factors_of_another_objective_are_refused(folder: Path) -> None:
    resolved = check(parse_run(preferring(folder)))
    other = layout.factors(str(folder / "other"), "prefer")
    maps = {name: {"shape": list(shape)} for name, shape in resolved.maps.items()}
    for path in layout.factor_files(other, resolved.maps):
        store.write_atomic(path, b"")
    about = {"model_sha256": resolved.stages[1].model_hash, "files": resolved.stages[1].files, "maps": maps}
    description = changed(preferring(folder), "stages.1.factors", str(folder / "other"))
    older = {"kind": "dpo", "beta": 0.2, "reference_sha256": resolved.stages[0].model_hash}
    own = older | {"reference_config_sha256": resolved.stages[0].files["config.json"]}
    for objective in (older, own):
        store.write_json(layout.factors_manifest(other), about | {"objective": objective})
        assert check(parse_run(description)).reused.keys() == {"prefer"}
    names = {"beta": 0.1, "reference_sha256": "another", "reference_config_sha256": "another"}
    others = [*({name: value} for name, value in names.items()), {"length_normalised": True}]
    for objective in (*(own | other for other in others), None):
        store.write_json(layout.factors_manifest(other), about | {"objective": objective})
        with pytest.raises(UserError, match=r"^stages\.1\.factors: .* was fitted with another objective; use the same"):
            check(parse_run(description))


@pytest.mark.parametrize("earlier", [False, True])
def test_another_configuration_of_the_reference_model_is_another_run(folder: Path, earlier: bool) -> None:
    shutil.copytree(folder / "preferring", folder / "other")
    run = parse_run(changed(preferring(folder), "stages.1.objective.reference", str(folder / "other")))
    keep_record(check(run), print)
    path = layout.run_record(run.run_dir)
    if earlier:  # a record of a version that kept the hash of the weights alone
        record = store.read_json(path)
        del record["identity"]["references"]["prefer"]["files"]
        store.write_json(path, record)
    keep_record(check(run), print)
    edit_config(folder / "other" / "config.json", layer_norm_eps=1e-3)
    message = r"another run: references\.prefer\.files\.config\.json was "
    with nullcontext() if earlier else pytest.raises(UserError, match=message):
        keep_record(check(run), print)
