"""A whole run, and how it is read (DESIGN.md §4)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from msif_ray.config.base import Location, Strict
from msif_ray.config.cluster import Cluster
from msif_ray.config.entries import Detail, Index, Queries, Score
from msif_ray.config.faults import first_fault
from msif_ray.config.loader import load_yaml
from msif_ray.config.objective import DOCUMENTS, Classification, Preference
from msif_ray.config.stage import (
    CgSolver,
    Documents,
    IdentityResponse,
    ProximalResponse,
    Response,
    Stage,
    UnrolledResponse,
)
from msif_ray.errors import UserError
from msif_ray.paths import is_storage_fault, path_of, reason


class Run(Strict):
    """A whole run: what `run.yaml` says, and the API.

    `modules` (globs) says which linear maps of every stage's model are tracked, and `blocks` whether those of queries,
    keys and values are cut into blocks of their own: a fused map by projection (`qkv`), or every one by head (`heads`).
    """

    run_dir: Location
    seed: int = 0
    stages: Annotated[list[Stage], Field(min_length=1)]
    modules: Annotated[list[str], Field(min_length=1)] | None = None
    blocks: Literal["qkv", "heads"] | None = None
    queries: Queries
    index: list[Index] = Field(default_factory=list)
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
        for number, each in enumerate(self.stages):
            if each.base is not None and each.base not in names[:number]:
                raise ValueError(f"stages.{number}.base: there is no earlier stage {each.base!r}")
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
        return self

    @model_validator(mode="after")
    def _ranks_that_can_be(self) -> Self:
        """What no machine could give its ranks."""
        sharded, gpus = self.cluster.ranks_per_replica > 1, self.cluster.gpus_per_rank or 0.0
        if self.cluster.offload and not sharded:
            raise ValueError("cluster.offload: only a sharded model can be offloaded; set `ranks_per_replica` over 1")
        if sharded and 0 < gpus < 1:
            raise ValueError(
                f"cluster.gpus_per_rank: ranks that hold one model together need a GPU each, not {gpus:g}; set it to 1 "
                "or `ranks_per_replica` to 1"
            )
        return self

    @model_validator(mode="after")
    def _documents_of_their_objectives(self) -> Self:
        """Documents are what their stage's objective reads."""
        described = {f"stages.{i}.documents": (stage, stage.documents) for i, stage in enumerate(self.stages)}
        entries: dict[str, Score | Index] = {f"score.{i}": entry for i, entry in enumerate(self.score)}
        entries |= {f"index.{i}": entry for i, entry in enumerate(self.index)}
        for key, entry in entries.items():
            described[f"{key}.documents"] = (self.stages[self.stage_index(entry.stage)], entry.documents)
        for key, (stage, documents) in described.items():
            kind = None if stage.objective is None else stage.objective.kind
            if documents is None or documents.objective == kind:
                continue
            if kind is not None:
                raise ValueError(f"{key}: the objective of {stage.name!r} is {kind}; name {DOCUMENTS[kind]}")
            raise ValueError(
                f"{key}: these are of the objective {documents.objective}, which {stage.name!r} has not; give the "
                "stage `objective`, or name other columns"
            )
        return self

    @model_validator(mode="after")
    def _reference_models(self) -> Self:
        """A stage of preferences has a language model to refer to."""
        before: Stage | None = None
        for index, stage in enumerate(self.stages):
            if isinstance(stage.objective, Preference) and stage.objective.reference is None:
                why = "is the first stage" if before is None else f"follows {before.name!r}, which classifies"
                if before is None or isinstance(before.objective, Classification):
                    raise ValueError(f"stages.{index}.objective: {stage.name!r} {why}; name a `reference` model")
            before = stage
        return self

    @model_validator(mode="after")
    def _queries_of_the_last_stage(self) -> Self:
        """A classifier is asked about classes, any other model about completions."""
        last = self.stages[-1]
        classifies = isinstance(last.objective, Classification)
        if classifies != (self.queries.label is not None):
            raise ValueError(
                f"queries: the last stage, {last.name!r}, classifies; name `text` and `label` (a query is a text and "
                "its class)"
                if classifies
                else f"queries.label: the last stage, {last.name!r}, does not classify; name `prompt` and `completion`"
            )
        return self

    @model_validator(mode="after")
    def _measurable(self) -> Self:
        """Refuses norms in the inverse curvature where there is no damped inverse, or not the whole gradient."""
        for index, score in enumerate(self.score if self.detail.curvature_norm else ()):
            if score.index is not None:
                raise ValueError(
                    f"detail.curvature_norm: score.{index} reads an index, which keeps too little of a gradient for "
                    "this norm; leave one out"
                )
            response = self.answering(score).stages[self.stage_index(score.stage)].response
            if isinstance(response, IdentityResponse | UnrolledResponse):
                raise ValueError(
                    f"detail.curvature_norm: in score.{index} the response of {score.stage!r} is "
                    f"{response.kind}, and the norm is that of a damped inverse; leave one out"
                )
        return self

    @model_validator(mode="after")
    def _solvable(self) -> Self:
        """Refuses what conjugate gradients do not answer, or would answer wrongly."""
        for index, stage in enumerate(self.stages):
            solver, key = stage.solver, f"stages.{index}.solver"
            if not isinstance(solver, CgSolver):
                continue
            if isinstance(stage.response, IdentityResponse):
                raise ValueError(f"{key}: the response of {stage.name!r} is the identity, so there is nothing to solve")
            answers: dict[str, Response | None] = {f"stages.{index}.response": stage.response}
            answers |= {f"score.{i}.responses": s.responses.get(stage.name) for i, s in enumerate(self.score)}
            unrolled = next((k for k, answer in answers.items() if isinstance(answer, UnrolledResponse)), None)
            if unrolled is not None:
                raise ValueError(
                    f"{key}: cg solves linear systems, and an unrolled response ({unrolled}) of {stage.name!r} is a "
                    "matrix exponential; use a proximal response, or kind: ekfac"
                )
            if (solver.documents or 0) > (stage.fit.documents or float("inf")):
                raise ValueError(
                    f"{key}.documents: {solver.documents} is more than the {stage.fit.documents} documents of fit"
                )
            if self.cluster.ranks_per_replica > 1:
                raise ValueError(
                    f"{key}: cg needs forward-mode derivatives, which a model sharded over ranks has not; set "
                    "cluster.ranks_per_replica to 1, or use kind: ekfac"
                )
            if self.cluster.dtype == "bfloat16":
                raise ValueError(
                    f"{key}: bfloat16 rounds too coarsely for conjugate gradients; set cluster.dtype to float32, or "
                    "use kind: ekfac"
                )
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
        raise UserError(f"{source}: {first_fault(error, Run)}") from None


def load_run(path: str | Path) -> Run:
    """The run described by a YAML file, local or on object storage.

    Raises UserError for a file that cannot be read or is not valid.
    """
    try:
        text = path_of(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not valid YAML: {error}; save it as UTF-8") from None
    except Exception as error:
        if not is_storage_fault(error):
            raise
        raise UserError(f"{path}: cannot be read ({reason(error)}); name a run description in YAML") from None
    try:
        description = load_yaml(text)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    if not isinstance(description, dict):
        raise UserError(f"{path}: not a run description: a mapping with run_dir, stages, queries and score is needed")
    return parse_run(description, str(path))
