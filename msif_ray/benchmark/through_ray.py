"""The same work through Ray: actors, Ray Data, files and Parquet, against the same steps in one process."""

import json
import os
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from msif_ray import heap
from msif_ray.benchmark.steps import Steps
from msif_ray.benchmark.workload import Workload
from msif_ray.errors import UserError


def check_installed() -> None:
    """Raises UserError where Ray is missing, before anything is timed."""
    if find_spec("ray") is None:
        raise UserError("--ray: Ray is not installed; pip install -c constraints.txt -e .")


@dataclass(frozen=True)
class Job:
    """A workload on disk: its model, its documents and queries as text, in a folder."""

    workload: Workload
    queries: int
    keep: int
    folder: Path

    def write(self) -> None:
        model = self.workload.model()
        model.save_pretrained(self.folder / "model")
        vocabulary = {_word(token): token for token in range(self.workload.shape.vocabulary)}
        backend = Tokenizer(WordLevel(vocabulary, unk_token=_word(0)))
        backend.pre_tokenizer = WhitespaceSplit()
        PreTrainedTokenizerFast(tokenizer_object=backend, unk_token=_word(0)).save_pretrained(self.folder / "model")
        _write_texts(self.folder / "documents.jsonl", self.workload.batches(), "text")
        _write_texts(self.folder / "queries.jsonl", self.workload.queries(self.queries), "completion")

    def description(self, replicas: int, threads: int, name: str) -> dict[str, Any]:
        documents = {"path": str(self.folder / "documents.jsonl"), "id": "id", "text": "text", "append_eos": False}
        return {
            "run_dir": str(self.folder / name),
            "stages": [
                {
                    "name": "pretrain",
                    "model": str(self.folder / "model"),
                    "documents": documents,
                    "fit": {"max_tokens": self.workload.tokens},
                }
            ],
            "queries": {"path": str(self.folder / "queries.jsonl"), "id": "id", "append_eos": False},
            "score": [{"stage": "pretrain"}],
            "cluster": {
                "replicas": replicas,
                "cpus_per_rank": threads,
                "gpus_per_rank": 0 if self.workload.device == "cpu" else 1 / replicas,
                "dtype": str(self.workload.dtype).removeprefix("torch."),
                "tokens_per_batch": self.workload.shape.tokens_per_batch,
                # A batch: replicas that are done with a pass wait no longer than that for another.
                "documents_per_block": max(1, self.workload.shape.tokens_per_batch // self.workload.tokens),
                "activations_memory": self.keep // replicas,
            },
        }

    def run(self, replicas: int, threads: int) -> "Taken":
        """A run to its report, in a Ray session that is there already."""
        from rich.console import Console

        from msif_ray.config import parse_run
        from msif_ray.progress import Reporter, Snapshot
        from msif_ray.run import run

        config = parse_run(self.description(replicas, threads, f"run-{replicas}x{threads}"))
        began = scored = perf_counter()

        def observe(step: Snapshot) -> None:
            nonlocal scored
            if step.name.endswith(": scores"):
                scored = perf_counter()

        with open(os.devnull, "w") as nowhere:
            run(config, reporter=Reporter(Console(file=nowhere), observe))
        return Taken(scored - began, perf_counter() - began)


class Taken(NamedTuple):
    """Seconds to the scores, and to the report: with the top documents' token scores and texts."""

    scores: float
    report: float


def _word(token: int) -> str:
    """A word that is this one token and holds no other: an unknown-token's word is found inside of others, too."""
    return f"t{token}"


def _write_texts(path: Path, batches: list[Any], column: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        for batch in batches:
            for row, key in enumerate(batch.keys):
                ids = batch.input_ids[row][batch.attention_mask[row]].tolist()
                line = {"id": key.document_id, column: " ".join(map(_word, ids))}
                file.write(json.dumps(line | ({"prompt": ""} if column == "completion" else {})) + "\n")


def in_process_seconds(workload: Workload, queries: int, threads: int, keep: int) -> float:
    """The same fit, carrying back and scoring in one process, started for it as a replica is and with the same
    settings: imports and the making of the model included, as a run's replicas have to load theirs."""
    began = perf_counter()
    with heap.environment(), ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        pool.submit(_in_process, workload, queries, threads, keep).result()
    return perf_counter() - began


def _in_process(workload: Workload, queries: int, threads: int, keep: int) -> None:
    torch.set_num_threads(threads)
    heap.keep_freed_memory()
    steps = Steps(workload, keep=keep)
    sums = steps.covariance()
    bases = steps.bases(sums, list(steps.maps))
    eigenvalues = steps.correction(bases)
    steps.forget()
    steps.score(steps.directions(bases, eigenvalues, queries, None))


def compare(workload: Workload, queries: int, threads: int, keep: int) -> dict[str, float]:
    """`ray_overhead`: one replica's extra time to its scores over the same steps in process, on as many threads, as a
    share of these; `ray_overhead_two_replicas`: that of two replicas of one thread, which a run has by default on two
    cores, over the same process. `replica_scaling`: one replica of one thread over two of them, to the scores. The
    report has no counterpart in process."""
    from msif_ray.connection import connected

    with tempfile.TemporaryDirectory() as name, connected():
        job = Job(workload, queries, keep, Path(name))
        job.write()
        alone = in_process_seconds(workload, queries, threads, keep)
        through = job.run(1, threads)
        one = through if threads == 1 else job.run(1, 1)  # on the same folder it would find all done
        two = job.run(2, 1)
    return {
        "in_process_s": alone,
        "ray_s": through.scores,
        "ray_report_s": through.report,
        "ray_overhead": through.scores / alone - 1,
        "ray_overhead_two_replicas": two.scores / alone - 1,
        "one_replica_s": one.scores,
        "two_replicas_s": two.scores,
        "replica_scaling": one.scores / two.scores,
    }
