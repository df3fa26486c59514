"""A corpus streamed by replicas without a model, some of which are lost."""

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from msif_ray.cluster import replica, workers
from msif_ray.cluster.workers import BlockReplica, Counted
from msif_ray.corpus.blocks import CorpusBlocks
from msif_ray.corpus.reader import Block

SECONDS = 0.3


def install() -> None:
    """Ray's worker_process_setup_hook: a replica notes the block down in place of scoring it, and who hands blocks on
    notes itself down."""
    workers.UNFILLED_SECONDS = 3.0
    process = workers.ModelReplica._process

    def noted(self: Any, block: Block) -> tuple[int, int, int]:
        task = ray.get(self._task)
        note(task.folder, "hands-on", str(os.getpid()))
        counted = process(self, block)
        task.await_another()
        return counted

    def begin(self: Any, task: Any) -> bool:
        self._task = task
        return True

    def do(self: Any, block: Block) -> tuple[int, int, int]:
        return count(self._task, block)

    setattr(workers.ModelReplica, "_process", noted)  # noqa: B010
    setattr(replica.Replica, "begin", begin)  # noqa: B010
    setattr(replica.Replica, "do", do)  # noqa: B010


def note(folder: Path, name: str, line: str) -> None:
    with open(folder / name, "a", encoding="utf-8") as file:
        file.write(line + "\n")


def count(task: "Task", block: Block) -> tuple[int, int, int]:
    time.sleep(SECONDS)
    note(task.folder, f"block-{block.id}", str(os.getpid()))
    return len(block.documents), 1, 0


class PlainReplica(BlockReplica):
    """An actor of Ray Data's that has the replica's room itself."""

    def __init__(self, task: list[Any], resources: Any, lent: list[Any]) -> None:
        self._task = ray.get(task[0])

    def do(self, block: Block) -> Counted:
        counted = Counted(*count(self._task, block))
        self._task.await_another()
        return counted


@dataclass(frozen=True)
class Task:
    """`folder` has a file for each block, with a line for each time it was done: of what process."""

    what = "blocks noted down"

    blocks: CorpusBlocks
    folder: Path
    replica: type[BlockReplica]

    def done(self) -> set[str]:
        return {path.name.removeprefix("block-") for path in self.folder.glob("block-*")}

    def pids(self, files: str) -> list[int]:
        """The processes that the files name."""
        return [int(line) for path in self.folder.glob(files) for line in path.read_text().split()]

    def await_another(self) -> None:
        """Returns when two replicas have done a block: on a busy machine one would do all before the other has started.

        It is for whoever gives a replica its blocks to wait, since the other's asks that replica whose it is.
        """
        while len(set(self.pids("block-*"))) < 2:
            time.sleep(0.05)
