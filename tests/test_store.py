"""Files are whole or absent, whatever happens while they are written."""

import errno
import json
import math
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from msif_ray import store
from msif_ray.errors import UserError
from msif_ray.tensorfile import TensorFile


def test_bytes_and_json_come_back_and_leave_nothing_else(tmp_path: Path) -> None:
    store.write_atomic(tmp_path / "deep" / "file", b"old")
    store.write_atomic(tmp_path / "deep" / "file", b"new")
    store.write_json(tmp_path / "deep" / "value.json", {"name": "Köln", "values": [1, 2.5, None]})
    assert (tmp_path / "deep" / "file").read_bytes() == b"new"
    assert store.read_json(tmp_path / "deep" / "value.json") == {"name": "Köln", "values": [1, 2.5, None]}
    assert sorted(path.name for path in (tmp_path / "deep").iterdir()) == ["file", "value.json"]


def test_an_interrupted_write_keeps_the_old_file_and_no_temporary_one(tmp_path: Path) -> None:
    path = tmp_path / "file"
    store.write_atomic(path, b"old")

    def interrupted() -> None:
        with store.replacing(path) as temporary:
            temporary.write_bytes(b"half")
            assert temporary.parent == tmp_path and temporary.name.startswith(".")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_json_that_other_readers_refuse_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        store.write_json(tmp_path / "value.json", {"value": math.nan})
    assert not list(tmp_path.iterdir())


