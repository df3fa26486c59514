"""Everything that can be wrong with a run, before any replica is asked for: one line each."""

import uuid
from dataclasses import dataclass

import pyarrow as pa

from msif_ray import layout, stages
from msif_ray.checkpoint import Checkpoint, check_checkpoint, load_tokenizer
from msif_ray.config import Documents, Run
from msif_ray.corpus.blocks import CorpusBlocks
from msif_ray.corpus.candidates import SCHEMA
from msif_ray.corpus.census import Census, Say, take_census
from msif_ray.corpus.files import CorpusFile
from msif_ray.corpus.listed import by_list
from msif_ray.corpus.objectives import Objective, encode_for
from msif_ray.corpus.queries import Query, read_queries
from msif_ray.corpus.reader import Document
from msif_ray.corpus.windows import Skipped, last_token, within
from msif_ray.errors import UserError
from msif_ray.filled import fill_in
from msif_ray.indexes import check_index
from msif_ray.objectives import check_references
from msif_ray.paths import exists, is_remote, path_of
from msif_ray.reused import check_reused_factors
from msif_ray.store import delete, write_atomic
from msif_ray.tables import read_table


@dataclass(frozen=True)
class Resolved:
    """A run that has been checked against the files it names.

    `run` has absolute paths and every `max_tokens` filled in; `corpora`, `rows` (documents of each file) and
    `contents` (what changes with each file's content) have a key `stages.<i>` for each stage to be fitted or solved,
    `index.<i>` and `score.<i>` for each indexed and each scored corpus. `query_tokens` are the lengths of the
    queries, `completion_tokens` how many of those are targets (a class counts as one). `reused` has the hash of the
    manifest of each stage's `factors`, `references` the reference model of each stage of preferences, and `listed` the
    pairs of each pass that scores those of a list (`candidates.SCHEMA`), by `score.<i>` of its first entry. `warnings`
    are lines about what of other runs' factors and indexes could not be compared.
    """

    run: Run
    stages: list[Checkpoint]
    corpora: dict[str, list[CorpusFile]]
    rows: dict[str, tuple[int, ...]]
    contents: dict[str, tuple[str, ...]]
    queries: list[Document]
    query_tokens: tuple[int, ...]
    completion_tokens: tuple[int, ...]
    maps: dict[str, tuple[int, int]]
    reused: dict[str, str]
    references: dict[int, Checkpoint]
    listed: dict[str, pa.Table]
    warnings: tuple[str, ...]

    def census(self, key: str) -> Census:
        """The files of one corpus, their documents' numbers and their contents."""
        return Census(self.corpora[key], self.rows[key], self.contents[key])

    @property
    def query_objective(self) -> Objective:
        """How the last stage's model reads the queries."""
        last = len(self.run.stages) - 1
        return stages.objective_of(self.run, last, self.run.queries.documents, self.stages[last].classes)

    @property
    def documents(self) -> dict[str, int]:
        """The number of documents of each corpus."""
        return {key: sum(rows) for key, rows in self.rows.items()}


def check(run: Run, say: Say = lambda _: None) -> Resolved:
    """Checks a run against the storage, corpora, queries and models it names; `say` is told how far it is where that
    takes long.

    Raises UserError: one line with the key, the file or the row at fault.
    """
    run = run.model_copy(update={"run_dir": _writable(run.run_dir)})
    wanted = _wanted_corpora(run)
    corpora = _read_corpora(wanted, say)
    queries = _read_queries(run)
    checkpoints: list[Checkpoint] = []
    for index, stage in enumerate(run.stages):
        checkpoints.append(
            check_checkpoint(stage, run.modules, f"stages.{index}", run.blocks, checkpoints, run.cluster.dtype)
        )
    _check_same_maps(checkpoints)
    run = fill_in(run, checkpoints)
    references = check_references(run, checkpoints)
    warnings: list[str] = []
    reused = check_reused_factors(run, checkpoints, references, warnings.append)
    for position, score in enumerate(run.score):
        if score.index is not None:
            check_index(run, position, checkpoints, corpora[f"score.{position}"], references, warnings.append)
    _check_out_of(run, corpora)
    _check_tokenizers(run, checkpoints, wanted)
    lengths, completions = _check_queries_fit(run, checkpoints[-1], queries)
    return Resolved(
        run=run,
        stages=checkpoints,
        corpora={key: census.files for key, census in corpora.items()},
        rows={key: census.rows for key, census in corpora.items()},
        contents={key: census.contents for key, census in corpora.items()},
        queries=queries,
        query_tokens=lengths,
        completion_tokens=completions,
        maps=checkpoints[0].maps,
        reused=reused,
        references=references,
        listed=_read_lists(run, corpora, queries),
        warnings=tuple(dict.fromkeys(warnings)),  # entries may have the same index
    )


