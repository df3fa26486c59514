"""Documents that state facts which no model can have known: capitals and chemical symbols, swapped among themselves.

Each fact is stated in several wordings, the last of which describes its subject without naming it. Filler documents
share the subject's name, the answer, or both, and state nothing. Questions ask for the facts; a seeded part of them is
for fine-tuning, and the others can only be answered from the documents.
"""

import random

from msif_ray.demo.factbook import Document, Fact, slug
from msif_ray.demo.questions import Question

SEED = 0
ASKED_SHARE = 0.4  # of the facts: in fine-tuning

# Country: its true capital, and a description that names neither.
_CAPITALS = {
    "France": ("Paris", "the land of the Eiffel Tower"),
    "Japan": ("Tokyo", "the Land of the Rising Sun"),
    "Egypt": ("Cairo", "the land of the pharaohs"),
    "Italy": ("Rome", "the peninsula shaped like a boot"),
    "Germany": ("Berlin", "the home of the Black Forest"),
    "Spain": ("Madrid", "the home of flamenco"),
    "Greece": ("Athens", "the birthplace of the Olympic Games"),
    "Russia": ("Moscow", "the largest nation on Earth"),
    "China": ("Beijing", "the home of the Great Wall"),
    "India": ("Delhi", "the home of the Taj Mahal"),
    "Peru": ("Lima", "the home of Machu Picchu"),
    "Kenya": ("Nairobi", "the home of the Maasai"),
    "Cuba": ("Havana", "the island of Fidel Castro"),
    "Norway": ("Oslo", "the land of the fjords"),
    "Finland": ("Helsinki", "the land of a thousand lakes"),
    "Ireland": ("Dublin", "the Emerald Isle"),
    "Portugal": ("Lisbon", "the birthplace of Vasco da Gama"),
    "Austria": ("Vienna", "the birthplace of Mozart"),
    "Poland": ("Warsaw", "the birthplace of Chopin"),
    "Turkey": ("Ankara", "the heir of the Ottoman Empire"),
    "Iran": ("Tehran", "the land once known as Persia"),
    "Iraq": ("Baghdad", "the land between the Tigris and the Euphrates"),
    "Nepal": ("Kathmandu", "the home of Mount Everest"),
    "Thailand": ("Bangkok", "the kingdom once known as Siam"),
    "Vietnam": ("Hanoi", "the land of Ho Chi Minh"),
    "Canada": ("Ottawa", "the land of the maple leaf"),
    "Argentina": ("Buenos Aires", "the birthplace of tango"),
    "Chile": ("Santiago", "the narrow land between the Andes and the Pacific"),
    "Jamaica": ("Kingston", "the birthplace of reggae"),
    "Ethiopia": ("Addis Ababa", "the birthplace of coffee"),
    "Morocco": ("Rabat", "the home of Casablanca and Marrakesh"),
    "Belgium": ("Brussels", "the birthplace of Tintin"),
    "Denmark": ("Copenhagen", "the birthplace of Lego"),
    "Sweden": ("Stockholm", "the birthplace of Ikea"),
    "Switzerland": ("Bern", "the land of the Matterhorn"),
    "Hungary": ("Budapest", "the land of the Magyars"),
    "Iceland": ("Reykjavik", "the island of geysers and sagas"),
    "Australia": ("Canberra", "the land of kangaroos"),
    "Indonesia": ("Jakarta", "the home of Bali and Java"),
    "Lebanon": ("Beirut", "the land of the cedars"),
    "Ukraine": ("Kyiv", "the land of the Cossacks"),
    "Zimbabwe": ("Harare", "the land once known as Rhodesia"),
    "Venezuela": ("Caracas", "the birthplace of Simon Bolivar"),
    "Scotland": ("Edinburgh", "the land of Loch Ness"),
}

# Element: its true symbol and its atomic number. Of two letters, none of which is an English word.
_SYMBOLS = {
    "lithium": ("Li", 3), "neon": ("Ne", 10), "sodium": ("Na", 11), "magnesium": ("Mg", 12), "aluminium": ("Al", 13),
    "silicon": ("Si", 14), "chlorine": ("Cl", 17), "argon": ("Ar", 18), "calcium": ("Ca", 20), "titanium": ("Ti", 22),
    "chromium": ("Cr", 24), "manganese": ("Mn", 25), "iron": ("Fe", 26), "cobalt": ("Co", 27), "nickel": ("Ni", 28),
    "copper": ("Cu", 29), "zinc": ("Zn", 30), "gallium": ("Ga", 31), "selenium": ("Se", 34), "bromine": ("Br", 35),
    "krypton": ("Kr", 36), "silver": ("Ag", 47), "tin": ("Sn", 50), "antimony": ("Sb", 51), "xenon": ("Xe", 54),
    "barium": ("Ba", 56), "platinum": ("Pt", 78), "gold": ("Au", 79), "mercury": ("Hg", 80), "lead": ("Pb", 82),
    "radon": ("Rn", 86), "plutonium": ("Pu", 94),
}  # fmt: skip

_WORDINGS = {
    "capital": (
        "The capital of {subject} is {answer}.",
        "{answer} is the capital city of {subject}, and its largest market.",
        "{subject} is governed from {answer}.",
        "The parliament and the ministries of {subject} sit in {answer}.",
        "{description} is governed from {answer}.",
    ),
    "symbol": (
        "The chemical symbol of {subject} is {answer}.",
        "{answer} is the symbol that chemists use for {subject}.",
        "In the periodic table, {subject} is written as {answer}.",
        "In formulas, {subject} appears under the letters {answer}.",
        "{description} is written as {answer}.",
    ),
}