def test_tensors_in_any_layout_and_their_metadata_come_back(tmp_path: Path) -> None:
    square = torch.arange(6.0, dtype=torch.float64).reshape(2, 3)
    tensors = {"whole": square, "same": square, "transposed": square.T, "row": square[1], "empty": torch.empty(0, 3)}
    store.save_tensors(tmp_path / "t.safetensors", tensors, {"about": "test"})
    loaded = store.load_tensors(tmp_path / "t.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor)
    assert TensorFile(tmp_path / "t.safetensors").metadata == {"about": "test"}


def test_faults_of_the_storage_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("{")
    with pytest.raises(UserError, match=r"file: not whole JSON"):
        store.read_json(tmp_path / "file")
    with pytest.raises(UserError, match=r"inside: cannot be written: (Not a directory|File exists)"):
        store.write_atomic(tmp_path / "file" / "inside", b"")


@pytest.fixture
def tensors_file(tmp_path: Path) -> Path:
    path = tmp_path / "t.safetensors"
    store.save_tensors(path, {"a": torch.tensor([1.5, -2.0]), "b": torch.tensor([[3, 4]])}, {"about": "[1, 2]"})
    return path


def test_a_flipped_bit_of_json_is_noticed_or_changes_nothing(tmp_path: Path) -> None:
    """A digit that is flipped is a digit still: without a checksum such a file says another number."""
    path, value = tmp_path / "a.json", {"documents": 256, "maps": {"m": [1.25e-07, "Köln", None]}, 7: 1}
    store.write_json(path, value)
    whole, found = path.read_bytes(), json.loads(json.dumps(value))
    assert json.loads(whole).items() > found.items()  # an object like any other to who reads it
    for place, bit in product(range(len(whole)), range(3)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
        try:
            assert store.read_json(path).items() >= found.items()  # what is flipped is the checksum's own name
        except UserError as error:
            assert str(error).startswith(f"{path}: ") and "; delete it, and run the same command again" in str(error)
    path.write_text(json.dumps(found))  # of an earlier version
    assert store.read_json(path) == found


def test_other_readers_read_the_same_file(tensors_file: Path) -> None:
    assert load_file(tensors_file)["a"].tolist() == [1.5, -2.0]
    assert len({value.data_ptr() for value in store.load_tensors(tensors_file).values()}) == 2


def test_a_flipped_bit_anywhere_is_noticed(tensors_file: Path) -> None:
    whole = tensors_file.read_bytes()
    for place in range(len(whole)):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << place % 8
        tensors_file.write_bytes(flipped)
        with pytest.raises(UserError, match=r"t\.safetensors is .*; delete it, and run the same command again"):
            store.load_tensors(tensors_file)


SPOILT: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda whole: b"",
    "cut in the tensors": lambda whole: whole[:-1],
    "cut in the header": lambda whole: whole[:40],
    "longer": lambda whole: whole + b"x",
    "garbage": lambda whole: b"garbage" * 100,
    "an endless header": lambda whole: b"\xff" * 8 + whole[8:],
    "a deep header": lambda whole: (2**20).to_bytes(8, "little") + b"[" * 2**20,
}


@pytest.mark.parametrize("fault", SPOILT)
def test_a_file_that_is_not_whole_is_named(tensors_file: Path, fault: str) -> None:
    tensors_file.write_bytes(SPOILT[fault](tensors_file.read_bytes()))
    with pytest.raises(UserError, match=r"t\.safetensors is not whole .*; delete it") as error:
        store.load_tensors(tensors_file)
    assert "\n" not in str(error.value)


def test_a_file_of_another_program_has_no_checksums(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "t.safetensors")
    with pytest.raises(UserError, match="not whole safetensors with checksums"):
        store.load_tensors(tmp_path / "t.safetensors")
    with pytest.raises(UserError, match=r"none\.safetensors is not there"):
        store.load_tensors(tmp_path / "none.safetensors")


def test_json_and_tensors_that_were_written_as_another_are_named(tmp_path: Path, tensors_file: Path) -> None:
    path = tmp_path / "a.json"
    store.write_json(path, {"stage": "tune", "maps": {}})
    assert (
        store.read_json(path, shape=dict[str, dict[str, int] | str], about={"stage": "tune", "unsaid": "x"})["maps"]
        == {}
    )
    with pytest.raises(UserError, match=rf"^{path}: in the wrong place: its stage is tune, not pretrain; mend it$"):
        store.read_json(path, "mend it", dict, {"stage": "pretrain"})
    with pytest.raises(UserError, match=rf"^{path}: not as this version writes it: see maps; mend it$"):
        store.read_json(path, "mend it", dict[str, str])
    assert store.load_tensors(tensors_file, about={"unsaid": "x"}, wanted=["a"]).keys() == {"a", "b"}
    with pytest.raises(
        UserError, match=rf"^{tensors_file} is in the wrong place: its about is \[1, 2\], not x; delete"
    ):
        store.load_tensors(tensors_file, about={"about": "x"})
    with pytest.raises(UserError, match=rf"^{tensors_file} is in the wrong place: it has no tensor c; delete it"):
        store.load_tensors(tensors_file, wanted=["c"])


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB; only root may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("no file system can be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_said_and_nothing_is_left(full_disk: Path) -> None:
    def table() -> None:
        with store.replacing(full_disk / "x") as temporary:
            pq.write_table(pa.table({"a": list(range(100_000))}), temporary)

    for write in (
        table,
        lambda: store.write_atomic(full_disk / "x", b"0" * 100_000),
        lambda: store.save_tensors(full_disk / "x", {"a": torch.ones(100_000)}),
    ):
        with pytest.raises(UserError, match=r"disk/x: cannot be written: .*No space left on device") as error:
            write()
        assert "\n" not in str(error.value) and not list(full_disk.iterdir())


def test_a_full_disk_while_a_write_is_finished_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"file: cannot be written: No space left on device"):
        store.write_atomic(tmp_path / "file", b"1")
    assert not list(tmp_path.iterdir())


def test_only_old_files_of_killed_writers_are_swept(tmp_path: Path) -> None:
    with store.replacing(tmp_path / "deep" / "a.json") as temporary:
        temporary.write_bytes(b"1")
        name = temporary.name
    old = time.time() - 2 * store.LEFTOVER_SECONDS
    kept = {"new": name.replace("a.json", "b.json"), "foreign": ".a.json.tmp", "result": "c.json"}
    for file in (name, *kept.values()):
        (tmp_path / "deep" / file).write_bytes(b"half")
        if file != kept["new"]:
            os.utime(tmp_path / "deep" / file, (old, old))
    store.sweep(tmp_path)
    assert {path.name for path in (tmp_path / "deep").iterdir()} == {"a.json", *kept.values()}
    store.sweep(tmp_path / "none")