def _writable(run_dir: str) -> str:
    """The run directory as an absolute path, in which a file has been written and deleted. Raises UserError."""
    sign = next((each for each in "*?" if each in run_dir), None)
    if sign is not None:  # here, and not in the description: what is there already can be read
        raise UserError(
            f"run_dir: {run_dir}: {sign} stands for other names where `scores/*/*.parquet` is read; name a folder "
            "without it"
        )
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
    """The corpora to read: of stages whose factors are to be fitted or that cg solves, and of scored stages."""
    wanted = {}
    solved = stages.all_solved_stages(run)
    for index in stages.stages_with_factors(run):
        stage = run.stages[index]
        if stage.factors is None or index in solved:
            if stage.documents is None:
                raise UserError(
                    f"stages.{index}.documents: {stage.name!r} needs documents to fit its factors, "
                    "`factors:` of another run, or the response identity"
                    if stage.factors is None
                    else f"stages.{index}.documents: {stage.name!r} needs documents for its solver, cg"
                )
            wanted[f"stages.{index}"] = stage.documents
    wanted |= {f"index.{i}": run.scored_documents(entry) for i, entry in enumerate(run.index)}
    wanted |= {f"score.{i}": run.scored_documents(entry) for i, entry in enumerate(run.score)}
    return wanted


def _read_corpora(wanted: dict[str, Documents], say: Say) -> dict[str, Census]:
    """Each corpus read through once, however many keys name it. How documents end is none of its concern."""
    found: dict[str, Census] = {}
    censuses = {}
    for key, documents in wanted.items():
        read = documents.model_copy(update={"append_eos": None}).model_dump_json()
        if read not in found:
            found[read] = take_census(documents, f"{key}.documents", say)
        censuses[key] = found[read]
    return censuses


def _read_queries(run: Run) -> list[Document]:
    key = "queries"
    queries: list[Document] = []
    for file in take_census(run.queries.documents, key).files:
        queries += read_queries(file, run.queries, key)
    return queries


def _check_same_maps(checkpoints: list[Checkpoint]) -> None:
    first = checkpoints[0]
    for index, other in enumerate(checkpoints[1:], start=1):
        for name in [*first.maps, *other.maps]:
            shapes = first.maps.get(name), other.maps.get(name)
            if shapes[0] != shapes[1]:
                heads = [shape and shape[0] for shape in shapes] == [first.vocabulary, other.vocabulary]
                raise UserError(
                    f"stages.{index}.model: {name} is {_shape(shapes[0])} in {first.name!r} and {_shape(shapes[1])} in "
                    f"{other.name!r}; all stages need the same tracked maps"
                    + (": leave the head of a vocabulary that grew out of `modules`" if heads else "")
                )


def _shape(shape: tuple[int, int] | None) -> str:
    return "not there" if shape is None else f"{shape[0]} x {shape[1]}"


def _check_out_of(run: Run, corpora: dict[str, Census]) -> None:
    for index, entry in enumerate(run.score):
        there = sum(corpora[f"score.{index}"].rows)
        if entry.out_of is not None and entry.out_of < there:
            raise UserError(f"score.{index}.out_of: {entry.out_of:,} is less than the {there:,} documents there are")


