"""What the C library of a process that computes on a CPU does with freed memory. Libraries other than glibc stay as
they are."""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4  # of <malloc.h>
_LARGEST = 32 * 2**20  # what glibc lets M_MMAP_THRESHOLD be
_USUAL_MAPPINGS = 65536

# What a process that computes is to be started with, for all its threads: Ray Data calls a replica in a thread that is
# not the main one, whose own arena gives back everything over 64 MiB. A pass there took 1.42 s, with one arena for all
# threads 1.20, and with huge pages, too, 0.95.
ENVIRONMENT = {
    "GLIBC_TUNABLES": "glibc.malloc.arena_max=1:glibc.malloc.hugetlb=1",
    # Of oneDNN's products (`influence/onednn.py`), by shape: a model has some 50 for batches of one length. By default
    # it keeps 1,024, which batches of other lengths fill in the end.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "256",
}


@contextmanager
def environment() -> Iterator[None]:
    """`ENVIRONMENT` for processes that are started meanwhile; this one's own is as it was afterwards."""
    before = {name: os.environ.get(name) for name in ENVIRONMENT}
    os.environ |= ENVIRONMENT
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            os.environ |= {} if value is None else {name: value}


def keep_freed_memory() -> None:
    """Lets this process keep what it frees, up to 2 GiB, for what it allocates next.

    By default glibc gives large tensors back to the system, whose fresh pages cost a pass over a batch a sixth of its
    time; those over 32 MiB whatever the threshold, unless no block may be a mapping of its own.
    """
    _set(_M_MMAP_MAX, 0)
    _set(_M_MMAP_THRESHOLD, _LARGEST)
    _set(_M_TRIM_THRESHOLD, 2**31 - 1)


def give_back_freed_memory() -> None:
    """Makes freed pieces of 1 MiB and more go back to the system: what is read and dropped all the time would else
    take up to twice its size."""
    _set(_M_MMAP_MAX, _USUAL_MAPPINGS)
    _set(_M_MMAP_THRESHOLD, 2**20)
    _set(_M_TRIM_THRESHOLD, 2**20)


def trim() -> None:
    """Gives back all that is free now."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def _set(threshold: int, size: int) -> None:
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(threshold, size)
