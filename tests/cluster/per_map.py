"""What is done of a map in tests of that: in a module without PyTorch, which each process that does it would import."""

import os
from pathlib import Path

from msif_ray.errors import UserError


def where(name: str, mark: str) -> tuple[str, str, int]:
    return name, mark, os.getpid()


def threads(name: str) -> int:
    import torch  # here: the others need none

    return torch.get_num_threads()


def refuse(name: str) -> None:
    raise UserError(f"{name}: no good")


def die_once(name: str, folder: Path) -> tuple[str, int]:
    """The first process that gets `a` dies of it."""
    mark = folder / "died"
    if name == "a" and not mark.exists():
        mark.write_text(str(os.getpid()))
        os._exit(1)
    return name, os.getpid()


def die(name: str, only: frozenset[int]) -> str:
    if os.getpid() in only:
        os._exit(1)
    return name
