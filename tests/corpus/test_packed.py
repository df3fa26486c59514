"""Packed rows: which tokens are whose, what documents are called, and rows that cannot be told apart."""

import json
from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
from corpora import write_rows
from results.finished import Finished
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from msif_ray.config import Documents, parse_run
from msif_ray.corpus.blocks import CorpusBlocks
from msif_ray.corpus.candidates import by_bm25
from msif_ray.corpus.census import take_census
from msif_ray.corpus.objectives import as_text
from msif_ray.corpus.packed import NoParts, Part, row_parts
from msif_ray.corpus.reader import Document, read_documents
from msif_ray.corpus.windows import Encoded, Skipped, encode
from msif_ray.errors import UserError
from msif_ray.indexes import corpus_identity
from msif_ray.preflight import Resolved, check
from msif_ray.results.aggregate import aggregate

TOKENIZER = models.build_tokenizer()
E = TOKENIZER.eos_token_id
IDS = [5, 6, 7, E, 8, 9, E, 10]
SPANS = [(0, 4), (4, 7), (7, 8)]


def packed(**columns: Any) -> dict[str, Any]:
    return {"ids": "ids", "attention": "row"} | columns


def split(row: dict[str, Any], **columns: Any) -> list[tuple[int, int]] | str:
    """The spans of a row's documents, or why it has none."""
    documents = Documents(path="x.jsonl", packed=packed(**columns))
    found = row_parts({"ids": IDS} | row, documents.packed)
    return found.reason if isinstance(found, NoParts) else [(part.start, part.stop) for part in found]


WAYS = [
    ({"lengths": "n"}, {"n": [4, 3, 1]}),
    ({"positions": "p"}, {"p": [0, 1, 2, 3, 0, 1, 2, 0]}),
    ({"documents": "d"}, {"d": ["a", "a", "a", "a", "b", "b", "b", "a"]}),
    ({"documents": "d"}, {"d": [0, 0, 0, 0, 1, 1, 1, 2]}),
    ({"eos": E}, {}),
]


@pytest.mark.parametrize(("columns", "row"), WAYS)
def test_four_ways_to_tell_a_rows_documents_apart(columns: dict[str, Any], row: dict[str, Any]) -> None:
    assert split(row, **columns) == SPANS


def test_what_eos_tokens_end() -> None:
    assert split({"ids": [5, E, 6, 7, E]}, eos=E) == [(0, 2), (2, 5)]
    assert split({"ids": [5, 6]}, eos=E) == [(0, 2)]
    assert split({"ids": [E, 5, E, E, E, 6, E, E]}, eos=E) == [(1, 3), (5, 7)]  # the others are padding
    assert split({"ids": [E, E]}, eos=E) == "there is no document between its EOS tokens"


FAULTS = [
    ({"ids": None}, {"eos": E}, "ids is null"),
    ({"ids": "the sea"}, {"eos": E}, "ids is not a list but str"),
    ({"ids": []}, {"eos": E}, "ids is empty"),
    ({"ids": [1, 2.5]}, {"eos": E}, "ids are not whole numbers from zero on"),
    ({"ids": [1, None]}, {"eos": E}, "ids are not whole numbers from zero on"),
    ({"ids": [1, -100]}, {"eos": E}, "ids are not whole numbers from zero on"),
    ({"ids": [2**63]}, {"eos": E}, "ids are not whole numbers from zero on"),
    ({"ids": [[1], [2, 3]]}, {"eos": E}, "ids are not whole numbers from zero on"),
    ({"ids": [True, False]}, {"eos": E}, "ids are not whole numbers from zero on"),
    ({"n": [4, 3]}, {"lengths": "n"}, "n are not the lengths of documents that ids consists of"),
    ({"n": [4, 4, 0]}, {"lengths": "n"}, "n are not the lengths of documents that ids consists of"),
    ({"n": [2**62] * 4 + [8]}, {"lengths": "n"}, "n are not the lengths of documents that ids consists of"),
    ({"n": None}, {"lengths": "n"}, "n is null"),
    ({"p": [0, 1]}, {"positions": "p"}, "p has 2 values for 8 tokens"),
    ({"d": [0, 1]}, {"documents": "d"}, "d has 2 values for 8 tokens"),
    ({"d": 3}, {"documents": "d"}, "d is not a list"),
]


@pytest.mark.parametrize(("row", "columns", "reason"), FAULTS)
def test_a_row_that_cannot_be_told_apart_says_why(row: dict[str, Any], columns: dict[str, Any], reason: str) -> None:
    assert split(row, **columns) == reason
    assert encode(TOKENIZER, Document("d", None, NoParts(reason)), append_eos=False) == Skipped("d", reason)


