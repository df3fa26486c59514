"""Damaged and missing files of a run, and a run.json of another version: one line each, that says what to do."""

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from results.finished import Finished
from typer.testing import CliRunner

from msif_ray.cli import app
from msif_ray.errors import UserError
from msif_ray.results import parts, top
from msif_ray.store import read_json

TABLES = ("top.parquet", "statistics.parquet", "skipped.parquet", "queries/stage=pretrain/energy.parquet")
AGAIN = "delete it, and run `msif run` again"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run and its corpus."""
    folder = tmp_path_factory.mktemp("damage")
    pq.write_table(pa.table({"id": [f"doc-{n:02d}" for n in range(12)], "text": ["x"] * 12}), folder / "c.parquet")
    documents = {"path": str(folder / "c.parquet"), "text": "text", "id": "id"}
    stages = [{"name": "pretrain", "model": "m", "documents": documents}, {"name": "tune", "model": "n"}]
    changes = {"stages": stages, "cluster": {"documents_per_block": 6}}
    return Finished(changes=changes, skipped=[("bad", "text is null")]).write(folder / "run")


@pytest.fixture
def run_dir(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "run"))


def said_by(run_dir: Path) -> dict[str, str | None]:
    """What each command refuses to go on with, if it does."""
    said: dict[str, str | None] = {}
    for command, *more in (("show",), ("report",), ("compare", str(run_dir)), ("aggregate", "--by", "id")):
        result = CliRunner().invoke(app, [command, str(run_dir), *more])
        assert result.exception is None or isinstance(result.exception, UserError), result.exception
        said[command] = None if result.exception is None else str(result.exception)
    return said


def flipped(data: bytes, place: int) -> bytes:
    return data[:place] + bytes(byte ^ 0xFF for byte in data[place : place + 8]) + data[place + 8 :]


def damaged(path: Path, how: str) -> bytes:
    data = path.read_bytes()
    if how == "flipped page":
        columns = pq.read_metadata(path).row_group(0)
        # The name of a query, a stage or a document: what no other check of a value would find.
        return flipped(data, columns.column(1).data_page_offset + columns.column(1).total_compressed_size - 8)
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    return {"empty": b"", "truncated": data[:-20], "flipped footer": flipped(data, footer + 4)}[how]


@pytest.mark.parametrize("how", ["empty", "truncated", "flipped footer", "flipped page"])
@pytest.mark.parametrize("name", TABLES)
def test_a_damaged_table_is_named_with_what_to_do(run_dir: Path, name: str, how: str) -> None:
    path = run_dir / name
    path.write_bytes(damaged(path, how))
    said = said_by(run_dir)
    reading = ["show", "report"] if name in TABLES[:2] else list(said)
    expected = [f"{path}: damaged; {AGAIN}", f"{path}: of another version; {AGAIN}"]
    assert [command for command, line in said.items() if line is not None] == reading
    assert all(said[command] in expected for command in reading)
    if name == "top.parquet":
        assert top.has_top(run_dir, 3) == (how == "flipped page")  # which is found by whoever reads it


def test_a_flipped_bit_of_a_footer_is_noticed(run_dir: Path) -> None:
    """pyarrow reads on with most: with statistics of other rows, or other metadata; with some the process ends."""
    path = sorted(run_dir.glob("scores/*/part-*"))[0]
    whole, read = path.read_bytes(), parts.skipped_of(path)
    start = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    for place in range(start - 8, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        if start - 8 <= place < start - 4:  # without its checksum's name it is as those of earlier versions
            assert parts.skipped_of(path) == read
        else:
            with pytest.raises(UserError, match=r"not a part of this run's scores, or damaged; delete it"):
                parts.skipped_of(path)


def test_a_table_of_an_earlier_version_is_read(run_dir: Path) -> None:
    path = sorted(run_dir.glob("scores/*/part-*"))[0]
    table = parts.read_part(path)
    pq.write_table(table, path)
    assert parts.read_part(path) == table


def test_a_table_of_another_version_is_named(run_dir: Path) -> None:
    path = run_dir / "statistics.parquet"
    pq.write_table(pq.read_table(path).drop_columns(["length_correlation"]), path)
    assert said_by(run_dir)["show"] == f"{path}: of another version; {AGAIN}"


@pytest.mark.parametrize("name", TABLES[:2])
def test_a_missing_table_is_of_a_run_to_be_finished(run_dir: Path, name: str) -> None:
    (run_dir / name).unlink()
    assert said_by(run_dir)["report"] == f"{run_dir}: no {name} there yet; finish the run with `msif run`"


CHANGES: list[tuple[str, Any]] = [
    ("strengths", None), ("identity.run", None), ("identity.models", None), ("identity.models", []),
    ("identity.documents", None), ("identity.queries", None), ("identity.maps", None),
    ("identity.documents", {}), ("identity.models", {"pretrain": {}}), ("identity.queries", [["q"]]),
    ("completion_tokens", 3), ("strengths", {"pretrain": 1}), ("identity.corpora", []),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), CHANGES)
def test_a_record_of_another_version_is_said(run_dir: Path, key: str, value: Any) -> None:
    path = run_dir / "run.json"
    record = read_json(path)
    *parents, last = key.split(".")
    (record[parents[0]] if parents else record)[last] = value
    path.write_text(json.dumps(record))
    lines = set(said_by(run_dir).values())
    assert len(lines) == 1 and f"{path}: not as this version writes it: see {key}" in str(lines.pop())
