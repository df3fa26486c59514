"""Rows written as a user's files: JSON lines, Parquet or a saved folder of `datasets`."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

Rows = Sequence[Mapping[str, Any]]


def write_lines(path: Path, rows: Rows) -> str:
    """JSON lines at the path, which is returned as a description names it."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def write_rows(path: Path, rows: Rows, row_group_size: int | None = None) -> str:
    """What the path's suffix says: .parquet, .jsonl, or without one a saved folder."""
    if path.suffix == ".jsonl":
        return write_lines(path, rows)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(list(rows)), path, row_group_size=row_group_size)
    else:
        Dataset.from_list(list(rows)).save_to_disk(path)
    return str(path)
