"""How a long piece of work tells what it is at: one signature for every layer."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Told the name of a step before it starts, how much of it is done, and of how much (0: not known).

A step lasts until another name is told.
"""


def silent(step: str, done: int, total: int) -> None:
    """Tell nobody."""
