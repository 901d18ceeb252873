"""Loops over the experts that occur, traced with every one of them.

Which experts the tokens of a batch have chosen, the data say; an expert without tokens adds nothing, so that a loop
over all of them computes the same. Where code asks which occur, or how often, the answer is: each.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from autoquant.capture.fake_tensors import is_known
from autoquant.library_patches import lists_of_traced, pytree, without_modes

_T: Any = torch.Tensor
_CHOOSES = {torch.topk, _T.topk, torch.argsort, _T.argsort, torch.sort, _T.sort, torch.argmax, _T.argmax}
_MOVES = {
    *(_T.reshape, _T.view, _T.flatten, _T.squeeze, _T.unsqueeze, _T.clone, _T.contiguous, _T.detach, _T.long, _T.to),
    *(_T.int, torch.flatten, torch.squeeze, torch.unsqueeze, torch.reshape),
}
_SAME_SHAPE = {
    *(_T.clone, _T.contiguous, _T.detach, _T.to, _T.long, _T.int, _T.float, _T.bool, torch.mul, _T.mul, _T.__mul__),
    *(_T.__and__, torch.logical_and),
}
_EQUAL = {torch.eq, _T.eq, _T.__eq__}
_POSITIVE = {torch.gt, _T.gt, _T.__gt__, torch.greater, _T.greater, torch.ne, _T.ne, _T.__ne__}
_ANY = {torch.any, _T.any}
_SUMS = {torch.sum, _T.sum, *_ANY}
_COUNTS = {torch.bincount, _T.bincount}
_PERMUTES = {torch.permute, _T.permute, torch.transpose, _T.transpose, _T.t, torch.movedim, _T.movedim}
_TAKES = {_T.__getitem__, _T.__setitem__}


class DataList:
    """``x.tolist()`` of indices that the data say, as many as they say: good for an index and for nothing else."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def _as_list(tensor: Tensor) -> DataList | None:
    whole = tensor.dim() == 1 and not isinstance(tensor.shape[0], int) and not tensor.is_floating_point()
    return DataList(tensor) if whole else None


MOST = 64
"""Experts that a loop is unrolled over: of several hundred, tracing took longer than all else by far."""


@dataclass(frozen=True, slots=True)
class _Chosen:
    """Numbers of which ``count`` there are: 0, 1, ..."""

    count: int


@dataclass(frozen=True, slots=True)
class _ForOne:
    """Where one number was chosen: somewhere it was."""


@dataclass(frozen=True, slots=True)
class _ForEach:
    """Where each number was chosen, or how often: ``dim`` goes through the numbers, of which the first ``count`` occur.

    A last class stands for no expert, where code has one more than could be chosen.
    """

    dim: int
    count: int


