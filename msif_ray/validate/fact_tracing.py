"""Do scores find the documents that state a fact? (The paper's second experiment.) Passes, scores and their sum."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from msif_ray.corpus.states import fingerprint
from msif_ray.corpus.windows import Encoded
from msif_ray.demo.metrics import Scores
from msif_ray.demo.questions import Question
from msif_ray.demo.run import bm25_scores
from msif_ray.influence.labels import batch_uniforms
from msif_ray.influence.modules import LinearMap, find_linear_maps
from msif_ray.store import json_hash, load_tensors, save_tensors
from msif_ray.validate.fact_settings import FactSetting, document_texts, encoded, question_texts
from msif_ray.validate.kept import check_setting
from msif_ray.validate.recording import Recording
from msif_ray.validate.setting import Setting
from msif_ray.validate.similarity import hidden_cosine
from msif_ray.validate.tracing import Passes, Traced, trace

HIDDEN, BM25, BM25_QUESTION = "hidden-state similarity", "BM25, question and answer", "BM25, question alone"


@dataclass(frozen=True)
class FactTracing:
    """One run of it: passes, each map's share of the scores and their sum are kept in `folder` and not computed again.

    `dampings` and `alpha` are multiples of each map's mean eigenvalue.
    """

    setting: FactSetting
    folder: Path
    seed: int
    dampings: tuple[float, ...]
    alpha: float
    tokens_per_batch: int
    say: Callable[[str], None]

    def check(self) -> None:
        """Raises UserError where `folder` holds parts of another setting."""
        setting = self.setting
        texts = {"documents": setting.documents, "queries": setting.queries, "finetuning": setting.finetuning}
        own: dict[str, Any] = {name: json_hash(each) for name, each in texts.items()}
        own |= {"models": [fingerprint(model) for model in setting.models]}
        own |= {"patterns": setting.patterns, "fitted": setting.fitted}
        check_setting(self.folder, own | self._options)

    @property
    def _options(self) -> dict[str, Any]:
        return {
            "dampings": list(self.dampings),
            "alpha": self.alpha,
            "seed": self.seed,
            "tokens_per_batch": self.tokens_per_batch,
        }

    def traced(self) -> Traced:
        """The scores of all methods that use gradients, over all maps."""
        path = self.folder / "scores.safetensors"
        if not path.exists():
            self._record()
            for number, name in enumerate(self.maps, start=1):
                self._trace_map(name)
                self.say(f"map {number} of {len(self.maps)}: {name}")
            total: dict[str, torch.Tensor] = {}
            for name in self.maps:
                for key, value in load_tensors(self._map_file(name)).items():
                    total[key] = total.get(key, 0) + value
            save_tensors(path, total)
        return unpacked(load_tensors(path))

    def others(self) -> dict[str, Scores]:
        """Scores of the methods that use no gradients, `[queries, documents]`."""
        path = self.folder / "others.safetensors"
        if not path.exists():
            found: dict[str, Scores] = {}
            setting = self.setting
            model, tokenizer = setting.model(1), setting.tokenizer()
            compared = Setting(model, tokenizer, self.maps, [], [], self._documents, self._queries, 0.0)
            found[HIDDEN] = hidden_cosine(compared)
            found[BM25] = bm25_scores(setting.documents, setting.queries)
            asked: list[Question] = [{**query, "completion": ""} for query in setting.queries]
            found[BM25_QUESTION] = bm25_scores(setting.documents, asked)
            save_tensors(path, {name: torch.from_numpy(scores).double() for name, scores in found.items()})
        return {name: scores.numpy() for name, scores in load_tensors(path).items()}

    @property
    def tokens(self) -> Scores:
        """How many tokens each document has, `[documents]`."""
        return np.array([float(len(document.ids)) for document in self._documents])

    @cached_property
    def maps(self) -> dict[str, LinearMap]:
        return find_linear_maps(self.setting.model(0), self.setting.patterns)

    @cached_property
    def _documents(self) -> list[Encoded]:
        return encoded(self.setting.tokenizer(), document_texts(self.setting.documents), append_eos=False)

    @cached_property
    def _queries(self) -> list[Encoded]:
        return encoded(self.setting.tokenizer(), question_texts(self.setting.queries), append_eos=True)

    @cached_property
    def passes(self) -> Passes:
        fitted = self._documents[: self.setting.fitted]
        asked = encoded(self.setting.tokenizer(), question_texts(self.setting.finetuning), append_eos=True)
        return Passes(
            documents=self._at_both("documents", self._documents),
            queries=self._at_both("queries", self._queries),
            fitted=self._at_both("fitted", fitted),
            finetuning=self._recording("finetuning-1", asked),
        )

    def _at_both(self, name: str, documents: Sequence[Encoded]) -> tuple[Recording, Recording]:
        return self._recording(f"{name}-0", documents), self._recording(f"{name}-1", documents)

    def _recording(self, name: str, documents: Sequence[Encoded]) -> Recording:
        return Recording(self.folder / "passes" / name, self.maps, documents, self.tokens_per_batch)

    def _record(self) -> None:
        """Every pass; the numbers that labels are drawn by depend on the stage, the document and the seed alone."""
        passes = self.passes
        for stage in (0, 1):
            drawn = partial(batch_uniforms, self.seed, f"stage {stage}")
            model = partial(self.setting.model, stage)
            for recording in (passes.documents[stage], passes.queries[stage]):
                recording.make(model)
                self.say(f"recorded {recording.folder.name}")
            for recording in (passes.fitted[stage], *([passes.finetuning] if stage else [])):
                recording.make(model, drawn)
                self.say(f"recorded {recording.folder.name}")

    def _trace_map(self, name: str) -> None:
        path = self._map_file(name)
        if not path.exists():
            save_tensors(path, packed(trace(name, self.passes, self.dampings, self.alpha)))

    def _map_file(self, name: str) -> Path:
        return self.folder / "maps" / f"{name}.safetensors"

    def about(self) -> dict[str, Any]:
        return {
            "documents": len(self.setting.documents),
            "queries": len(self.setting.queries),
            "stating_documents_per_query": float(self.setting.states.sum(axis=1).mean()),
            "tokens": int(self.tokens.sum()),
            "fitted_documents": len(self.passes.fitted[0].documents),
            "finetuning_questions": len(self.setting.finetuning),
            "maps": list(self.maps),
            "tracked_parameters": sum(each.parameters for each in self.maps.values()),
            **self._options,
            **self.setting.about,
        }


def packed(traced: Traced) -> dict[str, torch.Tensor]:
    """As tensors with names."""
    scores = {f"scores|{method}|{damping!r}": each for (method, damping), each in traced.scores.items()}
    squares = {f"squares|{stage}|{norm}|{damping!r}": each for (stage, norm, damping), each in traced.squares.items()}
    return scores | squares


def unpacked(tensors: dict[str, torch.Tensor]) -> Traced:
    """What `packed` made them of."""
    scores, squares = {}, {}
    for name, tensor in tensors.items():
        kind, *key, damping = name.split("|")
        if kind == "scores":
            scores[key[0], float(damping)] = tensor
        else:
            squares[int(key[0]), key[1], float(damping)] = tensor
    return Traced(scores, squares)
