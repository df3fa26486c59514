"""What an index of a stage's documents says of itself, and whether it is the one that a run may score from."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from msif_ray import layout
from msif_ray.checkpoint import Checkpoint
from msif_ray.config import Documents, Index, Run, Score
from msif_ray.corpus.blocks import CorpusBlocks
from msif_ray.corpus.census import Census
from msif_ray.errors import DamagedError, UserError
from msif_ray.manifests import Warn, check_files, check_type
from msif_ray.objectives import objective_identity, same_objective
from msif_ray.paths import all_there, exists, is_remote, path_of
from msif_ray.shapes import Pair
from msif_ray.store import read_json


class _Manifest(BaseModel):
    """What the manifest of every version's index says, and a run that scores from it needs."""

    model_sha256: str
    computed_in: str
    corpus: dict[str, Any]
    maps: dict[str, Pair[int]]
    groups: list[list[str]]
    documents_per_block: int
    files: dict[str, Any] | None = None
    rank: int = 0
    documents: int = 0
    tokens: int = 0
    bytes: int = 0


def index_location(run_dir: str | None) -> str | None:
    """A run directory as the run's own is written: absolute where it is local."""
    if run_dir is None:
        return None
    folder = path_of(run_dir)
    return str(folder if is_remote(folder) else folder.expanduser().absolute())


def index_folder(score: Score) -> Path:
    """Where the index is that an entry with an `index` scores from."""
    return layout.index(score.index or "", score.stage)


def is_own(run: Run, score: Score) -> bool:
    """Whether the entry scores from an index that its run builds itself."""
    return score.index == run.run_dir


@contextmanager
def whole(folder: Path) -> Iterator[None]:
    """Says what to do about a file of the index in `folder` that is missing or damaged. Raises UserError."""
    try:
        yield
    except DamagedError as error:
        raise UserError(f"{error}; {_mend(folder)}") from None


def _mend(folder: Path) -> str:
    return f"delete it, and run `msif index` of the run whose index {folder} is"


def read_manifest(folder: Path) -> dict[str, Any]:
    """What a finished index says of itself. Raises UserError for one that is damaged, or not whole."""
    about = {"stage": folder.name.removeprefix("stage=")}
    manifest: dict[str, Any] = read_json(layout.index_manifest(folder), _mend(folder), _Manifest, about)
    return manifest


def summary(folder: Path) -> dict[str, Any]:
    """What run.json says of a finished index."""
    kept = ("rank", "dtype", "computed_in", "metric", "damping", "documents", "tokens", "bytes")
    return {key: value for key, value in read_manifest(folder).items() if key in kept}


def describe(folder: Path) -> str:
    """A finished index in a few words: its documents, tokens and bytes."""
    about = read_manifest(folder)
    each = about["bytes"] / max(1, about["tokens"])
    return f"{about['documents']:,} documents, {about['bytes'] / 1e6:,.1f} MB, {each:,.0f} MB per million tokens"


def missing_files(folder: Path, blocks: CorpusBlocks) -> bool:
    """Whether a file of a finished index has been deleted since."""
    manifest = read_manifest(folder)
    groups = [layout.index_group(folder, group) for group in range(len(manifest["groups"]))]
    files = (layout.index_block(group, block) for group in groups for block in blocks.ids)
    return not all_there(chain(files, (layout.metric_file(folder, name) for name in manifest["maps"])))


def corpus_identity(
    documents: Documents, census: Census, max_tokens: int | None, objective: dict[str, Any] | None = None
) -> dict[str, Any]:
    """What two corpora have in common that are the same documents in the same windows, wherever they lie, with the same
    losses (`objective_identity`)."""
    later = {"messages", "packed", "label", "chosen", "rejected"}  # left out where not given: an index may be older
    optional = documents.model_dump(mode="json", include=later, exclude_none=True)
    return {
        "columns": documents.model_dump(mode="json", include={"text", "prompt", "completion", "id"}) | optional,
        "append_eos": documents.ends_with_eos,
        "max_tokens": max_tokens,
        "files": [
            [file.name, rows, content]
            for file, rows, content in zip(census.files, census.rows, census.contents, strict=True)
        ],
    } | ({} if objective is None else {"objective": objective})


def check_index(
    run: Run,
    position: int,
    checkpoints: Sequence[Checkpoint],
    census: Census,
    references: Mapping[int, Checkpoint],
    warn: Warn,
) -> None:
    """Whether the index of `score.<position>` is there, whole, and of the entry's model, maps and documents. `warn` is
    told what of an earlier version's could not be compared.

    Raises UserError, naming the key and what to change.
    """
    score = run.score[position]
    key, checkpoint = f"score.{position}", checkpoints[run.stage_index(score.stage)]
    if is_own(run, score):
        _check_own(run, score, key)
        return
    folder = index_folder(score)
    if not exists(layout.index_manifest(folder)):
        raise UserError(f"{key}.index: {folder} holds no finished index; run `msif index` of that run to its end")
    manifest = read_manifest(folder)
    try:
        _check_made(manifest, folder, checkpoint, run.cluster.dtype, warn)
    except UserError as error:
        raise UserError(f"{key}.index: {error}") from None
    documents = run.scored_documents(score)
    objective = objective_identity(run, run.stage_index(score.stage), references)
    wanted = corpus_identity(documents, census, score.max_tokens, objective)
    _check_corpus(manifest["corpus"], wanted, folder, key)
    blocks = CorpusBlocks(tuple(census.files), census.rows, documents, manifest["documents_per_block"], key)
    if missing_files(folder, blocks):
        raise UserError(f"{key}.index: {folder} lacks a file; run `msif index` of that run again")


def _check_made(manifest: Mapping[str, Any], folder: Path, checkpoint: Checkpoint, dtype: str, warn: Warn) -> None:
    """An index is of this model and tokenizer over these maps, and its metrics are of the run's type."""
    if manifest["model_sha256"] != checkpoint.model_hash:
        raise UserError(f"{folder} was built with another model than {checkpoint.name!r}'s")
    check_files(manifest, checkpoint, f"{folder} was built", warn, tokenizer=True)
    if {name: tuple(shape) for name, shape in manifest["maps"].items()} != checkpoint.maps:
        raise UserError(f"{folder} was built over other maps; use the same `modules` and `blocks`")
    check_type(manifest["computed_in"], dtype, f"{folder} was built")


def _check_corpus(kept: Mapping[str, Any], wanted: Mapping[str, Any], folder: Path, key: str) -> None:
    """The `corpus_identity` that an index has kept is the one of these documents."""
    for what, value in wanted.items():
        found = kept.get(what)
        if same_objective(found, value) if what == "objective" else found == value:
            continue
        if what == "max_tokens":
            raise UserError(f"{key}.max_tokens: {folder} was built with {found}, not {value}; set it to {found}")
        raise UserError(
            f"{key}.documents: {folder} was built over other documents: its {what} differ; describe those that it "
            "was built over, or build an index of these"
        )


def _check_own(run: Run, score: Score, key: str) -> None:
    """An index that is yet to be built must be described in the same run, over the same documents."""
    entry: Index | None = next((entry for entry in run.index if entry.stage == score.stage), None)
    if entry is None:
        raise UserError(f"{key}.index: this run has no index of {score.stage!r}; add one under `index`")
    if entry.max_tokens != score.max_tokens or run.scored_documents(entry) != run.scored_documents(score):
        raise UserError(f"{key}: its documents or max_tokens are not those of this run's index of {score.stage!r}")