MASKED = {"ids": [*IDS, 3, 3, 3], "mask": [1] * 8 + [0] * 3}
# Of padding each of these columns has what some packer writes there.
PADDED_WAYS = [
    ({"lengths": "n"}, {"n": [4, 3, 1]}),
    ({"positions": "p"}, {"p": [0, 1, 2, 3, 0, 1, 2, 0, 0, 0, 0]}),
    ({"positions": "p"}, {"p": [0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 3]}),
    ({"documents": "d"}, {"d": [1, 1, 1, 1, 2, 2, 2, 3, 0, 0, 0]}),
    ({"documents": "mask"}, {"mask": [1, 1, 1, 1, 2, 2, 2, 3, 0, 0, 0]}),
    ({"eos": E}, {"mask": [True] * 8 + [False] * 3}),
]


@pytest.mark.parametrize(("columns", "row"), PADDED_WAYS)
def test_padding_that_a_mask_tells_is_no_document_s(columns: dict[str, Any], row: dict[str, Any]) -> None:
    """Nor does a document's last token have any of it after it."""
    assert split(MASKED | row, mask="mask", **columns) == SPANS
    documents = Documents(path="x.jsonl", packed=packed(mask="mask", **columns))
    found = row_parts(MASKED | row, documents.packed)
    assert isinstance(found, list) and all(part.ids == tuple(IDS) for part in found)


BAD_MASKS = [
    (None, "mask is null"),
    (1, "mask is not a list but int"),
    ([1, 1], "mask has 2 values for 11 tokens"),
    ([0] * 11, "ids are padding alone by mask"),
    ([1, 0] + [1] * 9, "mask has padding before other tokens; only padding at a row's end can be cut off"),
    ([0.5] * 11, "mask are not whole numbers from zero on"),
]


@pytest.mark.parametrize(("mask", "reason"), BAD_MASKS)
def test_a_mask_that_cannot_be_followed_says_why(mask: Any, reason: str) -> None:
    assert split(MASKED | {"mask": mask}, mask="mask", eos=E) == reason


def test_other_columns_of_a_masked_row_have_a_value_per_token() -> None:
    assert split(MASKED | {"p": [0]}, mask="mask", positions="p") == "p has 1 values for 11 tokens"
    assert split(MASKED | {"d": 3}, mask="mask", documents="d") == "d is not a list"


def test_padding_that_no_mask_tells_is_not_scored() -> None:
    """Without `mask` it is taken for documents, or for the end of one: told where the tokenizer's own token is seen."""
    tokenizer = models.build_tokenizer(pad=True)
    pad = tokenizer.pad_token_id

    def reason(*own: int) -> str | None:
        found = encode(tokenizer, Document("d", None, Part((4, 5, *own), 2, 2 + len(own), alone=False)), False)
        return found.reason if isinstance(found, Skipped) else None

    nothing, ends = "it has no token but the tokenizer's padding or EOS", r"it begins or ends with padding (<pad>); cut"
    assert [reason(pad), reason(pad, pad), reason(E), reason(E, pad)] == [nothing] * 4
    assert all(str(reason(*own)).startswith(ends) for own in ((6, 7, pad, pad), (pad, pad, 6, 7)))
    assert [reason(6), reason(6, E, pad), reason(6, pad), reason(6, E, E), reason(6, pad, pad, 7)] == [None] * 5


def test_rows_without_a_mask_say_nothing_of_it() -> None:
    """Or a run of an earlier version could not go on."""
    assert "mask" not in Documents(path="x", packed=packed(eos=1)).model_dump(mode="json")["packed"]
    assert Documents(path="x", packed=packed(eos=1, mask="m")).model_dump(mode="json")["packed"]["mask"] == "m"


def test_tokens_before_a_document_are_context_or_are_not_there() -> None:
    ids = tuple(IDS)
    targets = []
    for start, stop in SPANS:
        found = encode(TOKENIZER, Document("d", None, Part(ids, start, stop, alone=False)), append_eos=False)
        assert isinstance(found, Encoded) and found.ids == ids[:stop]
        assert [t for t, target in enumerate(found.targets) if target] == list(range(max(1, start), stop))
        targets += [t for t, target in enumerate(found.targets) if target]
    assert targets == list(range(1, len(ids)))  # every token of the row but its first, once
    found = encode(TOKENIZER, Document("d", None, Part(ids, 4, 7, alone=True)), append_eos=False)
    assert found == Encoded("d", ids[4:7], (False, True, True))
    assert encode(TOKENIZER, Document("d", None, Part(ids, 7, 8, alone=True)), False) == Skipped(
        "d", "fewer than two tokens"
    )
    size = len(TOKENIZER)
    assert encode(TOKENIZER, Document("d", None, Part((4, size), 0, 2, True)), False) == Skipped(
        "d", f"token {size} is not in the tokenizer's vocabulary, whose last is {size - 1}"
    )


