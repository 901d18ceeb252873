"""The numbers of sequences and tokens for which a forward goes another way.

Its inputs get sizes that stand for any number, and its code is followed without values: whatever it asks of a size is
noted, and a size that answers otherwise is looked for. ``if x.shape[1] % 7``, a limit in a configuration or a table
that ends are seen so, whatever they are called.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from autoquant.capture.state import kept_state
from autoquant.library_patches import pytree, questions_of_sizes
from autoquant.models.source import quiet

Sizes = tuple[int, int]
"""Sequences and tokens."""
Made = Callable[[int, int], tuple[Any, Any]]
"""Arguments of so many sequences and tokens."""

MOST_SEQUENCES, MOST_TOKENS = 64, 1024
_MOST = 8
"""Sizes that are looked at: behind a branch there may be another one."""
_TAKEN = 9
"""Up to which each number is tried where code takes the number itself."""


def sizes_that_matter(module: nn.Module, made: Made, first: Sizes) -> Iterator[Sizes]:
    """Sizes for which the code of ``module`` answers otherwise than for ``first`` or for one found before.

    ``first``: two numbers that differ, each above 1, which torch takes for one of its own.
    """
    seen, queue, looked = {first}, deque([first]), 0
    while queue and looked < _MOST:
        sizes, looked = queue.popleft(), looked + 1
        for question in _questions(module, made, sizes):
            for which in (0, 1):
                others = _otherwise(question, sizes, which)
                for other in [size for size in others if size not in seen]:
                    seen.add(other)
                    yield other
                    if len(others) == 1:
                        queue.append(other)


def _questions(module: nn.Module, made: Made, sizes: Sizes) -> list[Callable[[int, int], bool]]:
    sequences, tokens = sizes

    def named(leaf: Tensor) -> list[int | None]:
        """Which of the two numbers each size is."""
        return [
            0 if dim == 0 and size == sequences else 1 if dim == 1 and size == tokens else None
            for dim, size in enumerate(leaf.shape)
        ]

    def call(args: Any, kwargs: Any) -> None:
        with quiet(), torch.no_grad():
            module(*args, **kwargs)

    try:
        args, kwargs = made(sequences, tokens)
    except Exception:  # an input that cannot be made of this size
        return []
    leaves = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    if not any(number is not None for leaf in leaves for number in named(leaf)):
        return []
    with torch.random.fork_rng(devices=()), kept_state(module):
        return questions_of_sizes(call, args, kwargs, lambda leaf: named(leaf) if leaf.dim() > 1 else [])


def _otherwise(question: Callable[[int, int], bool], sizes: Sizes, which: int) -> list[Sizes]:
    """The smallest other number for which the answer is another one, with the other of ``sizes`` as it is.

    Where code takes the number itself (a loop, ``len``) no other one answers alike, and what it does with it is not
    known: then several.
    """
    most = (MOST_SEQUENCES, MOST_TOKENS)[which]
    all_of_them = [(number, sizes[1]) if which == 0 else (sizes[0], number) for number in range(1, most + 1)]
    if not any(question(*other) for other in all_of_them[:_TAKEN] if other != sizes):
        return all_of_them[:_TAKEN] if sizes[which] > 1 else []  # torch itself takes a 1
    return [next((other for other in all_of_them if not question(*other)), sizes)]
