"""Whole runs on a real local Ray: margins, spans and conversations asked of documents in packed rows."""

from itertools import chain
from pathlib import Path
from typing import Any

import models
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import reference
import reference_solve
import torch
from cluster import runs
from cluster.questions import BAD, GOOD, OTHER_TALK, PROMPT, TALK, completed, last_turn, only
from corpus.test_chat import PLAIN, tokenizer_of
from results.finished import page_data

from msif_ray.config import parse_run
from msif_ray.run import run
from msif_ray.store import read_json

pytestmark = pytest.mark.usefixtures("ray_cluster")
TOKENIZER = tokenizer_of(PLAIN)
QUERIES = [
    {"id": "plain", "prompt": PROMPT, "completion": GOOD, "rejected": None, "part": None},
    {"id": "margin", "prompt": PROMPT, "completion": GOOD, "rejected": BAD, "part": None},
    {"id": "span", "prompt": PROMPT, "completion": BAD, "rejected": None, "part": [6, 11]},
]
TALKS = [
    {"id": "talk", "chosen": TALK, "rejected": None},
    {"id": "other", "chosen": TALK, "rejected": OTHER_TALK},
]


def packed_rows() -> list[dict[str, Any]]:
    """Five rows of three documents; the last one's lengths do not add up."""
    texts = iter(models.random_documents(6, 15, words=(2, 10)))
    rows: list[dict[str, Any]] = []
    for _ in range(5):
        each = [next(texts) for _ in range(3)]
        ids = [[*TOKENIZER(text["text"])["input_ids"], TOKENIZER.eos_token_id] for text in each]
        rows.append({"of": [text["id"] for text in each], "input_ids": [*chain(*ids)], "seq_lengths": [*map(len, ids)]})
    return [*rows, {"of": ["lost"], "input_ids": [5, 6, 7], "seq_lengths": [2]}]


def packed_by_hand() -> list[dict[str, Any]]:
    """The same, each document after those before it in its row."""
    found = []
    for row in packed_rows()[:-1]:
        start = 0
        for name, length in zip(row["of"], row["seq_lengths"], strict=True):
            stop = start + length
            targets = [t >= max(1, start) for t in range(stop)]
            found.append({"id": name, "ids": row["input_ids"][:stop], "targets": targets, "own": (start, stop)})
            start = stop
    return found


