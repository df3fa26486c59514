"""When a fit's sums are due to be written: by what the last writing took."""

import pytest

from msif_ray.cluster import replica


@pytest.mark.parametrize(
    ("seconds", "due"),
    [
        (0.0, 0.0),  # the first block, which tells what a commit takes
        (0.1, 10.0),  # a hundredth of the time
        (10.0, 379.47),  # √(2 · 10 · 7200), sooner than 1,000
        (100.0, 900.0),  # a quarter of an hour, sooner than √(2 · 100 · 7200)
    ],
)
def test_a_commit_is_due(seconds: float, due: float, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [50.0]
    monkeypatch.setattr(replica, "monotonic", lambda: now[0])
    sums = replica._Committed(seconds=seconds, at=50.0)
    now[0] = 50.0 + 0.99 * due
    assert sums.is_due() == (due == 0.0)
    now[0] = 50.0 + 1.01 * due
    assert sums.is_due()