def test_ids_of_a_vocabulary_with_holes_are_known_by_the_largest() -> None:
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0, "b": 1, "c": 9}, unk_token="a")))
    assert len(words) == 3
    found = encode(words, Document("d", None, Part((1, 9), 0, 2, True)), False)
    assert found == Encoded("d", (1, 9), (False, True))
    assert encode(words, Document("d", None, Part((1, 10), 0, 2, True)), False) == Skipped(
        "d", "token 10 is not in the tokenizer's vocabulary, whose last is 9"
    )


def test_a_row_longer_than_windows_is_cut_where_a_document_would_be() -> None:
    ids = tuple(range(4, 20))
    found = encode(TOKENIZER, Document("d", None, Part(ids, 9, 14, alone=False)), append_eos=False)
    assert isinstance(found, Encoded)
    windows = list(found.windows(6))  # begin at tokens 0, 5 and 10
    assert [(window.key.window, window.ids) for window in windows] == [(1, ids[5:11]), (2, ids[10:14])]
    assert [t for w, start in zip(windows, (5, 10), strict=True) for t, own in enumerate(w.targets, start) if own] == [
        *range(9, 14)
    ]


ROWS = [
    {"name": "a", "ids": IDS, "n": [4, 3, 1], "of": ["x", "y", "z"], "from": "web"},
    {"name": "b", "ids": [5, 6], "n": [3], "of": ["u"], "from": "books"},
    {"name": "c", "ids": [7, 8, 9], "n": [2, 1], "of": ["v", "w"], "from": "web"},
]


