"""How a corpus packs several documents into each row of token ids."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from msif_ray.config.base import Column, Strict


class Packed(Strict):
    """Rows of token ids (the column `ids`) as training saw them, each of several documents end to end.

    Where one document ends and the next begins, one of these says: `lengths`, a column with the tokens of each document
    of the row; `positions`, one with a position per token that begins anew with each document; `documents`, one with a
    value per token that changes with each document; or `eos`, the id of the token that each document ends with (where
    several follow one another, the others are padding, and of no document). By the other three every token is some
    document's unless `mask` names a column that tells padding: a value per token, zero or false at the padding that a
    row ends with. Padding that is not told is scored as part of a document, or with `lengths` no row adds up; only what
    is plainly padding, by the tokenizer's own token for it, is skipped.

    `attention` says what a token saw in training: with `row`, all tokens before it in its row, so that a document is
    scored with what comes before it there as context, and positions count along the row; with `document`, those of its
    own document alone, which is then as if it stood alone.
    """

    ids: Column
    attention: Literal["row", "document"]
    lengths: Column | None = None
    positions: Column | None = None
    documents: Column | None = None
    eos: Annotated[int, Field(ge=0)] | None = None
    # Not said where not given: records and indexes of earlier versions say nothing of it.
    mask: Annotated[Column | None, Field(exclude_if=lambda column: column is None)] = None

    @model_validator(mode="after")
    def _one_boundary(self) -> Self:
        if sum(each is not None for each in (self.lengths, self.positions, self.documents, self.eos)) != 1:
            raise ValueError(
                "give one of `lengths`, `positions`, `documents` and `eos`, to tell a row's documents apart"
            )
        return self

    @property
    def columns(self) -> list[str]:
        """What is read of a row."""
        found = (self.ids, self.lengths, self.positions, self.documents, self.mask)
        return [column for column in found if column is not None]
