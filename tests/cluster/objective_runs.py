"""Runs of stages with other objectives, on disk, and their dense reference."""

from pathlib import Path
from typing import Any

import models
import reference
import reference_objectives
from cluster import runs

NAMES = ("no", "maybe", "yes")
LABELLED = models.random_texts(2, 24, (2, 14))
ASKED = models.random_texts(5, 3, (3, 6))
BAD = {
    "long": {"text": "the" + " sea" * 40, "label": 1},
    "odd": {"text": "the sea", "label": "perhaps"},
}
SMALL: dict[str, Any] = {"seed": 3, "strength": 0.01, "damping": 0.001}


def named(text: dict[str, Any]) -> dict[str, Any]:
    return text | {"label": NAMES[text["label"]]}


def classifying(folder: Path, run_dir: str) -> dict[str, Any]:
    """A run of a language model and a classifier tuned from it; labels are names, numbers in one document."""
    description = runs.two_stages(folder, run_dir)
    if not (folder / "classifier").exists():
        tuned, tokenizer = models.load(folder / "stage1")
        config = {"id2label": dict(enumerate(NAMES)), "label2id": {name: i for i, name in enumerate(NAMES)}}
        models.save(models.classifier(tuned, 2, **config), tokenizer, folder / "classifier")
    documents = [LABELLED[0], *map(named, LABELLED[1:]), *({"id": name} | row for name, row in BAD.items())]
    description["stages"][1] |= {
        "model": str(folder / "classifier"),
        "objective": "classification",
        "documents": {
            "path": runs.write_lines(folder / "labelled.jsonl", documents),
            "text": "text",
            "label": "label",
            "id": "id",
        },
        "fit": {"max_tokens": 16},
        "damping": {"relative": 0.001},
    }
    path = runs.write_lines(folder / "asked.jsonl", [named(text) for text in ASKED])
    return description | {"queries": {"path": path, "text": "text", "label": "label", "id": "id"}}


def dense_classifying(folder: Path) -> list[reference.StageSpec]:
    """The stages of that run; `spec` of the language model as the other runs have it."""
    first, _ = runs.specs(folder)
    tuned, tokenizer = models.load(folder / "stage1")
    config = {"id2label": dict(enumerate(NAMES))}
    second = models.classifier(tuned, 2, **config)
    return [first, reference_objectives.Classified("tune", second, tokenizer, LABELLED, 16, **SMALL)]


PAIRED = models.random_pairs(4, 16, (2, 10))
NO_PAIRS = {
    "far": {"prompt": "the", "chosen": " sea" * 40, "rejected": " old"},
    "same": {"prompt": "the", "chosen": " sea", "rejected": " sea"},
}
BETA = 1.0


def preferring(folder: Path, run_dir: str) -> dict[str, Any]:
    """A run of a language model, one tuned from it, and one that learned preferences."""
    description = runs.two_stages(folder, run_dir)
    if not (folder / "preferring").exists():
        tuned, tokenizer = models.load(folder / "stage1")
        models.save(models.perturb(tuned, 7), tokenizer, folder / "preferring")
    rows = [*PAIRED, *({"id": name} | row for name, row in NO_PAIRS.items())]
    stage = {
        "name": "prefer",
        "model": str(folder / "preferring"),
        "objective": {"kind": "dpo", "beta": BETA},
        "documents": {
            "path": runs.write_lines(folder / "pairs.jsonl", rows),
            "prompt": "prompt",
            "chosen": "chosen",
            "rejected": "rejected",
            "id": "id",
        },
        "fit": {"max_tokens": 30},
        "damping": {"relative": 0.001},
        "response": {"kind": "proximal", "alpha": {"relative": 0.01}},
    }
    description["stages"].append(stage)
    return description | {"score": [{"stage": "pretrain"}, {"stage": "prefer"}]}


def dense_preferring(folder: Path) -> list[reference.StageSpec]:
    first, second = runs.specs(folder)
    model, tokenizer = models.load(folder / "preferring")
    third = reference_objectives.Preferred(
        "prefer", model, tokenizer, PAIRED, 30, **SMALL, beta=BETA, reference_model=second.model
    )
    return [first, second, third]
