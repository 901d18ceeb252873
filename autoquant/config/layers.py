"""Parameter and module names: the layer index in them, and sets of layers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache

from autoquant.errors import AutoQuantError

LAYER = "{layer}"
MAX_LAYERS = 100_000  # far above any model: a typed '0-99999999999' must not fill the memory
MAX_SHORTEST = 512  # of longer sets the shortest text is not looked for

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


def module_of(path: str) -> str:
    """The module that a person means by a parameter: ``q_proj`` for ``q_proj.weight``; else the parameter itself."""
    head, _, leaf = path.rpartition(".")
    return head if leaf in ("weight", "bias") and head else path


def tail(path: str, other: str) -> str:
    """``path`` without the modules that it shares with ``other``."""
    parts, others = path.split("."), other.split(".")
    shared = 0
    while shared < min(len(parts), len(others)) - 1 and parts[shared] == others[shared]:
        shared += 1
    return ".".join(parts[shared:])


def layer_numbers(text: str) -> tuple[int, ...]:
    """The layers that a layer set names, ascending and each once.

    >>> layer_numbers("0-6:2,7")
    (0, 2, 4, 6, 7)

    Raises AutoQuantError for anything that is not a comma-separated list of numbers, ranges 'first-last' and strided
    ranges 'first-last:step', and for ranges that run backwards or have step 0.
    """
    return numbers_in(layer_bits(text))


@lru_cache(maxsize=64)
def layer_bits(text: str) -> int:
    """The layers that a set names as a number that holds one byte for each, the lowest first: 1 if it is named.

    So sets of any size are compared (``a & ~b``) without a list of their layers. Raises as :func:`layer_numbers`.
    """
    named = bytearray()
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
        named.extend(bytes(max(last + 1 - len(named), 0)))
        named[first : last + 1 : step] = b"\x01" * len(range(first, last + 1, step))
    return int.from_bytes(named, "little")


def last_layer(bits: int) -> int:
    """The highest layer of a set that is not empty."""
    return (bits.bit_length() - 1) // 8


def layers_below(bits: int, end: int) -> int:
    """The set without the layers from ``end`` on."""
    return bits & ((1 << 8 * end) - 1)


def numbers_in(bits: int) -> tuple[int, ...]:
    """The layers of a set, ascending."""
    named = bits.to_bytes((bits.bit_length() + 7) // 8, "little")
    return tuple(layer for layer, there in enumerate(named) if there)


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
    if len(numbers) > MAX_SHORTEST:
        return _ranges(numbers)
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


def _ranges(numbers: Sequence[int]) -> str:
    """The ranges of ascending layers, in one pass: not the shortest way, which takes time as the square of them."""
    starts = [i for i, number in enumerate(numbers) if not i or number != numbers[i - 1] + 1]
    ends = [start - 1 for start in starts[1:]] + [len(numbers) - 1]
    pairs = ((numbers[start], numbers[end]) for start, end in zip(starts, ends, strict=True))
    return ",".join(f"{first}-{last}" if last > first else str(first) for first, last in pairs)


def _extend(best: tuple[int, int, tuple[str, ...]], term: str) -> tuple[int, int, tuple[str, ...]]:
    length, count, terms = best
    return length + len(term) + 1, count + 1, (*terms, term)
