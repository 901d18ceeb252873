"""Rows that are cut into one run for each expert, as long as the data say.

Code that sorts its tokens by expert reads how many each of them has as numbers, and goes on with slices between their
sums. A trace has a symbol for each number; of such a slice it knows neither that it is as long as one of them, nor that
all of them together are all rows. Here a slice is a piece of one ``split``, whose pieces are as long as the numbers,
and the pieces joined again are as many rows as there were. A graph that is run checks both.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from autoquant.library_patches import say_sizes

Objects = np.ndarray[Any, np.dtype[np.object_]]


@dataclass(frozen=True, slots=True)
class _Cut:
    """``total`` rows in runs of ``sizes``, which are symbols."""

    sizes: tuple[Any, ...]
    total: int


class Cuts:
    """The numbers that were read off counts, and what is done with them."""

    def __init__(self) -> None:
        self.runs: dict[tuple[Hashable, Hashable], tuple[_Cut, int]] = {}
        """By where it begins and ends, which run of which cut."""
        self.whole: dict[tuple[Hashable, ...], _Cut] = {}
        self.pieces: dict[tuple[int, int, int], tuple[Tensor, Sequence[Tensor]]] = {}
        """By what was cut, which is kept, the dimension, and the cut."""

    def sizes(self, counts: Tensor, total: int | None) -> list[Any]:
        """The numbers that a traced ``counts`` [E] holds: each 0 or more, all together ``total`` where it is known."""
        sizes = tuple(count.item() for count in counts.unbind())
        say_sizes(sizes, total)
        if total is not None:
            cut = _Cut(sizes, total)
            ends = map(_name, running_sums(sizes))
            bounds = itertools.pairwise([_name(0), *ends])
            self.runs |= {bound: (cut, place) for place, bound in enumerate(bounds)}
            self.whole[tuple(map(_name, sizes))] = cut
        return list(sizes)

    def run_of(self, x: Tensor, dim: int, start: Any, stop: Any, step: int = 1) -> Tensor | None:
        """``aten.slice`` where it is one of the runs that all of ``x`` is cut into along ``dim``, else None."""
        cut, place = self.runs.get((_name(0 if start is None else start), _name(stop)), (None, 0))
        if cut is None or step != 1 or x.shape[dim] != cut.total:
            return None
        made = self.pieces.get((id(x), dim, id(cut)))
        if made is None:
            made = self.pieces[id(x), dim, id(cut)] = x, torch.split(x, list(cut.sizes), dim)
        return made[1][place]

    def joined(self, parts: Sequence[Tensor], result: Tensor) -> Tensor:
        """``parts`` one behind the other: where they are all runs of a cut, the rows by number, as many as were cut."""
        cut = self.whole.get(tuple(_name(part.shape[0]) for part in parts if part.dim()))
        if cut is None:
            return result
        return result.index_select(0, torch.arange(cut.total, device=result.device))


def running_sums(sizes: Sequence[Any]) -> list[Any]:
    """Each number with those before it."""
    return list(itertools.accumulate(sizes))


def in_array(numbers: Sequence[Any]) -> Objects:
    """Numbers of a trace in an array of NumPy's."""
    array = np.empty(len(numbers), dtype=object)
    array[:] = numbers
    return array


def _name(number: object) -> Hashable:
    """Equal for numbers of a trace that are the same sum of symbols."""
    return number.node.expr if isinstance(number, torch.SymInt) else number
