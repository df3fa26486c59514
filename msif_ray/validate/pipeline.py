"""The tiny two-stage pipeline that is retrained: one-sentence documents, then questions, and held-out questions."""

import random
from collections import Counter
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from msif_ray.corpus.reader import Document
from msif_ray.corpus.windows import Encoded, encode, to_batch
from msif_ray.demo import factbook, run
from msif_ray.demo.metrics import Marks
from msif_ray.demo.questions import Question, all_questions
from msif_ray.demo.training import Schedule, new_model, train_tokenizer
from msif_ray.errors import UserError
from msif_ray.influence.batch import Batch

LAYERS, HEADS, CONTEXT = 2, 4, 64


@dataclass(frozen=True)
class Sizes:
    """How large it is, and how it is trained. Of `countries`, so many are `asked` about in fine-tuning, and the others
    held out; of each there are four facts, each stated by so many `wordings`. `alpha` is the real proximal term's
    (DESIGN.md §2)."""

    countries: int = 44
    asked: int = 11
    wordings: int = 3
    hidden: int = 64
    vocabulary: int = 768
    epochs: int = 24
    rate: float = 6e-3
    rows_per_batch: int = 24
    finetune_epochs: int = 10
    finetune_rate: float = 4e-3
    alpha: float = 0.3
    settle_steps: int = 60
    settle_rate: float = 4e-3

    def pretraining(self, rows: Batch) -> Schedule:
        return Schedule(self.epochs, self.rate, 0.01, self.rows_per_batch * rows.input_ids.shape[1])

    def finetuning(self, rows: Batch) -> Schedule:
        """As people do: AdamW, a few epochs."""
        return Schedule(self.finetune_epochs, self.finetune_rate, 0.01, self.rows_per_batch * rows.input_ids.shape[1])


@dataclass(frozen=True)
class Pipeline:
    """What is trained and on what: `model` has the weights that every training begins with."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    texts: list[factbook.Document]
    questions: list[Question]
    documents: list[Encoded]
    finetuning: list[Encoded]
    queries: list[Encoded]

    @property
    def states(self) -> Marks:
        """Which documents state the fact that each query asks for, `[queries, documents]`."""
        return run.stating(self.texts, self.questions)


def complete_countries() -> list[str]:
    """Those that have all four facts."""
    count = Counter(fact.country for fact in factbook.facts())
    return [country for country in count if count[country] == len(factbook.RELATIONS)]


def make_pipeline(sizes: Sizes, seed: int) -> Pipeline:
    """Countries are drawn with `seed` from those that have all four facts, and wordings for each fact."""
    rng = random.Random(seed)
    chosen = rng.sample(complete_countries(), sizes.countries)
    asked = set(chosen[: sizes.asked])
    statements: dict[tuple[str, str], list[factbook.Document]] = {}
    for document in factbook.build_corpus():
        if document["country"] in chosen and document["field"] == "statement":
            statements.setdefault((document["country"], document["states"]), []).append(document)
    texts = [document for each in statements.values() for document in rng.sample(each, sizes.wordings)]
    questions = [question for question in all_questions() if question["country"] in chosen]
    read = [document["text"] for document in texts]
    tokenizer = train_tokenizer([*read, *(each["prompt"] + each["completion"] for each in questions)], sizes.vocabulary)
    torch.manual_seed(seed)
    model = new_model(len(tokenizer), LAYERS, sizes.hidden, CONTEXT, HEADS).eval()
    held_out = [question for question in questions if question["country"] not in asked]
    return Pipeline(
        model,
        tokenizer,
        texts,
        held_out,
        [_encoded(tokenizer, Document(each["id"], None, each["text"], has_prompt=False)) for each in texts],
        [_question(tokenizer, each) for each in questions if each["country"] in asked],
        [_question(tokenizer, each) for each in held_out],
    )


def rows(documents: list[Encoded]) -> Batch:
    """All of them as the rows of one batch, in order."""
    return to_batch([window for document in documents for window in document.windows(CONTEXT)])


def _question(tokenizer: PreTrainedTokenizerBase, question: Question) -> Encoded:
    return _encoded(tokenizer, Document(question["id"], question["prompt"], question["completion"], has_prompt=True))


def _encoded(tokenizer: PreTrainedTokenizerBase, document: Document) -> Encoded:
    """As the package encodes it: a completion ends with EOS, a text does not."""
    found = encode(tokenizer, document, document.has_prompt)
    if not isinstance(found, Encoded):
        raise UserError(f"{document.id}: {found.reason}")
    return found
