"""The run description (DESIGN.md §4): types, defaults and the validation that needs no files."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import AfterValidator, BaseModel, ByteSize, ConfigDict, Field, ValidationError, model_validator

from msif_ray.errors import UserError
from msif_ray.paths import check_location, path_of

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
Column = Annotated[str, Field(min_length=1)]
Location = Annotated[str, AfterValidator(check_location)]
Locations = Annotated[str | list[str], AfterValidator(check_location)]


class Strict(BaseModel):
    """Immutable; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Strength(Strict):
    """A damping or an α: an eigenvalue, or a multiple of each map's mean corrected eigenvalue."""

    absolute: Positive | None = None
    relative: Positive | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.absolute is None) == (self.relative is None):
            raise ValueError("give either `absolute` or `relative`")
        return self

    def resolve(self, mean_eigenvalue: float) -> float:
        """The eigenvalue meant, for a map with this mean corrected eigenvalue."""
        if self.absolute is not None:
            return self.absolute
        return float(self.relative or 0.0) * mean_eigenvalue


class Documents(Strict):
    """A corpus: Parquet, JSON lines or a saved `datasets` folder, and its columns.

    Either `text`, or `completion` with an optional `prompt`. Without `id`, a document's id is
    `file:row`. `append_eos` ends the sequence with the EOS token as a target: by default where
    there is a completion.
    """

    path: Locations
    text: Column | None = None
    prompt: Column | None = None
    completion: Column | None = None
    id: Column | None = None
    append_eos: bool | None = None

    @model_validator(mode="after")
    def _columns(self) -> Self:
        if (self.text is None) == (self.completion is None):
            raise ValueError("give either `text`, or `completion` with an optional `prompt`")
        if self.text is not None and self.prompt is not None:
            raise ValueError("`prompt` goes with `completion`, not with `text`")
        return self

    @property
    def ends_with_eos(self) -> bool:
        return self.completion is not None if self.append_eos is None else self.append_eos


class Fit(Strict):
    """What a stage's factors are estimated from: the corpus's first `documents` (default: all)."""

    documents: Annotated[int, Field(ge=1)] | None = None
    max_tokens: Annotated[int, Field(ge=2)] | None = None
    labels: Literal["sampled", "empirical"] = "sampled"


class ProximalResponse(Strict):
    """α/(λ + α): a later stage that stays near where it began, as in the paper."""

    kind: Literal["proximal"] = "proximal"
    alpha: Strength = Strength(relative=0.1)


class UnrolledResponse(Strict):
    """A stage trained by `steps` steps at learning rate `rate` without a proximal term (SOURCE)."""

    kind: Literal["unrolled"]
    rate: Positive
    steps: Annotated[int, Field(ge=1)]


class IdentityResponse(Strict):
    """Leaves the stage's curvature out."""

    kind: Literal["identity"]


Response = Annotated[ProximalResponse | UnrolledResponse | IdentityResponse, Field(discriminator="kind")]


class Stage(Strict):
    """One training stage: the model it ended with, what it was trained on, how it responds."""

    name: Name
    model: Location
    revision: str | None = None
    tokenizer: Location | None = None
    documents: Documents | None = None
    fit: Fit = Fit()
    factors: Location | None = None
    damping: Strength = Strength(relative=0.1)
    response: Response | None = None


class Queries(Strict):
    """Prompts and completions to explain, one per row; low rank by a fixed `rank` or kept `energy`.

    `energy` is the share of its squared norm that each query keeps at each map, by the smallest rank that does.
    """

    path: Locations
    prompt: Column = "prompt"
    completion: Column = "completion"
    id: Column | None = None
    append_eos: bool | None = None
    rank: Annotated[int, Field(ge=1)] | None = None
    energy: Annotated[float, Field(gt=0, le=1)] | None = None

    @model_validator(mode="after")
    def _one_truncation(self) -> Self:
        if self.rank is not None and self.energy is not None:
            raise ValueError("give `rank` or `energy`, not both")
        return self

    @property
    def documents(self) -> Documents:
        """The queries read as a corpus of prompts and completions."""
        return Documents(
            path=self.path,
            prompt=self.prompt,
            completion=self.completion,
            id=self.id,
            append_eos=self.append_eos,
        )


