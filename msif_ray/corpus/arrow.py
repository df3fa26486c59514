"""Rows of Arrow's as Python values, whatever bytes a writer has put in."""

from typing import Any

import pyarrow as pa


def python_rows(rows: pa.RecordBatch | pa.Table) -> list[dict[str, Any]]:
    """The rows as Python values. Writers do not check UTF-8: bytes that are not become lone
    surrogates, so that one bad document is told apart instead of ending the run."""
    try:
        return rows.to_pylist()
    except UnicodeDecodeError:
        columns = {name: map(_value, column) for name, column in zip(rows.schema.names, rows.columns, strict=True)}
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _value(scalar: pa.Scalar) -> Any:
    """A value as Arrow gives it, and only where its bytes do not let it, part by part."""
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        if isinstance(scalar, pa.StringScalar):
            return scalar.as_buffer().to_pybytes().decode(errors="surrogateescape")
        if isinstance(scalar, pa.StructScalar):
            return {name: _value(each) for name, each in scalar.items()}
        if isinstance(scalar, pa.ListScalar):
            return [_value(each) for each in scalar.values]
        return _value(scalar.value)  # what a dictionary's entry or an extension type stands for
