"""Progress with throughput and time left: a live bar on a terminal, a line a minute in a log, a summary at the end."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field
from time import monotonic

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from msif_ray.columns import print_table
from msif_ray.repeated import repeated

SECONDS_BETWEEN_LINES = 60.0
SECONDS_BETWEEN_WAITS = 20.0


@dataclass(frozen=True)
class Snapshot:
    """Where a step stands. `resumed` documents were done by an earlier run of the same command; `replicas` is the
    number of those at work (None: not known)."""

    name: str
    total: int | None
    documents: int
    tokens: int
    skipped: int
    resumed: int
    seconds: float
    replicas: int | None = None

    @property
    def done(self) -> int:
        return self.documents + self.skipped

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / max(self.seconds, 1e-9)

    @property
    def seconds_left(self) -> float | None:
        """At the rate of this run's documents so far; None where it has done none, or there are none left."""
        own = self.done - self.resumed
        if not self.total or own <= 0 or self.done >= self.total:
            return None
        return self.seconds * (self.total - self.done) / own

    def __str__(self) -> str:
        parts = [f"{self.name}: {self.done:,}" + (f" of {self.total:,}" if self.total else "") + " documents"]
        parts += [f"{self.tokens:,} tokens", f"{self.tokens_per_second:,.0f} tokens/s", f"{self.seconds:.0f} s"]
        if self.replicas is not None:
            parts.append(f"{self.replicas} replica{'' if self.replicas == 1 else 's'}")
        if self.skipped:
            parts.append(f"{self.skipped:,} skipped")
        if self.seconds_left is not None:
            parts.append(f"{self.seconds_left:.0f} s left")
        return ", ".join(parts)


Observer = Callable[[Snapshot], None]


def _nobody(_: Snapshot) -> None: ...


def _nothing() -> None: ...


@dataclass
class Step:
    """One step under way: `add` says what was done."""

    name: str
    total: int | None
    console: Console
    bar: Progress
    observe: Observer = _nobody
    check: Callable[[], None] = _nothing
    documents: int = 0
    tokens: int = 0
    skipped: int = 0
    resumed: int = 0
    replicas: int | None = None
    started: float = field(default_factory=monotonic)
    _said: float = field(default_factory=monotonic)

    def __post_init__(self) -> None:
        self._task = self.bar.add_task(self.name, total=self.total, rate="")

    def add(self, documents: int, tokens: int, skipped: int = 0) -> None:
        """Counts documents done, with their tokens, and documents skipped."""
        self.documents += documents
        self.tokens += tokens
        self.skipped += skipped
        now = self.snapshot()
        self.bar.update(self._task, completed=now.done, rate=f"{now.tokens_per_second:,.0f} tokens/s")
        self.check()
        self.observe(now)

    def alive(self, replicas: int) -> None:
        """Says how many replicas are at work."""
        self.replicas = replicas

    def resume(self, documents: int, skipped: int = 0) -> None:
        """Counts what an earlier run of the same command had done."""
        self.resumed = documents + skipped
        self.skipped += skipped
        self.add(documents, 0)
        if self.resumed:
            self._say(f"{self.name}: {self.resumed:,} documents were done before")

    def wait(self, reason: str) -> None:
        """Says why nothing is being done, now and then."""
        if monotonic() - self._said > SECONDS_BETWEEN_WAITS:
            self._said = monotonic()
            self._say(f"{self.name}: waiting: {reason}")

    def tell(self) -> None:
        """Where it stands: to `observe`, and in a log that has had no line for a minute; a terminal has its bar."""
        self.observe(self.snapshot())  # Ray forgets a metric that it is not told again for 20 seconds
        if not self.console.is_terminal and monotonic() - self._said > SECONDS_BETWEEN_LINES:
            self._said = monotonic()
            self._say(str(self.snapshot()))

    def close(self) -> Snapshot:
        """Ends the step with a line that sums it up."""
        self.bar.remove_task(self._task)
        last = self.snapshot()
        self.check()
        self.observe(last)
        self._say(str(last))
        return last

    def _say(self, line: str) -> None:
        _print_line(self.console, line)

    def snapshot(self) -> Snapshot:
        seconds = monotonic() - self.started
        counts = (self.documents, self.tokens, self.skipped, self.resumed)
        return Snapshot(self.name, self.total, *counts, seconds, self.replicas)


@dataclass(frozen=True)
class Reporter:
    """Where a run says what it does. `observe` is told where each step stands, as often as that changes and now and
    then between (in another thread); `check` is called before it is told of a change, and what it raises ends the run;
    `finished` gathers the steps."""

    console: Console = field(default_factory=lambda: Console(stderr=True))
    observe: Observer = _nobody
    check: Callable[[], None] = _nothing
    finished: list[Snapshot] = field(default_factory=list)
    started: float = field(default_factory=monotonic)

    def say(self, line: str) -> None:
        _print_line(self.console, line)

    def checking(self, check: Callable[[], None]) -> "Reporter":
        """The same with this `check`."""
        checked = copy(self)  # not `replace`: a subclass may be made of other things
        vars(checked)["check"] = check
        return checked

    @contextmanager
    def step(self, name: str, total: int | None) -> Iterator[Step]:
        """A step with a bar; on leaving, one line stays that sums it up."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal) as bar:
            step = Step(name, total, self.console, bar, self.observe, self.check)
            # Where the step stands, even while nothing is done.
            with repeated(step.tell, SECONDS_BETWEEN_LINES / 10):
                yield step
            self.finished.append(step.close())

    def summarise(self) -> None:
        """Prints the time of every step and its share, with what this run did in it, and the time between them."""
        if not self.finished:
            return
        total = monotonic() - self.started
        table = Table(box=None, padding=(0, 1), header_style="dim")
        table.add_column("step", overflow="fold")
        for name in ("documents", "skipped", "tokens", "tokens/s", "seconds", "share"):
            table.add_column(name, justify="right", no_wrap=True)
        for step in self.finished:
            counts = [f"{count:,}" for count in (step.done - step.resumed, step.skipped, step.tokens)]
            table.add_row(Text(step.name), *counts, f"{step.tokens_per_second:,.0f}", *_of(step.seconds, total))
        rest = total - sum(step.seconds for step in self.finished)
        table.add_row("between the steps", "", "", "", "", *_of(rest, total), style="dim")
        table.add_row("all", "", "", "", "", *_of(total, total), style="bold")
        print_table(table, self.console)


def _print_line(console: Console, line: str) -> None:
    """As it is: what stands in brackets or between colons is no markup of rich's, and no emoji."""
    console.print(Text(line), soft_wrap=True)


def _of(seconds: float, total: float) -> tuple[str, str]:
    return f"{seconds:,.0f}", f"{seconds / max(total, 1e-9):.0%}"