class Candidates(Strict):
    """Which documents of the corpus are scored for each query: the `top` by BM25 of its prompt and completion, or the
    pairs that a Parquet file at `path` names in `doc_id` and, unless all queries are meant, `query_id`."""

    method: Literal["bm25"] | None = None
    top: Annotated[int, Field(ge=1)] = 10_000
    path: Location | None = None

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if (self.method is None) == (self.path is None):
            raise ValueError("give either `method: bm25` or `path`")
        return self


class Score(Strict):
    """A stage whose documents are scored; by default those that it was trained on.

    `responses` answers for the named stages instead of their own, for an ablation or another α: entries
    that differ in nothing else share one pass over the documents. Each needs a `name` of its own, which
    is the stage's unless given. `index` names the run directory (this one's, or another's) that holds an index of
    the stage's documents, to score from that in place of a pass. `candidates` chooses what is scored; all documents
    are by default.
    """

    stage: Name
    name: Name | None = None
    documents: Documents | None = None
    index: Location | None = None
    candidates: Candidates | None = None
    max_tokens: Annotated[int, Field(ge=2)] | None = None
    responses: dict[str, Response] = {}

    @property
    def label(self) -> str:
        """What the scores are called: `scores/stage=<label>`."""
        return self.name or self.stage


class Index(Strict):
    """Compressed gradients of a stage's documents, so that later queries need no pass over them.

    Of each document and map, the `rank` largest directions in the metric of scores, its damping the
    stage's, as numbers of `dtype`. More ranks in fewer bits agree best for their size (docs/index.md).
    """

    stage: Name
    documents: Documents | None = None
    max_tokens: Annotated[int, Field(ge=2)] | None = None
    rank: Annotated[int, Field(ge=1)] = 16
    dtype: Literal["int8", "float16", "bfloat16", "float32", "float64"] = "int8"


class Detail(Strict):
    """What is written beside every score: as list columns what it is a sum of, by token and by tracked map, which the
    top documents have in any case; and `normalised`, the score per token and per unit of the gradient's norm.
    """

    tokens: bool = False
    modules: bool = False
    normalised: bool = False


class Replicas(Strict):
    min: Annotated[int, Field(ge=1)] = 1
    max: Annotated[int, Field(ge=1)] = 1

    @model_validator(mode="before")
    @classmethod
    def _fixed(cls, value: Any) -> Any:
        return {"min": value, "max": value} if isinstance(value, int) else value

    @model_validator(mode="after")
    def _order(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"min {self.min} is larger than max {self.max}")
        return self


class Cluster(Strict):
    """The machines: replicas, each of one or more ranks that hold one model.

    `factor_memory` (bytes, or a text such as 8GiB) is what a rank may use for the factors that it fits; what
    does not fit at once takes several passes. By default it is a share of what is free once the model is loaded.
    `directions_memory` is what a rank may use for the carried-back queries that it scores with, in the same units and
    with the same default; what does not fit is read from local disk for every batch.
    `offload` keeps the shards of a replica of several GPU ranks in the memory of their hosts.

    `dtype`, `tokens_per_batch` and `documents_per_block` take part in rounding, so they are part
    of what a run must keep; the rest may change between two runs of the same command.
    """

    replicas: Replicas = Replicas()
    ranks_per_replica: Annotated[int, Field(ge=1)] = 1
    gpus_per_rank: Annotated[float, Field(ge=0)] | None = None
    cpus_per_rank: Annotated[int, Field(ge=1)] = 1
    offload: bool = False
    factor_memory: Annotated[ByteSize, Field(gt=0)] | None = None
    directions_memory: Annotated[ByteSize, Field(gt=0)] | None = None
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    tokens_per_batch: Annotated[int, Field(ge=1)] = 8192
    documents_per_block: Annotated[int, Field(ge=1)] = 256


