"""The Parquet that a run leaves: written so that every reader of Parquet takes it, and damage said in one line.

Pages have Parquet's own checksums. The footer has none there, and pyarrow takes one with a flipped bit for another
table, or ends the process: ours is between the last page and the footer, where no reader looks.
"""

import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from msif_ray.errors import DamagedError, UserError
from msif_ray.paths import exists, path_of, storage
from msif_ray.store import replacing

AGAIN = "delete it, and run `msif run` again"
# What a footer's checksum (CRC-32) begins with; a footer ends with its own length and the mark of Parquet.
SEAL = b"crc="
_SEAL_BYTES, _END_BYTES = len(SEAL) + 4, 8
# What pyarrow reads of a file at first: of a remote one that is then at hand.
_TAIL_BYTES = 2**16

FINISH = "finish the run with `msif run`"


def table_path(run_dir: str | Path, name: str) -> Path:
    """The path of a table that a run ends with. Raises UserError where it is not there yet."""
    path = path_of(run_dir) / name
    if not exists(path):
        raise UserError(f"{run_dir}: no {name} there yet; {FINISH}")
    return path


@contextmanager
def opened(path: Path, fault: str = f"damaged; {AGAIN}") -> Iterator[pq.ParquetFile]:
    """A file to be read. Raises DamagedError, `path: fault`, where it is not Parquet, is not whole, or has not what is
    looked for while it is open."""
    with storage(path, "read"), path.open("rb") as raw:
        try:
            _check_seal(raw)
            with pq.ParquetFile(raw, page_checksum_verification=True) as file:
                yield file
        except OSError as error:
            # Parquet's own complaints are OSErrors too; the system's have a number.
            if error.errno is not None:
                raise
            raise DamagedError(f"{path}: {fault}") from None
        except (pa.ArrowException, KeyError, TypeError, ValueError):
            raise DamagedError(f"{path}: {fault}") from None


def read_table(path: Path, columns: Sequence[str], about: Mapping[str, str] | None = None) -> pa.Table:
    """Some columns of a whole table. Raises UserError as `opened` and `check_place`, and where one of them is not
    there."""
    with opened(path) as file:
        check_place(path, file, about or {}, AGAIN)
        if not set(columns) <= set(file.schema_arrow.names):
            raise other_version(path)
        return file.read(columns=list(columns))


def check_place(path: Path, file: pq.ParquetFile, about: Mapping[str, str], mend: str) -> None:
    """Raises DamagedError, saying how to `mend` it, for a table that was written as another: its metadata say of a key
    of `about` what is not wanted. One of an earlier version may say nothing."""
    said = file.schema_arrow.metadata or {}
    for key, wanted in about.items():
        found = said.get(key.encode(), wanted.encode()).decode()
        if found != wanted:
            raise DamagedError(f"{path}: in the wrong place: its {key} is {found}, not {wanted}; {mend}")


def other_version(path: Path) -> UserError:
    """What is said of a table with other columns."""
    return UserError(f"{path}: of another version; {AGAIN}")


def write_table(path: str | Path, table: pa.Table) -> None:
    """Writes a whole table, in row groups none of which is empty: `datasets` fails on one of no rows, where a file
    without any row group is read, by it and by all others, as no rows of its columns."""
    with writing(path, table.schema) as writer:
        if len(table):
            writer.write_table(table)


@contextmanager
def writing(path: str | Path, schema: pa.Schema, **options: Any) -> Iterator[pq.ParquetWriter]:
    """Writes a table bit by bit, with checksums of its pages and of its footer; `options` are the writer's."""
    with replacing(path) as temporary:
        with pq.ParquetWriter(temporary, schema, write_page_checksum=True, **options) as writer:
            yield writer
        with open(temporary, "r+b") as file:
            footer = _last(file, _footer_bytes(_last(file, _END_BYTES)))
            file.seek(-len(footer), os.SEEK_END)
            file.write(SEAL + zlib.crc32(footer).to_bytes(4, "little") + footer)


def _footer_bytes(end: bytes) -> int:
    """The length of a footer to the end of its file, as the file's last bytes say."""
    return int.from_bytes(end[-_END_BYTES:][:4], "little") + _END_BYTES


def _check_seal(file: BinaryIO) -> None:
    """Raises ValueError for a footer that does not fit its checksum; those of earlier versions have none."""
    size = file.seek(0, os.SEEK_END)
    tail = _last(file, min(size, _TAIL_BYTES))
    length = _footer_bytes(tail) + _SEAL_BYTES
    if size < length:
        return  # no Parquet at all, as its reader will say
    sealed = tail[-length:] if length <= len(tail) else _last(file, length)
    checksum, footer = sealed[len(SEAL) : _SEAL_BYTES], sealed[_SEAL_BYTES:]
    if sealed.startswith(SEAL) and zlib.crc32(footer).to_bytes(4, "little") != checksum:
        raise ValueError("the footer does not fit its checksum")
    file.seek(0)


def _last(file: BinaryIO, count: int) -> bytes:
    file.seek(-count, os.SEEK_END)
    return file.read()
