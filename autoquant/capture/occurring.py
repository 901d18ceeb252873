"""Loops over the experts that occur, traced with every one of them.

Which experts the tokens of a batch have chosen, the data say; an expert without tokens adds nothing, so that a loop
over all of them computes the same. Where code asks which occur, the answer is: each; how often, what the data say, and
more often than never.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from autoquant.capture.cuts import Cuts, in_array, running_sums
from autoquant.capture.fake_tensors import WRITES, is_known
from autoquant.library_patches import lists_of_traced, pytree, without_modes

_T: Any = torch.Tensor
_CHOOSES = {torch.topk, _T.topk, torch.argsort, _T.argsort, torch.sort, _T.sort, torch.argmax, _T.argmax}
_MOVES = {
    *(_T.reshape, _T.view, _T.flatten, _T.squeeze, _T.unsqueeze, _T.clone, _T.contiguous, _T.detach, _T.long, _T.to),
    *(_T.int, torch.flatten, torch.squeeze, torch.unsqueeze, torch.reshape, _T.cpu, torch.ravel, _T.ravel),
}
_CASTS = {_T.clone, _T.contiguous, _T.detach, _T.to, _T.long, _T.int, _T.float, _T.cpu}
_SAME_SHAPE = {*_CASTS, _T.bool, torch.mul, _T.mul, _T.__mul__, _T.__and__, torch.logical_and}
_EQUAL = {torch.eq, _T.eq, _T.__eq__}
_POSITIVE = {torch.gt, _T.gt, _T.__gt__, torch.greater, _T.greater, torch.ne, _T.ne, _T.__ne__}
_ANY = {torch.any, _T.any}
_SUMS = {torch.sum, _T.sum, *_ANY}
_COUNTS = {torch.bincount, _T.bincount}
_MARKS = {torch.scatter, _T.scatter, _T.scatter_, torch.scatter_add, _T.scatter_add, _T.scatter_add_}
_FILLS = {
    **dict.fromkeys((torch.zeros, torch.zeros_like, _T.new_zeros), 0),
    **dict.fromkeys((torch.ones, torch.ones_like, _T.new_ones), 1),
}
_RUNNING = {torch.cumsum, _T.cumsum}
_JOINS = {torch.cat, torch.concat, torch.concatenate, torch.vstack}
_PERMUTES = {torch.permute, _T.permute, torch.transpose, _T.transpose, _T.t, torch.movedim, _T.movedim}
_TAKES = {_T.__getitem__, _T.__setitem__}
_TO_NUMPY = {_T.numpy, _T.__array__}


class DataList:
    """``x.tolist()`` of indices that the data say, as many as they say: good for an index and for nothing else."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


MOST = 384
"""Experts that a loop is unrolled over: each takes 0.1 s in a trace, and some 10 nodes."""


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
    total: int | None = None
    """What all of them add up to, where it is how often."""


@dataclass(frozen=True, slots=True)
class _UpTo:
    """How often the numbers up to each were chosen: running sums of how often each was."""

    counts: Tensor


@dataclass(frozen=True, slots=True)
class _Filled:
    """The same number everywhere."""

    value: int


_Known = _Chosen | _ForOne | _ForEach | _UpTo | _Filled


