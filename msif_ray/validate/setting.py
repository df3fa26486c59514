"""What solvers are compared on: a small GPT-NeoX trained here on the World Factbook, its documents and queries."""

import random
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from msif_ray.corpus.batches import pack
from msif_ray.corpus.reader import Document
from msif_ray.corpus.windows import Encoded, encode, to_batch
from msif_ray.demo.factbook import build_corpus, facts, slug
from msif_ray.demo.training import Schedule, Sequence, new_model, optimise, train_tokenizer
from msif_ray.influence.batch import Batch
from msif_ray.influence.modules import LinearMap, find_linear_maps
from msif_ray.store import write_atomic

LAYERS, HEADS, CONTEXT = 2, 4, 128
RATE, WEIGHT_DECAY, TRAINING_TOKENS = 2e-3, 0.01, 2048


@dataclass(frozen=True)
class Sizes:
    """How large it is: `documents` make the operator and the factors, `scored` ones are scored against `queries`."""

    hidden: int = 256
    vocabulary: int = 1024
    epochs: int = 3
    documents: int = 128
    scored: int = 256
    queries: int = 8
    tokens_per_batch: int = 256


@dataclass(frozen=True)
class Setting:
    """A trained model and everything that scores are computed from. `spare` are documents beyond the operator's."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    maps: dict[str, LinearMap]
    documents: list[Encoded]
    spare: list[Encoded]
    scored: list[Encoded]
    queries: list[Encoded]
    loss: float

    @property
    def mlp(self) -> list[str]:
        return [name for name in self.maps if ".mlp." in name]


def make_setting(sizes: Sizes, seed: int, folder: Path) -> Setting:
    """Trains the model, or loads it from `folder` where an earlier call left it.

    The operator's documents, the scored ones and the queries are drawn with `seed` from the corpus that the model is
    trained on; a query asks for the last words of a statement that it has read.
    """
    corpus = build_corpus()
    model, tokenizer, loss = _trained(sizes, seed, folder / "model", [document["text"] for document in corpus])
    rng = random.Random(seed)
    documents = [Document(each["id"], None, each["text"], has_prompt=False) for each in corpus]
    rng.shuffle(documents)
    encoded = [e for document in documents if isinstance(e := encode(tokenizer, document, False), Encoded)]
    queries = [e for query in _queries() if isinstance(e := encode(tokenizer, query, False), Encoded)]
    rng.shuffle(queries)
    return Setting(
        model,
        tokenizer,
        find_linear_maps(model),
        encoded[: sizes.documents],
        encoded[sizes.documents :],
        encoded[: sizes.scored],
        queries[: sizes.queries],
        loss,
    )


def batches(documents: list[Encoded], tokens_per_batch: int) -> list[Batch]:
    """Padded batches of whole documents."""
    windows = [window for document in documents for window in document.windows(CONTEXT)]
    return [to_batch(some) for some in pack(windows, tokens_per_batch)]


def _queries() -> list[Document]:
    """The first statement of every fact, its answer as the completion."""
    texts = {document["id"]: document["text"] for document in build_corpus()}
    found = []
    for country, relation, answer in facts():
        text = texts[f"{slug(country)}/{relation}/1"]
        if text.endswith(f" {answer}."):
            prompt = text.removesuffix(f" {answer}.")
            found.append(Document(f"{slug(country)}/{relation}", prompt, f" {answer}.", has_prompt=True))
    return found


def _trained(
    sizes: Sizes, seed: int, folder: Path, texts: list[str]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, float]:
    done = folder / "loss.txt"
    if not done.exists():
        torch.manual_seed(seed)
        tokenizer = train_tokenizer(texts, sizes.vocabulary)
        model = new_model(len(tokenizer), LAYERS, sizes.hidden, CONTEXT, HEADS)
        sequences = [Sequence(ids, 1) for ids in tokenizer(texts)["input_ids"]]
        schedule = Schedule(sizes.epochs, RATE, WEIGHT_DECAY, TRAINING_TOKENS)
        _, loss = optimise("pretrain", model, sequences, schedule, seed)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_atomic(done, f"{loss}\n".encode())
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder), float(done.read_text())
