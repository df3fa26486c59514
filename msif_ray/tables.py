"""The Parquet that a run leaves: written so that every reader of Parquet takes it, and damage said in one line."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from msif_ray.errors import DamagedError, UserError
from msif_ray.paths import exists, path_of, storage
from msif_ray.store import replacing

AGAIN = "delete it, and run `msif run` again"
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
            with pq.ParquetFile(raw, page_checksum_verification=True) as file:
                yield file
        except OSError as error:
            # Parquet's own complaints are OSErrors too; the system's have a number.
            if error.errno is not None:
                raise
            raise DamagedError(f"{path}: {fault}") from None
        except (pa.ArrowException, KeyError, TypeError, ValueError):
            raise DamagedError(f"{path}: {fault}") from None


def read_table(path: Path, columns: Sequence[str]) -> pa.Table:
    """Some columns of a whole table. Raises UserError as `opened`, and where one of them is not there."""
    with opened(path) as file:
        if not set(columns) <= set(file.schema_arrow.names):
            raise other_version(path)
        return file.read(columns=list(columns))


def other_version(path: Path) -> UserError:
    """What is said of a table with other columns."""
    return UserError(f"{path}: of another version; {AGAIN}")


def write_table(path: str | Path, table: pa.Table) -> None:
    """Writes a whole table, in row groups none of which is empty: `datasets` fails on one of no rows, where a file
    without any row group is read, by it and by all others, as no rows of its columns."""
    with replacing(path) as temporary, pq.ParquetWriter(temporary, table.schema, write_page_checksum=True) as writer:
        if len(table):
            writer.write_table(table)
