"""The inputs of the bloomz example from LAMA and T-REx: README.md says where they are, and how to call this."""

import argparse
import json
import random
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

Row = Mapping[str, Any]
# What a fact's Wikidata addresses begin with.
ENTITY, PROPERTY = "http://www.wikidata.org/entity/", "http://www.wikidata.org/prop/direct/"
SUBJECT, OBJECT = "[X]", "[Y]"


def fact_of(row: Row) -> str:
    """`predicate,subject,object` of a LAMA row."""
    return f"{row['predicate_id']},{row['sub_uri']},{row['obj_uri']}"


def queries(rows: Iterable[Row], relations: Iterable[Row]) -> Iterator[dict[str, Any]]:
    """LAMA's facts as prompts and completions, by its own templates: those that end with the object."""
    templates = {row["relation"]: row["template"].strip().removesuffix(".").strip() for row in relations}
    for row in rows:
        template = templates.get(row["predicate_id"], "")
        if not template.endswith(OBJECT) or template.count(OBJECT) > 1:
            continue
        prompt = template.removesuffix(OBJECT).strip().replace(SUBJECT, row["sub_label"])
        yield {"id": row["uuid"], "prompt": prompt, "completion": f" {row['obj_label']}", "fact": fact_of(row)}


def sentences(articles: Iterable[Row], facts: set[str]) -> Iterator[dict[str, Any]]:
    """The sentences of T-REx that state one of the facts, and all facts that they state."""
    for article in articles:
        stated: dict[int, list[str]] = {}
        for triple in article["triples"]:
            fact = _triple(triple)
            if fact is not None and triple["sentence_id"] is not None:
                stated.setdefault(triple["sentence_id"], []).append(fact)
        for number, found in sorted(stated.items()):
            if facts & set(found):
                start, end = article["sentences_boundaries"][number]
                text = article["text"][start:end]
                yield {"id": f"{article['docid']}#{number}", "text": text, "facts": sorted(set(found))}


def _triple(triple: Row) -> str | None:
    addresses = [(triple["predicate"]["uri"], PROPERTY), (triple["subject"]["uri"], ENTITY)]
    addresses.append((triple["object"]["uri"], ENTITY))
    if not all(address.startswith(prefix) for address, prefix in addresses):
        return None  # a date or a number
    return ",".join(address.removeprefix(prefix) for address, prefix in addresses)


def drawn(rows: Iterable[Row], count: int, seed: int) -> list[Row]:
    """So many of the rows at random, in their order."""
    rows = list(rows)
    places = sorted(random.Random(seed).sample(range(len(rows)), min(count, len(rows))))
    return [rows[place] for place in places]


def read_lines(paths: Iterable[Path]) -> Iterator[dict[str, Any]]:
    for path in sorted(paths):
        with path.open(encoding="utf-8") as lines:
            yield from map(json.loads, lines)


def read_articles(paths: Iterable[Path]) -> Iterator[dict[str, Any]]:
    for path in sorted(paths):
        yield from json.loads(path.read_text(encoding="utf-8"))


def write(lama: Path, trex: Path, out: Path, count: int, seed: int) -> tuple[int, int]:
    """Writes queries and sentences; gives their numbers. `count` facts are drawn of those that a sentence states."""
    out.mkdir(parents=True, exist_ok=True)
    rows = list(read_lines((lama / "TREx").glob("*.jsonl")))
    found = list(sentences(read_articles(trex.glob("*.json")), {fact_of(row) for row in rows}))
    stated = {fact for row in found for fact in row["facts"]}
    known = [row for row in rows if fact_of(row) in stated]
    chosen = drawn(queries(known, read_lines([lama / "relations.jsonl"])), count, seed)
    pq.write_table(pa.Table.from_pylist(found), out / "trex.parquet")
    with (out / "queries.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(dict(row), ensure_ascii=False) + "\n" for row in chosen)
    return len(chosen), len(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lama", type=Path, required=True, help="folder with TREx/*.jsonl and relations.jsonl")
    parser.add_argument("--trex", type=Path, required=True, help="folder with T-REx's re-nlg_*.json")
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("data"))
    asked = parser.parse_args()
    counts = write(asked.lama, asked.trex, asked.out, asked.queries, asked.seed)
    print("{:,} queries, {:,} sentences".format(*counts))


if __name__ == "__main__":
    main()