class Run(Strict):
    """A whole run: what `run.yaml` says, and the API."""

    run_dir: Location
    seed: int = 0
    stages: Annotated[list[Stage], Field(min_length=1)]
    modules: Annotated[list[str], Field(min_length=1)] | None = None
    queries: Queries
    index: list[Index] = []
    score: Annotated[list[Score], Field(min_length=1)]
    detail: Detail = Detail()
    top: Annotated[int, Field(ge=1)] = 20
    cluster: Cluster = Cluster()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [stage.name for stage in self.stages]
        labels = {"stages": names, "score": [score.label for score in self.score]}
        for key, found in (labels | {"index": [index.stage for index in self.index]}).items():
            repeated = next((name for name in found if found.count(name) > 1), None)
            if repeated is not None:
                raise ValueError(f"{key}: the name {repeated!r} is there twice")
        of_first = {"stages.0.response": self.stages[0].response}
        of_first |= {f"score.{i}.responses": score.responses.get(names[0]) for i, score in enumerate(self.score)}
        for key, response in of_first.items():
            if isinstance(response, ProximalResponse):
                raise ValueError(f"{key}: {names[0]!r} is the first stage; a proximal response belongs to a later one")
        both = next((i for i, s in enumerate(self.score) if s.index is not None and s.candidates is not None), None)
        if both is not None:
            raise ValueError(f"score.{both}.candidates: an index is scored as a whole; leave `index` or this out")
        for index, score in enumerate(self.score):
            unknown = next((name for name in score.responses if name not in names), None)
            if unknown is not None:
                raise ValueError(f"score.{index}.responses: there is no stage {unknown!r}, only {', '.join(names)}")
        entries = {f"score.{i}": (s.stage, s.documents) for i, s in enumerate(self.score)}
        entries |= {f"index.{i}": (x.stage, x.documents) for i, x in enumerate(self.index)}
        for key, (stage, documents) in entries.items():
            if stage not in names:
                raise ValueError(f"{key}.stage: there is no stage {stage!r}, only {', '.join(names)}")
            if documents is None and self.stages[names.index(stage)].documents is None:
                raise ValueError(f"{key}.documents: neither this entry nor its stage names documents")
        indexed = next((i for i, score in enumerate(self.score) if score.index is not None), None)
        if self.detail.tokens and indexed is not None:
            raise ValueError(f"detail.tokens: score.{indexed} reads an index, which keeps no tokens; leave one out")
        if self.cluster.offload and self.cluster.ranks_per_replica == 1:
            raise ValueError("cluster.offload: only a sharded model can be offloaded; set `ranks_per_replica` over 1")
        return self

    def answering(self, score: Score) -> "Run":
        """The run with the responses of one `score` entry in place of the stages' own."""
        stages = [
            stage.model_copy(update={"response": score.responses.get(stage.name, stage.response)})
            for stage in self.stages
        ]
        return self.model_copy(update={"stages": stages})

    def stage_index(self, name: str) -> int:
        return [stage.name for stage in self.stages].index(name)

    def scored_documents(self, entry: Score | Index) -> Documents:
        """The corpus of a `score` or an `index` entry: its own, or that of its stage."""
        documents = entry.documents or self.stages[self.stage_index(entry.stage)].documents
        if documents is None:
            raise UserError(f"{type(entry).__name__.lower()}: the stage {entry.stage!r} has no documents")
        return documents


def parse_run(description: Mapping[str, Any], source: str = "run description") -> Run:
    """The run that a mapping of YAML's shape describes.

    Raises UserError with one line: the source, the key at fault and what is wrong with it.
    """
    try:
        return Run.model_validate(description)
    except ValidationError as error:
        raise UserError(f"{source}: {_first_fault(error)}") from None


def load_run(path: str | Path) -> Run:
    """The run described by a YAML file. Raises UserError for a file that cannot be read or is not valid."""
    try:
        description = yaml.safe_load(path_of(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); name a run description in YAML") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(description, dict):
        raise UserError(f"{path}: not a run description: a mapping with run_dir, stages, queries and score is needed")
    return parse_run(description, str(path))


def _first_fault(error: ValidationError) -> str:
    fault = error.errors()[0]
    # A discriminated union repeats its tag, and a union its member, in the path of an error.
    members = ("proximal", "unrolled", "identity", "str", "list[str]")
    parts = [str(part) for part in fault["loc"] if part not in members]
    key = ".".join(parts)
    message = str(fault["msg"]).removeprefix("Value error, ")
    if fault["type"] == "extra_forbidden":
        message = "unknown key"
    elif fault["type"] == "missing":
        message = "is missing"
    elif fault["type"] not in ("value_error", "union_tag_invalid"):
        message = f"{message[0].lower()}{message[1:]}, not {fault['input']!r}"
    return f"{key}: {message}" if key else message
