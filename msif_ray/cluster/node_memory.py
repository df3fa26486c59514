"""What this process may still take of its node's memory: the machine's, within what its container is limited to."""

from collections.abc import Iterator
from pathlib import Path

MEMORY = Path("/proc/meminfo")
CGROUPS = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")


def available_memory() -> int:
    """Bytes that can be taken without swapping, and without the container's limit ending a process."""
    return min([_of_machine(), *_left_of_limits()])


def _of_machine() -> int:
    """By the kernel's own estimate, in kibibytes there. Read here: the benchmark is to run without psutil."""
    lines = dict(line.split(":", 1) for line in MEMORY.read_text().splitlines())
    return 1024 * int(lines["MemAvailable"].split()[0])


def _left_of_limits() -> Iterator[int]:
    """What is left of each limit over this process: of its control group, and of those that hold that one."""
    for root, name, limit, usage in _groups():
        for folder in [root / name, *(root / parent for parent in Path(name).parents)]:
            try:
                most, used = int((folder / limit).read_text()), int((folder / usage).read_text())
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):  # no such group as seen from inside the container, or the limit `max`
                continue
            # Files that were read once count as used, and go first when memory is short.
            cache = int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))
            yield max(0, most - used + cache)


def _groups() -> Iterator[tuple[Path, str, str, str]]:
    """This process's memory groups, of either version: a root, the name under it, the files of limit and usage."""
    try:
        lines = OWN.read_text().splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        number, controllers, name = line.split(":", 2)
        if number == "0":
            yield CGROUPS, name.strip("/"), "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            yield CGROUPS / "memory", name.strip("/"), "memory.limit_in_bytes", "memory.usage_in_bytes"
