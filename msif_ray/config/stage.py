"""A training stage: its model, its documents, its fit and how it responds."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from msif_ray.config.base import Column, Location, Locations, Name, Positive, Strength, Strict
from msif_ray.config.objective import Kind, Objective
from msif_ray.config.packed import Packed


class Documents(Strict):
    """A corpus: Parquet, JSON lines or a saved `datasets` folder, and its columns.

    One of `text`, `completion` with an optional `prompt`, and `messages`: a conversation, a list of
    `{role, content}`, which the tokenizer's chat template makes one text of, and of which the assistant's
    turns alone are targets; or `packed`, for rows of token ids. A stage that classifies has a `label` beside its
    `text`: a class's name or number. One of preferences has `chosen` and `rejected` in place of a completion, each a
    text or messages as the prompt is. Without `id`, a document's id is `file:row`; of several in a row
    `file:row:number`, or the `id` with the number, unless that is a list of theirs. `append_eos` ends the sequence with
    the EOS token as a target: by default where there is a completion. Of a tokenizer that ends every text with EOS, a
    prompt isn't ended, and nothing is ended twice. A chat template ends its turns itself.
    """

    path: Locations
    text: Column | None = None
    prompt: Column | None = None
    completion: Column | None = None
    messages: Column | None = None
    packed: Packed | None = None
    label: Column | None = None
    chosen: Column | None = None
    rejected: Column | None = None
    id: Column | None = None
    append_eos: bool | None = None

    @model_validator(mode="after")
    def _columns(self) -> Self:
        if (self.chosen is None) != (self.rejected is None):
            raise ValueError("`chosen` and `rejected` go together")
        contents = {
            "text": self.text,
            "completion": self.completion,
            "messages": self.messages,
            "packed": self.packed,
            "chosen": self.chosen,
        }
        given = [name for name, column in contents.items() if column is not None]
        if len(given) != 1:
            raise ValueError(
                "give one of `text`, `completion` with an optional `prompt`, `messages`, `packed`, and `chosen` with "
                "`rejected`"
            )
        if self.completion is None and self.chosen is None and self.prompt is not None:
            raise ValueError(f"`prompt` goes with `completion`, not with `{given[0]}`")
        if self.label is not None and self.text is None:
            raise ValueError("`label` goes with `text`")
        if self.packed is not None and self.append_eos:
            raise ValueError("`append_eos` does not go with `packed`: rows of token ids are used as they are")
        if self.messages is not None and self.append_eos:
            raise ValueError("`append_eos` does not go with `messages`: the chat template ends its turns itself")
        return self

    @property
    def ends_with_eos(self) -> bool:
        ended = self.completion is not None or self.chosen is not None
        return ended if self.append_eos is None else self.append_eos

    @property
    def content(self) -> tuple[str, ...]:
        """The columns of what a document says, without its prompt."""
        ids = None if self.packed is None else self.packed.ids
        named = (self.completion, self.text, self.messages, self.chosen, self.rejected, ids)
        return tuple(column for column in named if column is not None)

    @property
    def objective(self) -> Kind | None:
        """The kind of the objective that these columns are for; None: a language model's."""
        if self.chosen is not None:
            return "dpo"
        return None if self.label is None else "classification"


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


class EkfacSolver(Strict):
    """Queries go back through the stage by its EK-FAC factors alone."""

    kind: Literal["ekfac"] = "ekfac"


class CgSolver(Strict):
    """Block conjugate gradients on the stage's damped Gauss-Newton Hessian itself.

    That is of the first `documents` of those that the stage is fitted on (default: all of them), met once per query
    and iteration; EK-FAC is the preconditioner. A query is solved once its residual is within `tolerance` times its
    right-hand side; one that `iterations` do not solve keeps EK-FAC's answer, since one stopped half-way can be worse.
    The defaults are from one small model at damping 0.1 × mean, where a residual of 0.3 took some 30 iterations and
    gave scores that correlate at 0.98 with those of 56, EK-FAC's at 0.60 (docs/validation.md).
    """

    kind: Literal["cg"]
    iterations: Annotated[int, Field(ge=1)] = 64
    documents: Annotated[int, Field(ge=1)] | None = None
    tolerance: Annotated[float, Field(gt=0, lt=1)] = 0.3


Solver = Annotated[EkfacSolver | CgSolver, Field(discriminator="kind")]


class Stage(Strict):
    """One training stage: the model it ended with, what it was trained on, how it responds.

    Without an `objective`, it is a language model's: the tokens of its documents, or those of their completions. A
    `model` that is a LoRA adapter is merged into that of the stage `base` (default: the one before, where the adapter
    says that it was trained on it), and then stands for the whole model (`lora.py`).

    The default damping predicted retraining of a tiny model better than the customary 0.1 × mean did, and no worse than
    smaller ones (docs/validation.md).
    """

    name: Name
    model: Location
    revision: str | None = None
    base: Name | None = None
    tokenizer: Location | None = None
    documents: Documents | None = None
    objective: Objective | None = None
    fit: Fit = Fit()
    factors: Location | None = None
    damping: Strength = Strength(relative=0.01)
    response: Response | None = None
    solver: Solver = EkfacSolver()
