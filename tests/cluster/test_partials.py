"""Partial sums on storage, without Ray."""

import pickle
import shutil

import pytest
import torch

from msif_ray.cluster import partials
from msif_ray.cluster.outcomes import Counts, Outcome
from msif_ray.cluster.partials import Coverage
from msif_ray.corpus.windows import Skipped
from msif_ray.errors import UserError
from msif_ray.layout import part_file
from msif_ray.store import save_tensors


def outcome(*documents):
    return Outcome({document: 10 for document in documents}, (Skipped(f"not-{documents[0]}", "why"),), len(documents))


def write(step, blocks, value, ranks=1, replaces=None, inputs=""):
    """A partial over blocks of one document each; every rank adds `value` to map `m`."""
    folder = partials.new_folder(step, blocks[0])
    for rank in range(ranks):
        about = partials.part_metadata(folder, "m", rank)
        save_tensors(part_file(folder, "m", rank), {"E": torch.full((2, 3), float(value))}, about)
    partials.publish(folder, [["m"]] * ranks, [(block, outcome(block).counts) for block in blocks], replaces, inputs)
    return folder


def cover(step, *blocks):
    return Coverage(tuple(partials.read_disjoint(step)), frozenset(blocks))


def test_sums_over_partials_and_ranks(tmp_path):
    write(tmp_path, ["a", "b"], 1.0, ranks=2)
    write(tmp_path, ["c"], 5.0)
    covered = cover(tmp_path, "a", "b", "c")
    assert torch.equal(covered.total("m")["E"], torch.full((2, 3), 7.0))
    assert (covered.documents, covered.tokens, covered.windows) == (3, 30, 3)
    assert sorted(covered.skipped) == [("not-a", "why"), ("not-b", "why"), ("not-c", "why")]
    assert covered.total("another map") == {}


def test_a_later_partial_takes_an_earlier_ones_place(tmp_path):
    first = write(tmp_path, ["a"], 1.0)
    write(tmp_path, ["a", "b"], 3.0, replaces=first)
    assert not first.exists()
    assert torch.equal(cover(tmp_path, "a", "b").total("m")["E"], torch.full((2, 3), 3.0))


def test_the_larger_of_two_that_overlap_counts(tmp_path):
    # As a kill leaves them between the new partial's manifest and the end of the old one.
    write(tmp_path, ["a"], 1.0)
    write(tmp_path, ["a", "b"], 3.0)
    assert torch.equal(cover(tmp_path, "a", "b").total("m")["E"], torch.full((2, 3), 3.0))


def test_one_that_overlaps_with_any_of_the_larger_does_not_count(tmp_path):
    for blocks, value in ((["a"], 8.0), (["b", "c", "d"], 1.0), (["e", "f"], 2.0), (["d"], 4.0)):
        write(tmp_path, blocks, value)
    assert torch.equal(cover(tmp_path, *"abcdef").total("m")["E"], torch.full((2, 3), 11.0))


def test_what_was_not_published_does_not_count(tmp_path):
    folder = partials.new_folder(tmp_path, "a")
    save_tensors(part_file(folder, "m", 0), {"E": torch.ones(2, 3)})
    assert partials.read_disjoint(tmp_path) == []


def test_sums_by_other_bases_do_not_count(tmp_path):
    write(tmp_path, ["a", "b"], 1.0, inputs="other")
    write(tmp_path, ["a"], 2.0, inputs="these")
    assert partials.covered_blocks(partials.read_disjoint(tmp_path, "these")) == {"a"}
    assert partials.read_disjoint(tmp_path) == []


@pytest.mark.parametrize(
    ("written", "blocks", "message"),
    [
        ([["a"]], ["a", "b"], "block b is in 0 partial sums and belongs in 1"),
        ([["a"], ["b"]], ["a"], "block b is in 1 partial sums and belongs in 0"),
        ([["a", "b"], ["b", "c"]], ["a", "b", "c"], "block b is in 2 partial sums and belongs in 1"),
    ],
)
def test_overlapping_missing_and_foreign_blocks_are_refused(tmp_path, written, blocks, message):
    everything = [p for group in written for p in partials.read_disjoint(write(tmp_path / group[0], group, 1.0).parent)]
    with pytest.raises(UserError, match=message):
        Coverage(tuple(everything), frozenset(blocks))


