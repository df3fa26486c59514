"""What is asked of the stages: queries, scores and indexes."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from msif_ray.config.base import Column, Location, Locations, Name, Strict
from msif_ray.config.stage import Documents, Response


class Queries(Strict):
    """Prompts and completions to explain, one per row; low rank by a fixed `rank` or kept `energy`.

    `messages` in place of `prompt` and `completion`: conversations whose last turn, the assistant's, is explained.
    `rather_than` is another completion (of a conversation: another last turn, or the whole conversation with it): then
    log p(completion) − log p(rather_than) is explained. `span` is [start, end) in characters of the completion or of
    the last turn: then the tokens that overlap it are explained, and the others are context. A row may have one of the
    two; one where both are null asks for its whole completion. Where the last stage classifies, a query is a `text` and
    its class in the column `label`.

    `energy` is the share of its squared norm that each query keeps at each map, by the smallest rank that does.
    """

    path: Locations
    prompt: Column | None = None
    completion: Column | None = None
    messages: Column | None = None
    text: Column | None = None
    label: Column | None = None
    rather_than: Column | None = None
    span: Column | None = None
    id: Column | None = None
    append_eos: bool | None = None
    rank: Annotated[int, Field(ge=1)] | None = None
    energy: Annotated[float, Field(gt=0, le=1)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _usual_columns(cls, value: Any) -> Any:
        if not isinstance(value, dict) or any(value.get(name) is not None for name in ("messages", "text", "label")):
            return value
        columns = {name: name for name in ("prompt", "completion") if value.get(name) is None}
        return value | columns

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if self.messages is not None and (self.prompt is not None or self.completion is not None):
            raise ValueError("give `messages`, or `prompt` and `completion`, not both")
        if self.messages is not None and self.append_eos:
            raise ValueError("`append_eos` does not go with `messages`: the chat template ends its turns itself")
        if self.rank is not None and self.energy is not None:
            raise ValueError("give `rank` or `energy`, not both")
        if (self.text is None) != (self.label is None):
            raise ValueError("`text` and `label` go together: a text and its class")
        others = ("prompt", "completion", "messages", "rather_than", "span")
        other = next((name for name in others if getattr(self, name) is not None), None)
        if self.label is not None and other is not None:
            raise ValueError(f"`{other}` does not go with `text` and `label`, which ask about a class")
        return self

    @property
    def documents(self) -> Documents:
        """The queries read as a corpus of prompts and completions, of conversations, or of texts and classes."""
        if self.label is not None:
            return Documents(path=self.path, text=self.text, label=self.label, id=self.id, append_eos=self.append_eos)
        return Documents(
            path=self.path,
            prompt=self.prompt,
            completion=self.completion,
            messages=self.messages,
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
    are by default. `out_of` says of how many of its stage's documents these were chosen, where they are not a random
    sample: scores do not depend on it, the stage's share of the influence does (`results/by_stage.py`).
    """

    stage: Name
    name: Name | None = None
    documents: Documents | None = None
    index: Location | None = None
    candidates: Candidates | None = None
    out_of: Annotated[int, Field(ge=1)] | None = None
    max_tokens: Annotated[int, Field(ge=2)] | None = None
    responses: dict[str, Response] = Field(default_factory=dict)

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
    top documents have in any case; `curvature_norm`, the norm of the document's gradient in the scored stage's inverse
    curvature; and `normalised`, the score per token and per unit of each of the gradient's norms. `norm: false` leaves
    out the gradient's plain norm, which is null then: queries of low rank are scored faster without.
    """

    tokens: bool = False
    modules: bool = False
    curvature_norm: bool = False
    normalised: bool = False
    norm: bool = True

    @model_validator(mode="after")
    def _divisible(self) -> Self:
        if self.normalised and not self.norm:
            raise ValueError("`normalised` has the score per unit of `norm`; leave `norm: false` out, or `normalised`")
        return self
