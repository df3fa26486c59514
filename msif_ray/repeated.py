"""Something told now and then, while other work is waited for."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event, Thread


@contextmanager
def repeated(tell: Callable[[], None], seconds: float) -> Iterator[None]:
    """Calls `tell` in a thread every so many seconds, first after as many, and no more once the context is left."""
    ended = Event()

    def telling() -> None:
        while not ended.wait(seconds):
            tell()

    teller = Thread(target=telling, daemon=True)
    teller.start()
    try:
        yield
    finally:
        ended.set()
        teller.join()
