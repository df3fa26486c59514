"""Which block a replica gets next, and when passes over blocks come to an end, without Ray."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from msif_ray.cluster import partials
from msif_ray.cluster.ahead import Ahead
from msif_ray.cluster.outcomes import Outcome
from msif_ray.cluster.pool import FRUITLESS_TRIES, ReplicaPool
from msif_ray.config import Cluster
from msif_ray.corpus.blocks import ListedBlocks
from msif_ray.corpus.reader import Block
from msif_ray.errors import UserError


def test_a_replica_gets_blocks_that_it_did_before_and_else_the_next() -> None:
    ahead = Ahead((Block(str(number), ()) for number in range(6)), 4)
    assert ahead.take({"2", "5"}).id == "2"
    assert ahead.take({"2", "5"}).id == "0"  # 5 is not in sight yet
    assert ahead.take({"2", "5"}).id == "5"
    assert [ahead.take(set()).id for _ in range(3)] == ["1", "3", "4"]
    assert ahead.take({"1"}) is None


def test_without_a_look_ahead_blocks_come_in_order_and_none_is_read_before_its_turn() -> None:
    read: list[int] = []

    def blocks():
        for number in range(3):
            read.append(number)
            yield Block(str(number), ())

    ahead = Ahead(blocks(), 1)
    assert ahead.take({"2"}).id == "0" and read == [0]


def accumulate(
    step: Path, monkeypatch: pytest.MonkeyPatch, covers: Callable[[int, list[str]], list[str]]
) -> tuple[list[list[str]], frozenset[str]]:
    """The blocks of every pass over four, and those covered in the end. After each pass storage has a partial of what
    `covers` gives for the pass's number and its blocks, as replicas leave that may have died."""
    passes: list[list[str]] = []

    def one_pass(self: Any, what: Any, blocks: Iterator[Block], progress: Any) -> Iterator[Any]:
        done = list(blocks)
        passes.append([block.id for block in done])
        yield from ((block, Outcome({"d": 2}, (), 1)) for block in done)

    def commit(self: Any, destination: Any) -> None:
        covered = covers(len(passes), passes[-1])
        if covered:
            outcomes = [(block, Outcome({"d": 2}, (), 1).counts) for block in covered]
            partials.publish(partials.new_folder(step, covered[0]), [["m"]], outcomes, None)

    monkeypatch.setattr(ReplicaPool, "_stream", one_pass)
    monkeypatch.setattr(ReplicaPool, "_commit", commit)
    pool = ReplicaPool(Cluster(cpus_per_rank=1, gpus_per_rank=0))
    blocks = ListedBlocks([Block(name, ()) for name in "abcd"])
    return passes, pool.accumulate(Mock(), Mock(), blocks, step, Mock()).blocks


def test_what_dead_replicas_left_uncovered_is_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # One block more every few passes: each time but one all replicas die before they have written anything.
    passes, covered = accumulate(
        tmp_path, monkeypatch, lambda number, left: [] if number % FRUITLESS_TRIES else left[:1]
    )
    assert covered == frozenset("abcd") and len(passes) == 4 * FRUITLESS_TRIES
    assert passes[-1] == ["d"]


def test_passes_that_leave_nothing_come_to_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError) as error:
        accumulate(tmp_path, monkeypatch, lambda number, left: left[:1] if number == 1 else [])
    assert str(error.value) == (
        f"{tmp_path}: {FRUITLESS_TRIES} passes in a row over 3 blocks left no partial sum of any here; see "
        "that the storage lists what is written to it, or that replicas live, and run the command again"
    )
