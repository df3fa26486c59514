"""Tokens of ragged corpora: exact when counted, close when sampled."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import models
import pytest
from corpora import write_lines

from msif_ray.cluster.rank import ModelSetup
from msif_ray.config import Documents
from msif_ray.corpus.files import corpus_files
from msif_ray.corpus.preferences import Pairs
from msif_ray.corpus.reader import Document
from msif_ray.corpus.windows import encode
from msif_ray.plan import tokens
from msif_ray.plan.tokens import Tally, corpus_tally, encoder, tally

ROWS = [*models.random_documents(1, 1500, (2, 90)), {"id": "short", "text": "the"}, {"id": "null", "text": None}]


def count(folder: Path, documents: int, max_tokens: int = 16, files: int = 3) -> Tally:
    for number in range(files):
        write_lines(folder / f"{number}.jsonl", ROWS[number::files])
    corpus = Documents(path=str(folder / "*.jsonl"), text="text")
    found = corpus_files(corpus, "corpus")
    tokenizer = models.build_tokenizer()
    return corpus_tally(found, corpus, documents, "corpus", lambda each: encode(tokenizer, each, False), max_tokens)


def test_a_small_corpus_is_counted(tmp_path: Path) -> None:
    tally = count(tmp_path, len(ROWS))
    words = sum(len(row["text"].split()) + 1 for row in ROWS[:-2])
    assert (tally.sampled, tally.documents, tally.skipped, tally.tokens) == (None, 1502, 2, words)
    assert tally.targets == words - 1500
    assert tally.positions == tally.targets + sum(tally.lengths.values())
    assert max(tally.lengths) == 16


def test_a_limit_takes_the_first_documents(tmp_path: Path) -> None:
    assert count(tmp_path, 30).tokens == sum(len(row["text"].split()) + 1 for row in ROWS[0:90:3])


@pytest.mark.parametrize("read_bytes", [2**30, 0])
def test_a_large_corpus_is_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_bytes: int) -> None:
    exact = count(tmp_path, len(ROWS))
    monkeypatch.setattr(tokens, "COUNTED", 400)
    monkeypatch.setattr(tokens, "READ_BYTES", read_bytes)
    monkeypatch.setattr(tokens, "FILES", 2)
    monkeypatch.setattr(tokens, "ROWS", 450)
    guess = count(tmp_path, len(ROWS))
    assert guess.sampled is not None and 200 <= guess.sampled <= 400
    assert guess.documents == 1502
    # 300 documents of uniform length over 2 to 91 tokens: a standard error of 26/47/√300, 3.2 %.
    assert guess.tokens == pytest.approx(exact.tokens, rel=0.1)
    assert guess.positions == pytest.approx(exact.positions, rel=0.1)
    assert guess.squared_lengths == pytest.approx(exact.squared_lengths, rel=0.1)


def test_a_pair_that_straddles_a_length_where_the_model_changes_is_not_usable(tmp_path: Path) -> None:
    """As a rank skips it (tests/cluster/test_rank.py)."""
    folder = str(tmp_path)
    models.build_tokenizer().save_pretrained(folder)
    setup = ModelSetup("pre", folder, folder, None, "float64", None, False, 40, 0, 1, False, objective=Pairs(0.1))
    stage = SimpleNamespace(tokenizer_path=folder, vocabulary=len(models.VOCABULARY), switches=(8,))
    resolved: Any = SimpleNamespace(stages=[stage])
    words = ["the" + "".join(models.VOCABULARY[29 : 29 + more]).replace("Ġ", " ") for more in (4, 7, 8)]
    pairs = [Document(str(n), None, words[a], rejected=words[b]) for n, (a, b) in enumerate([(0, 1), (1, 2)])]
    counted = tally(map(encoder(resolved, 0, setup), pairs), None)
    assert (counted.documents, counted.skipped) == (2, 1)
    assert [*counted.reasons] == [
        "its two sequences have 8 and 9 tokens, and the model embeds positions otherwise beyond 8"
    ]