SAID_OLD, SAID_GREEN = (completed(TOKENIZER, PROMPT, completion) for completion in (GOOD, BAD))
ASKED = [
    {"id": "plain", "windows": [(1.0, *SAID_OLD)]},
    {"id": "margin", "windows": [(1.0, *SAID_OLD), (-1.0, *SAID_GREEN)]},
    {"id": "span", "windows": [(1.0, *only(SAID_GREEN, 2))]},  # green
]
SAID = [
    {"id": "talk", "windows": [(1.0, *last_turn(TALK))]},
    {"id": "other", "windows": [(1.0, *last_turn(TALK)), (-1.0, *last_turn(OTHER_TALK))]},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pair of models whose tokenizer has a chat template, and the packed corpus."""
    path = tmp_path_factory.mktemp("asked")
    models.save_pair(path, "gpt_neox", seed=5, tokenizer=TOKENIZER)
    pq.write_table(pa.Table.from_pylist(packed_rows()), path / "packed.parquet")
    return path


def described(folder: Path, run_dir: str, **cluster: Any) -> dict[str, Any]:
    description = runs.two_stages(folder, run_dir, **cluster)
    packed = {"ids": "input_ids", "lengths": "seq_lengths", "attention": "row"}
    corpus = {"path": str(folder / "packed.parquet"), "id": "of", "packed": packed}
    description["stages"][0] |= {"documents": corpus, "fit": {}}
    queries = runs.write_lines(folder / "asked.jsonl", QUERIES)
    description["queries"] = {"path": queries, "id": "id", "rather_than": "rejected", "span": "part"}
    description["score"] = [{"stage": "pretrain"}]
    return description


@pytest.fixture(scope="module")
def specs(folder: Path) -> list[reference.StageSpec]:
    first, second = runs.specs(folder)
    first.documents, first.max_tokens = packed_by_hand(), None
    return [first, second]


@pytest.fixture(scope="module")
def fits(specs: list[reference.StageSpec]) -> list[dict[str, reference.Fit]]:
    with torch.enable_grad():
        return [reference.fit(stage, reference.tracked_names(stage.model)) for stage in specs]


def expected(specs: Any, fits: Any, queries: list[dict[str, Any]]) -> dict[runs.Pair, tuple[float, float, int]]:
    with torch.enable_grad():
        return reference.scores(specs, queries, specs[0].documents, 0, None, fits)[0]


@pytest.fixture(scope="module")
def asked(folder: Path) -> Path:
    description = described(folder, "run")
    run(parse_run(description))
    return Path(description["run_dir"])


def test_scores_equal_the_dense_reference(asked: Path, specs: Any, fits: Any) -> None:
    found = runs.read_scores(str(asked), "pretrain")
    assert runs.largest_error(found, expected(specs, fits, ASKED)) < runs.FLOAT32
    skipped = pq.read_table(asked / "skipped.parquet").to_pylist()
    reason = "seq_lengths are not the lengths of documents that input_ids consists of"
    assert [(row["doc_id"], row["reason"]) for row in skipped] == [("packed.parquet:5", reason)]


def test_what_was_asked_is_recorded_and_shown(asked: Path, specs: Any) -> None:
    record = read_json(asked / "run.json")
    assert record["identity"]["queries"] == [
        ["plain", PROMPT, GOOD],
        ["margin", PROMPT, GOOD, {"rather_than": BAD}],
        ["span", PROMPT, BAD, {"span": [6, 11]}],
    ]
    assert record["completion_tokens"] == {"plain": 4, "margin": 4, "span": 1}
    assert record["identity"]["run"]["stages"][0]["documents"]["packed"]["attention"] == "row"
    queries = page_data((asked / "report.html").read_text(encoding="utf-8"))["queries"]
    assert [query["rather_than"] for query in queries] == [None, BAD, None]
    assert queries[2]["explained"] == [" is a ", "green", " stone in the sea."]
    model = specs[1].model
    losses = [
        [sign * reference.summed_nll(model, ids, reference.data_labels(ids, own)).item() for sign, ids, own in windows]
        for windows in (query["windows"] for query in ASKED)
    ]
    assert [query["log_likelihood"] for query in queries] == pytest.approx([-sum(each) for each in losses], rel=1e-5)


def test_top_documents_are_their_own_text_and_tokens_with_what_came_before(asked: Path) -> None:
    rows = pq.read_table(asked / "top.parquet").to_pylist()
    documents = {document["id"]: document for document in packed_by_hand()}
    assert len(rows) == 3 * 2 * 4  # queries, sides, k
    for row in rows:
        document = documents[row["doc_id"]]
        assert row["text"] == TOKENIZER.decode(document["ids"][slice(*document["own"])])
        assert "".join(row["tokens"]) == TOKENIZER.decode(document["ids"])
        assert len(row["token_scores"]) == row["n_tokens"] == len(document["ids"])
        assert sum(row["token_scores"]) == pytest.approx(row["score"], rel=1e-4, abs=1e-6)


@pytest.mark.long
@pytest.mark.timeout(600)
def test_conversations_on_two_ranks_that_shard_the_weights(folder: Path, asked: Path, specs: Any, fits: Any) -> None:
    """A margin's two sequences are batches of their own, and so of one rank each."""
    description = described(folder, "talks", ranks_per_replica=2) | {
        "queries": {
            "path": runs.write_lines(folder / "talks.jsonl", TALKS),
            "id": "id",
            "messages": "chosen",
            "rather_than": "rejected",
        }
    }
    description["cluster"]["tokens_per_batch"] = 30
    for stage in description["stages"]:
        stage["factors"] = str(asked)
    run(parse_run(description), until="score")
    found = runs.read_scores(description["run_dir"], "pretrain")
    assert runs.largest_error(found, expected(specs, fits, SAID)) < 1e-5
    asked_for = read_json(Path(description["run_dir"]) / "run.json")["identity"]["queries"]
    assert asked_for == [["talk", None, TALK], ["other", None, TALK, {"rather_than": OTHER_TALK}]]


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_margin_is_solved_by_conjugate_gradients_as_one_query(
    folder: Path, asked: Path, specs: Any, fits: Any
) -> None:
    """The later stage solved on its own Gauss-Newton Hessian, with an α so strong that few iterations do."""
    description = described(folder, "solved")
    for stage in description["stages"]:
        stage["factors"] = str(asked)
    tune = description["stages"][1]
    tune["solver"] = {"kind": "cg", "iterations": 40, "documents": 5, "tolerance": 1e-6}
    tune["response"]["alpha"] = {"relative": 100.0}
    run(parse_run(description), until="score")
    names = reference.tracked_names(specs[1].model)
    operator = reference.StageSpec(
        "tune", specs[1].model, specs[1].tokenizer, runs.TUNING[:5], 8, seed=3, strength=100.0
    )
    with torch.enable_grad():
        carried = reference_solve.query_gradients(specs[1], names, ASKED)
        carried = reference_solve.solved(operator, fits[1], carried, scored=False)
        for name in names:
            vectors = carried[name].flatten(1).T
            vectors = reference.stage_respond(specs[0], fits[0][name].hessian(), vectors, scored=True)
            carried[name] = vectors.T.reshape(carried[name].shape)
        wanted = {}
        for document in specs[0].documents:
            gradient = reference.window_gradients(specs[0].model, names, document["ids"], document["targets"])
            for row, query in enumerate(ASKED):
                score = sum(float((carried[name][row] * gradient[name]).sum()) for name in names)
                wanted[query["id"], document["id"]] = score
    found = {pair: score for pair, (score, _, _) in runs.read_scores(description["run_dir"], "pretrain").items()}
    assert found.keys() == wanted.keys()
    assert max(abs(found[pair] - wanted[pair]) for pair in wanted) < 1e-4 * max(map(abs, wanted.values()))
    record = read_json(Path(description["run_dir"]) / "run.json")
    assert record["solvers"]["pretrain"]["tune"]["kept_ekfac"] == []