class EachOccurs(TorchFunctionMode):
    """Where code asks which numbers occur (experts that tokens chose), or how often each does, each does.

    Known is what was chosen from how many: ``topk(...).indices`` and the like, ``one_hot``, ``bincount(minlength=)``.
    Asked is by ``unique``, by ``nonzero`` of what is summed over all tokens, by ``any``, and by counts. What counts
    are used for other than to skip what has none cannot be read off, and raises RuntimeError.
    """

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[int, tuple[Tensor, _Chosen | _ForOne | _ForEach]] = {}
        """By the identity of a tensor, which is kept."""
        self.lists = ExitStack()
        self.counts: list[Tensor] = []
        self.numbers: dict[int, Tensor] = {}
        """By identity, too: those that stand for every number, and what was taken of them: they have values."""

    def __enter__(self) -> EachOccurs:
        self.lists.enter_context(lists_of_traced(_as_list))
        super().__enter__()  # type: ignore[no-untyped-call]  # torch's own
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]  # torch's own
        self.lists.close()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = pytree.tree_leaves((args, kwargs))
        if any(isinstance(leaf, DataList) for leaf in leaves):
            if func not in _TAKES:
                raise RuntimeError("a list made of the data is used for more than an index")
            args = pytree.tree_map_only(DataList, lambda leaf: leaf.tensor, args)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if tensors and all(id(tensor) in self.numbers for tensor in tensors):
            return self._noted(func, args, kwargs)
        answer = self._answer(func, args, kwargs)
        if answer is not None:
            return answer
        result = func(*args, **kwargs)
        if isinstance(result, Tensor) and any(leaf is made for leaf in leaves for made in self.counts):
            raise RuntimeError("what is counted of the data is used for more than to skip what has none")
        self._learn(func, args, kwargs, result)
        return result

    def _noted(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What is made of numbers that have values has values."""
        with without_modes():
            result = func(*args, **kwargs)
        self.numbers |= {id(leaf): leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)}
        return result

    def _every(self, count: int) -> Any:
        if count > MOST:
            raise RuntimeError(f"a loop goes through {count} experts, one by one, and {MOST} at most are traced so")
        return self._noted(torch.arange, (count,), {})

    def _of(self, value: object) -> object:
        found = self.known.get(id(value))
        return None if found is None else found[1]

    def _answer(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What the data alone could say, None where something else is asked."""
        if not args or not isinstance(args[0], Tensor) or is_known(args[0]):
            return None
        given, of = args[0], self._of(args[0])
        if func in _COUNTS and "minlength" in kwargs:
            with without_modes():
                self.counts.append(torch.ones(int(kwargs["minlength"]), dtype=torch.int64))
            return self.counts[-1]
        if func in (torch.unique, _T.unique) and isinstance(of, _Chosen) and not _asks_for_more(args, kwargs):
            return self._every(of.count)
        if func in (torch.nonzero, _T.nonzero, torch.where) and isinstance(of, _ForEach) and given.dim() == 1:
            every = self._every(of.count)
            in_tuple = func is torch.where or kwargs.get("as_tuple")
            return (every,) if in_tuple else self._noted(_T.unsqueeze, (every, 1), {})
        if isinstance(of, _ForOne) and given.dim() == 0:
            if func is _T.__bool__:
                return True
            if func in (*_EQUAL, *_POSITIVE) and args[1] == 0:
                return func in _POSITIVE
        return None

    def _learn(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Note what is known of a result."""
        found: _Chosen | _ForOne | _ForEach | None = None
        of = self._of(args[0]) if args else None
        if func in _CHOOSES and args and args[0].dim():
            result = result[-1] if isinstance(result, tuple) else result
            dim = kwargs.get("dim", _axis(func, args))
            found = _Chosen(args[0].shape[dim]) if isinstance(dim, int) else None
        elif func is torch.nn.functional.one_hot:
            classes = result.shape[-1]
            found = _ForEach(result.dim() - 1, min(of.count, classes) if isinstance(of, _Chosen) else classes)
        elif isinstance(of, _Chosen):
            found = of if func in _MOVES else _ForOne() if func in _EQUAL else None
        elif isinstance(of, _ForOne):
            found = of if func in _SUMS and result.dim() == 0 else None
        elif isinstance(of, _ForEach):
            same = func in _SAME_SHAPE and result.shape == args[0].shape  # fewer tokens, of which each still has some
            found = of if same or (func in _POSITIVE and args[1] == 0) else None
            if func in _PERMUTES or func in _SUMS:
                found = _moved(func, args, kwargs, of)
            if func in _MOVES and of.dim == args[0].dim() - 1 and result.shape[-1:] == args[0].shape[-1:]:
                found = _ForEach(result.dim() - 1, of.count)
        if found is not None:
            self.known[id(result)] = result, found


def _asks_for_more(args: Any, kwargs: Any) -> bool:
    """Whether ``unique`` is to return more than the numbers, or goes along one dimension."""
    more = ("return_inverse", "return_counts")
    return len(args) > 1 or kwargs.get("dim") is not None or any(kwargs.get(name) for name in more)


def _axis(func: Any, args: Any) -> int | None:
    """The dimension along which something is chosen; None for that of all elements."""
    position = 2 if func in (torch.topk, _T.topk) else 1
    if len(args) > position:
        return int(args[position])
    return None if func in (torch.argmax, _T.argmax) else -1


def _moved(func: Any, args: Any, kwargs: Any, of: _ForEach) -> _ForEach | None:
    """Where the dimension of the numbers is after ``func``, seen on sizes that tell dimensions apart."""
    with without_modes():
        probe = torch.empty(tuple(range(2, 2 + args[0].dim())), device="meta")
        sizes = func(probe, *args[1:], **kwargs).shape
    return _ForEach(sizes.index(2 + of.dim), of.count) if 2 + of.dim in sizes else None
