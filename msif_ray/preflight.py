"""Everything that can be wrong with a run, before any replica is asked for: one line each."""

import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass

from msif_ray import layout, stages
from msif_ray.checkpoint import Checkpoint, check_checkpoint, load_tokenizer
from msif_ray.config import Documents, Index, Run, Score, Stage
from msif_ray.corpus.reader import CorpusFile, Document, corpus_files, read_documents, read_rows, row_id
from msif_ray.corpus.windows import Skipped, encode
from msif_ray.errors import UserError
from msif_ray.indexes import check_index, index_location
from msif_ray.paths import exists, is_remote, path_of
from msif_ray.store import delete, read_json, write_atomic

# Windows are this long unless the run says otherwise, or the model's context is shorter.
DEFAULT_MAX_TOKENS = 512


@dataclass(frozen=True)
class Resolved:
    """A run that has been checked against the files it names.

    `run` has absolute paths and every `max_tokens` filled in; `corpora` and `rows` (documents of each
    file) have a key `stages.<i>` for each stage to be fitted, `index.<i>` and `score.<i>` for each indexed and
    each scored corpus.
    """

    run: Run
    stages: list[Checkpoint]
    corpora: dict[str, list[CorpusFile]]
    rows: dict[str, tuple[int, ...]]
    queries: list[Document]
    maps: dict[str, tuple[int, int]]

    @property
    def documents(self) -> dict[str, int]:
        """The number of documents of each corpus."""
        return {key: sum(rows) for key, rows in self.rows.items()}


def check(run: Run) -> Resolved:
    """Checks a run against the storage, corpora, queries and models it names.

    Raises UserError: one line with the key, the file or the row at fault.
    """
    run = run.model_copy(update={"run_dir": _writable(run.run_dir)})
    wanted = _wanted_corpora(run)
    corpora = {key: corpus_files(documents, f"{key}.documents") for key, documents in wanted.items()}
    counts = {key: _check_ids(corpora[key], documents, f"{key}.documents") for key, documents in wanted.items()}
    queries = _read_queries(run)
    checkpoints = [check_checkpoint(stage, run.modules, f"stages.{i}") for i, stage in enumerate(run.stages)]
    _check_same_maps(checkpoints)
    run = _fill_in(run, checkpoints)
    _check_reused_factors(run, checkpoints)
    for position, score in enumerate(run.score):
        if score.index is not None:
            check_index(run, position, checkpoints, corpora, counts)
    _check_tokenizers(run, checkpoints, wanted)
    _check_queries_fit(run, checkpoints[-1], queries)
    return Resolved(run, checkpoints, corpora, counts, queries, checkpoints[0].maps)


def _writable(run_dir: str) -> str:
    """The run directory as an absolute path, in which a file has been written and deleted."""
    folder = path_of(run_dir)
    if not is_remote(folder):
        folder = folder.expanduser().absolute()
    probe = folder / f".writable-{uuid.uuid4().hex}"
    try:
        write_atomic(probe, b"")
        delete(probe)
    except UserError as error:
        raise UserError(f"run_dir: {str(error).replace(str(probe), str(folder))}") from None
    return str(folder)


def _wanted_corpora(run: Run) -> dict[str, Documents]:
    """The corpora to read: of stages whose factors are to be fitted, and of scored stages."""
    wanted = {}
    for index in stages.stages_with_factors(run):
        stage = run.stages[index]
        if stage.factors is None:
            if stage.documents is None:
                raise UserError(
                    f"stages.{index}.documents: {stage.name!r} needs documents to fit its factors, "
                    "`factors:` of another run, or the response identity"
                )
            wanted[f"stages.{index}"] = stage.documents
    wanted |= {f"index.{i}": run.scored_documents(entry) for i, entry in enumerate(run.index)}
    wanted |= {f"score.{i}": run.scored_documents(entry) for i, entry in enumerate(run.score)}
    return wanted


def _check_ids(files: list[CorpusFile], documents: Documents, key: str) -> tuple[int, ...]:
    """The number of documents of each file of a corpus with all its columns, whose ids are there and differ.

    One pass over the id column, or over the first row's columns and a count where there is none.
    """
    seen: dict[str, tuple[int, int]] = {}
    counts = []
    for index, file in enumerate(files):
        columns = [documents.id] if documents.id is not None else _one_column(documents)
        _check_content_columns(file, documents, key)
        counts.append(0)
        for number, row in enumerate(read_rows(file, columns, key)):
            counts[-1] += 1
            if documents.id is None:
                continue
            document = row_id(file, number, row, documents, key)
            first = seen.setdefault(document, (index, number))
            if first != (index, number):
                raise UserError(
                    f"{key}.id: {file.path} row {number} has the id {document!r} "
                    f"of {files[first[0]].path} row {first[1]}; ids must differ"
                )
    if sum(counts) == 0:
        raise UserError(f"{key}.path: {documents.path}: there is no document in it")
    return tuple(counts)


def _one_column(documents: Documents) -> list[str]:
    return [documents.completion or documents.text or ""]


def _check_content_columns(file: CorpusFile, documents: Documents, key: str) -> None:
    """Raises UserError when the content columns are not there (JSON lines: in no row)."""
    rows: Iterator[Document] = read_documents(file, documents.model_copy(update={"id": None}), key)
    if file.kind == "jsonl":
        for _ in rows:
            pass
    else:
        next(rows, None)


def _read_queries(run: Run) -> list[Document]:
    key = "queries"
    documents = run.queries.documents
    files = corpus_files(documents, key)
    _check_ids(files, documents, key)
    queries = []
    for file in files:
        for number, query in enumerate(read_documents(file, documents, key)):
            for column, value in ((run.queries.prompt, query.prompt), (run.queries.completion, query.text)):
                if not isinstance(value, str):
                    found = "null" if value is None else type(value).__name__
                    raise UserError(
                        f"{key}: {file.path} row {number} (id {query.id!r}): {column!r} is {found}, not text"
                    )
            if not query.text:
                raise UserError(f"{key}: {file.path} row {number} (id {query.id!r}): the completion is empty")
            queries.append(query)
    return queries


