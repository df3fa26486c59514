"""Files that are whole or absent: a temporary name in the same folder, then a rename."""

import json
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from msif_ray.errors import UserError


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary path to write, which becomes `path` when the block ends without an exception.

    The temporary name begins with a dot and ends in `.tmp`, so no reader's glob takes it for a result.
    Raises UserError when the folder or the file cannot be written.
    """
    path = Path(path)
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex}.tmp"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            _flush(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from None


def _flush(path: Path) -> None:
    """To the disk before the rename, or a crash of the machine could leave an empty file of the final name."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: str | Path, data: bytes) -> None:
    """Writes `data` to `path`, making its folders."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def write_json(path: str | Path, value: Any) -> None:
    """Writes `value` as indented JSON. Raises ValueError for a number that JSON cannot hold (NaN, infinity)."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    write_atomic(path, (text + "\n").encode("utf-8"))


def read_json(path: str | Path) -> Any:
    """What `write_json` wrote. Raises UserError for a file that is not whole JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not whole JSON: {' '.join(str(error).split())}") from None


def save_tensors(
    path: str | Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes tensors, of any device and layout, as safetensors with the given metadata."""
    with replacing(path) as temporary:
        save_file(_separate(tensors), str(temporary), dict(metadata or {}))


def _separate(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """On the CPU, contiguous, and none in another's memory, which safetensors refuses."""
    seen: set[int] = set()
    separate: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        own = tensor.detach().cpu().contiguous()
        if own.untyped_storage().data_ptr() in seen:
            own = own.clone()
        seen.add(own.untyped_storage().data_ptr())
        separate[name] = own
    return separate


def load_tensors(path: str | Path) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file, on the CPU."""
    return load_file(str(path))


def load_metadata(path: str | Path) -> dict[str, str]:
    """A safetensors file's metadata, without reading its tensors."""
    with safe_open(str(path), framework="pt") as file:
        return dict(file.metadata() or {})
