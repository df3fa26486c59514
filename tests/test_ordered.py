"""A function of many files: in their order, a few ahead, and what it raises in its turn."""

import threading
import time

import pytest

from msif_ray import ordered
from msif_ray.ordered import in_order


def test_results_come_in_order_and_no_more_than_a_few_are_ahead() -> None:
    taken, begun, lock = 0, [], threading.Lock()

    def slow(item: int) -> int:
        with lock:
            begun.append(item - taken)
        time.sleep(0.002 * (item % 3))
        return item * item

    for item, found in enumerate(in_order(slow, range(40))):
        assert found == item * item
        taken = item + 1
    assert 1 < max(begun) <= ordered.AT_ONCE
    assert list(in_order(slow, [])) == []


def test_what_is_raised_is_raised_in_its_turn() -> None:
    def fail(item: int) -> int:
        if item >= 3:
            raise ValueError(str(item))
        return item

    found = in_order(fail, range(100))
    assert [next(found) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match=r"^3$"):
        next(found)
