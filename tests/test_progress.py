"""Progress in a log: a line a minute whatever is done, time left from this run's own work, and a summary."""

import io
import time

import pytest
from rich.console import Console

from msif_ray import progress
from msif_ray.errors import UserError
from msif_ray.progress import Reporter, Snapshot


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "monotonic", clock)
    return clock


def log() -> tuple[Reporter, io.StringIO, list[Snapshot]]:
    written, seen = io.StringIO(), []
    return Reporter(Console(file=written, width=200), seen.append), written, seen


def step_of(reporter: Reporter, clock: Clock, total: int | None = 100) -> progress.Step:
    bar = progress.Progress(console=reporter.console, disable=True)
    step = progress.Step("s", total, reporter.console, bar, reporter.observe)
    step.started = step._said = clock.now
    return step


def test_a_line_a_minute_and_no_more(clock: Clock) -> None:
    reporter, written, _ = log()
    step = step_of(reporter, clock)
    for second in range(1, 181):
        clock.now = float(second)
        if second < 70:
            step.add(1, 10)
        step.tell()
    lines = written.getvalue().splitlines()
    assert len(lines) == 2 and lines[0] == "s: 61 of 100 documents, 610 tokens, 10 tokens/s, 61 s, 39 s left"
    assert "69 of 100" in lines[1] and "\x1b" not in written.getvalue() and "\r" not in written.getvalue()


def test_time_left_counts_what_this_run_did(clock: Clock) -> None:
    reporter, _, seen = log()
    step = step_of(reporter, clock)
    step.resume(80)
    assert step.snapshot().seconds_left is None
    clock.now = 30.0
    step.add(8, 100, skipped=2)
    step.alive(3)
    now = step.snapshot()
    assert now.seconds_left == pytest.approx(30.0) and now.done == 90
    assert str(now).endswith("30 s, 3 replicas, 2 skipped, 30 s left")
    assert [each.documents for each in seen] == [80, 88]
    step.add(10, 100)
    assert step.snapshot().seconds_left is None


def test_a_silent_step_tells_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.1)
    reporter, written, seen = log()
    with reporter.step("slow", 5):
        time.sleep(0.5)
    assert len(seen) > 3 and {each.documents for each in seen} == {0}
    assert 3 <= written.getvalue().count("slow: 0 of 5 documents") <= 7


def test_the_summary_has_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    reporter, written, seen = log()
    for name, count in (("fit", 3), ("scores", 7)):
        with reporter.step(name, count) as step:
            step.add(count, 10 * count, skipped=1)
    assert [each.name for each in reporter.finished] == ["fit", "scores"] and len(seen) == 4
    written.truncate(0)
    reporter.summarise()
    lines = written.getvalue().splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["fit", "scores", "between", "all"]
    assert lines[2].split()[1:4] == ["8", "1", "70"] and lines[-1].split()[-1] == "100%"


def test_words_of_the_summary_stay_whole_at_80_columns(clock: Clock) -> None:
    clock.now, written = 200_000.0, io.StringIO()
    reporter = Reporter(Console(file=written, width=80), started=0.0)
    names = ["pretraining-on-it-all: covariance", "finetune: top documents"]
    reporter.finished.extend(Snapshot(name, None, 7_318_000, 1_234_567_890, 12_345, 0, 98_765.0) for name in names)
    reporter.summarise()
    words = written.getvalue().split()
    assert max(map(len, written.getvalue().splitlines())) <= 80
    assert {"documents", "skipped", "tokens/s", "pretraining-on-it-all:", "covariance"} <= set(words)
    assert words.count("7,330,345") == words.count("1,234,567,890") == 2 and "12,500" in words


def test_brackets_and_colons_are_text(clock: Clock) -> None:
    reporter, written, _ = log()
    step = step_of(reporter, clock)
    step.name = "[s]"
    step.resume(1)
    clock.now = 61.0
    step.wait("[/x] of s3://b/:smile:")
    step.close()
    lines = written.getvalue().splitlines()
    assert lines[:2] == ["[s]: 1 documents were done before", "[s]: waiting: [/x] of s3://b/:smile:"]
    assert lines[2].startswith("[s]: 1 of 100 documents")


def test_nothing_done_has_no_summary() -> None:
    reporter, written, _ = log()
    reporter.summarise()
    assert written.getvalue() == ""


def test_a_check_is_made_as_often_as_something_is_told(clock: Clock) -> None:
    reporter, _, seen = log()
    faults: list[Exception] = []

    def check() -> None:
        if faults:
            raise faults[0]

    with pytest.raises(UserError, match="the lease is lost"), reporter.checking(check).step("s", 10) as step:
        step.add(1, 10)
        faults.append(UserError("the lease is lost"))
        step.add(1, 10)
    assert [each.documents for each in seen] == [1] and not reporter.finished
