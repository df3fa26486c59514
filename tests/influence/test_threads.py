"""Work side by side: each piece on one thread, and nothing else changed by it."""

from threading import Thread, get_ident

import pytest
import torch

from msif_ray.influence.threads import side_by_side

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_results_come_in_order_and_each_piece_has_one_thread() -> None:
    def work(item: int) -> tuple[int, int, bool]:
        return item, torch.get_num_threads(), get_ident() == caller

    caller = get_ident()
    assert side_by_side(work, range(20), CPU) == [(item, 1, False) for item in range(20)]


def test_the_caller_and_threads_begun_later_keep_their_number() -> None:
    side_by_side(abs, range(3), CPU)
    assert torch.get_num_threads() == 2
    found: list[int] = []
    later = Thread(target=lambda: found.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert found == [2]


def test_with_one_thread_the_work_is_the_caller_s() -> None:
    torch.set_num_threads(1)
    assert side_by_side(lambda _: get_ident(), range(3), CPU) == [get_ident()] * 3


def test_what_goes_wrong_in_a_piece_arrives() -> None:
    with pytest.raises(ZeroDivisionError):
        side_by_side(lambda item: 1 / item, [1, 0], CPU)
