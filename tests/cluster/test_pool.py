"""Which block a replica gets next, without Ray."""

from msif_ray.cluster.ahead import Ahead
from msif_ray.corpus.reader import Block


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
