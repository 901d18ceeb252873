"""Names that users chose (paths, layers, models) as text that no terminal acts on."""

from __future__ import annotations


def inert(text: str) -> str:
    r"""``text`` as one line in which every character shows: ``\n``, ``\x1b`` and what turns the direction are escaped.

    Surrogates, which stand for bytes of a path that are not UTF-8, are escaped too.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