def corpus(path: Path, **columns: Any) -> Documents:
    return Documents(path=str(path), packed=packed(lengths="n"), **columns)


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ""])
def test_documents_are_read_counted_and_named(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows{suffix}"
    write_rows(path, ROWS, row_group_size=2)
    names = {
        "name": ["a:0", "a:1", "a:2", "b", "c:0", "c:1"],
        "of": ["x", "y", "z", f"rows{suffix}:1", "v", "w"],
        None: [f"rows{suffix}:{name}" for name in ("0:0", "0:1", "0:2", "1", "2:0", "2:1")],
    }
    for column, expected in names.items():
        documents = corpus(path, id=column)
        census = take_census(documents, "key")
        assert census.rows == (6,)
        found = [each for file in census.files for each in read_documents(file, documents, "key")]
        assert [document.id for document in found] == expected
    assert found[1].text == Part(tuple(IDS), 4, 7, alone=False)
    assert isinstance(found[3].text, NoParts)
    assert as_text(None, found[1], TOKENIZER) == TOKENIZER.decode(IDS[4:7])
    blocks = CorpusBlocks(tuple(census.files), census.rows, documents, 2, "key", limit=5)
    assert [[document.id for document in block.documents] for block in blocks.left(frozenset())] == [
        names[None][:2], names[None][2:4], names[None][4:5]
    ]  # fmt: skip
    assert blocks.count == 5


def test_ids_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    for of, said in ((["x", "y"], "has 2 ids for 3 documents"), (["x", None, "z"], "has an empty id")):
        write_rows(path, [ROWS[2], ROWS[0] | {"of": of}])
        with pytest.raises(UserError, match=rf"^key\.id: .*rows\.jsonl row 1: 'of' {said}"):
            take_census(corpus(path, id="of"), "key")
    write_rows(path, [ROWS[0], ROWS[2] | {"of": ["v", "y"]}])
    with pytest.raises(UserError, match=r"^key\.id: .* row 1 has the id 'y' of .*rows\.jsonl row 0; ids must differ"):
        take_census(corpus(path, id="of"), "key")
    write_rows(path, [ROWS[0] | {"of": ["x", "y", "\ud800"]}])
    with pytest.raises(UserError, match=r"^key\.id: .*rows\.jsonl row 0: 'of' is not valid Unicode"):
        take_census(corpus(path, id="of"), "key")


def test_bm25_searches_each_documents_own_text(tmp_path: Path) -> None:
    words = TOKENIZER("the sea. a green stone.", add_special_tokens=False)["input_ids"]
    write_rows(tmp_path / "rows.jsonl", [{"ids": words, "n": [3, 4]}])
    documents = corpus(tmp_path / "rows.jsonl")
    census = take_census(documents, "key")
    blocks = CorpusBlocks(tuple(census.files), census.rows, documents, 8, "key")
    queries = [Document("q", "which stone", " the green", True), Document("r", "", "sea", True)]
    found = by_bm25(blocks, queries, 1, lambda ids: TOKENIZER.decode(list(ids))).to_pylist()
    assert [(row["query_id"], row["doc_id"]) for row in found] == [("q", "rows.jsonl:0:1"), ("r", "rows.jsonl:0:0")]


def test_scores_are_summed_by_a_rows_value_or_by_each_documents_own(tmp_path: Path) -> None:
    rows = [{"ids": [5, 6, 7, 8], "n": [2, 2], "from": "web", "by": [f"{n % 3}", f"{n}"]} for n in range(6)]
    write_rows(tmp_path / "rows.jsonl", rows)
    documents = {"path": str(tmp_path / "rows.jsonl"), "packed": packed(lengths="n")}
    stages = [{"name": "pretrain", "model": "m", "documents": documents}, {"name": "tune", "model": "n"}]
    changes = {"stages": stages, "cluster": {"documents_per_block": 6}}
    run = Finished(changes=changes, id_of=lambda number: f"rows.jsonl:{number // 2}:{number % 2}")
    run_dir = run.write(tmp_path / "run")
    scores = run.scores("pretrain").astype(float)[:, 0]
    (row,) = [row for row in aggregate(run_dir, "from").to_pylist() if row["query_id"] == "q0"]
    assert row["documents"] == 12 and row["total"] == pytest.approx(scores.sum(), rel=1e-5)
    found = {row["value"]: row["total"] for row in aggregate(run_dir, "by").to_pylist() if row["query_id"] == "q0"}
    owners = np.array([value for each in rows for value in each["by"]])
    assert found == {value: pytest.approx(scores[owners == value].sum(), rel=1e-5) for value in set(owners)}


def test_an_index_of_rows_read_otherwise_is_another(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", ROWS)
    documents = corpus(tmp_path / "rows.jsonl")
    census = take_census(documents, "key")
    found = corpus_identity(documents, census, 64)
    assert json.loads(json.dumps(found)) == found
    alone = Documents(path=documents.path, packed=packed(lengths="n") | {"attention": "document"})
    assert corpus_identity(alone, census, 64)["columns"] != found["columns"]
    text = Documents(path=documents.path, text="from")
    assert "packed" not in corpus_identity(text, census, 64)["columns"]


CONFIGURATIONS = [
    ({"packed": packed()}, r"documents\.packed: give one of `lengths`, `positions`, `documents` and `eos`"),
    ({"packed": packed(lengths="n", eos=1)}, r"documents\.packed: give one of `lengths`, `positions`, `documents`"),
    ({"packed": {"ids": "ids", "eos": 1}}, r"documents\.packed\.attention: is missing"),
    ({"packed": packed(eos=-1)}, r"documents\.packed\.eos: "),
    ({"packed": packed(eos=1), "text": "t"}, r"documents: give one of `text`, .* `messages`, `packed`, and"),
    ({"packed": packed(eos=1), "prompt": "t"}, r"documents: `prompt` goes with `completion`, not with `packed`"),
    ({"packed": packed(eos=1), "append_eos": True}, r"documents: `append_eos` does not go with `packed`"),
]


@pytest.mark.parametrize(("columns", "message"), CONFIGURATIONS)
def test_columns_that_do_not_go_together(columns: dict[str, Any], message: str) -> None:
    stage = {"name": "a", "model": "m", "documents": {"path": "x.jsonl"} | columns}
    run = {"run_dir": "r", "stages": [stage], "queries": {"path": "q"}, "score": [{"stage": "a"}]}
    with pytest.raises(UserError, match=rf"stages\.0\.{message}") as error:
        parse_run(run)
    assert "\n" not in str(error.value)


def resolve(folder: Path, **documents: Any) -> Resolved:
    models.save(models.build_model("gpt_neox", 0), TOKENIZER, folder / "model")
    write_rows(folder / "rows.jsonl", ROWS)
    write_rows(folder / "queries.jsonl", [{"prompt": "the", "completion": " sea"}])
    stage = {"name": "a", "model": str(folder / "model"), "documents": {"path": str(folder / "rows.jsonl")} | documents}
    queries = {"path": str(folder / "queries.jsonl")}
    return check(
        parse_run({"run_dir": str(folder / "r"), "stages": [stage], "queries": queries, "score": [{"stage": "a"}]})
    )


def test_rows_are_whole_by_default_and_mistakes_are_told_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("msif_ray.filled.DEFAULT_MAX_TOKENS", 7)
    resolved = resolve(tmp_path, packed=packed(lengths="n"), id="name")
    assert resolved.documents == {"stages.0": 6, "score.0": 6}
    assert resolved.run.stages[0].fit.max_tokens == resolved.run.score[0].max_tokens == models.CONTEXT
    with pytest.raises(UserError, match=r"^stages\.0\.documents\.packed\.eos: 60 is .*, whose last is 52; name"):
        resolve(tmp_path, packed=packed(eos=60))
    with pytest.raises(UserError, match=r"^stages\.0\.documents: .*rows\.jsonl has no column 'seq_lengths'"):
        resolve(tmp_path, packed=packed(lengths="seq_lengths"))
