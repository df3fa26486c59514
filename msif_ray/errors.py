"""The one exception that a user's mistake raises."""


class UserError(Exception):
    """A mistake in what the user gave: one line that names the key, file or row at fault and what to do.

    The command line prints it without a traceback and exits with status 2.
    """


class DamagedError(UserError):
    """A file that this project wrote is missing or not as it was written: what to delete depends on whose it is."""
