"""Files that are whole or absent, on local disk and on object storage, and that say when they are damaged.

On disk: a temporary name in the same folder, then a rename. On object storage: a local temporary file, then one
put, which is atomic there.
"""

import glob
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
import uuid
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from msif_ray.errors import DamagedError, UserError
from msif_ray.paths import filesystem, is_remote, listing, path_of, storage
from msif_ray.shapes import misfit
from msif_ray.tensorfile import TensorFile, with_checksums

# Under which a JSON object has the checksum of all else in it: a digit that is flipped is a digit still.
CHECKSUM = "crc32"

AGAIN = "delete it, and run the same command again"

_LEFTOVER = re.compile(r"\..+\.[0-9a-f]{32}\.tmp")
LEFTOVER_SECONDS = 3600.0


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A local temporary path to write, which becomes `path` when the block ends without an exception.

    The temporary name begins with a dot and ends in `.tmp`, so no reader's glob takes it for a result.
    Raises UserError when the folder or the file cannot be written.
    """
    path = path_of(path)
    with (_upload if is_remote(path) else _rename)(path) as temporary:
        yield temporary


@contextmanager
def _rename(path: Path) -> Iterator[Path]:
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex}.tmp"
    with storage(path, "written"):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            _flush(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def _upload(path: Path) -> Iterator[Path]:
    with _local_folder(path) as folder:
        temporary = folder / f".{path.name}.tmp"
        with storage(f"{path} (its temporary file in {folder.parent}; TMPDIR names another folder)", "written"):
            yield temporary
        files, name = filesystem(path)
        with storage(path, "written"):
            files.put_file(str(temporary), name)


@contextmanager
def _local_folder(path: Path) -> Iterator[Path]:
    with storage(f"{path}: a temporary folder in {tempfile.gettempdir()}", "made"):
        folder = tempfile.TemporaryDirectory(prefix="msif-ray-")
    with folder as name:
        yield Path(name)


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


def delete_folder(folder: Path, first: str | None = None) -> None:
    """Deletes a folder and all in it, where it is there; the file named `first` before any other."""
    if first is not None:
        delete(folder / first)
    with storage(folder, "deleted"):
        if is_remote(folder):
            _delete_objects(folder)
        else:
            shutil.rmtree(folder, ignore_errors=not folder.exists())


def _delete_objects(folder: Path) -> None:
    """Deletes every object under a remote folder. Many by one request, of which s3fs does not say what it has left;
    each of that by its own name, which raises. So are names with `*`, `?` or `[` in them: fsspec's `rm` takes one for a
    pattern, and would delete what matches."""
    files, root = filesystem(folder)

    def names() -> list[str]:
        return [f"{root.rstrip('/')}/{below}" for below, _, _ in listing(folder)]

    plain = [name for name in names() if glob.escape(name) == name]
    with suppress(FileNotFoundError):  # another process deletes them, too
        if plain:
            files.rm(plain)
    for name in names():
        _delete_object(files, name)


def _delete_object(files: Any, name: str) -> None:
    with suppress(FileNotFoundError):
        files.rm_file(name)


def write_json(path: str | Path, value: Any) -> None:
    """Writes `value` as indented JSON, an object with a checksum, whose key no object of ours may have itself. Raises
    ValueError for a number that JSON cannot hold (NaN, infinity)."""
    if isinstance(value, dict):
        value = value | {CHECKSUM: _json_checksum(value)}
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    write_atomic(path, (text + "\n").encode("utf-8"))


def read_json(path: str | Path, mend: str = AGAIN, shape: Any = None, about: Mapping[str, Any] | None = None) -> Any:
    """What `write_json` wrote; one of an earlier version has no checksum.

    Raises DamagedError, which says how to `mend` it, for a file that is not whole JSON, does not fit its checksum, has
    not the `shape` of `shapes.misfit`, or says of a key of `about` what is not wanted, as one that was written as
    another; one of an earlier version may say nothing. Raises UserError for a storage that cannot be read.
    """
    with storage(path, "read"):
        data = path_of(path).read_bytes()
    try:
        found = json.loads(data)
    except ValueError as error:
        fault = " ".join(str(error).split())
        raise DamagedError(f"{path}: not whole JSON: {fault}; {mend}") from None
    if isinstance(found, dict) and CHECKSUM in found and found.pop(CHECKSUM) != _json_checksum(found):
        raise DamagedError(f"{path}: damaged: it does not fit its checksum; {mend}")
    if shape is not None and (at := misfit(found, shape)) is not None:
        raise DamagedError(f"{path}: not as this version writes it{f': see {at}' if at else ''}; {mend}")
    for key, wanted in (about or {}).items():
        if found.get(key, wanted) != wanted:
            raise DamagedError(f"{path}: in the wrong place: its {key} is {found[key]}, not {wanted}; {mend}")
    return found


def _json_checksum(value: Any) -> int:
    """Of what a reader finds, whatever the order of keys and their types here."""
    found = json.loads(json.dumps(value))
    return zlib.crc32(json.dumps(found, sort_keys=True).encode())


def json_hash(value: Any) -> str:
    """A hash of what JSON says, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def delete(path: str | Path) -> None:
    """Deletes a file that may be gone already. Raises UserError when the storage does not let it."""
    with storage(path, "deleted"):
        path = path_of(path)
        if is_remote(path):
            _delete_object(*filesystem(path))  # UPath's `unlink` takes a name for a pattern, as `rm` does
        else:
            path.unlink(missing_ok=True)


