"""Run directories as a finished run leaves them, written without a cluster: for what reads them."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from msif_ray import layout
from msif_ray.config import parse_run
from msif_ray.results import parts, top
from msif_ray.results.statistics import write_statistics
from msif_ray.store import write_json

LAYERS, KINDS = 3, ("attention.dense", "mlp.up", "mlp.down")
MAPS = [f"model.layers.{layer}.{kind}" for layer in range(LAYERS) for kind in KINDS]

# A query of each kind, as run.json has them.
KINDS = (
    ("margin", "Is it?", " yes", {"rather_than": " no"}),
    ("span", "Who was it?", " it was Ann.", {"span": [8, 11]}),
    ("talk", None, [{"role": "user", "content": "Really?"}, {"role": "assistant", "content": "No."}]),
)


@dataclass
class Finished:
    """What the run holds. `queries` are as run.json has them. `tokens_of` gives a document's tokens by its number."""

    queries: Sequence[Sequence[Any]] = (("q0", "Is it?", " yes"), ("q1", "Or not?", " no"))
    documents: int = 12
    labels: Sequence[str] = ("pretrain",)
    top: int = 3
    seed: int = 0
    tokens_of: Callable[[int], list[str]] = lambda number: [f"word{number}", " and", " more"]
    id_of: Callable[[int], str] = lambda number: f"doc-{number:02d}"
    log_likelihood: float = -1.0
    energy: float = 1.0
    skipped: Sequence[tuple[str, str]] = ()
    changes: Mapping[str, Any] = field(default_factory=dict)
    out_of: int | None = None  # documents of the corpus, where others have no scores

    def write(self, run_dir: Path) -> Path:
        self._record(run_dir)
        for label in self.labels:
            self._directions(run_dir, label)
            self._scores(run_dir, label)
        parts.write_skipped(run_dir, self.labels[:1])
        rows = [row for label in self.labels for row in self._top(run_dir, label)]
        top.write_top(run_dir, rows, self.top, self.has_curvature_norms)
        write_statistics(run_dir, self.labels)
        return run_dir

    @property
    def has_curvature_norms(self) -> bool:
        return bool(self.changes.get("detail", {}).get("curvature_norm"))

    @property
    def has_norms(self) -> bool:
        return bool(self.changes.get("detail", {}).get("norm", True))

    def scores(self, label: str) -> np.ndarray:
        """`[documents, queries]`, of both signs."""
        seed = self.seed + 100 * list(self.labels).index(label)
        return np.random.default_rng(seed).standard_normal((self.documents, len(self.queries))).astype(np.float32)

    def _record(self, run_dir: Path) -> None:
        description = {
            "run_dir": str(run_dir),
            "stages": [
                {"name": "pretrain", "model": "models/base", "documents": {"path": "base.jsonl", "text": "text"}},
                {"name": "tune", "model": "models/<tuned>"},
            ],
            "queries": {"path": "queries.jsonl", "id": "id"},
            "score": [{"stage": "pretrain", "name": label} for label in self.labels],
        }
        run = parse_run(description | dict(self.changes)).model_dump(mode="json", exclude={"run_dir", "top"})
        total = self.out_of or self.documents + len(self.skipped)
        write_json(
            layout.run_record(str(run_dir)),
            {
                "identity": {
                    "run": run,
                    "models": {name: {"revision": None, "sha256": name} for name in ("pretrain", "tune")},
                    "documents": {f"score.{i}": total for i in range(len(self.labels))},
                    "queries": self.queries,
                    "maps": {name: [8, 9] for name in MAPS},
                },
                "device": "cpu",
                "versions": {"msif_ray": "0"},
                "strengths": {label: {"pretrain.damping": {name: 0.5 for name in MAPS}} for label in self.labels},
                "completion_tokens": {query: 2 for query, *_ in self.queries},
            },
        )
        write_json(
            layout.factors_manifest(layout.factors(str(run_dir), "pretrain")),
            {"documents": 1000, "tokens": 20_000, "skipped": [], "share_covered": 0.5},
        )

    def _directions(self, run_dir: Path, label: str) -> None:
        folder, ids = layout.directions(str(run_dir), label), [query for query, *_ in self.queries]
        write_json(layout.directions_manifest(folder), {"log_likelihood": dict.fromkeys(ids, self.log_likelihood)})
        rows = [{"map": m, "query_id": q, "rank": 4, "energy_kept": self.energy} for m in MAPS for q in ids]
        pq.write_table(pa.Table.from_pylist(rows), layout.energy_file(folder))

    def _scores(self, run_dir: Path, label: str) -> None:
        ids, scores = [self.id_of(number) for number in range(self.documents)], self.scores(label)
        lengths = [len(self.tokens_of(number)) for number in range(self.documents)]
        norms = np.arange(self.documents) % 5 + 1.0
        half = self.documents // 2
        for block, some in enumerate((slice(0, half), slice(half, None))):
            parts.write_part(
                parts.part_path(run_dir, label, f"00000-000000{block}"),
                [query for query, *_ in self.queries],
                ids[some],
                scores[some],
                norms[some] if self.has_norms else None,
                lengths[some],
                self.skipped if block == 0 else (),
                {"stage": "pretrain", "name": label},
                parts.Details((), curvature_norms=10 * norms[some] if self.has_curvature_norms else None),
            )

    def _top(self, run_dir: Path, label: str) -> list[dict[str, Any]]:
        numbers = {self.id_of(number): number for number in range(self.documents)}
        rows = []
        for pair in top.top_pairs(run_dir, label, self.top):
            tokens = self.tokens_of(numbers[pair.doc_id])
            random = np.random.default_rng(numbers[pair.doc_id])
            by_token, by_map = (random.dirichlet(np.full(n, 0.2)) * pair.score for n in (len(tokens), len(MAPS)))
            if len(tokens) > 1:  # one of them on the other side
                by_token[0] -= 0.2 * pair.score
                by_token[1] += 0.2 * pair.score
            rows.append(
                {
                    "stage": label,
                    "query_id": pair.query_id,
                    "side": pair.side,
                    "rank": pair.rank,
                    "doc_id": pair.doc_id,
                    "score": pair.score,
                    "norm": pair.norm,
                    "n_tokens": pair.n_tokens,
                    "text": "".join(tokens),
                    "tokens": tokens,
                    "token_scores": by_token.astype(np.float32),
                    "modules": MAPS,
                    "module_scores": by_map.astype(np.float32),
                }
                | ({"curvature_norm": pair.curvature_norm} if self.has_curvature_norms else {})
            )
        return rows


def page_data(page: str) -> dict[str, Any]:
    """What a report's script is given."""
    start = page.index('id="data">') + len('id="data">')
    return dict(json.loads(page[start : page.index("</script>", start)]))
