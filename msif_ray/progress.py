"""Progress with throughput and time left: a live bar on a terminal, a line now and then in a log."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import monotonic

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 60.0
SECONDS_BETWEEN_WAITS = 20.0


@dataclass
class Step:
    """One step under way: `add` says what was done."""

    name: str
    total: int | None
    console: Console
    bar: Progress
    documents: int = 0
    tokens: int = 0
    skipped: int = 0
    resumed: int = 0
    started: float = field(default_factory=monotonic)
    _said: float = field(default_factory=monotonic)

    def __post_init__(self) -> None:
        self._task = self.bar.add_task(self.name, total=self.total, rate="")

    def add(self, documents: int, tokens: int, skipped: int = 0) -> None:
        """Counts documents done, with their tokens, and documents skipped."""
        self.documents += documents
        self.tokens += tokens
        self.skipped += skipped
        self.bar.update(self._task, completed=self.documents + self.skipped, rate=f"{self._rate():,.0f} tokens/s")
        if not self.console.is_terminal and monotonic() - self._said > SECONDS_BETWEEN_LINES:
            self._said = monotonic()
            self.console.print(self._line(), highlight=False, soft_wrap=True)

    def resume(self, documents: int, skipped: int = 0) -> None:
        """Counts what an earlier run of the same command had done."""
        self.resumed = documents + skipped
        self.skipped += skipped
        self.add(documents, 0)
        if self.resumed:
            self.console.print(f"{self.name}: {self.resumed:,} documents were done before", highlight=False)

    def wait(self, reason: str) -> None:
        """Says why nothing is being done, now and then."""
        if monotonic() - self._said > SECONDS_BETWEEN_WAITS:
            self._said = monotonic()
            self.console.print(f"{self.name}: waiting: {reason}", highlight=False, soft_wrap=True)

    def close(self) -> None:
        self.bar.remove_task(self._task)
        self.console.print(self._line(), highlight=False, soft_wrap=True)

    def _rate(self) -> float:
        return self.tokens / max(monotonic() - self.started, 1e-9)

    def _line(self) -> str:
        seconds = monotonic() - self.started
        done = self.documents + self.skipped
        parts = [f"{self.name}: {done:,}" + (f" of {self.total:,}" if self.total else "") + " documents"]
        parts += [f"{self.tokens:,} tokens", f"{self._rate():,.0f} tokens/s", f"{seconds:.0f} s"]
        if self.skipped:
            parts.append(f"{self.skipped:,} skipped")
        if self.total and 0 < done < self.total:
            parts.append(f"{seconds * (self.total - done) / max(done - self.resumed, 1):.0f} s left")
        return ", ".join(parts)


@dataclass(frozen=True)
class Reporter:
    """Where a run says what it does."""

    console: Console = field(default_factory=lambda: Console(stderr=True))

    def say(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)

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
            step = Step(name, total, self.console, bar)
            yield step
            step.close()
