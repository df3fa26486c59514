"""Whether a file of a corpus is still what the run was checked with, on whichever node and however late it is read."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import xxhash

from msif_ray.corpus.files import CorpusFile
from msif_ray.errors import UserError
from msif_ray.paths import is_remote, listing, path_of, storage
from msif_ray.samples import not_here, samples

HASH_BYTES = 2**20


def content_files(path: Path) -> list[Path]:
    """The file itself, or those of a saved folder, without what `datasets` keeps of its own there."""
    if not path.is_dir():
        return [path]
    return [file for file in sorted(path.iterdir()) if file.is_file() and not file.name.startswith((".", "cache-"))]


def fingerprint(path: Path) -> str:
    """What changes when a file's content does, or that of a saved `datasets` folder.

    Local: a hash of the bytes. XXH3 is not cryptographic, and is not asked to be: whoever can write the corpus needs
    no collision. It is as fast as the disk, where SHA-256 takes a second per gigabyte. On object storage: sizes and
    etags (or times) of the listing. Raises UserError for what cannot be read.
    """
    digest = xxhash.xxh3_128()
    if is_remote(path):
        digest.update(repr(listing(path)).encode())
        return digest.hexdigest()
    with storage(path, "read"):
        for file in content_files(path):
            digest.update(f"{file.name}\0{file.stat().st_size}\0".encode(errors="surrogateescape"))
            with open(file, "rb", buffering=0) as content:
                while chunk := content.read(HASH_BYTES):
                    digest.update(chunk)
    return digest.hexdigest()


def content_of(file: CorpusFile) -> str:
    """The `fingerprint` of a file with its state, which it is part of where the file is on object storage."""
    return file.state[1] if file.state and is_remote(file.path) else fingerprint(path_of(file.path))


def state_of(file: CorpusFile, size: int | None = None) -> tuple[int, str]:
    """The bytes of a file and what tells its content from another one's: of a local file samples, of its first `size`
    bytes where that is given; of a saved folder those of all its files; on object storage its `fingerprint`.

    Raises UserError for what cannot be read.
    """
    if is_remote(file.path):
        return 0, fingerprint(path_of(file.path))
    digest, total = xxhash.xxh3_128(), 0
    with storage(file.path, "read"):
        for each in content_files(Path(file.path)):
            length = each.stat().st_size if size is None else size
            total += length
            digest.update(f"{each.name}\0{length}\0".encode(errors="surrogateescape"))
            for sample in samples(each, length):
                digest.update(sample)
    return total, digest.hexdigest()


class Watched:
    """A file while it is read, in blocks that `check` lets pass.

    On object storage the first look alone asks: what is replaced while it is open S3 gives no more of.
    """

    def __init__(self, file: CorpusFile, key: str) -> None:
        self._file, self._key = file, key
        self._stamps: list[tuple[int, ...]] | None = None
        self.check()

    def check(self) -> None:
        """Raises UserError, naming key and file, where it is no longer what was counted, or is not on this node. JSON
        lines may have been added to. Nothing is read again where nobody has written."""
        if self._file.state is None:
            return
        if not is_remote(self._file.path) and not os.path.exists(self._file.path):
            raise UserError(f"{self._key}.path: {not_here(self._file.path)}")
        stamps = list(self._now())
        if stamps == self._stamps:
            return
        size = self._file.state[0] if self._file.kind == "jsonl" else None
        if state_of(self._file, size) != self._file.state:
            raise UserError(
                f"{self._key}.path: {self._file.path} has changed since the run was checked, or is another one on "
                f"{socket.gethostname()}; put it back as it was and run the same command again, or name a new run_dir"
            )
        self._stamps = stamps

    def _now(self) -> Iterator[tuple[int, ...]]:
        if is_remote(self._file.path):
            return
        with storage(f"{self._key}.path: {self._file.path}", "read"):
            for each in content_files(path_of(self._file.path)):
                about = each.stat()
                yield about.st_ino, about.st_mtime_ns, about.st_size
