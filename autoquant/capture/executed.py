"""What each block of a model does when it runs, operator by operator: blocks that do the same need one representative.

A forward may branch on its layer's number, call what a closure holds, be patched, or have hooks; the loop over the
blocks may do something of its own after one of them. None of it shows in modules, shapes and attributes, all of it in
the operators that run. The model is run once without weights. Two blocks are alike where they call the same operators
on the same arguments: tensors are told apart by where they come from (a parameter of the block, an operator of the
block, the block before it), tensors of known values by their values, and everything else by equality. A number that
an activation is multiplied by counts by its sign alone, since no symmetry depends on the value of a factor.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from autoquant.library_patches import FakeTensor, TorchDispatchMode, pytree, without_modes

Signature = tuple[Any, ...]
Block = tuple[str, int]
"""Path of the stack, number of the block."""

_FACTORS = frozenset(("mul", "div", "mul_", "div_"))
OUTSIDE = "outside"
"""Begins the source of a tensor that is made outside of the block."""

_MOST_VALUES = 1 << 22
"""Elements of a tensor of known values that are compared; a larger one is like no other."""


@dataclass(frozen=True, slots=True)
class Between:
    """What runs after one block and before another one."""

    before: Block
    after: Block
    signature: Signature


@dataclass(frozen=True, slots=True)
class Executed:
    """What ran. ``calls[path][i]``: a signature for each call of block i of a stack, in order."""

    calls: Mapping[str, tuple[tuple[Signature, ...], ...]]
    between: tuple[Between, ...]
    blocks: tuple[Block | None, ...] = ()
    """Which block each number of a tensor's source stands for, None where what ran was in none."""
    outside: Mapping[int, Signature] = field(default_factory=dict)
    """What ran in no block, by that number."""


def execute(module: nn.Module, stacks: Mapping[str, int], forward: Callable[[nn.Module], object]) -> Executed:
    """Run ``forward(module)`` and watch the blocks of ``stacks`` (path and number of blocks). Raises what it raises."""
    watch = _Watch(module, tuple(stacks))
    hooks: list[Any] = [
        module.register_forward_pre_hook(lambda *_: watch.start(), prepend=True),
        module.register_forward_hook(lambda *_: watch.stop(), always_call=True),
    ]
    for path, length in stacks.items():
        for i in range(length):
            block = module.get_submodule(f"{path}.{i}")
            hooks.append(block.register_forward_pre_hook(partial(watch.enter, (path, i)), prepend=True))
            hooks.append(block.register_forward_hook(watch.leave))
    try:
        forward(module)
    finally:
        for hook in hooks:
            hook.remove()
    return watch.executed(stacks)


def loose(signature: Signature) -> Signature:
    """``signature`` with whatever comes from outside of the block numbered by first use.

    The first block takes from the embeddings what others take from the block before them.
    """
    numbers: dict[Any, int] = {}

    def renamed(value: Any) -> Any:
        if not isinstance(value, tuple):
            return value
        if value and value[0] == OUTSIDE:
            return OUTSIDE, numbers.setdefault(value, len(numbers))
        return tuple(map(renamed, value))

    return tuple(map(renamed, signature))


def values_of(tensor: Tensor) -> object:
    """Hashable: equal for tensors of equal values, and where these are not known, of equal shape and dtype."""
    described = tuple(tensor.shape), tensor.dtype
    if isinstance(tensor, FakeTensor) or tensor.is_meta or tensor.layout is not torch.strided:
        return described
    if tensor.numel() > _MOST_VALUES:
        return *described, id(tensor)
    with without_modes():  # a mode of fake tensors would make the copy a fake one
        return *described, tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@dataclass(slots=True)
class _Segment:
    """What runs in one call of a block, or between two."""

    number: int
    block: Block | None
    """None between blocks."""
    names: Mapping[int, str] = field(default_factory=dict)
    """Of the block's own tensors, by id."""
    rows: list[Signature] = field(default_factory=list)
    last: Block | None = None
    """Between blocks: the one that ran before."""


