"""A corpus is counted, hashed and its ids compared in one pass, with few bytes for each document."""

import os
import re
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpora import write_rows

from msif_ray.config import Documents
from msif_ray.corpus import census, reader
from msif_ray.corpus.census import take_census
from msif_ray.corpus.states import fingerprint
from msif_ray.errors import UserError

Rows = list[dict[str, Any]]


def rows(first: int, count: int) -> Rows:
    return [{"id": f"r{first + i}", "text": f"text {i}"} for i in range(count)]


def documents(path: Path, **columns: Any) -> Documents:
    return Documents(path=str(path), **({"text": "text", "id": "id"} | columns))


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ""])
def test_rows_are_counted_and_a_repeated_id_is_named_with_both_places(tmp_path: Path, suffix: str) -> None:
    for name, first in (("a", 0), ("b", 5)):
        write_rows(tmp_path / f"{name}{suffix}", rows(first, 5))
    found = take_census(documents(tmp_path / f"?{suffix}"), "key")
    assert [file.name for file in found.files] == [f"a{suffix}", f"b{suffix}"] and found.rows == (5, 5)
    assert len(set(found.contents)) == 2
    assert take_census(documents(tmp_path / f"?{suffix}", id=None), "key").rows == (5, 5)
    write_rows(tmp_path / f"c{suffix}", [*rows(20, 3), {"id": "r3", "text": ""}, {"id": "r7", "text": ""}])
    message = f"key.id: {tmp_path}/c{suffix} row 3 has the id 'r3' of {tmp_path}/a{suffix} row 3; ids must differ"
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        take_census(documents(tmp_path / f"?{suffix}"), "key")


def test_ids_that_only_share_a_hash_are_no_repeat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_rows(tmp_path / "a.jsonl", rows(0, 50))
    monkeypatch.setattr(census, "hash", lambda text: len(text), raising=False)
    assert take_census(documents(tmp_path / "a.jsonl"), "key").rows == (50,)
    write_rows(tmp_path / "a.jsonl", [*rows(0, 50), rows(7, 1)[0]])
    with pytest.raises(UserError, match=r"row 50 has the id 'r7' of .* row 7"):
        take_census(documents(tmp_path / "a.jsonl"), "key")


def peak(path: Path, count: int) -> int:
    ids = pa.array([f"a-document-with-a-long-identifier-{i:09d}" for i in range(count)])
    pq.write_table(pa.table({"id": ids, "text": pa.array(["x"] * count)}), path, row_group_size=1000)
    tracemalloc.start()
    try:
        take_census(documents(path), "key")
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_an_id_takes_few_bytes(tmp_path: Path) -> None:
    few, many = 50_000, 250_000
    path = tmp_path / "a.parquet"
    peak(path, few)  # what is imported and cached once
    assert peak(path, many) - peak(path, few) < 16 * (many - few)


def test_a_corpus_without_ids_is_counted_and_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.parquet", "b"):
        write_rows(tmp_path / name, rows(0, 100))
        read: list[int] = []
        monkeypatch.setattr(reader, "python_rows", lambda some, read=read: read.append(len(some)) or some.to_pylist())
        assert take_census(documents(tmp_path / name, id=None), "key").rows == (100,)
        assert len(read) == 1, "the first rows, to see that the columns are there"


def test_it_says_how_far_it_is_where_it_takes_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, first in (("a", 0), ("b", 5), ("c", 10)):
        write_rows(tmp_path / f"{name}.parquet", rows(first, 5))
    said: list[str] = []
    take_census(documents(tmp_path / "*.parquet"), "key", said.append)
    assert said == []
    monkeypatch.setattr(census, "SECONDS_BETWEEN_LINES", -1.0)
    take_census(documents(tmp_path / "*.parquet"), "key", said.append)
    assert said[1:] == [f"key: {n} of 3 files are checked, {5 * n} documents" for n in (1, 2)]


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ""])
def test_another_content_of_the_same_size_is_another_fingerprint(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    write_rows(path, rows(0, 5))
    before = fingerprint(path)
    assert fingerprint(path) == before
    file = next(path.glob("*.arrow")) if path.is_dir() else path
    content = file.read_bytes()
    file.write_bytes(content.replace(b"text 4", b"text 5"))
    assert len(file.read_bytes()) == len(content) and file.read_bytes() != content
    assert fingerprint(path) != before


@pytest.mark.parametrize("name", ["cache-2024.jsonl", ".hidden.parquet"])
def test_a_file_that_is_named_counts_whatever_it_is_called(tmp_path: Path, name: str) -> None:
    write_rows(tmp_path / name, rows(0, 5))
    before = fingerprint(tmp_path / name)
    write_rows(tmp_path / name, rows(1, 5))
    assert fingerprint(tmp_path / name) != before
    (tmp_path / name).unlink()
    with pytest.raises(UserError, match=rf"{re.escape(name)}: cannot be read: No such file"):
        fingerprint(tmp_path / name)


def test_what_datasets_keeps_beside_a_saved_corpus_is_not_its_content(tmp_path: Path) -> None:
    write_rows(tmp_path / "a", rows(0, 5))
    before = fingerprint(tmp_path / "a")
    (tmp_path / "a" / "cache-0123.arrow").write_bytes(b"x")
    assert fingerprint(tmp_path / "a") == before
    (tmp_path / "a" / os.fsdecode(b"caf\xe9")).write_bytes(b"x")  # no content, but not known to be none
    assert fingerprint(tmp_path / "a") != before
