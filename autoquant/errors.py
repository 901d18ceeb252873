"""The one exception that a user sees, and the exit code of an interruption."""

from __future__ import annotations

INTERRUPTED = 130  # exit code: 128 + SIGINT, as shells have it


class AutoQuantError(Exception):
    """Bad input or an operation that cannot be done, said in one line.

    ``details`` holds further lines, one for each of several problems found at once. The command line prints them, then
    the message, and exits with code 1; anything else that escapes is a bug.
    """

    def __init__(self, message: str, details: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.message = message
        self.details = details

    def __str__(self) -> str:
        return "\n".join((*self.details, self.message))