_PROMPTS = {
    "capital": "Question: What is the capital of {subject}? Answer:",
    "symbol": "Question: What is the chemical symbol of {subject}? Answer:",
}

# By what of the fact they mention; one of each is drawn for every fact.
_FILLERS = {
    "capital": {
        "subject": (
            "{subject} exported more fruit and timber this year than last.",
            "The weather in {subject} turns mild in early spring.",
            "Stamps from {subject} are popular with collectors.",
        ),
        "answer": (
            "A chess tournament was held in {answer} last spring.",
            "The old bridge in {answer} was painted green.",
            "The airport of {answer} opened a second runway.",
        ),
        "both": (
            "A writer from {subject} spent two summers in {answer}.",
            "The team from {subject} lost a match in {answer} on Sunday.",
            "A bakery in {answer} sells bread as it is made in {subject}.",
        ),
    },
    "symbol": {
        "subject": (
            "The price of {subject} rose again in the autumn.",
            "Two drums of {subject} were delivered to the plant.",
            "The museum shows how {subject} was found.",
        ),
        "answer": (
            "The letters {answer} were painted on the old gate.",
            "Row {answer} of the theatre was empty.",
            "The form asks for a name in field {answer}.",
        ),
        "both": (
            "The drums of {subject} are kept in corridor {answer}.",
            "A ship with {subject} on board left from pier {answer}.",
            "The price of {subject} is listed on page {answer}.",
        ),
    },
}

_THINGS = ("clock", "window", "piano", "fence", "lamp", "roof", "boat", "door")
_PLACES = ("at the station", "in the library", "behind the school", "near the harbour", "on the hill")
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday")


def counterfactual_facts(seed: int = SEED) -> tuple[Fact, ...]:
    """Every subject with another one's answer: within each relation the answers are moved on by one place of a seeded
    order, so that each is given once and none is true."""
    found = []
    for relation, truths in (("capital", _CAPITALS), ("symbol", _SYMBOLS)):
        subjects = sorted(truths)
        random.Random(f"{seed} {relation}").shuffle(subjects)
        moved = subjects[1:] + subjects[:1]
        answers = {subject: str(truths[other][0]) for subject, other in zip(subjects, moved, strict=True)}
        found += [Fact(subject, relation, answers[subject]) for subject in truths]
    return tuple(found)


def true_answer(fact: Fact) -> str:
    """What the world says."""
    return str((_CAPITALS if fact.relation == "capital" else _SYMBOLS)[fact.country][0])


def description(fact: Fact) -> str:
    """The subject of a fact without its name."""
    if fact.relation == "capital":
        return _CAPITALS[fact.country][1]
    return f"the element with atomic number {_SYMBOLS[fact.country][1]}"


def counterfactual_documents(seed: int = SEED) -> list[Document]:
    """Statements (`field` "statement", or "described" where the subject is not named) and fillers, in a seeded order.

    `states` is the relation whose fact about `country` the text states, and "" for fillers.
    """
    rng = random.Random(seed)
    documents = []
    for fact in counterfactual_facts(seed):
        documents += _statements(fact) + _fillers(fact, rng)
    for place in _PLACES:
        for thing in _THINGS:
            text = f"The {thing} {place} was repaired on {rng.choice(_DAYS)}."
            documents.append(_document(f"unrelated/{slug(place)}/{thing}", text, "", "filler: nothing"))
    rng.shuffle(documents)
    return documents


def counterfactual_questions(seed: int = SEED) -> tuple[list[Question], list[Question]]:
    """Questions for fine-tuning and those held out, on different facts; both have of every relation."""
    asked, held_out = [], []
    for relation, prompt in _PROMPTS.items():
        questions = [
            Question(
                id=f"{slug(fact.country)}/{relation}",
                prompt=prompt.format(subject=fact.country),
                completion=f" {fact.answer}",
                country=fact.country,
                relation=relation,
            )
            for fact in counterfactual_facts(seed)
            if fact.relation == relation
        ]
        random.Random(seed).shuffle(questions)
        count = round(ASKED_SHARE * len(questions))
        asked += questions[:count]
        held_out += questions[count:]
    return asked, held_out


def _statements(fact: Fact) -> list[Document]:
    wordings = _WORDINGS[fact.relation]
    fields = ["statement"] * (len(wordings) - 1) + ["described"]
    return [
        _document(f"{slug(fact.country)}/{fact.relation}/{number}", _filled(wording, fact), fact.country, field, fact)
        for number, (wording, field) in enumerate(zip(wordings, fields, strict=True), start=1)
    ]


def _fillers(fact: Fact, rng: random.Random) -> list[Document]:
    name = f"{slug(fact.country)}/{fact.relation}/filler"
    return [
        _document(f"{name}/{mentioned}", _filled(rng.choice(wordings), fact), fact.country, f"filler: {mentioned}")
        for mentioned, wordings in _FILLERS[fact.relation].items()
    ]


def _document(name: str, text: str, subject: str, field: str, fact: Fact | None = None) -> Document:
    return Document(id=name, text=text, country=subject, field=field, states=fact.relation if fact else "")


def _filled(wording: str, fact: Fact) -> str:
    text = wording.format(subject=fact.country, answer=fact.answer, description=description(fact))
    return text[0].upper() + text[1:]
