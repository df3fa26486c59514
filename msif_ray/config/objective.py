"""What a stage was trained to do, where that is not a language model's next token."""

from operator import not_
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from msif_ray.config.base import Location, Positive, Strict

Kind = Literal["classification", "dpo"]


class Classification(Strict):
    """−log p(class | text), of a model with a classification head (DESIGN.md §2: a loss of one term per document).

    The head is no part of any other stage, so it is left out. A text longer than `max_tokens` is skipped, since a
    classifier reads it whole; `truncate` cuts it as its tokenizer does.
    """

    kind: Literal["classification"]
    truncate: bool = False


class Preference(Strict):
    """Direct preference optimisation: −log σ(β[log π(chosen)/π(rejected) − log π_ref(chosen)/π_ref(rejected)]).

    Rafailov et al. 2023, arXiv 2305.18290, eq. 7. The `reference` model is by default the stage's before. A pair of
    which either sequence is longer than `max_tokens` is skipped. `length_normalised` divides each log-probability by
    the number of tokens of its completion (Tülu 3: Lambert et al. 2024, arXiv 2411.15124, preference finetuning).
    """

    kind: Literal["dpo"]
    beta: Positive = 0.1
    reference: Location | None = None
    # Written down only where it is set: a run without it is the run that it was before there was such a key.
    length_normalised: Annotated[bool, Field(exclude_if=not_)] = False


def _by_name(value: Any) -> Any:
    return {"kind": value} if isinstance(value, str) else value


_Described = Annotated[Classification | Preference, Field(discriminator="kind")]
Objective = Annotated[_Described, BeforeValidator(_by_name)]

# What the documents of a stage with an objective are, and the columns that say so.
DOCUMENTS: dict[Kind, str] = {
    "classification": "a text and its class: `text` and `label`",
    "dpo": "two completions: `chosen` and `rejected`, with or without a `prompt`",
}