def save_tensors(
    path: str | Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes tensors, of any device and layout, as safetensors with the given metadata and their checksums."""
    separate = _separate(tensors)
    with replacing(path) as temporary:
        try:
            save_file(separate, str(temporary), with_checksums(separate, metadata or {}))
        except SafetensorError as error:  # which is what a full disk raises there
            raise OSError(_system_message(error)) from None


def _system_message(error: SafetensorError) -> str:
    """`No space left on device` out of safetensors' rendering of the system's error."""
    message = re.search(r"I/O error: (.+) \(os error", str(error))
    return message[1] if message else str(error)


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


def load_tensors(
    path: str | Path,
    part_of: Path | None = None,
    about: Mapping[str, str] | None = None,
    wanted: Sequence[str] = (),
) -> dict[str, torch.Tensor]:
    """All tensors of a file of `save_tensors`, on the CPU; those `wanted` among them.

    Raises UserError for a file that cannot be read, is not whole, does not fit its checksums, lacks a tensor, or was
    written as another, as its metadata say that are named in `about`. Then what is to be deleted is the file, or the
    folder that is worthless without it.
    """
    with damage_to_mend("it" if part_of is None else f"the folder {part_of}"):
        file = TensorFile(path_of(path), about)
        return {name: file.tensor(name) for name in dict.fromkeys([*file.names, *wanted])}


def checksums(path: str | Path) -> dict[str, int]:
    """Each tensor's checksum, as its file's header has it. Raises UserError as `load_tensors` does."""
    with damage_to_mend("it"):
        return TensorFile(path_of(path)).checksums


@contextmanager
def damage_to_mend(what: str) -> Iterator[None]:
    """Says what to delete for a file that is found to be damaged. Raises UserError."""
    try:
        yield
    except DamagedError as error:
        raise UserError(f"{error}; delete {what}, and run the same command again") from None


def sweep(folder: str | Path) -> None:
    """Removes what killed processes left half-written under a local folder an hour ago or earlier.

    Object storage has no such files: what was not put whole was not put.
    """
    folder = path_of(folder)
    if is_remote(folder):
        return
    latest = time.time() - LEFTOVER_SECONDS
    with storage(folder, "swept of half-written files"):
        for path in folder.rglob(".*.tmp"):
            try:
                if _LEFTOVER.fullmatch(path.name) and path.stat().st_mtime < latest:
                    path.unlink()
            except FileNotFoundError:  # another process sweeps too, or finished its file
                continue
