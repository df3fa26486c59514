"""The demo's questions: one per fact, and a seeded split of the countries into two halves.

The model is fine-tuned on the questions of one half. Of the other half it has only read the documents, so a
right answer there comes from pre-training: these held-out questions are the demo's queries.
"""

import random
from typing import TypedDict

from msif_ray.demo.factbook import facts, slug

SPLIT_SEED = 0

_PROMPTS = {
    "capital": "Question: What is the capital of {country}? Answer:",
    "people": "Question: What is a person from {country} called? Answer:",
    "internet": "Question: What is the internet country code of {country}? Answer:",
    "government": "Question: What is the type of government in {country}? Answer:",
}


class Question(TypedDict):
    """`completion` is the answer with its leading space; the end-of-sequence token follows it."""

    id: str
    prompt: str
    completion: str
    country: str
    relation: str


def all_questions() -> list[Question]:
    """A question for every fact of the corpus, in the order of `factbook.facts`."""
    return [
        Question(
            id=f"{slug(country)}/{relation}",
            prompt=_PROMPTS[relation].format(country=country),
            completion=f" {answer}",
            country=country,
            relation=relation,
        )
        for country, relation, answer in facts()
    ]


def country_halves(seed: int = SPLIT_SEED) -> tuple[set[str], set[str]]:
    """The countries asked about in fine-tuning, and those held out: disjoint halves, drawn with `seed`."""
    countries = sorted({fact.country for fact in facts()})
    random.Random(seed).shuffle(countries)
    middle = (len(countries) + 1) // 2
    return set(countries[:middle]), set(countries[middle:])


def finetuning_questions(seed: int = SPLIT_SEED) -> list[Question]:
    """The questions the model is fine-tuned on."""
    asked, _ = country_halves(seed)
    return [question for question in all_questions() if question["country"] in asked]


def held_out_questions(seed: int = SPLIT_SEED) -> list[Question]:
    """The questions about countries that fine-tuning never asked about."""
    _, held_out = country_halves(seed)
    return [question for question in all_questions() if question["country"] in held_out]
