"""Reading a corpus: order, ids, blocks, and one clear line for what cannot be read."""

import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpus.test_chat import PLAIN, tokenizer_of
from datasets import Dataset, DatasetDict, load_from_disk

from msif_ray.config import Documents
from msif_ray.corpus.files import corpus_files
from msif_ray.corpus.reader import read_documents
from msif_ray.corpus.windows import Encoded, Skipped, encode
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


@pytest.mark.parametrize("pattern", ("**/**/*.jsonl", "deep/*/../../*.jsonl", ["**/*.jsonl", "deep/../*.jsonl"]))
def test_a_file_that_a_pattern_names_by_several_ways_is_read_once(tmp_path, monkeypatch, pattern):
    monkeypatch.chdir(tmp_path)
    for folder in ("deep/one", "deep/other"):
        (tmp_path / folder).mkdir(parents=True)
    path = write(tmp_path / "rows.jsonl")
    assert [file.path for file in corpus_files(Documents(path=pattern, text="text"), "key")] == [str(path)]


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


def test_a_saved_dataset_without_rows_is_as_a_file_without_lines(tmp_path):
    write(tmp_path / "rows", ROWS[:1])
    save(tmp_path / "empty", pa.table({"id": [], "text": []}))
    load_from_disk(tmp_path / "rows").select([]).save_to_disk(tmp_path / "none")
    (tmp_path / "x.jsonl").write_text("")
    for name in ("empty", "none", "x.jsonl"):
        assert read(tmp_path / name) == []


STATES = {
    "state.json": ("{", "[]", "{}", '{"_data_files": [3]}'),
    "dataset_info.json": ("{", "[3]", '{"features": {"text": {"_type": "Future"}}}', '{"features": 3}'),
}


@pytest.mark.parametrize(("file", "content"), [(file, content) for file in STATES for content in STATES[file]])
def test_a_damaged_saved_dataset_is_one_line(tmp_path, file, content):
    path = write(tmp_path / "rows")
    (path / file).write_text(content)
    with pytest.raises(UserError) as error:
        read(path)
    line = str(error.value)
    assert line.startswith(f"key.path: {path} cannot be read as a saved `datasets` folder (") and "\n" not in line
    assert line.endswith("save it again, or write Parquet") and len(line) < len(str(path)) + 400


def test_saved_features_are_decoded(tmp_path):
    """As `datasets` itself reads them; a value that cannot be decoded is no conversation."""
    talk = [{"role": "assistant", "content": "the sea"}]
    stored = pa.ExtensionArray.from_storage(pa.json_(), unchecked(json.dumps(talk).encode(), b"[\xff]"))
    save(tmp_path / "x", pa.table({"id": ["a", "b"], "talk": stored}))
    assert [d.text for d in read(tmp_path / "x", text=None, messages="talk")] == [talk, "[\udcff]"]


def test_faults_of_paths_name_the_key(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "empty.parquet").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    splits = tmp_path / "splits"
    rows = Dataset.from_list([{"id": "a", "text": "b"}])
    DatasetDict({"train": rows, "test": rows}).save_to_disk(splits)
    for path, message in (
        (tmp_path / "*.none", "no file matches"),
        ("ftp://host/x.parquet", "only local paths"),
        (tmp_path / "notes.txt", "not .parquet"),
        (tmp_path / "folder", "no saved `datasets` split; name its files with a glob$"),
        (splits, f"{splits} holds several splits; name those that are meant: {splits}/test, {splits}/train$"),
        (tmp_path / "empty.parquet", "cannot be read"),
    ):
        with pytest.raises(UserError, match=message) as error:
            read(path)
        assert str(error.value).startswith("key.path: ")
    (tmp_path / os.fsdecode(b"caf\xe9.jsonl")).write_text('{"id": "a", "text": "b"}')
    with pytest.raises(UserError, match=r"^key\.path: .*caf\\xe9\.jsonl: its name is not UTF-8; rename it$"):
        read(tmp_path / "caf*.jsonl")
    with pytest.raises(UserError, match="names no file"):
        corpus_files(Documents(path=[], text="text"), "key")


