"""Standard input, output and error are open, though the process was started with one of them closed."""

import os
import sys
from contextlib import suppress


def open_streams() -> None:
    """Opens those that are closed to nowhere. Else the next file that is opened gets the number of one, and what a
    library writes to standard error goes into that file; and there would be no standard error to be turned away."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        with suppress(OSError):
            os.fstat(number)
            continue
        os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115
