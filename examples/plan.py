"""`msif plan` of an example without its weights and data: on a model of the same shape, all zeros, and stand-in text.

    python examples/plan.py dolly
    python examples/plan.py olmo2 7b      # with the changes of configs/changes/7b.json: another size, another cluster

The stand-in's shapes are those of the example's `configs/`; its corpora have the numbers of documents and tokens of
`stand_in.json`. Zeros are sparse files, so this takes no room; nothing is measured, so there are no hours.
"""

import argparse
import json
import os
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from rich.console import Console
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from msif_ray.config import parse_run
from msif_ray.plan.make import make_plan
from msif_ray.plan.report import print_plan

EXAMPLES = Path(__file__).parent
WORDS = [f"w{number}" for number in range(1000)]
CONVERSATIONS = ("messages", "chosen", "rejected")
CHAT = "{% for m in messages %}{{ m.role }} {{ m.content }} {{ eos_token }} {% endfor %}"


def config_of(example: str, stage: str) -> dict[str, Any]:
    return dict(json.loads((EXAMPLES / example / "configs" / f"{stage}.json").read_text(encoding="utf-8")))


def description_of(example: str) -> dict[str, Any]:
    return dict(yaml.safe_load((EXAMPLES / example / "run.yaml").read_text(encoding="utf-8")))


def save_zeros(config: dict[str, Any], folder: Path) -> None:
    """A checkpoint of bfloat16 zeros in one sparse file."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    header, end = {}, 0
    for name, tensor in model.named_parameters():
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [end, end + 2 * tensor.numel()]}
        end += 2 * tensor.numel()
    head = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(head)) + head)
        file.truncate(8 + len(head) + end)


def save_tokenizer(folder: Path) -> None:
    vocabulary = {word: number for number, word in enumerate(["<unk>", "<eos>", *WORDS])}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="<eos>")
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)


def text(number: int, words: int) -> str:
    return " ".join(WORDS[(number * 31 + place * place) % len(WORDS)] for place in range(words))


def talk(asked: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": asked[:200]}, {"role": "assistant", "content": answer}]


def rows(about: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Of a corpus or the queries: `documents` rows, with so many words in each column."""
    for number in range(about["documents"]):
        row: dict[str, Any] = {"id": str(number)}
        for column, words in about["words"].items():
            said = text(number, words)
            answer = text(number + 1, words) if column == "rejected" else said
            row[column] = talk(said, answer) if column in CONVERSATIONS else said
        yield row


def write_corpora(example: str, folder: Path) -> None:
    for name, about in json.loads((EXAMPLES / example / "stand_in.json").read_text(encoding="utf-8")).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        found = list(rows(about)) if "words" in about else pairs(about)
        if path.suffix == ".parquet":
            pq.write_table(pa.Table.from_pylist(found), path)
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")


def pairs(about: dict[str, Any]) -> list[dict[str, str]]:
    """Candidates: each query's own documents."""
    per_query = about["documents"] // about["queries"]
    return [{"query_id": str(n // per_query), "doc_id": str(n)} for n in range(per_query * about["queries"])]


def changed(description: dict[str, Any], example: str, changes: str | None) -> dict[str, Any]:
    """A run's description, and what its models' shapes are changed to."""
    if changes is None:
        return {}
    found = json.loads((EXAMPLES / example / "configs" / "changes" / f"{changes}.json").read_text(encoding="utf-8"))
    description["cluster"] |= found["cluster"]
    return dict(found["config"])


def main(example: str, changes: str | None = None) -> None:
    description = description_of(example)
    config = changed(description, example, changes)
    with tempfile.TemporaryDirectory() as temporary:
        os.chdir(temporary)
        write_corpora(example, Path(temporary))
        for stage in description["stages"]:
            folder = Path(temporary) / "models" / stage["name"]
            save_zeros(config_of(example, stage["name"]) | config, folder)
            save_tokenizer(folder)
            stage.pop("revision", None)
            stage["model"] = str(folder)
        console = Console(width=120)
        with console.capture() as printed:
            print_plan(make_plan(parse_run(description), measured=False), console)
    lines = printed.get().replace(f"{os.path.realpath(temporary)}/", "").splitlines()
    print("\n".join(line.rstrip() for line in lines))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("example", choices=sorted(path.parent.name for path in EXAMPLES.glob("*/run.yaml")))
    parser.add_argument("changes", nargs="?", help="a file of the example's configs/changes, without .json")
    asked = parser.parse_args()
    there = sorted(path.stem for path in (EXAMPLES / asked.example / "configs" / "changes").glob("*.json"))
    if asked.changes is not None and asked.changes not in there:
        parser.error(f"{asked.example} has no changes {asked.changes!r}, only {', '.join(there) or 'none'}")
    main(asked.example, asked.changes)
