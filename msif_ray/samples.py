"""What tells a local file from another one without a pass over it, on whichever node it is looked at."""

import socket
from collections.abc import Iterator
from pathlib import Path

from msif_ray.errors import UserError

# Parts of so many bytes, evenly spread.
SAMPLES, SAMPLE_BYTES = 16, 4096


def samples(path: Path, size: int) -> Iterator[bytes]:
    """Parts of a file's first `size` bytes, all of which a small one is. Of contents and not of times, which differ
    between nodes' copies."""
    with open(path, "rb", buffering=0) as file:
        for sample in range(SAMPLES):
            file.seek(size * sample // SAMPLES)
            yield file.read(min(SAMPLE_BYTES, size - file.tell()))


def not_here(path: str) -> UserError:
    """What is said where a node has not what the run was checked with."""
    return UserError(
        f"{path}: not there on {socket.gethostname()}; every node reads it, so put it where all of them have it under "
        "this path, such as a shared disk, or on object storage"
    )
