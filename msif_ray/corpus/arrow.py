"""Rows of Arrow's as Python values, whatever bytes a writer has put in."""

from typing import Any

import pyarrow as pa


def python_rows(batch: pa.RecordBatch) -> list[dict[str, Any]]:
    """The rows as Python values. Writers do not check UTF-8: bytes that are not become lone
    surrogates, so that one bad document is told apart instead of ending the run."""
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        columns = {name: _lenient(column) for name, column in zip(batch.schema.names, batch.columns, strict=True)}
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _lenient(column: pa.Array) -> list[Any]:
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        return column.to_pylist()
    values = column.cast(pa.large_binary()).to_pylist()
    return [None if value is None else value.decode(errors="surrogateescape") for value in values]
