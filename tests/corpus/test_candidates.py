"""Candidates: BM25's are those of its formula, lists are taken at their word, and blocks hold no others."""

import json
import math
import re
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from msif_ray.config import Documents
from msif_ray.corpus.blocks import CorpusBlocks
from msif_ray.corpus.candidates import (
    CandidateBlocks,
    Chosen,
    ChosenFile,
    by_bm25,
    read_chosen,
)
from msif_ray.corpus.files import corpus_files
from msif_ray.corpus.listed import by_list
from msif_ray.corpus.queries import Query
from msif_ray.corpus.reader import Document
from msif_ray.errors import UserError
from msif_ray.tables import write_table

TEXTS = [
    "the river runs to the sea", "a king of the old city", None, "the sea is green and the sea is old", "winter",
    "a market in the north", "the king and the sea", "stone house", "a river, a river", "green light",
]  # fmt: skip
QUERIES = [Document("q0", "Where is the ", "SEA", True), Document("q1", None, "king river", False)]


@pytest.fixture
def blocks(tmp_path: Path) -> CorpusBlocks:
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"id": f"d{n}", "text": text}) + "\n" for n, text in enumerate(TEXTS)))
    documents = Documents(path=str(path), text="text", id="id")
    return CorpusBlocks(tuple(corpus_files(documents, "k")), (len(TEXTS),), documents, 4, "k")


def bm25(query: str, k1: float = 1.5, b: float = 0.75) -> list[float]:
    """Lucene's formula, which is the library's default, over lower-case words."""
    bags = [re.findall(r"\w+", (text or "").lower()) for text in TEXTS]
    mean = sum(map(len, bags)) / len(bags)
    scores = [0.0] * len(bags)
    for word in re.findall(r"\w+", query.lower()):
        having = sum(word in bag for bag in bags)
        weight = math.log(1 + (len(bags) - having + 0.5) / (having + 0.5))
        for place, bag in enumerate(bags):
            count = bag.count(word)
            scores[place] += weight * count / (count + k1 * (1 - b + b * len(bag) / mean))
    return scores


def test_what_a_query_asks_is_searched_for_whole(blocks: CorpusBlocks) -> None:
    """Both completions of a margin, all turns of a conversation without their roles, and what a span is of."""
    talk = [{"role": "user", "content": "the old king"}, {"role": "assistant", "content": "the sea"}]
    asked = {
        "the old king the sea": Query("a", None, talk, is_chat=True),
        "the river was green": Query("b", "the river", " was", True, rather_than=" green"),
        "the winter was old": Query("c", "the winter", " was old", True, span=[1, 4]),
    }
    for text, query in asked.items():
        plain = by_bm25(blocks, [Document(query.id, None, text)], 5).to_pylist()
        assert by_bm25(blocks, [query], 5).to_pylist() == plain and plain


@pytest.mark.parametrize("top", [2, 100])
def test_bm25_is_its_formula(blocks: CorpusBlocks, top: int) -> None:
    found = by_bm25(blocks, QUERIES, top).to_pylist()
    for query in QUERIES:
        wanted = bm25(f"{query.prompt or ''}{query.text}")
        own = [row for row in found if row["query_id"] == query.id]
        assert len(own) == min(top, sum(score > 0 for score in wanted))
        assert [row["rank"] for row in own] == list(range(1, len(own) + 1))
        assert [row["bm25"] for row in own] == pytest.approx(sorted(wanted, reverse=True)[: len(own)], rel=1e-5)
        for row in own:
            number = int(row["doc_id"][1:])
            assert row["bm25"] == pytest.approx(wanted[number], rel=1e-5)
            assert row["block"] == f"00000-{number // 4:07d}"


def test_no_word_in_common_is_said(blocks: CorpusBlocks) -> None:
    with pytest.raises(UserError, match="shares a word"):
        by_bm25(blocks, [Document("q", None, "zebra", False)], 5)
    found = by_bm25(blocks, [Document("q", None, "zebra", False), *QUERIES], 5)
    assert set(found["query_id"].to_pylist()) == {"q0", "q1"}


def write(tmp_path: Path, **columns: list[str]) -> str:
    pq.write_table(pa.table(columns), tmp_path / "list.parquet")
    return str(tmp_path / "list.parquet")


def test_blocks_hold_candidates_alone(blocks: CorpusBlocks, tmp_path: Path) -> None:
    path = write(tmp_path, query_id=["q1", "q0", "q1"], doc_id=["d9", "d0", "d1"])
    write_table(tmp_path / "chosen.parquet", by_list(blocks, QUERIES, path, "k"))
    chosen = blocks.as_a(CandidateBlocks, chosen=ChosenFile.found(tmp_path / "chosen.parquet"))
    names = ["00000-0000000", "00000-0000002"]
    assert chosen.ids == set(names) and chosen.count == 3 and chosen.documents_in(names[0]) == 2
    assert [[each.id for each in block.documents] for block in chosen.left(set())] == [["d0", "d1"], ["d9"]]
    assert [block.id for block in chosen.left({names[0]})] == names[1:]
    pairs = read_chosen(chosen.chosen).pairs
    assert pairs(names[0], ["d0", "d1", "d3"], ["q0", "q1"]).tolist() == [[True, False], [False, True], [False, False]]
    assert pairs(names[1], ["d9"], ["q0", "q1"]).tolist() == [[False, True]]
    assert pairs(names[0], ["d1"], ["q0", "q1"]).tolist() == [[False, True]], "d0 was skipped"


def test_a_later_run_of_the_same_process_reads_its_own_candidates(blocks: CorpusBlocks, tmp_path: Path) -> None:
    for document in ("d1", "d5", "d1"):
        write_table(tmp_path / "chosen.parquet", by_list(blocks, QUERIES, write(tmp_path, doc_id=[document]), "k"))
        chosen = blocks.as_a(CandidateBlocks, chosen=ChosenFile.found(tmp_path / "chosen.parquet"))
        assert [each.id for block in chosen.left(set()) for each in block.documents] == [document]


def test_both_completions_of_a_pair_are_searched(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "winter market"}]
    answer = [{"role": "assistant", "content": "stone"}]
    rows = [
        {"id": "text", "prompt": "the sea", "chosen": " is green", "rejected": " is Ulm"},
        {"id": "talk", "prompt": turns, "chosen": answer, "rejected": answer},
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    columns = {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected", "id": "id"}
    documents = Documents(path=str(path), **columns)
    pairs = CorpusBlocks(tuple(corpus_files(documents, "d")), (2,), documents, 4, "d")
    queries = [Document(word, "", word) for word in ("Ulm", "winter", "stone", "sea")]
    found = {row["query_id"]: row["doc_id"] for row in by_bm25(pairs, queries, 1).to_pylist()}
    assert found == {"Ulm": "text", "winter": "talk", "stone": "talk", "sea": "text"}


def test_a_pair_takes_few_bytes(tmp_path: Path) -> None:
    """Every process that reads or scores has all of them."""
    pairs = 200_000
    columns = {
        "query_id": [f"query-{n % 1000}" for n in range(pairs)],
        "doc_id": [f"document-{n:09d}" for n in range(pairs)],
        "block": [f"00000-{n // 256:07d}" for n in range(pairs)],
    }
    table = pa.table(columns)
    del columns
    tracemalloc.start()
    before = pa.total_allocated_bytes()
    chosen = Chosen.of(table)
    size = tracemalloc.get_traced_memory()[0] + pa.total_allocated_bytes() - before
    tracemalloc.stop()
    assert size < 40 * pairs
    assert len(chosen.documents("00000-0000003")) == 256 and len(chosen.places) == -(-pairs // 256)
