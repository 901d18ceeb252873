"""Tensors from outside that are a block's own: layer i of a decoder takes the keys that layer i of its encoder left.

By where they come from such tensors are others for each layer, though layers differ in their number alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from autoquant.capture.executed import OUTSIDE, Executed, Signature, loose

Calls = tuple[Signature, ...]
"""Of one block."""
Ranks = Mapping[int, str]
"""The tensors from outside, by the order of their first use, that a block takes from one of its number in a stack."""


def own_sources(path: str, kinds: Sequence[int], ran: Executed) -> tuple[tuple[Calls, ...], tuple[Ranks, ...]]:
    """The calls of the blocks of a stack with what is each block's own named alike, and what it takes from others.

    It is so named where all blocks of one of ``kinds`` that call the same operators have, in one place, a tensor that
    no other block takes and that nothing made (an empty cache), or one operator on the same arguments in no block, or
    one that the block of the same number in another stack made.
    """
    calls = list(ran.calls[path])
    sources = [list(dict.fromkeys(_outside(call))) for call in calls]
    users = Counter(source for taken in sources for source in taken)
    alike: dict[object, list[int]] = {}
    for i, (kind, call) in enumerate(zip(kinds, calls, strict=True)):
        alike.setdefault((kind, loose(call)), []).append(i)
    beside: list[dict[int, str]] = [{} for _ in calls]
    for layers in (layers for layers in alike.values() if len(layers) > 1):
        names: dict[int, dict[Signature, Signature]] = {i: {} for i in layers}
        for rank in range(len(sources[layers[0]])):
            taken = {i: sources[i][rank] for i in layers}
            if len(set(taken.values())) == 1:
                continue
            others = {other_stack(source, i, path, ran) for i, source in taken.items()}
            (other,) = others if len(others) == 1 else (None,)
            own = all(users[source] == 1 for source in taken.values())
            if other is None and not (own and len({_made(source, ran) for source in taken.values()}) == 1):
                continue
            for i, source in taken.items():
                names[i][source] = (OUTSIDE, "own", rank) if other is None else (OUTSIDE, "beside", other, *source[3:])
                if other is not None:
                    beside[i][rank] = other
        for i in layers:
            calls[i] = _renamed(calls[i], names[i])
    return tuple(calls), tuple(beside)


def other_stack(source: Signature, number: int, path: str, ran: Executed) -> str | None:
    """The stack, another than ``path``, whose block of this ``number`` made ``source``; None where none did."""
    block = ran.blocks[source[2]] if source[1] == "at" and source[2] < len(ran.blocks) else None
    return block[0] if block is not None and block[0] != path and block[1] == number else None


def _made(source: Signature, ran: Executed) -> object:
    """How a tensor was made, equal for those that are alike; itself where it was made in a block or has a name."""
    if source[1] == "given":
        return "given"
    if source[1] == "at" and source[3] == "made" and source[2] in ran.outside:
        return source[2], ran.outside[source[2]][source[4]], source[5]
    return source


def keeps_beside(path: str, number: int, taken: Ranks, ran: Executed) -> bool:
    """Whether block ``number`` of a shallower model takes from those beside it what it has to."""
    sources = list(dict.fromkeys(_outside(ran.calls[path][number])))
    return all(
        rank < len(sources) and other_stack(sources[rank], number, path, ran) == other for rank, other in taken.items()
    )


def _outside(value: Any) -> Iterator[Signature]:
    if isinstance(value, tuple):
        if value and value[0] == OUTSIDE:
            yield value
        else:
            for item in value:
                yield from _outside(item)


def _renamed(value: Any, names: Mapping[Signature, Signature]) -> Any:
    if not isinstance(value, tuple):
        return value
    return names.get(value, value) if value and value[0] == OUTSIDE else tuple(_renamed(item, names) for item in value)
