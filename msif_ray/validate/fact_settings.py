"""What facts are traced in: documents, questions and a pair of models, of which the second was fine-tuned on questions
about other facts."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from msif_ray.corpus.reader import Document as Text
from msif_ray.corpus.windows import Encoded, encode
from msif_ray.demo.answering import answers_correctly
from msif_ray.demo.factbook import Document, build_corpus
from msif_ray.demo.metrics import Marks
from msif_ray.demo.questions import Question, finetuning_questions
from msif_ray.demo.run import MODELS, SEED, choose_queries
from msif_ray.errors import UserError
from msif_ray.store import read_json, write_json
from msif_ray.validate import counterfactual, smollm2


@dataclass(frozen=True)
class FactSetting:
    """`models`: θ₁, which read the documents, and θ₂, fine-tuned on the questions `finetuning`; `queries` are held out
    and answered right. `patterns` name the tracked maps (None: all). The first `fitted` documents make the factors."""

    documents: list[Document]
    queries: list[Question]
    finetuning: list[Question]
    models: tuple[Path, Path]
    patterns: list[str] | None
    fitted: int
    about: dict[str, Any]

    def model(self, stage: int) -> PreTrainedModel:
        path = self.models[stage]
        return AutoModelForCausalLM.from_pretrained(path, use_safetensors=True, dtype="float32").eval()

    def tokenizer(self) -> PreTrainedTokenizerBase:
        return AutoTokenizer.from_pretrained(self.models[1])

    @property
    def states(self) -> Marks:
        """Which documents state the fact that each query asks for, `[queries, documents]`."""
        stated = [(document["country"], document["states"]) for document in self.documents]
        asked = [(query["country"], query["relation"]) for query in self.queries]
        return np.array([[fact == each for each in stated] for fact in asked])


def factbook() -> FactSetting:
    """The demo's documents, questions and pair of models; tracked are the MLP maps, as in the paper."""
    documents = build_corpus()
    random.Random(SEED).shuffle(documents)
    models = (MODELS / "pretrained", MODELS / "finetuned")
    return FactSetting(documents, choose_queries(), finetuning_questions(), models, ["*.mlp.*"], 2500, {})


@dataclass(frozen=True)
class Smollm2Sizes:
    """How SmolLM2 is trained, and which of its 30 layers' MLP maps are tracked."""

    schedules: smollm2.Schedules
    layers: tuple[int, ...]
    fitted: int


def counterfactuals(weights: Path, folder: Path, sizes: Smollm2Sizes, seed: int) -> FactSetting:
    """SmolLM2 with the counterfactual documents: trains it, unless it is there under `folder`. Raises UserError where
    it then answers none of the held-out questions, since those that it answers are traced."""
    documents = counterfactual.counterfactual_documents(seed)
    asked, held_out = counterfactual.counterfactual_questions(seed)
    models = folder / "models"
    smollm2.train_stages(weights, models, documents, asked, sizes.schedules, seed)
    path = folder / "answered.json"
    if not path.exists():
        questions = {"asked": asked, "held out": held_out}
        write_json(path, {name: _answered(models / name, questions) for name in smollm2.STAGES})
    answered = read_json(path)
    right = set(answered["finetuned"]["held out"])
    if not right:
        raise UserError(
            "the fine-tuned model answers none of the held-out questions, so that there is nothing to trace; give more "
            "--epochs or --finetune-epochs, and another --folder"
        )
    counts = {name: {part: len(ids) for part, ids in each.items()} for name, each in answered.items()}
    training = {name: read_json(models / name / smollm2.TRAINING) for name in smollm2.STAGES[1:]}
    return FactSetting(
        documents,
        [question for question in held_out if question["id"] in right],
        asked,
        (models / "continued", models / "finetuned"),
        [f"model.layers.{layer}.mlp.*" for layer in sizes.layers],
        sizes.fitted,
        {"asked": len(asked), "held_out": len(held_out), "answered": counts, "training": training},
    )


def _answered(model: Path, questions: dict[str, list[Question]]) -> dict[str, list[str]]:
    """Ids of the questions that a model answers exactly."""
    loaded, tokenizer = smollm2.load(model)
    return {
        part: [q["id"] for q, right in zip(some, answers_correctly(loaded, tokenizer, some), strict=True) if right]
        for part, some in questions.items()
    }


def encoded(tokenizer: PreTrainedTokenizerBase, texts: Sequence[Text], append_eos: bool) -> list[Encoded]:
    """Their tokens; ValueError for one that has none to predict."""
    found = [encode(tokenizer, text, append_eos) for text in texts]
    if not all(isinstance(each, Encoded) for each in found):
        raise ValueError("a document or a question has no token to predict")
    return [each for each in found if isinstance(each, Encoded)]


def question_texts(questions: Sequence[Question]) -> list[Text]:
    return [Text(each["id"], each["prompt"], each["completion"], has_prompt=True) for each in questions]


def document_texts(documents: Sequence[Document]) -> list[Text]:
    return [Text(each["id"], None, each["text"]) for each in documents]