@pytest.mark.parametrize("content", ["", "{", "[]", '{"blocks": ["a"]}', '{"parts": 3, "blocks": []}'])
def test_a_damaged_manifest_is_named(tmp_path, content):
    manifest = write(tmp_path, ["a"], 1.0) / partials.MANIFEST
    manifest.write_text(content)
    with pytest.raises(UserError, match=rf"^{manifest}: not .*; delete the folder {manifest.parent}, and run"):
        partials.read_disjoint(tmp_path)


def test_a_manifest_that_the_storage_does_not_give_is_not_called_damaged(tmp_path, monkeypatch):
    """Who deleted it as a damaged one would lose the work."""

    def fails(path, *_):
        raise UserError(f"{path}: cannot be read: Please reduce your request rate.")

    manifest = write(tmp_path, ["a"], 1.0) / partials.MANIFEST
    monkeypatch.setattr(partials, "read_json", fails)
    with pytest.raises(UserError, match=rf"^{manifest}: cannot be read: Please reduce your request rate\.$"):
        partials.read_disjoint(tmp_path)


def test_a_partial_that_is_replaced_while_it_is_read_is_not_there(tmp_path, monkeypatch):
    old, new = write(tmp_path, ["a"], 1.0), write(tmp_path, ["a", "b"], 3.0)
    read_json = partials.read_json

    def replaced(path, *how):
        shutil.rmtree(old, ignore_errors=True)
        return read_json(path, *how)

    monkeypatch.setattr(partials, "read_json", replaced)
    assert [partial.folder for partial in partials.read_disjoint(tmp_path)] == [new]


def test_a_damaged_or_missing_part_is_named(tmp_path):
    folder = write(tmp_path, ["a"], 1.0)
    part = part_file(folder, "m", 0)
    part.write_bytes(part.read_bytes()[:-5])
    with pytest.raises(UserError, match=rf"{part} is .*delete the folder {folder}"):
        cover(tmp_path, "a").total("m")
    part.unlink()
    with pytest.raises(UserError, match=rf"{part} is .*delete the folder {folder}"):
        cover(tmp_path, "a").total("m")


@pytest.mark.parametrize("wrong", ["partial", "rank", "part"])
def test_a_part_in_the_place_of_another_is_named(tmp_path, wrong):
    folder, other = write(tmp_path, ["a"], 1.0, ranks=2), write(tmp_path, ["b"], 2.0, ranks=2)
    place = part_file(folder, "m", 1)
    if wrong == "part":
        about = partials.part_metadata(folder, "another map", 1)
        save_tensors(place, {"E": torch.ones(2, 3)}, about)
    else:
        shutil.copy(part_file(other if wrong == "partial" else folder, "m", int(wrong == "partial")), place)
    with pytest.raises(
        UserError, match=rf"^{place} is in the wrong place: its {wrong} is .*delete the folder {folder}"
    ):
        cover(tmp_path, "a", "b").total("m")


def test_a_part_of_an_earlier_version_is_read(tmp_path):
    folder = write(tmp_path, ["a"], 1.0)
    save_tensors(part_file(folder, "m", 0), {"E": torch.ones(2, 3)}, {"part": "m"})
    assert torch.equal(cover(tmp_path, "a").total("m")["E"], torch.ones(2, 3))


@pytest.mark.parametrize("wrong", ["partial", "step", "stage"])
def test_a_partial_in_the_place_of_another_is_named(tmp_path, wrong):
    """Sums of another stage over the same maps have the same inputs."""
    step = tmp_path / "pretrain" / "covariance"
    folder = write(step, ["a"], 1.0)
    partials.publish(folder, [["m"]], [("a", outcome("a").counts)], None, stage="pretrain")
    assert len(partials.read_disjoint(step, stage="pretrain")) == 1
    moved = {
        "partial": step / "other-name",
        "step": step.with_name("correction") / folder.name,
        "stage": tmp_path / "tune" / "covariance" / folder.name,
    }[wrong]
    shutil.copytree(folder, moved)
    with pytest.raises(
        UserError, match=f"{moved}/manifest.json: in the wrong place: its {wrong} is .*; delete the fol"
    ):
        partials.read_disjoint(moved.parent, stage="tune" if wrong == "stage" else "pretrain")


def test_what_a_replica_keeps_of_a_block_has_nothing_of_each_document() -> None:
    few, many = ({f"document-{number}": 7 for number in range(count)} for count in (1, 10_000))
    sizes = [len(pickle.dumps(Outcome(tokens, (), 5).counts)) for tokens in (few, many)]
    assert sizes[1] < sizes[0] + 8
    assert Outcome(many, (), 5).counts == Counts(10_000, 70_000, 5, ())
