"""What a query asks: a completion, one rather than another, a span of one, or a conversation's last turn."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from msif_ray.config import Queries
from msif_ray.corpus.chat import chat_fault, turns_text
from msif_ray.corpus.files import CorpusFile
from msif_ray.corpus.reader import Document, document_columns, document_of, read_rows, row_id
from msif_ray.errors import UserError
from msif_ray.shapes import Pair, misfit


@dataclass(frozen=True)
class Query(Document):
    """A query as read. `text` is the completion, or where `is_chat` a conversation whose last turn is one.

    `rather_than` is another completion, or of a conversation another last turn or the conversation with that; `span`
    is `[start, end)` in characters of the completion. Each is None where it isn't asked for, and at most one is.
    """

    rather_than: Any = None
    span: Any = None

    @property
    def completion(self) -> str:
        return str(self.text[-1]["content"] if self.is_chat else self.text)

    @property
    def before(self) -> str:
        """What the completion follows, to be read: the prompt, or the turns before it."""
        if not self.is_chat:
            return self.prompt or ""
        return "".join(f"{turn}\n\n" for turn in [turns_text(self.text[:-1])] if turn) + "assistant: "

    @property
    def other_completion(self) -> str | None:
        """What the completion is asked about rather than."""
        return None if self.rather_than is None else self.other.completion

    @property
    def other(self) -> "Query":
        """The query about `rather_than` alone."""
        text = self.rather_than
        if self.is_chat and not isinstance(text, list):
            text = [*self.text[:-1], {"role": "assistant", "content": text}]
        return Query(self.id, self.prompt, text, self.has_prompt, self.is_chat)

    @property
    def words(self) -> str:
        """What documents are searched for: all that is said in it."""
        said = [message["content"] for message in self.text] if self.is_chat else [f"{self.prompt or ''}{self.text}"]
        return " ".join([*said, self.other_completion or ""]).rstrip()


def read_queries(file: CorpusFile, queries: Queries, key: str) -> Iterator[Query]:
    """The file's queries in order.

    Raises UserError, naming file and row, for one that isn't fit to be asked.
    """
    documents, extra = queries.documents, [name for name in (queries.rather_than, queries.span) if name is not None]
    for number, row in enumerate(read_rows(file, [*document_columns(documents), *extra], key)):
        found = document_of(row, documents, row_id(file, number, row, documents, key))
        of_row = {name: row[column] for name, column in _columns(queries) if column is not None}
        query = Query(**vars(found), **of_row)
        fault = _fault(query, queries)
        if fault is not None:
            raise UserError(f"{key}: {file.path} row {number} (id {query.id!r}): {fault}")
        yield query


def asked(query: Document) -> list[Any]:
    """All that a query is, for run.json: its id, prompt, and completion or messages, and what else it asks."""
    entry: list[Any] = [query.id, query.prompt, _plain(query.text)]
    if isinstance(query, Query):
        extra = {"rather_than": query.rather_than, "span": query.span}
        extra = {name: _plain(value) for name, value in extra.items() if value is not None}
        entry += [extra] if extra else []
    return entry


class _Extra(BaseModel, extra="forbid"):
    rather_than: str | list[Any] = ""
    span: Pair[int] = [0, 0]


class _Asked(BaseModel):
    name: str
    prompt: str | None
    text: str | list[Any]
    extra: _Extra = _Extra()


def is_asked(entry: list[Any]) -> bool:
    """Whether an entry of run.json is one that `asked` may have made."""
    parts = dict(zip(_Asked.model_fields, entry, strict=False))
    return len(entry) <= len(_Asked.model_fields) and misfit(parts, _Asked) is None


def query_of(entry: list[Any]) -> Query:
    """The query of an entry of `asked`."""
    name, prompt, text, *extra = entry
    chat = isinstance(text, list)
    return Query(name, prompt, text, not chat, chat, **(extra[0] if extra else {}))


def _plain(value: Any) -> Any:
    """A value as JSON has it: a conversation may hold more than roles and contents."""
    return json.loads(json.dumps(value, default=str))


def _columns(queries: Queries) -> list[tuple[str, str | None]]:
    return [("rather_than", queries.rather_than), ("span", queries.span)]


def _fault(query: Query, queries: Queries) -> str | None:
    """What is wrong with a row, in words that name its columns."""
    if queries.label is not None:
        return _text_fault(query.text, str(queries.text)) or (None if query.text else "the text is empty")
    if query.is_chat:
        fault = _turns_fault(query.text, str(queries.messages))
    else:
        fault = _text_fault(query.prompt, str(queries.prompt)) or _text_fault(query.text, str(queries.completion))
    if fault is not None:
        return fault
    if not query.completion:
        return "the completion is empty" if not query.is_chat else "the last turn is empty; there is nothing to explain"
    if query.rather_than is not None and query.span is not None:
        return f"it has {queries.rather_than!r} and {queries.span!r}; a row may have one of them, so leave one null"
    if query.rather_than is not None:
        return _other_fault(query, str(queries.rather_than))
    return None if query.span is None else _span_fault(query, str(queries.span))


def _text_fault(value: Any, column: str) -> str | None:
    if isinstance(value, str):
        return None
    return f"{column!r} is {'null' if value is None else type(value).__name__}, not text"


def _turns_fault(messages: Any, column: str) -> str | None:
    fault = chat_fault(messages)
    if fault is not None:
        return f"{column!r}: {fault}"
    last = messages[-1]["role"]
    if last != "assistant":
        return f"{column!r}: the last message is the {last}'s; end with the assistant's, which is explained"
    return None


def _other_fault(query: Query, column: str) -> str | None:
    if query.is_chat and isinstance(query.rather_than, list):
        fault = _turns_fault(query.rather_than, column)
        if fault is not None:
            return fault
        if query.rather_than[:-1] != query.text[:-1]:
            return f"{column!r}: the turns before the last are others; the two must differ in their last turn alone"
    elif not isinstance(query.rather_than, str):
        return _text_fault(query.rather_than, column)
    if not query.other.completion:
        return f"{column!r} is empty; give another completion, or null"
    if query.other.completion == query.completion:
        return f"{column!r} is the completion itself; give another one, or null"
    return None


def _span_fault(query: Query, column: str) -> str | None:
    span, length = query.span, len(query.completion)
    whole = isinstance(span, list) and len(span) == 2 and all(type(place) is int for place in span)
    if not whole or not 0 <= span[0] < span[1] <= length:
        return (
            f"{column!r} is {span!r}; give [start, end) with 0 <= start < end <= {length}, in characters of the "
            "completion, or null"
        )
    return None
