"""The inputs of the dolly example from the public files: README.md says which, and how to call this."""

import argparse
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

Row = Mapping[str, Any]
Encode = Callable[[Sequence[str]], np.ndarray]

INTRO = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
# Texts that are embedded at once.
BATCH = 4096
# Characters of a document that the encoder is given; it reads 256 tokens of them.
CHARACTERS = 4000


def prompt_of(row: Row) -> str:
    """The prompt that Dolly was trained with."""
    given = f"Input:\n{row['context']}\n\n" if row.get("context") else ""
    return f"{INTRO}\n\n### Instruction:\n{row['instruction']}\n\n{given}### Response:\n"


def completions(rows: Iterable[Row], prefix: str) -> Iterator[dict[str, str]]:
    """Records of databricks-dolly-15k, or the paper's queries, as prompts and completions."""
    for number, row in enumerate(rows):
        yield {"id": f"{prefix}-{number}", "prompt": prompt_of(row), "completion": f"{row['response']}\n\n### End"}


def documents(rows: Iterable[Row], name: str) -> Iterator[dict[str, str]]:
    """Articles (title and text) or passages (text) with an id."""
    for number, row in enumerate(rows):
        title = f"{row['title']}\n\n" if row.get("title") else ""
        yield {"id": f"{name}-{number}", "text": f"{title}{row['text']}"}


def nearest(encode: Encode, queries: Sequence[str], texts: Iterable[str], top: int) -> list[list[int]]:
    """For each query the numbers of the `top` texts of largest cosine, nearest first; a batch of texts at a time."""
    asked = _unit(encode(queries))
    best = np.full((len(queries), 0), 0.0)
    numbers = np.zeros((len(queries), 0), dtype=np.int64)
    seen = 0
    left = iter(texts)
    while batch := list(islice(left, BATCH)):
        cosines = asked @ _unit(encode([text[:CHARACTERS] for text in batch])).T
        best = np.concatenate([best, cosines], axis=1)
        numbers = np.concatenate([numbers, np.tile(np.arange(seen, seen + len(batch)), (len(queries), 1))], axis=1)
        order = np.argsort(-best, axis=1, kind="stable")[:, :top]
        best, numbers = np.take_along_axis(best, order, 1), np.take_along_axis(numbers, order, 1)
        seen += len(batch)
    return [[int(number) for number in row] for row in numbers]


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def write_candidates(
    folder: Path, name: str, read: Callable[[], Iterable[Row]], encode: Encode, queries: Sequence[Row], top: int
) -> int:
    """The nearest documents of each query, and which they are; gives the number of all, for `out_of`. `read` is called
    twice, so that no more of a corpus than the candidates is in memory."""
    texts = [f"{query['prompt']}{query['completion']}" for query in queries]
    found = nearest(encode, texts, (row["text"] for row in documents(read(), name)), top)
    wanted, chosen, count = {number for row in found for number in row}, [], 0
    for number, row in enumerate(documents(read(), name)):
        count += 1
        if number in wanted:
            chosen.append(row)
    pairs = [
        {"query_id": query["id"], "doc_id": f"{name}-{number}"}
        for query, numbers in zip(queries, found, strict=True)
        for number in numbers
    ]
    pq.write_table(pa.Table.from_pylist(chosen), folder / f"{name}.parquet")
    pq.write_table(pa.Table.from_pylist(pairs), folder / f"{name}-candidates.parquet")
    return count


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Of JSON lines, a JSON list or Parquet."""
    if path.suffix == ".parquet":
        for batch in pq.ParquetFile(path).iter_batches():
            yield from batch.to_pylist()
    elif path.suffix == ".json":
        yield from json.loads(path.read_text(encoding="utf-8"))
    else:
        with path.open(encoding="utf-8") as lines:
            yield from map(json.loads, lines)


def write_lines(path: Path, rows: Iterable[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(dict(row), ensure_ascii=False) + "\n" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dolly", type=Path, required=True, help="databricks-dolly-15k.jsonl")
    parser.add_argument("--queries", type=Path, nargs="+", required=True, help="qa.json and toxic.json of the paper")
    parser.add_argument("--wikipedia", type=Path, required=True, help="articles with `title` and `text`")
    parser.add_argument("--pile", type=Path, required=True, help="passages with `text`")
    parser.add_argument("--top", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path("data"))
    asked = parser.parse_args()
    from sentence_transformers import SentenceTransformer  # the one package that this needs and msif_ray does not

    encoder = SentenceTransformer("sentence-transformers/all-MiniLM-L6-v2")
    write_lines(asked.out / "dolly.jsonl", completions(read_rows(asked.dolly), "dolly"))
    queries = [row for path in asked.queries for row in completions(read_rows(path), path.stem)]
    write_lines(asked.out / "queries.jsonl", queries)
    for name, path in (("wikipedia", asked.wikipedia), ("pile-nearest", asked.pile)):
        count = write_candidates(asked.out, name, lambda path=path: read_rows(path), encoder.encode, queries, asked.top)
        print(f"{name}: chosen from {count:,} documents")


if __name__ == "__main__":
    main()
