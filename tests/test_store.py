"""Files are whole or absent, whatever happens while they are written."""

import math
from pathlib import Path

import pytest
import torch

from msif_ray import store
from msif_ray.errors import UserError


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
    assert store.load_metadata(tmp_path / "t.safetensors") == {"about": "test"}


def test_faults_of_the_storage_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("{")
    with pytest.raises(UserError, match=r"file: not whole JSON"):
        store.read_json(tmp_path / "file")
    with pytest.raises(UserError, match=r"inside: cannot be written: (Not a directory|File exists)"):
        store.write_atomic(tmp_path / "file" / "inside", b"")
