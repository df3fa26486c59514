"""Reading a corpus: order, ids, blocks, and one clear line for what cannot be read."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from msif_ray.config import Documents
from msif_ray.corpus.files import corpus_files
from msif_ray.corpus.reader import read_documents
from msif_ray.errors import UserError

ROWS = [{"id": f"r{i}", "text": f"text {i}", "other": i} for i in range(7)]


def write(path, rows=ROWS):
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    else:
        Dataset.from_list(rows).save_to_disk(path)
    return path


def read(path, **columns):
    documents = Documents(path=str(path), **({"text": "text", "id": "id"} | columns))
    return [d for file in corpus_files(documents, "key") for d in read_documents(file, documents, "key")]


@pytest.mark.parametrize("name", ("rows.parquet", "rows.jsonl", "rows"))
def test_every_format_gives_the_same_documents_in_order(tmp_path, name):
    path = write(tmp_path / name)
    assert [(d.id, d.text, d.prompt, d.has_prompt) for d in read(path)] == [
        (row["id"], row["text"], None, False) for row in ROWS
    ]
    assert [d.id for d in read(path, id=None)] == [f"{name}:{i}" for i in range(7)]
    pair = read(path, text=None, prompt="id", completion="text")[3]
    assert (pair.prompt, pair.text, pair.has_prompt) == ("r3", "text 3", True)
    with pytest.raises(UserError, match=r"key: .*rows.* has no column 'nothing'"):
        read(path, text="nothing")


FAULTS = {
    "not json": ('{"id": "a", "text": "b"}\n{oops\n', r"line 2: not JSON"),
    "deep": ("[" * 100_000, r"line 1: not JSON"),
    "list": ("[1]\n", r"line 1: not a JSON object"),
    "no id": ('{"text": "b"}\n{"id": "x", "text": "b"}', r"row 0 has no 'id'"),
    "bad id": ('{"id": "\\ud800", "text": "b"}', r"row 0: 'id' is not valid Unicode"),
    "bytes": (b'{"id": "a", "text": "\xff"}', r"line 1: not JSON"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_json_lines_names_the_file_and_row(tmp_path, fault):
    content, message = FAULTS[fault]
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message) as error:
        read(path)
    assert "bad.jsonl" in str(error.value) and "\n" not in str(error.value)


def test_faults_of_paths_name_the_key(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "empty.parquet").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    for path, message in (
        (tmp_path / "*.none", "no file matches"),
        ("ftp://host/x.parquet", "only local paths"),
        (tmp_path / "notes.txt", "not .parquet"),
        (tmp_path / "folder", "no saved `datasets` split"),
        (tmp_path / "empty.parquet", "cannot be read"),
    ):
        with pytest.raises(UserError, match=message) as error:
            read(path)
        assert str(error.value).startswith("key.path: ")
    with pytest.raises(UserError, match="names no file"):
        corpus_files(Documents(path=[], text="text"), "key")


def test_bytes_that_are_no_utf8_spoil_one_document_only(tmp_path):
    texts = pa.array([b"good", b"bad \xff", None], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"id": ["a", "b", "c"], "text": texts}), tmp_path / "x.parquet")
    assert [(d.id, d.text) for d in read(tmp_path / "x.parquet")] == [("a", "good"), ("b", "bad \udcff"), ("c", None)]
