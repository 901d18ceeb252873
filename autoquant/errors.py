"""The one exception that a user sees, and the exit code of an interruption."""

from __future__ import annotations

from typing import Any

INTERRUPTED = 130  # exit code: 128 + SIGINT, as shells have it


class AutoQuantError(Exception):
    """Bad input or an operation that cannot be done, said in one line.

    ``details`` holds further lines, one for each of several problems found at once. The command line prints them, then
    the message, and exits with code 1; anything else that escapes is a bug. ``problems``: those of a config, as values,
    so that whoever has read its file can tell where in it they are.
    """

    def __init__(self, message: str, details: tuple[str, ...] = (), problems: tuple[Any, ...] = ()) -> None:
        super().__init__(message)
        self.message = message
        self.details = details
        self.problems = problems

    def __str__(self) -> str:
        return "\n".join((*self.details, self.message))