def _check_same_maps(checkpoints: list[Checkpoint]) -> None:
    first = checkpoints[0]
    for index, other in enumerate(checkpoints[1:], start=1):
        for name in [*first.maps, *other.maps]:
            shapes = first.maps.get(name), other.maps.get(name)
            if shapes[0] != shapes[1]:
                raise UserError(
                    f"stages.{index}.model: {name} is {_shape(shapes[0])} in {first.name!r} and {_shape(shapes[1])} in "
                    f"{other.name!r}; all stages need the same tracked maps"
                )


def _check_reused_factors(run: Run, checkpoints: list[Checkpoint]) -> None:
    """Factors of another run are finished, and fitted to this model over these maps."""
    for index in stages.stages_with_factors(run):
        stage, checkpoint = run.stages[index], checkpoints[index]
        if stage.factors is None:
            continue
        key, folder = f"stages.{index}.factors", layout.factors(stage.factors, stage.name)
        if not exists(layout.factors_manifest(folder)):
            raise UserError(f"{key}: {folder} holds no finished factors")
        manifest = read_json(layout.factors_manifest(folder))
        if manifest["model_sha256"] != checkpoint.model_hash:
            raise UserError(f"{key}: {folder} was fitted to another model than {stage.model}")
        if {name: tuple(about["shape"]) for name, about in manifest["maps"].items()} != checkpoint.maps:
            raise UserError(f"{key}: {folder} was fitted over other maps; use the same `modules`")


def _shape(shape: tuple[int, int] | None) -> str:
    return "not there" if shape is None else f"{shape[0]} x {shape[1]}"


def _fill_in(run: Run, checkpoints: list[Checkpoint]) -> Run:
    """The run with absolute paths and with every `max_tokens` said."""
    filled = []
    for index, (stage, checkpoint) in enumerate(zip(run.stages, checkpoints, strict=True)):
        key = f"stages.{index}.fit.max_tokens"
        fit = stage.fit.model_copy(update={"max_tokens": _max_tokens(stage.fit.max_tokens, checkpoint, key)})
        paths = {"tokenizer": _absolute(stage.tokenizer), "factors": _absolute(stage.factors)}
        filled.append(stage.model_copy(update={"fit": fit, **paths}))

    def max_tokens(entry: Index | Score, key: str) -> int:
        at = run.stage_index(entry.stage)
        return _max_tokens(entry.max_tokens or filled[at].fit.max_tokens, checkpoints[at], f"{key}.max_tokens")

    indexes = [e.model_copy(update={"max_tokens": max_tokens(e, f"index.{i}")}) for i, e in enumerate(run.index)]
    scores = [
        e.model_copy(update={"max_tokens": max_tokens(e, f"score.{i}"), "index": index_location(e.index)})
        for i, e in enumerate(run.score)
    ]
    return run.model_copy(update={"stages": filled, "index": indexes, "score": scores})


def _absolute(name: str | None) -> str | None:
    """A path that is there, made absolute for processes with another working directory; names stay."""
    return os.path.abspath(name) if name is not None and os.path.exists(name) else name


def _max_tokens(asked: int | None, checkpoint: Checkpoint, key: str) -> int:
    if asked is None:
        return min(DEFAULT_MAX_TOKENS, checkpoint.context or DEFAULT_MAX_TOKENS)
    if checkpoint.context is not None and asked > checkpoint.context:
        raise UserError(f"{key}: {asked} is more than the {checkpoint.context} tokens of {checkpoint.name!r}'s context")
    return asked


def tokenizer_name(stage: Stage, checkpoint: Checkpoint) -> str:
    return stage.tokenizer or checkpoint.model_path


def _check_tokenizers(run: Run, checkpoints: list[Checkpoint], wanted: dict[str, Documents]) -> None:
    """Every tokenizer loads, and has an EOS token where one is to be appended."""
    for index, (stage, checkpoint) in enumerate(zip(run.stages, checkpoints, strict=True)):
        key = f"stages.{index}.tokenizer"
        tokenizer = load_tokenizer(tokenizer_name(stage, checkpoint), key)
        scored = [f"score.{i}" for i, score in enumerate(run.score) if score.stage == stage.name]
        scored += [f"index.{i}" for i, entry in enumerate(run.index) if entry.stage == stage.name]
        appended = [wanted[name] for name in (f"stages.{index}", *scored) if name in wanted]
        appended += [run.queries.documents] if index == len(run.stages) - 1 else []
        if tokenizer.eos_token_id is None and any(documents.ends_with_eos for documents in appended):
            raise UserError(f"{key}: it has no EOS token to append; set append_eos: false")


def _check_queries_fit(run: Run, checkpoint: Checkpoint, queries: list[Document]) -> None:
    """Queries are not cut into windows, so each must fit the last model's context."""
    tokenizer = load_tokenizer(tokenizer_name(run.stages[-1], checkpoint), "tokenizer")
    for query in queries:
        encoded = encode(tokenizer, query, run.queries.documents.ends_with_eos)
        if isinstance(encoded, Skipped):
            raise UserError(f"queries: {query.id!r}: {encoded.reason}")
        if checkpoint.context is not None and len(encoded.ids) > checkpoint.context:
            raise UserError(
                f"queries: {query.id!r} has {len(encoded.ids)} tokens, more than the {checkpoint.context} of "
                f"{checkpoint.name!r}'s context; shorten its prompt"
            )
