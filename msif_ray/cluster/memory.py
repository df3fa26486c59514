"""What a process may still take of its device's memory."""

import ctypes
import os
from contextlib import suppress

import psutil
import torch


def free_memory(device: torch.device, threads: int) -> int:
    """Bytes that a rank may still take: of its GPU, or the share of its threads in what its node has available."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    share = threads / (os.cpu_count() or 1)
    return int(psutil.virtual_memory().available * min(1.0, share))


def give_back_at_once(size: int = 2**20) -> None:
    """Makes freed pieces of `size` bytes and more go back to the system, where this process uses glibc.

    It keeps pieces of up to 32 MiB otherwise once it has seen some freed, and what is read and dropped all the time
    then takes up to twice its size.
    """
    with suppress(AttributeError):
        ctypes.CDLL(None).mallopt(-3, size)  # M_MMAP_THRESHOLD
