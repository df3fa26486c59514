"""Stages with another objective than a language model's, and what the package is told of them."""

from dataclasses import dataclass, replace
from typing import Any

import models
import reference
import reference_objectives
import torch

from msif_ray.corpus.objectives import Classes
from msif_ray.corpus.preferences import Pairs

SMALL = {"strength": 1e-3, "damping": 1e-3, "seed": 3}
CLASSES = Classes(("no", "maybe", "yes"))
TEXTS = models.random_documents(1, 12, words=(2, 20))
LABELLED = models.random_texts(2, 14)
ASKED = models.random_texts(5, 2, (3, 9))
PAIRS = Pairs(beta=1.0)  # margins up to four nats
MEANS = Pairs(beta=4.0, length_normalised=True)
ANSWERS = models.random_documents(2, 16, words=(2, 9), completions=True)
PAIRED = models.random_pairs(4, 16)
QUERIES = models.random_documents(7, 2, words=(2, 7), completions=True, prefix="query")


@dataclass
class Classified(reference_objectives.Classified):
    """With what the package is told of it."""

    objective: Any = CLASSES


def classified(kind: str, **config: Any) -> list[reference.StageSpec]:
    """A language model, and one moved away from it that classifies."""
    first, tokenizer = models.build_model(kind, 0), models.build_tokenizer()
    tuned = models.classifier(models.perturb(first, 1), 2, **config)
    return [
        reference.StageSpec("pretrain", first, tokenizer, TEXTS, max_tokens=12, **SMALL),
        Classified("classify", tuned, tokenizer, LABELLED, **SMALL),
    ]


@dataclass
class Preferred(reference_objectives.Preferred):
    """With what the package is told of it."""

    objective: Any = PAIRS


def preferring(kind: str, pairs: Pairs = PAIRS) -> list[reference.StageSpec]:
    """A language model, one tuned from it, and one that learned preferences with that as its reference."""
    first, tokenizer = models.build_model(kind, 0), models.build_tokenizer()
    second = models.perturb(first, 1)
    third = Preferred(
        "prefer", models.perturb(second, 2), tokenizer, [], **SMALL, **told(pairs), reference_model=second
    )
    return [
        reference.StageSpec("pretrain", first, tokenizer, TEXTS, max_tokens=12, **SMALL),
        reference.StageSpec("tune", second, tokenizer, ANSWERS, max_tokens=16, **SMALL),
        replace(third, documents=[referred(third, pair) for pair in PAIRED]),
    ]


def normalised(kind: str) -> list[reference.StageSpec]:
    """The same, of the completions' means."""
    return preferring(kind, MEANS)


def told(pairs: Pairs) -> dict[str, Any]:
    return {"objective": pairs, "beta": pairs.beta, "per_token": pairs.length_normalised}


def referred(stage: reference_objectives.Preferred, pair: dict[str, Any]) -> dict[str, Any]:
    """The pair with what the reference model makes of it."""
    with torch.no_grad():
        return pair | {"reference": float(reference_objectives.log_ratio(stage.reference_model, stage, pair))}
