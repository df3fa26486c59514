"""What a process takes: the resident memory of a process on the CPU, or the memory of its GPU."""

from contextlib import suppress
from pathlib import Path

import torch

from msif_ray import heap

# Bytes of the process that hands a replica its blocks while they are scored: Ray's own and Ray Data's libraries,
# whatever the model. 199 MiB was found (Ray 2.60).
HAND_MEMORY = 200 * 2**20

STATUS = Path("/proc/self/status")
PEAK_RESET = Path("/proc/self/clear_refs")


def resident_peak(pid: int | str = "self") -> int:
    """The most bytes that a process had resident so far (VmHWM): its own memory and the file pages it maps."""
    return 1024 * _kilobytes(Path(f"/proc/{pid}/status"), "VmHWM")


def _kilobytes(file: Path, field: str) -> int:
    for line in file.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0])
    raise RuntimeError(f"{file} has no {field}")


class Gauge:
    """The memory that decides on a device: resident bytes of this process, or of its GPU with its context."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"

    def now(self) -> int:
        if self._cuda:
            return torch.cuda.memory_allocated() + self._context()
        return 1024 * _kilobytes(STATUS, "VmRSS")

    def peak(self) -> int:
        """The most since `reset`, or since the process began where the kernel does not let it be reset."""
        if self._cuda:
            return torch.cuda.max_memory_allocated() + self._context()
        return resident_peak()

    def reset(self) -> None:
        """Gives freed memory back, and begins a new peak."""
        if self._cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            return
        heap.trim()
        with suppress(OSError):
            PEAK_RESET.write_text("5")

    def _context(self) -> int:
        """What the GPU holds beside PyTorch's tensors: the context, its kernels, and other processes."""
        free, total = torch.cuda.mem_get_info()
        return total - free - torch.cuda.memory_reserved()