def test_a_time_that_python_has_not_is_said(tmp_path):
    save(tmp_path / "x.parquet", pa.table({"id": ["a"], "text": pa.array([2**50], pa.timestamp("s"))}))
    with pytest.raises(UserError, match=r"^key\.path: .*x\.parquet cannot be read: .+"):
        read(tmp_path / "x.parquet")


def unchecked(*values):
    """Text as a writer leaves it that does not check its bytes."""
    return pa.array(values, pa.binary()).view(pa.string())


def save(path, table):
    if path.suffix:
        pq.write_table(table, path)
    else:
        Dataset(table).save_to_disk(path)


TEXTS = {
    "string": unchecked(b"good", b"bad \xff", None),
    "large": pa.array([b"good", b"bad \xff", None], pa.large_binary()).view(pa.large_string()),
    "dictionary": pa.DictionaryArray.from_arrays(pa.array([0, 1, None], pa.int32()), unchecked(b"good", b"bad \xff")),
}


@pytest.mark.parametrize("kind", TEXTS)
@pytest.mark.parametrize("name", ("x.parquet", "x"))
def test_bytes_that_are_no_utf8_spoil_one_document_only(tmp_path, kind, name):
    save(tmp_path / name, pa.table({"id": ["a", "b", "c"], "text": TEXTS[kind]}))
    found = read(tmp_path / name)
    assert [(d.id, d.text) for d in found] == [("a", "good"), ("b", "bad \udcff"), ("c", None)]
    assert encode(tokenizer_of(PLAIN), found[1], False) == Skipped("b", "text is not valid Unicode")


@pytest.mark.parametrize("field", ("role", "content", "name"))
@pytest.mark.parametrize("name", ("x.parquet", "x"))
def test_bytes_that_are_no_utf8_spoil_one_conversation_only(tmp_path, field, name):
    talk = [{"role": "user", "content": "the", "name": "x"}, {"role": "assistant", "content": "the sea", "name": "x"}]
    fields = {key: [turn[key].encode() for turn in [*talk, *talk]] for key in talk[0]}
    fields[field][2] += b"\xff"
    turns = pa.StructArray.from_arrays([unchecked(*values) for values in fields.values()], names=list(fields))
    lists = pa.ListArray.from_arrays(pa.array([0, 2, 4], pa.int32()), turns)
    save(tmp_path / name, pa.table({"id": ["a", "b"], "talk": lists}))
    good, bad = read(tmp_path / name, text=None, messages="talk")
    assert good.text == talk and bad.text == [talk[0] | {field: talk[0][field] + "\udcff"}, talk[1]]
    tokenizer = tokenizer_of(PLAIN)
    assert isinstance(encode(tokenizer, good, False), Encoded)
    assert encode(tokenizer, bad, False) == Skipped("b", "message 0 is not valid Unicode")


def test_a_damaged_parquet_file_is_one_line(tmp_path):
    """Whatever byte is wrong: of a column's name, of its type, of its values."""
    whole = write(tmp_path / "x.parquet", ROWS[:2]).read_bytes()
    path = tmp_path / "bad.parquet"
    for place in range(0, len(whole), 2):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        try:
            read(path)
        except UserError as error:
            assert "bad.parquet" in str(error) and "\n" not in str(error)


def test_a_column_that_is_there_twice_is_refused_where_it_is_read(tmp_path):
    columns = [pa.array(["a"]), pa.array(["b"]), pa.array(["c"])]
    pq.write_table(pa.Table.from_arrays(columns, names=["id", "text", "text"]), tmp_path / "x.parquet")
    with pytest.raises(UserError, match=r"^key: .*x\.parquet has 2 columns 'text'; rename all but one$"):
        read(tmp_path / "x.parquet")
    assert read(tmp_path / "x.parquet", text="id")[0].text == "a"
