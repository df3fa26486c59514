"""Which corpora of preferences a run needs its reference models for, and where what they make of them is."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from msif_ray import layout, stages
from msif_ray.config import Documents, Preference, Run


@dataclass(frozen=True)
class ReferencePass:
    """A stage's pairs to be read by its reference model, for those `corpora` (`stages.<i>`, `index.<i>`, `score.<i>`)
    that are the same; its first `limit` documents are enough. `late`: of those scored from an index the top ones alone,
    once they are known. `entry`: the only `score` entry, or the first of a pass, that sees just these blocks."""

    stage: int
    corpora: tuple[str, ...]
    documents: Documents
    max_tokens: int | None
    limit: int | None
    late: bool = False
    entry: int | None = None

    @property
    def key(self) -> str:
        """What its folder is called."""
        return self.corpora[0]


def reference_passes(run: Run, corpora: Iterable[str]) -> list[ReferencePass]:
    """The passes that a checked run's corpora need, in their order."""
    found: dict[tuple[int, str, int | None, int | None], list[tuple[str, Documents]]] = {}
    for corpus in corpora:
        stage, documents, max_tokens = _described(run, corpus)
        if documents is not None and isinstance(run.stages[stage].objective, Preference):
            same = (stage, documents.model_dump_json(), max_tokens, _of_its_own(run, corpus))
            found.setdefault(same, []).append((corpus, documents))
    passes = []
    for (stage, _, max_tokens, own), members in found.items():
        names = tuple(corpus for corpus, _ in members)
        limit = run.stages[stage].fit.documents if all(name.startswith("stages.") for name in names) else None
        late = own is not None and run.score[own].index is not None
        passes.append(ReferencePass(stage, names, members[0][1], max_tokens, limit, late, own))
    return passes


def references_folder(run: Run, corpora: Iterable[str], corpus: str) -> Path | None:
    """Where the references of a corpus are; None of one that has none."""
    for each in reference_passes(run, corpora):
        if corpus in each.corpora:
            return layout.references(run.run_dir, each.key)
    return None


def _described(run: Run, corpus: str) -> tuple[int, Documents | None, int | None]:
    """The stage, the documents and the `max_tokens` of a corpus."""
    kind, _, number = corpus.partition(".")
    if kind == "stages":
        stage = run.stages[int(number)]
        return int(number), stage.documents, stage.fit.max_tokens
    entry = run.index[int(number)] if kind == "index" else run.score[int(number)]
    return run.stage_index(entry.stage), run.scored_documents(entry), entry.max_tokens


def _of_its_own(run: Run, corpus: str) -> int | None:
    """The first entry of a scoring pass that sees some of the documents only, or blocks of another size."""
    kind, _, number = corpus.partition(".")
    if kind != "score":
        return None
    entry = run.score[int(number)]
    if entry.index is None and entry.candidates is None:
        return None
    entries = next(entries for entries in stages.passes(run) if entry in entries)
    return run.score.index(entries[0])
