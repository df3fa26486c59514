"""The one exception that a user's mistake raises, and what others say as part of its line."""


class UserError(Exception):
    """A mistake in what the user gave: one line that names the key, file or row at fault and what to do.

    The command line prints it without a traceback and exits with status 2.
    """


class DamagedError(UserError):
    """A file that this project wrote is missing or not as it was written: what to delete depends on whose it is."""


def one_line(text: object, longest: int = 200) -> str:
    """A text, or what an exception says, in one line of at most so many characters; what is left out is at a word's end
    where there is one, and "…" stands for it."""
    line = " ".join(str(text).split())
    if len(line) <= longest:
        return line
    words = line[: longest - 1].rpartition(" ")[0]
    return f"{words} …" if len(words) > longest // 2 else f"{line[: longest - 1]}…"
