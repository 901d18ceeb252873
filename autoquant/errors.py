"""The one exception that a user sees."""

from __future__ import annotations


class AutoQuantError(Exception):
    """Bad input or an operation that cannot be done, said in one line.

    The command line prints the message and exits with code 1; anything else that escapes is a bug.
    """
