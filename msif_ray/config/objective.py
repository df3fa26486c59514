"""What a stage was trained to do, where that is not a language model's next token."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from msif_ray.config.base import Strict

Kind = Literal["classification"]


class Classification(Strict):
    """−log p(class | text), of a model with a classification head (DESIGN.md §2: a loss of one term per document).

    The head is no part of any other stage, so it is left out. A text longer than `max_tokens` is skipped, since a
    classifier reads it whole; `truncate` cuts it as its tokenizer does.
    """

    kind: Literal["classification"] = "classification"
    truncate: bool = False


def _by_name(value: Any) -> Any:
    return {"kind": value} if isinstance(value, str) else value


Objective = Annotated[Classification, BeforeValidator(_by_name)]

# What the documents of a stage with an objective are, and the columns that say so.
DOCUMENTS: dict[Kind, str] = {"classification": "a text and its class: `text` and `label`"}
