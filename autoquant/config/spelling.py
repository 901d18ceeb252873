"""The nearest name to a misspelt one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The most similar of ``names``, or None where none is similar."""
    lowered: dict[str, str] = {}
    for candidate in names:
        lowered.setdefault(candidate.lower(), candidate)
    matches = difflib.get_close_matches(name.lower(), lowered, n=1, cutoff=0.6)
    return lowered[matches[0]] if matches else None


def cut(name: str, length: int = 80) -> str:
    """A name as a message repeats it: the beginning of a long one."""
    return name if len(name) <= length else f"{name[: length - 1]}…"


def listed(names: Sequence[str], length: int = 200) -> str:
    """Names in a row, as many as fit; of the others the number is said."""
    shown, room = 0, length
    while shown < len(names) and (room := room - len(names[shown]) - 2) >= 0:
        shown += 1
    shown = max(shown, 1)
    more = f" and {len(names) - shown} more" if shown < len(names) else ""
    return ", ".join(names[:shown]) + more


def did_you_mean(name: str, names: Sequence[str]) -> str:
    """The end of an error message: '; did you mean 'x'?', or nothing."""
    match = nearest(name, names)
    return f"; did you mean '{match}'?" if match is not None else ""


def did_you_mean_or(name: str, names: Sequence[str], listing: str = "there are") -> str:
    """The nearest name, or all of them where none is near: the end of a message about a name among few."""
    return did_you_mean(name, names) or f"; {listing} {', '.join(names)}"


def counted(number: int, what: str) -> str:
    """``'1 problem'``, ``'2 problems'``."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def with_ends(names: Sequence[str]) -> list[str]:
    """Names, and their ends behind each dot: by one of them a person may go."""
    return [*names, *(name.split(".", at)[-1] for name in names for at in range(1, name.count(".") + 1))]
