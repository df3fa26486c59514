import json

import pytest

from msif_ray.config import Documents
from msif_ray.corpus.blocks import CorpusBlocks
from msif_ray.corpus.files import corpus_files

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
