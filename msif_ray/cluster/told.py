"""What whoever works through blocks tells of it; `msif_ray/progress.py` shows it."""

from typing import Protocol


class Progress(Protocol):
    """Told what is done: documents, their tokens and skipped documents."""

    def add(self, documents: int, tokens: int, skipped: int = 0) -> None: ...

    def resume(self, documents: int, skipped: int = 0) -> None:
        """What an earlier run of the same command had done."""
        ...

    def alive(self, replicas: int) -> None:
        """So many replicas are at work."""
        ...

    def wait(self, reason: str) -> None:
        """Nothing is being done, for this reason."""
        ...