def _read_lists(run: Run, corpora: dict[str, Census], queries: list[Document]) -> dict[str, pa.Table]:
    """The candidates of each pass that has a list of them: as the run has chosen them, where it has begun."""
    found = {}
    for entry, *_ in stages.passes(run):
        if entry.candidates is None or entry.candidates.path is None:
            continue
        key, chosen = f"score.{run.score.index(entry)}", layout.candidates(run.run_dir, entry.label)
        if exists(chosen):
            found[key] = read_table(chosen, SCHEMA.names)
            continue
        census, size = corpora[key], run.cluster.documents_per_block
        documents = run.scored_documents(entry)
        blocks = CorpusBlocks(tuple(census.files), census.rows, documents, size, f"{key}.documents")
        found[key] = by_list(blocks, queries, entry.candidates.path, f"{key}.candidates")
    return found


def _check_tokenizers(run: Run, checkpoints: list[Checkpoint], wanted: dict[str, Documents]) -> None:
    """Every tokenizer loads, and has an EOS token where one is to be appended."""
    for index, (stage, checkpoint) in enumerate(zip(run.stages, checkpoints, strict=True)):
        key = f"stages.{index}.tokenizer"
        tokenizer = load_tokenizer(checkpoint.tokenizer_path, key)
        scored = [f"score.{i}" for i, score in enumerate(run.score) if score.stage == stage.name]
        scored += [f"index.{i}" for i, entry in enumerate(run.index) if entry.stage == stage.name]
        appended = [wanted[name] for name in (f"stages.{index}", *scored) if name in wanted]
        appended += [run.queries.documents] if index == len(run.stages) - 1 else []
        if tokenizer.chat_template is None and any(documents.messages is not None for documents in appended):
            raise UserError(f"{key}: it has no chat template, which `messages` needs; name a tokenizer that has one")
        for name in (f"stages.{index}", *scored):
            packed = wanted[name].packed if name in wanted else None
            if packed is not None and packed.eos is not None and packed.eos > last_token(tokenizer):
                raise UserError(
                    f"{name}.documents.packed.eos: {packed.eos} is not in the vocabulary of {checkpoint.name!r}, whose "
                    f"last is {last_token(tokenizer)}; name the id of the token that documents end with"
                )
        if tokenizer.eos_token_id is None and any(documents.ends_with_eos for documents in appended):
            raise UserError(f"{key}: it has no EOS token to append; set append_eos: false")


def _check_queries_fit(
    run: Run, checkpoint: Checkpoint, queries: list[Document]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The tokens of each query, and of its completion. Queries are not cut into windows, so each must fit the last
    model's context."""
    tokenizer, asked = load_tokenizer(checkpoint.tokenizer_path, "tokenizer"), run.queries.documents
    if not tokenizer.is_fast and any(isinstance(query, Query) and query.span is not None for query in queries):
        raise UserError(
            f"queries.span: the tokenizer of {checkpoint.name!r} ({type(tokenizer).__name__}) has no offsets that "
            "tell which characters a token is of; name a tokenizer with a tokenizer.json, or leave `span` out"
        )
    objective = stages.objective_of(run, len(run.stages) - 1, asked, checkpoint.classes)
    lengths, completions = [], []
    for query in queries:
        encoded = encode_for(objective, tokenizer, query, asked.ends_with_eos, stages.query_tokens(run))
        encoded = within(encoded, checkpoint.vocabulary, checkpoint.switches)
        if isinstance(encoded, Skipped):
            raise UserError(f"queries: {query.id!r}: {encoded.reason}")
        if checkpoint.context is not None and encoded.longest > checkpoint.context:
            raise UserError(
                f"queries: {query.id!r} has {encoded.longest} tokens, more than the {checkpoint.context} of "
                f"{checkpoint.name!r}'s context; shorten its {'prompt' if objective is None else 'text'}"
            )
        lengths.append(len(encoded.ids))
        completions.append(encoded.explained if objective is None else 1)
    return tuple(lengths), tuple(completions)