class EachOccurs(TorchFunctionMode):
    """Where code asks which numbers occur (experts that tokens chose), each does, and more often than never.

    Known is what was chosen from how many: ``topk(...).indices`` and the like, ``one_hot``, ``bincount``, scattered
    ones. Asked is by ``unique``, by ``nonzero`` of what is summed over all tokens, by ``any``, and by counts, whose
    numbers are those of the data: what tokens are cut by (:class:`Cuts`), or skipped where there are none.
    """

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[int, tuple[Tensor, _Known]] = {}
        """By the identity of a tensor, which is kept."""
        self.lists = ExitStack()
        self.cuts = Cuts()
        self.read: dict[int, list[Any]] = {}
        """By the identity of counts, the numbers that were read off them."""
        self.numbers: dict[int, Tensor] = {}
        """By identity, too: those that stand for every number, and what was taken of them: they have values."""

    def __enter__(self) -> EachOccurs:
        self.lists.enter_context(lists_of_traced(self._as_list))
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
        self._learn(func, args, kwargs, result)
        if func in _JOINS and (args[1] if len(args) > 1 else kwargs.get("dim", 0)) == 0:
            return self.cuts.joined(args[0] if args else kwargs["tensors"], result)
        return result

    def _as_list(self, tensor: Tensor) -> DataList | list[Any] | None:
        """``tensor.tolist()``, where it can be said."""
        if tensor.dim() == 1 and not isinstance(tensor.shape[0], int) and not tensor.is_floating_point():
            return DataList(tensor)
        return self._sizes(tensor)

    def _sizes(self, tensor: Tensor) -> list[Any] | None:
        """The numbers in a tensor [E] that says how often each was chosen, or each and those before it."""
        of = self._of(tensor)
        counts = of.counts if isinstance(of, _UpTo) else tensor
        counted = self._of(counts)
        if not isinstance(counted, _ForEach) or tuple(counts.shape) != (counted.count,):
            return None
        if counts.dtype is torch.bool or counts.is_floating_point():
            return None
        if id(counts) not in self.read:
            _check_few(counted.count)
            self.read[id(counts)] = self.cuts.sizes(counts, counted.total)
        sizes = self.read[id(counts)]
        return running_sums(sizes) if isinstance(of, _UpTo) else sizes

    def _noted(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What is made of numbers that have values has values."""
        with without_modes():
            result = func(*args, **kwargs)
        self.numbers |= {id(leaf): leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)}
        return result

    def _every(self, count: int) -> Any:
        _check_few(count)
        return self._noted(torch.arange, (count,), {})

    def _of(self, value: object) -> _Known | None:
        found = self.known.get(id(value))
        return None if found is None else found[1]

    def _answer(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What the data alone could say, None where something else is asked."""
        if not args or not isinstance(args[0], Tensor) or is_known(args[0]):
            return None
        given, of = args[0], self._of(args[0])
        if func in _COUNTS and len(args) == 1 and kwargs.get("weights") is None:
            return self._counted(given, kwargs.get("minlength", 0))
        if func in _TO_NUMPY:
            sizes = self._sizes(given)
            return None if sizes is None else in_array(sizes)
        if func is torch.ops.aten.slice:  # as export writes ``x[a:b]`` between numbers of the trace
            return self.cuts.run_of(*args)
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

    def _counted(self, chosen: Tensor, least: int) -> Tensor | None:
        """``bincount``, whose size the data say, of the size that it has where the last number was chosen."""
        of = self._of(chosen)
        count = max(least, of.count if isinstance(of, _Chosen) else 0)
        if not count:
            return None
        ones = torch.ones_like(chosen, dtype=torch.int64)
        counts = torch.zeros(count, dtype=torch.int64, device=chosen.device).scatter_add(0, chosen.long(), ones)
        self.known[id(counts)] = counts, _ForEach(0, count, _as_int(chosen.numel()))
        return counts

    def _learn(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Note what is known of a result."""
        found: _Known | None = None
        of = self._of(args[0]) if args else None
        if func in _FILLS:
            found = _Filled(_FILLS[func])
        elif func in _MARKS:
            found = self._marked(func, *args, **kwargs)
        elif func in _CHOOSES and args and args[0].dim():
            result = result[-1] if isinstance(result, tuple) else result
            dim = kwargs.get("dim", _axis(func, args))
            found = _Chosen(args[0].shape[dim]) if isinstance(dim, int) else None
        elif func is torch.nn.functional.one_hot:
            classes, total = result.shape[-1], _as_int(args[0].numel())
            count = min(of.count, classes) if isinstance(of, _Chosen) else classes
            found = _ForEach(result.dim() - 1, count, total)
        elif isinstance(of, _Chosen):
            found = of if func in _MOVES else _ForOne() if func in _EQUAL else None
        elif isinstance(of, _ForOne):
            found = of if func in _SUMS and result.dim() == 0 else None
        elif isinstance(of, _ForEach):
            found = _followed(func, args, kwargs, of, result)
        elif isinstance(of, _UpTo | _Filled):
            found = of if func in _MOVES else None
        name = getattr(func, "__name__", "")
        if name in WRITES or (name.endswith("_") and not name.endswith("__")):  # what was known held before it
            result = args[0] if args else kwargs.get("tensor")  # as torch.nn.init has it
            self.known.pop(id(result), None)
        if found is not None:
            self.known[id(result)] = result, found

    def _marked(
        self, func: Any, x: Tensor, dim: int, index: Tensor, src: Any = None, *, value: Any = None, reduce: Any = None
    ) -> _ForEach | None:
        """Ones scattered over zeros count; those that are not added count once what one row has twice."""
        written = self._of(src) if isinstance(src, Tensor) else _Filled(value if src is None else src)
        if reduce is not None or self._of(x) != _Filled(0) or written != _Filled(1):
            return None
        of, classes = self._of(index), x.shape[dim]
        added = "add" in func.__name__ or index.dim() > 1  # in a row of choices none stands twice
        count = min(of.count, classes) if isinstance(of, _Chosen) else classes
        return _ForEach(dim % x.dim(), count, _as_int(index.numel()) if added else None)


def _followed(func: Any, args: Any, kwargs: Any, of: _ForEach, result: Any) -> _ForEach | _UpTo | None:
    """What is known of a result of how often each was chosen."""
    if func in _RUNNING:
        return _UpTo(args[0]) if args[0].dim() == 1 else None
    if func in _POSITIVE:
        return replace(of, total=None) if args[1] == 0 else None
    if func in _SUMS or func in _PERMUTES:
        found = _moved(func, args, kwargs, of)
        return replace(found, total=None) if found is not None and func in _ANY else found
    if func in _CASTS and result.shape == args[0].shape:
        return of
    if func in _SAME_SHAPE and result.shape == args[0].shape:  # fewer tokens, of which each still has some
        return replace(of, total=None)
    if func in _MOVES and of.dim == args[0].dim() - 1 and result.shape[-1:] == args[0].shape[-1:]:
        return replace(of, dim=result.dim() - 1)
    return None


def _check_few(count: int) -> None:
    if count > MOST:
        raise RuntimeError(f"a loop goes through {count} experts, one by one, and {MOST} at most are traced so")


def _as_int(size: object) -> int | None:
    """A size that no data say."""
    return size if isinstance(size, int) else None


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
    return replace(of, dim=sizes.index(2 + of.dim)) if 2 + of.dim in sizes else None