class _Watch(TorchDispatchMode):
    """Notes every operator while it is on, in the segment that runs."""

    def __init__(self, module: nn.Module, paths: Sequence[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no types for it
        self.module, self.paths = module, paths
        self.on = False
        self._forget()

    def _forget(self) -> None:
        self.segments: list[_Segment] = []
        self.running: list[_Segment] = []
        self.made: dict[int, tuple[int, Signature]] = {}
        self.names: dict[int, str] = {}
        self.seen: dict[int, int] = {}
        self.alive: list[object] = []  # an id must not be given to another tensor
        self.firsts: dict[str, int] = {}

    def start(self) -> None:
        if self.on:  # a model that calls itself
            return
        self._forget()  # of a run that failed
        tensors = (*self.module.named_parameters(), *self.module.named_buffers())
        self.names = {id(tensor): name for name, tensor in tensors}
        self._begin(None, {}, None)
        self.on = True
        self.__enter__()  # type: ignore[no-untyped-call]  # torch has no types for it

    def stop(self) -> None:
        if self.on:
            self.on = False
            self.__exit__(None, None, None)  # type: ignore[no-untyped-call]  # torch has no types for it

    def enter(self, block: Block, module: nn.Module, args: Any) -> None:
        if self.on:
            own = {id(tensor): name for name, tensor in (*module.named_parameters(), *module.named_buffers())}
            self.firsts.setdefault(block[0], len(self.segments))
            self._begin(block, own, None)

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if not self.on:
            return
        ended = self.running.pop()
        results = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
        ended.rows.append(("returns", *(self._origin(leaf, ended) for leaf in results)))
        for number, leaf in enumerate(results):  # what is handed on from layer to layer comes from the last one
            self.made[id(leaf)] = ended.number, ("returned", number)
        self.alive += results
        if self.running[-1].block is None:  # else a block within a block
            self.running.pop()
            self._begin(None, {}, ended.block)

    def _begin(self, block: Block | None, names: Mapping[int, str], last: Block | None) -> None:
        segment = _Segment(len(self.segments), block, names, [], last)
        self.segments.append(segment)
        self.running.append(segment)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        segment = self.running[-1]
        loosely = func.overloadpacket.__name__ in _FACTORS
        given = tuple(self._described(arg, segment, loosely) for arg in args)
        named = tuple((key, self._described(arg, segment)) for key, arg in (kwargs or {}).items())
        result = func(*args, **(kwargs or {}))
        made = []
        for number, leaf in enumerate(pytree.tree_leaves(result)):
            if isinstance(leaf, Tensor):
                if func.overloadpacket.__name__ != "lift_fresh":  # a constant of the code: told by its values
                    self.made[id(leaf)] = segment.number, ("made", len(segment.rows), number)
                self.alive.append(leaf)
                made.append((tuple(leaf.shape), leaf.dtype))
        if made:  # else it asks for a device or a number, which what follows shows
            segment.rows.append((str(func), given, named, tuple(made)))
        return result

    def _described(self, value: Any, segment: _Segment, factor: bool = False) -> Any:
        if isinstance(value, Tensor):
            return self._origin(value, segment)
        if isinstance(value, list | tuple):
            return tuple(self._described(item, segment) for item in value)
        if isinstance(value, bool | str) or not isinstance(value, int | float):
            return value if value.__hash__ is not None else repr(value)
        if factor:
            return "factor", math.isfinite(value) and (value > 0) - (value < 0)
        return type(value), value if value == value else "nan"

    def _origin(self, tensor: Tensor, segment: _Segment) -> Signature:
        if id(tensor) in segment.names:
            return "own", segment.names[id(tensor)]
        if id(tensor) in self.made:
            number, what = self.made[id(tensor)]
            if number == segment.number:
                return "here", *what
            block = segment.block or segment.last
            first = self.firsts[block[0]] if block is not None else 0
            if number < first or number == first < segment.number - 2:
                return OUTSIDE, "at", number, *what
            return OUTSIDE, "back", segment.number - number, *what
        if id(tensor) in self.names:
            return OUTSIDE, "named", self._relative(self.names[id(tensor)], segment)
        if isinstance(tensor, FakeTensor) or tensor.is_meta:
            self.alive.append(tensor)
            return OUTSIDE, "given", self.seen.setdefault(id(tensor), len(self.seen))
        return "known", values_of(tensor)

    def _relative(self, name: str, segment: _Segment) -> object:
        """A name in the block that ran last, or in the next one, without their numbers."""
        path = next((path for path in self.paths if name.startswith(f"{path}.")), None)
        if segment.last is None or path is None:
            return name
        number, _, rest = name.removeprefix(f"{path}.").partition(".")
        return path, int(number) - segment.last[1], rest

    def executed(self, stacks: Mapping[str, int]) -> Executed:
        calls: dict[str, list[list[Signature]]] = {path: [[] for _ in range(length)] for path, length in stacks.items()}
        between = []
        for segment in self.segments:
            if segment.block is not None:
                path, i = segment.block
                calls[path][i].append(tuple(segment.rows))
        for one, other in itertools.pairwise(self.segments):
            if one.last is not None and other.block is not None:
                between.append(Between(one.last, other.block, tuple(one.rows)))
        blocks = tuple(segment.block for segment in self.segments)
        outside = {segment.number: tuple(segment.rows) for segment in self.segments if segment.block is None}
        return Executed(
            {path: tuple(map(tuple, found)) for path, found in calls.items()}, tuple(between), blocks, outside
        )
