import json
import socket

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpora import write_rows

from msif_ray.config import Documents
from msif_ray.corpus import reader
from msif_ray.corpus.blocks import CorpusBlocks
from msif_ray.corpus.census import take_census
from msif_ray.corpus.files import CorpusFile, corpus_files
from msif_ray.errors import UserError

ROWS = 7


@pytest.fixture
def corpus(tmp_path):
    for name in ("b.jsonl", "a.jsonl"):
        lines = (json.dumps({"text": f"{name} {number}"}) for number in range(ROWS))
        (tmp_path / name).write_text("\n".join(lines))
    documents = Documents(path=str(tmp_path / "*.jsonl"), text="text")
    files = tuple(corpus_files(documents, "key"))
    assert [file.name for file in files] == ["a.jsonl", "b.jsonl"]
    return lambda limit=None: CorpusBlocks(files, (ROWS, ROWS), documents, 3, "key", limit)


def test_blocks_are_cut_by_file(corpus):
    blocks = list(corpus().left(set()))
    assert [len(block.documents) for block in blocks] == [3, 3, 1, 3, 3, 1]
    assert [block.id for block in blocks] == sorted({block.id for block in blocks})
    assert len({document.id for block in blocks for document in block.documents}) == 2 * ROWS


@pytest.mark.parametrize("limit", [None, 1, 3, 7, 8, 14, 20])
def test_a_limit_takes_the_first_documents_and_names_are_known_unread(corpus, limit):
    everything = [document for block in corpus().left(set()) for document in block.documents]
    limited = corpus(limit)
    blocks = list(limited.left(set()))
    assert [document for block in blocks for document in block.documents] == everything[:limit]
    assert limited.ids == {block.id for block in blocks}
    assert limited.count == len(everything[:limit])
    assert {block.id: len(block.documents) for block in blocks} == {
        name: limited.documents_in(name) for name in limited.ids
    }


def test_blocks_that_are_done_are_left_out(corpus, tmp_path):
    blocks = list(corpus().left(set()))
    done = {blocks[0].id, blocks[4].id}
    assert [block.id for block in corpus().left(done)] == [block.id for block in blocks if block.id not in done]
    (tmp_path / "a.jsonl").unlink()  # a file whose blocks are all done is not opened
    assert list(corpus().left({block.id for block in blocks[:3]})) == blocks[3:]


@pytest.mark.parametrize("rows", [0, 3, 5])  # nothing, whole blocks, a part of one
def test_a_file_that_has_become_shorter_is_named(corpus, tmp_path, rows):
    lines = (tmp_path / "b.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "b.jsonl").write_text("".join(lines[:rows]))
    read = []
    with pytest.raises(UserError, match=rf"^key\.path: {tmp_path}/b\.jsonl .*shorter .* it has {rows} of its 7 doc"):
        for block in corpus().left(set()):
            read.append(block)
    assert [len(block.documents) for block in read] == [3, 3, 1] + [3] * (rows // 3), "a cut block is handed out"
    assert len(list(corpus(ROWS + rows).left(set()))) == 3 + -(-rows // 3), "what is missing is not asked for"


class Seen(tuple):
    """Row counts that know how often they were gone through."""

    times = 0

    def __iter__(self):
        Seen.times += 1
        return super().__iter__()


@pytest.mark.parametrize("files", [2, 50])
def test_a_corpus_of_many_files_is_not_gone_through_for_every_one_nor_for_every_block(files):
    paths = tuple(CorpusFile(f"/{n}.parquet", str(n), "parquet") for n in range(files))
    Seen.times = 0
    blocks = CorpusBlocks(paths, Seen([ROWS] * files), Documents(path="/*.parquet", text="text"), 3, "key")
    assert sum(map(blocks.documents_in, blocks.ids)) == blocks.count == files * ROWS
    assert Seen.times <= 2


def test_names_of_documents_take_no_more_than_their_ids(tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(reader.pq.ParquetFile, "iter_batches", spy(reader.pq.ParquetFile.iter_batches, read))
    for name in "ab":
        rows = pa.table({"id": [f"{name}{n}" for n in range(5)], "text": ["a long text"] * 5})
        pq.write_table(rows, tmp_path / f"{name}.parquet")
    for column, names in (("id", [f"{name}{n}" for name in "ab" for n in range(5)]), (None, None)):
        documents = Documents(path=str(tmp_path / "*.parquet"), text="text", id=column)
        blocks = CorpusBlocks(tuple(corpus_files(documents, "k")), (5, 5), documents, 2, "k", limit=8)
        every = [(document.id, block.id) for block in blocks.left(set()) for document in block.documents]
        read.clear()
        assert list(blocks.named()) == every and len(every) == 8
        assert read == ([["id"]] * 2 if column else [])
        assert names is None or [name for name, _ in every] == names[:8]


def spy(method, read):
    def called(*arguments, columns, **options):
        read.append(columns)
        return method(*arguments, columns=columns, **options)

    return called


def counted(path, size):
    documents = Documents(path=str(path), text="text", id="id")
    census = take_census(documents, "key")
    return CorpusBlocks(tuple(census.files), census.rows, documents, size, "key")


@pytest.mark.parametrize("kind", ["jsonl", "parquet", ""])
@pytest.mark.parametrize("handed_out", [0, 1, 2])
def test_a_file_that_is_replaced_is_named_before_a_block_of_another_content_is_handed_out(tmp_path, kind, handed_out):
    path = tmp_path / f"corpus.{kind}".rstrip(".")
    rows = [{"id": f"d{number}", "text": f"text {number}"} for number in range(9)]
    write_rows(path, rows)
    read, blocks = [], counted(path, 3).left(set())
    for _ in range(handed_out):
        read += next(blocks).documents
    write_rows(path, rows[::-1])  # of the same size
    with pytest.raises(
        UserError, match=f"^key.path: {path} has changed since the run was checked, or is another one on"
    ):
        for block in blocks:
            read += block.documents
    assert [document.id for document in read] == [f"d{number}" for number in range(3 * handed_out)]


def test_lines_that_come_later_are_no_change(tmp_path):
    path = tmp_path / "corpus.jsonl"
    rows = [{"id": f"d{number}", "text": f"text {number}"} for number in range(7)]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows[:5]))
    blocks = counted(path, 3)
    with open(path, "a") as lines:
        lines.writelines(f"{json.dumps(row)}\n" for row in rows[5:])
    read = [document.id for block in blocks.left(set()) for document in block.documents]
    assert read == ["d0", "d1", "d2", "d3", "d4"]


def test_a_node_that_has_not_the_file_is_named(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text('{"id": "d", "text": "text"}\n')
    blocks = counted(path, 3)
    path.unlink()
    with pytest.raises(UserError, match=rf"^key\.path: {path}: not there on {socket.gethostname()}; every node reads"):
        next(blocks.left(set()))
