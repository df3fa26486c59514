"""What this process may still take of its node's memory: the machine's, within what its container is limited to."""

from collections.abc import Iterator
from pathlib import Path

import psutil

CGROUPS = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")


def available_memory() -> int:
    """Bytes that can be taken without swapping, and without the container's limit ending a process."""
    return min([psutil.virtual_memory().available, *_left_of_limits()])


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
