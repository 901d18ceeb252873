"""Parameter and module names: the layer index in them, sets of layers, and the nearest name to a misspelt one."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence

from autoquant.errors import AutoQuantError

LAYER = "{layer}"
MAX_LAYERS = 100_000  # far above any model: a typed '0-99999999999' must not fill the memory

_TERM = re.compile(r"(\d+)(?:-(\d+)(?::(\d+))?)?")


def template(path: str, layer: int) -> str:
    """Replace the first component of ``path`` that is the number ``layer`` by ``{layer}``.

    >>> template("model.layers.3.mlp.experts.3.weight", 3)
    'model.layers.{layer}.mlp.experts.3.weight'

    Raises AutoQuantError where no component is that number.
    """
    parts = path.split(".")
    if str(layer) not in parts:
        raise AutoQuantError(f"{path}: no component is the layer number {layer}")
    parts[parts.index(str(layer))] = LAYER
    return ".".join(parts)


def fill(path: str, layer: int) -> str:
    """Replace ``{layer}`` in ``path``; a path without it is returned as it is."""
    return path.replace(LAYER, str(layer))


def layer_numbers(text: str) -> tuple[int, ...]:
    """The layers that a layer set names, ascending and each once.

    >>> layer_numbers("0-6:2,7")
    (0, 2, 4, 6, 7)

    Raises AutoQuantError for anything that is not a comma-separated list of numbers, ranges 'first-last' and strided
    ranges 'first-last:step', and for ranges that run backwards or have step 0.
    """
    numbers: set[int] = set()
    for term in text.split(","):
        match = _TERM.fullmatch(term)
        if match is None or not term.isascii():
            raise AutoQuantError(f"layer set '{text}': '{term}' is not a number, 'first-last' or 'first-last:step'")
        if max(map(len, match.groups(default="0"))) > 9:
            raise AutoQuantError(f"layer set '{text}': '{term}' is out of range, at most {MAX_LAYERS - 1}")
        first, last, step = int(match[1]), int(match[2] or match[1]), int(match[3] or 1)
        if step == 0:
            raise AutoQuantError(f"layer set '{text}': '{term}' has step 0")
        if last < first:
            raise AutoQuantError(f"layer set '{text}': '{term}' runs backwards")
        if last >= MAX_LAYERS:
            raise AutoQuantError(f"layer set '{text}': '{term}' is out of range, at most {MAX_LAYERS - 1}")
        numbers.update(range(first, last + 1, step))
    return tuple(sorted(numbers))


def layer_set(layers: Iterable[int]) -> str:
    """The shortest way to cut ascending layers into numbers and ranges; of equally short ones that with fewest terms.

    >>> layer_set((0, 2, 4, 6, 7))
    '0-6:2,7'

    Inverse of :func:`layer_numbers`. Raises ValueError for no layers or a negative one.
    """
    numbers = sorted(set(layers))
    if not numbers or numbers[0] < 0:
        raise ValueError(f"a layer set needs at least one layer and none below 0: {numbers}")
    # best[i] is (length, number of terms, terms) for the first i numbers. A term ends at i and is an arithmetic run, so
    # going back from i stops where the step changes.
    best: list[tuple[int, int, tuple[str, ...]]] = [(0, 0, ())]
    for end in range(1, len(numbers) + 1):
        choices = [_extend(best[end - 1], str(numbers[end - 1]))]
        start = end - 2
        while start >= 0 and numbers[start + 1] - numbers[start] == numbers[end - 1] - numbers[end - 2]:
            step = numbers[start + 1] - numbers[start]
            text = f"{numbers[start]}-{numbers[end - 1]}" + (f":{step}" if step > 1 else "")
            choices.append(_extend(best[start], text))
            start -= 1
        best.append(min(choices))
    return ",".join(best[-1][2])


def _extend(best: tuple[int, int, tuple[str, ...]], term: str) -> tuple[int, int, tuple[str, ...]]:
    length, count, terms = best
    return length + len(term) + 1, count + 1, (*terms, term)


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The most similar of ``names``, or None where none is similar."""
    lowered: dict[str, str] = {}
    for candidate in names:
        lowered.setdefault(candidate.lower(), candidate)
    matches = difflib.get_close_matches(name.lower(), lowered, n=1, cutoff=0.6)
    return lowered[matches[0]] if matches else None


def did_you_mean(name: str, names: Sequence[str]) -> str:
    """The end of an error message: '; did you mean 'x'?', or nothing."""
    match = nearest(name, names)
    return f"; did you mean '{match}'?" if match is not None else ""
