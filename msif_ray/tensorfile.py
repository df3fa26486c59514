"""Safetensors files with a checksum of every tensor, read by ranges: one tensor of many costs its own bytes.

The checksums (CRC-32) cover a tensor's bytes, name, dtype and shape, and the file's other metadata, so that no
flipped bit goes unnoticed. They are in the metadata under one key; the file is plain safetensors to other readers.
"""

import json
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from msif_ray.errors import DamagedError
from msif_ray.paths import filesystem, is_remote, storage

CHECKSUMS = "crc32"
_PREFIX = 8  # bytes of the little-endian length of the header
_LONGEST_HEADER = 100 * 2**20  # safetensors' own limit
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def with_checksums(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """The metadata and the checksums of contiguous CPU tensors, to be written with them."""
    sums = {"metadata": _of_metadata(metadata), "tensors": {name: _of_tensor(name, t) for name, t in tensors.items()}}
    return dict(metadata) | {CHECKSUMS: json.dumps(sums)}


def _of_metadata(metadata: Mapping[str, str]) -> int:
    return zlib.crc32(json.dumps(dict(metadata), sort_keys=True).encode())


def _of_tensor(name: str, tensor: Tensor) -> int:
    about = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
    return zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, about) if tensor.numel() else about


@dataclass(frozen=True)
class _Entry:
    """Where a tensor is: its type and shape, and the first and the last byte (exclusive) in the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


class TensorFile:
    """A file of `save_tensors` on local disk or object storage; `about` is what its metadata are to say.

    Raises DamagedError, here and in `tensor`, for a file that is missing, cut short, fails its checksums or was written
    as another, and UserError for a storage that cannot be read.
    """

    def __init__(self, path: Path, about: Mapping[str, str] | None = None) -> None:
        self.path = path
        with storage(path, "read"):
            self._size = self._length()
        try:
            self._entries, metadata = self._header()
            checksums = json.loads(metadata.pop(CHECKSUMS))
            self.checksums: dict[str, int] = dict(checksums["tensors"])
            whole = checksums["metadata"] == _of_metadata(metadata) and self.checksums.keys() == self._entries.keys()
        except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
            raise self._damaged("is not whole safetensors with checksums") from None
        if not whole:
            raise self._damaged("is damaged: its header does not fit its checksum")
        self.metadata: dict[str, str] = metadata
        for key, wanted in (about or {}).items():
            self.check(key, wanted)

    @property
    def names(self) -> list[str]:
        return list(self._entries)

    def check(self, key: str, wanted: str) -> None:
        """Raises DamagedError for a file that was written as another: its metadata say of `key` what is not `wanted`.
        One of an earlier version may say nothing."""
        found = self.metadata.get(key, wanted)
        if found != wanted:
            raise self._damaged(f"is in the wrong place: its {key} is {found}, not {wanted}")

    def tensor(self, name: str, verify: bool = True) -> Tensor:
        """One tensor, on the CPU, in memory of its own; without `verify` its checksum is not compared."""
        entry = self._entries.get(name)
        if entry is None:
            raise self._damaged(f"is in the wrong place: it has no tensor {name}")
        with storage(self.path, "read"):
            content = self._read(entry.start, entry.stop)
        if len(content) != entry.stop - entry.start:
            raise self._damaged("is cut short")
        tensor = torch.frombuffer(content, dtype=entry.dtype) if content else torch.empty(0, dtype=entry.dtype)
        tensor = tensor.reshape(entry.shape)
        if verify and _of_tensor(name, tensor) != self.checksums[name]:
            raise self._damaged(f"is damaged: the tensor {name} does not fit its checksum")
        return tensor

    def _header(self) -> tuple[dict[str, _Entry], dict[str, str]]:
        """The tensors' places and the metadata. Raises ValueError and the like for what is no header."""
        if self._size < _PREFIX:  # of an empty object, S3 would not have the range
            raise ValueError("the file is shorter than its header")
        length = int.from_bytes(self._read(0, _PREFIX), "little")
        start = _PREFIX + length
        if not 0 < length <= min(_LONGEST_HEADER, self._size - _PREFIX):
            raise ValueError("the header is longer than the file")
        described = json.loads(self._read(_PREFIX, start))
        metadata = described.pop("__metadata__")
        entries = {name: _entry(about, start) for name, about in described.items()}
        if max((entry.stop for entry in entries.values()), default=start) != self._size:
            raise ValueError("the file is shorter or longer than its tensors")
        return entries, metadata

    def _length(self) -> int:
        try:
            return int(self.path.stat().st_size)
        except FileNotFoundError:
            raise self._damaged("is not there") from None

    def _read(self, start: int, stop: int) -> bytearray:
        with storage(self.path, "read"):
            if is_remote(self.path):
                files, name = filesystem(self.path)
                return bytearray(files.cat_file(name, start=start, end=stop) if stop > start else b"")
            with open(self.path, "rb", buffering=0) as file:
                file.seek(start)
                return _read_into(file, stop - start)

    def _damaged(self, what: str) -> DamagedError:
        return DamagedError(f"{self.path} {what}")


def _read_into(file: Any, size: int) -> bytearray:
    """Up to `size` bytes; one read of a system gives at most 2 GiB."""
    content = bytearray(size)
    view, done = memoryview(content), 0
    while done < size and (count := file.readinto(view[done:])):
        done += count
    view.release()
    del content[done:]
    return content


def _entry(about: dict[str, Any], base: int) -> _Entry:
    dtype, shape = _DTYPES[about["dtype"]], tuple(about["shape"])
    start, stop = (base + offset for offset in about["data_offsets"])
    if not base <= start <= stop or stop - start != math.prod(shape) * dtype.itemsize:
        raise ValueError("a tensor's place does not fit its shape")
    return _Entry(dtype, shape, start, stop)
