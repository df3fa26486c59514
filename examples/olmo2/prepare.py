"""The inputs of the olmo2 example: random samples of each stage's public data, and queries in its chat format."""

import argparse
import io
import json
import random
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

Row = Mapping[str, Any]
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd"}


def sample(rows: Iterable[Row], count: int, seed: int) -> list[Row]:
    """So many of the rows, each as likely as any other, without holding more of them (reservoir sampling)."""
    drawer, kept = random.Random(seed), []
    for number, row in enumerate(rows):
        if number < count:
            kept.append(row)
        elif (place := drawer.randrange(number + 1)) < count:
            kept[place] = row
    return kept


def texts(rows: Iterable[Row], name: str) -> Iterator[dict[str, str]]:
    """Pre-training documents. Their own ids are not unique over the sources of a mix."""
    for number, row in enumerate(rows):
        yield {"id": f"{name}-{number}", "text": row["text"]}


def chats(rows: Iterable[Row]) -> Iterator[dict[str, Any]]:
    for number, row in enumerate(rows):
        yield {"id": f"sft-{number}", "messages": turns(row["messages"])}


def pairs(rows: Iterable[Row]) -> Iterator[dict[str, Any]]:
    """Preferences: two conversations that begin alike."""
    for number, row in enumerate(rows):
        yield {"id": f"dpo-{number}", "chosen": turns(row["chosen"]), "rejected": turns(row["rejected"])}


def turns(messages: Iterable[Row]) -> list[dict[str, str]]:
    return [{"role": each["role"], "content": each["content"]} for each in messages]


def query(name: str, question: str, answer: str) -> dict[str, str]:
    """As OLMo 2's chat template writes a question and the beginning of the answer."""
    prompt = f"<|endoftext|><|user|>\n{question}\n<|assistant|>\n"
    return {"id": name, "prompt": prompt, "completion": f"{answer}<|endoftext|>"}


def read_rows(folder: Path) -> Iterator[dict[str, Any]]:
    """Of JSON lines, compressed or not, and Parquet under a folder.

    Ends the program for a folder without such files, and for a file that is none: a sample of the others would not be
    one of the mix.
    """
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not _is_about(path, folder)]
    if not files:
        sys.exit(f"{folder}: no files there; name the folder of the shards")
    for path in files:
        yield from _rows(path)


def _is_about(path: Path, folder: Path) -> bool:
    """Whether it is a file about the others, as the hub's client leaves some."""
    return path.suffix == ".md" or any(part.startswith(".") for part in path.relative_to(folder).parts)


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    if path.suffix == ".parquet":
        for batch in pq.ParquetFile(path).iter_batches():
            yield from batch.to_pylist()
        return
    compression = COMPRESSIONS.get(path.suffix)
    if (path.with_suffix("") if compression else path).suffix not in (".json", ".jsonl"):
        sys.exit(f"{path} is neither JSON lines (.gz, .zst) nor Parquet; unpack it, or move it out of the folder")
    with pa.input_stream(str(path), compression=compression) as stream:
        yield from map(json.loads, io.TextIOWrapper(stream, encoding="utf-8"))


def write_lines(path: Path, rows: Iterable[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(dict(row), ensure_ascii=False) + "\n" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stage1", type=Path, required=True, help="shards of olmo-mix-1124")
    parser.add_argument("--stage2", type=Path, required=True, help="shards of dolmino-mix-1124")
    parser.add_argument("--sft", type=Path, required=True, help="tulu-3-sft-olmo-2-mixture-0225")
    parser.add_argument("--dpo", type=Path, required=True, help="olmo-2-0425-1b-preference-mix")
    parser.add_argument("--questions", type=Path, required=True, help="JSON lines with `id`, `question` and `answer`")
    parser.add_argument("--documents", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("data"))
    asked = parser.parse_args()
    drawn = {
        name: sample(read_rows(getattr(asked, name)), asked.documents, asked.seed) for name in ("stage1", "stage2")
    }
    write_lines(asked.out / "olmo-mix.jsonl", texts(drawn["stage1"], "stage1"))
    write_lines(asked.out / "dolmino-mix.jsonl", texts(drawn["stage2"], "stage2"))
    write_lines(asked.out / "sft-sample.jsonl", chats(sample(read_rows(asked.sft), asked.documents, asked.seed)))
    write_lines(asked.out / "dpo-sample.jsonl", pairs(sample(read_rows(asked.dpo), asked.documents, asked.seed)))
    with asked.questions.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    write_lines(asked.out / "queries.jsonl", [query(row["id"], row["question"], row["answer"]) for row in rows])


if __name__ == "__main__":
    main()
