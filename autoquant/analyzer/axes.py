"""The axes of parameters, as axes of variables.

A weight ``W[o, i]`` may be replaced by ``r[o] * W[o, i] * c[i]``: it has one family of variables for its rows and one
for its columns, whatever transposes, slices and reshapes it goes through before it is used. A norm weight, a bias or
any other parameter used as a tensor has one family, per affine offset (``1 + w`` is not ``w``).

Stacked weights (the experts of a mixture) are used through a product that lets the data choose the matrix per token.
Then one family stands for the same axis of *every* expert (``keyed``), and its scales may differ from expert to expert
for as long as nothing mixes the tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from autoquant.analyzer.variables import Ints, Reason, Variables

MAX_ELEMENTS = 1 << 24
"""Largest parameter that is labelled element by element (as a tensor, or through a reshape that must copy)."""

UNKNOWN_USE = "something else"
"""How a parameter is used where no rule says what it is for."""
SEVERAL = "a weight that is no matrix in its last two dimensions"
"""How a weight is used whose channels lie along other dimensions, or along several at once."""

Role = Literal["row", "column", "leaf", "table"]


@dataclass(frozen=True, slots=True)
class Param:
    """A parameter as it is seen at a node: its name, and the data movement since."""

    name: str
    full_shape: tuple[int, ...]
    views: tuple[Callable[[Tensor], Tensor], ...] = ()
    shape: tuple[int, ...] = ()
    key: int = 0
    """Non-zero after rows (experts, tokens) were picked by data: the grouping they were picked by."""

    @property
    def is_table(self) -> bool:
        """True if it is a matrix as it is stored, whose rows can be looked up."""
        return len(self.full_shape) == 2 and not self.views

    def viewed(self, move: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> Param:
        return replace(self, views=(*self.views, move), shape=shape)

    def picked(self, shape: tuple[int, ...], key: int) -> Param:
        """Matrices of a stack (or rows of a table) that the data choose by an index of any shape."""

        def any_of(labels: Tensor) -> Tensor:  # keyed labels are the same for all entries of the stack
            return labels[:1].expand(shape) if labels.ndim == len(shape) else labels[0].expand(shape)

        return Param(self.name, self.full_shape, (any_of,), shape, key)

    def replay(self, labels: Tensor) -> Tensor:
        for move in self.views:
            labels = move(labels)
        return labels

    @property
    def is_run_of_rows(self) -> bool:
        """True if it is seen as two or more consecutive rows of a matrix that has more of them."""
        if len(self.full_shape) != 2 or self.key or len(self.shape) < 2:
            return False
        rows, width = (torch.arange(size) for size in self.full_shape)
        picked, columns = (self.replay(part.expand(self.full_shape)) for part in (rows[:, None], width))
        if columns.shape[-1] != len(width) or bool((columns != width).any()):
            return False
        run = picked[..., 0].reshape(-1)
        return bool((picked == picked[..., :1]).all()) and 1 < len(run) < len(rows) and bool((run.diff() == 1).all())


@dataclass(frozen=True, slots=True)
class Axis:
    """Consecutive variables for one axis of one parameter.

    Position ``p`` is ``stack_index * size_of_dim + index``, and ``stack`` is None for the plain axis. A ``keyed``
    family holds the positions of one stacked matrix only.
    """

    param: str
    role: Role
    dim: int
    stack: int | None
    offset: int
    keyed: int
    start: int
    count: int
    full_shape: tuple[int, ...]
    order: int
    """Where in the graph it was met first."""


@dataclass(frozen=True, slots=True)
class Factors:
    """A weight as a matrix: the labels of its columns and rows, and the parameter's dimensions that they are."""

    columns: Tensor
    rows: Tensor
    column_dim: int
    """-1 where they lie along several dimensions, which no slot can say: their labels are fixed."""
    row_dim: int
    """The same of the rows."""
    matrix: bool = True
    """False where these are not the last two dimensions: a weight that no quantized linear holds."""


@dataclass(slots=True)
class Axes:
    """All axes of an analysis, and which way each parameter is used."""

    variables: Variables
    _by_key: dict[tuple[object, ...], Axis] = field(default_factory=dict)
    _labels: dict[tuple[object, ...], Tensor] = field(default_factory=dict)
    """Of each axis: every expert of a stack shows a part of them, and keeps no copy of its own."""
    _uses: dict[str, dict[str, Reason]] = field(default_factory=dict)
    _sites: dict[str, set[int]] = field(default_factory=dict)
    """By parameter, the operators that use it, by their order."""
    _seen: dict[str, Tensor] = field(default_factory=dict)
    """Which elements of the parameters that are used as tensors some view shows."""

    def all(self) -> list[Axis]:
        """In order of their variables."""
        return sorted(self._by_key.values(), key=lambda family: family.start)

    def axis(
        self, param: Param, dim: int, role: Role, here: Reason, stacked: bool, *, depthwise: bool = False
    ) -> Tensor:
        """Labels of one axis of a weight: ``[size]``, or ``[stack, size]`` where ``stacked`` and not keyed.

        ``depthwise``: rows and columns are one and the same dimension, and two families all the same.
        """
        size = param.full_shape[dim]
        stack = int(np.prod(param.full_shape[:-2])) if stacked and len(param.full_shape) > 2 else None
        keyed = param.key if stack else 0
        count = size if keyed or not stack else stack * size
        labels = self._get(param, role, dim, stack, 0, keyed, count, here, apart=depthwise and role == "row")
        self._use(param, "a table" if role == "table" else "a weight per expert" if keyed else "a weight", here)
        return labels if keyed or not stack else labels.view(stack, size)

    def leaf(self, param: Param, offset: int, here: Reason) -> Tensor | None:
        """Labels of a parameter used as a tensor, in the shape it is seen in; None if it is too large."""
        shape = param.full_shape
        self._use(param, f"a tensor{' plus 1' * offset}{' by data' if param.key else ''}", here)
        if int(np.prod(shape)) > MAX_ELEMENTS or (param.key and len(shape) > 2):
            return None
        wide = [dim for dim, size in enumerate(shape) if size > 1]
        if param.key:
            base = self._get(param, "leaf", len(shape) - 1, shape[0], offset, param.key, int(np.prod(shape[1:])), here)
            base = base.view(1, *shape[1:]).expand(shape)
        else:
            dim = wide[-1] if wide else max(len(shape) - 1, 0)
            stack = int(np.prod(shape[:dim])) if len(wide) > 1 else None
            base = self._get(param, "leaf", dim, stack, offset, 0, int(np.prod(shape)), here).view(shape)
        seen = self._seen.setdefault(param.name, torch.zeros(int(np.prod(shape)), dtype=torch.bool))
        if not param.views or param.key:
            seen.fill_(True)
        else:
            seen[param.replay(torch.arange(len(seen)).view(shape)).reshape(-1)] = True
        return param.replay(base)

    def factors(self, param: Param, contracted: int, output: int, here: Reason) -> Factors | None:
        """Column and row labels of a weight seen as a matrix (or a stack of them) of ``param.shape``.

        ``contracted`` and ``output`` are dimensions of the view. Returns labels with the other one removed, or None
        where the view mixes rows and columns.
        """
        found = self._matrix(param, (contracted,), (output,), here)
        if found is None:
            return None
        columns, rows = (
            labels.select(dim, 0)
            if _constant_along(labels, dim)
            else self.variables.merge_along(labels, [dim], here.order)  # a stack whose matrices lie side by side
            for labels, dim in ((found.columns, output), (found.rows, contracted))
        )
        return replace(found, columns=columns, rows=rows)

    def contraction(
        self, param: Param, contracted: Collection[int], kept: Collection[int], here: Reason
    ) -> Factors | None:
        """Column and row labels of a weight of which several dimensions of the view are summed, or several kept.

        Labels have all dimensions of the view, of size 1 where they do not change. None where the view mixes rows and
        columns, or the weight is no matrix in its last two dimensions.
        """
        found = self._matrix(param, contracted, kept, here)
        if found is None:
            return None
        return replace(found, columns=_narrowed(found.columns), rows=_narrowed(found.rows))

    def _matrix(self, param: Param, contracted: Collection[int], kept: Collection[int], here: Reason) -> Factors | None:
        """Labels of all dimensions of the view, of the columns that change along ``contracted`` and the rows."""
        if len(param.full_shape) < 2:
            return None
        lead = param.full_shape[:-2]
        column, row = None, None
        for dim in (len(param.full_shape) - 2, len(param.full_shape) - 1):
            probe = torch.arange(param.full_shape[dim], dtype=torch.int32)
            seen = self._spread(param, probe.view(*(1,) * len(lead), -1), dim)
            if seen is None:
                return None
            if all(_constant_along(seen, d) for d in kept):
                column = dim
            if all(_constant_along(seen, d) for d in contracted) and (row is None or row == column):
                row = dim
        if column is None or row is None or column == row:
            return None if param.key else self._tensor(param, contracted, kept, here)
        columns = self._seen_axis(param, column, "column", here)
        rows = self._seen_axis(param, row, "row", here)
        if columns is None or rows is None:
            return None
        return Factors(columns, rows, column, row)

    def _tensor(self, param: Param, contracted: Collection[int], kept: Collection[int], here: Reason) -> Factors | None:
        """A weight whose columns or rows are one of its dimensions, which need not be one of the last two.

        What lies along several has fixed labels. None where a dimension is of both, or neither side is a single one.
        """
        columns, rows = list[int](), list[int]()
        for dim, size in enumerate(param.full_shape):
            seen = self._along(param, torch.arange(size, dtype=torch.int32), dim)
            if seen is None:
                return None
            varying = {d for d in range(seen.ndim) if not _constant_along(seen, d)}
            if varying:
                side = columns if varying <= set(contracted) else rows if varying <= set(kept) else None
                if side is None:
                    return None
                side.append(dim)
        if not columns or not rows or 1 not in (len(columns), len(rows)):
            return None
        self._use(param, SEVERAL, here)
        sides = []
        roles: tuple[tuple[list[int], Collection[int], Role], ...] = (
            (columns, contracted, "column"),
            (rows, kept, "row"),
        )
        for dims, along, role in roles:
            if len(dims) == 1:
                labels = self._get(param, role, dims[0], None, 0, 0, param.full_shape[dims[0]], here)
                seen = self._along(param, labels, dims[0])
            else:
                sizes = [size if d in along else 1 for d, size in enumerate(param.shape)]
                seen = self.variables.fresh(int(np.prod(sizes))).view(sizes)
                what = "read" if role == "column" else "written"
                text = f"what is {what} of {param.name} lies along several of its dimensions"
                self.variables.fix(seen, replace(here, text=text))
            if seen is None:
                return None
            sides.append(seen.expand(param.shape))
        found = [dims[0] if len(dims) == 1 else -1 for dims in (columns, rows)]
        return Factors(sides[0], sides[1], found[0], found[1], matrix=False)

    def _along(self, param: Param, labels: Tensor, dim: int) -> Tensor | None:
        """Labels of one dimension spread over the full shape without memory, then moved as the weight is."""
        shape = [size if d == dim else 1 for d, size in enumerate(param.full_shape)]
        return self._moved(param, labels.view(shape).expand(param.full_shape))

    def channels(self, param: Param, here: Reason) -> tuple[Tensor, Tensor] | None:
        """Labels ``[channels]`` of dimension 0 of a depthwise convolution's weight, None where a view mixed them up.

        Two families, of what each channel reads and of what it makes: ``y = w * x``, so ``w`` can take both scales.
        """
        found = []
        roles: tuple[Role, Role] = ("column", "row")
        for role in roles:
            labels = self.axis(param, 0, role, here, stacked=False, depthwise=True)
            seen = param.replay(labels.view(-1, *(1,) * (len(param.full_shape) - 1)).expand(param.full_shape))
            if not _constant_along(seen.flatten(1), 1):
                return None
            found.append(seen.flatten(1)[:, 0])
        return found[0], found[1]

    def _seen_axis(self, param: Param, dim: int, role: Role, here: Reason) -> Tensor | None:
        lead = param.full_shape[:-2]
        labels = self.axis(param, dim, role, here, stacked=True)
        return self._spread(
            param, labels.view(*(1,) * len(lead), -1) if labels.ndim == 1 else labels.view(*lead, -1), dim
        )

    def _spread(self, param: Param, labels: Tensor, dim: int) -> Tensor | None:
        """Labels ``[*lead, size]`` spread over the full shape without memory, then moved as the weight is."""
        other = len(param.full_shape) - 1 if dim == len(param.full_shape) - 2 else len(param.full_shape) - 2
        return self._moved(param, labels.unsqueeze(other).expand(param.full_shape))

    def _moved(self, param: Param, full: Tensor) -> Tensor | None:
        try:
            seen = param.replay(full)
        except (RuntimeError, IndexError):
            return None
        copied = seen.untyped_storage().size() // seen.element_size() > MAX_ELEMENTS
        return None if copied else seen

    def conflicts(self) -> list[tuple[list[Axis], Reason]]:
        """Parameters that are used in two ways (as ``w`` and as ``1 + w``, as a weight and as a tensor) or in part."""
        return [
            ([family for family in self._by_key.values() if family.param == name], reason)
            for name, reason in (self._partly_seen() | self.contested()).items()
        ]

    def _partly_seen(self) -> dict[str, Reason]:
        """Parameters of which other inputs may use more: a table of positions as far as these tokens go."""
        found = {}
        for name, seen in self._seen.items():
            if not bool(seen.all()):
                text = "only a part of the parameter is used for these inputs, and others may use more of it"
                found[name] = self._at_last_use(name, text)
        return found

    def contested(self) -> dict[str, Reason]:
        """The parameters that are used in two ways; one of which nothing is known tells why where it is met."""
        found = {}
        for name, uses in self._uses.items():
            if len(uses) < 2:
                continue
            if UNKNOWN_USE in uses:
                last = uses[UNKNOWN_USE]
                says = last.text if last.text.partition(" ")[0] in self._uses else f"{name} is used where {last.text}"
                found[name] = replace(last, text=says)
                continue
            text = "the parameter is used in different ways: as " + " and as ".join(sorted(uses))
            found[name] = self._at_last_use(name, text)
        return found

    def _at_last_use(self, name: str, text: str) -> Reason:
        return replace(max(self._uses[name].values(), key=lambda reason: reason.order), text=text)

    def labels(self, family: Axis) -> Ints:
        return np.arange(family.start, family.start + family.count)

    def _get(
        self,
        param: Param,
        role: Role,
        dim: int,
        stack: int | None,
        offset: int,
        keyed: int,
        count: int,
        here: Reason,
        *,
        apart: bool = False,
    ) -> Tensor:
        # The role is not part of the key: a matrix that is used both ways round has one family per axis all the same.
        # Nor is the grouping: experts that are used twice are the same experts.
        key = (param.name, dim, stack, offset, bool(keyed), apart)
        if key not in self._by_key:
            start = int(self.variables.fresh(count, keyed)[0]) if count else self.variables.count
            self._by_key[key] = Axis(
                param.name, role, dim, stack, offset, keyed, start, count, param.full_shape, here.order
            )
            self._labels[key] = torch.arange(start, start + count)
        family = self._by_key[key]
        labels = self._labels[key]
        if keyed != family.keyed:  # the tag says which tokens went to which expert, and now other tokens did
            self.variables.mix(labels)
        return labels

    def other_use(self, param: Param, here: Reason, how: str = UNKNOWN_USE) -> None:
        """Note a use that gives the parameter no variables; it must be the only kind of use."""
        self._use(param, how, here)

    def used_once(self, name: str) -> bool:
        """True if one operator alone uses a parameter."""
        return len(self._sites.get(name, ())) == 1

    def used_by(self, name: str) -> frozenset[int]:
        """The operators that use a parameter, by their order."""
        return frozenset(self._sites.get(name, ()))

    def place(self, name: str, dim: int, labels: Tensor) -> Tensor | None:
        """Where on dimension ``dim`` of a matrix labels stand; None where some stand nowhere on it."""
        family = self._by_key.get((name, dim, None, 0, False, False))
        if family is None or bool(((labels < family.start) | (labels >= family.start + family.count)).any()):
            return None
        return labels - family.start

    def uses(self, name: str) -> dict[str, Reason]:
        """The ways in which a parameter is used, in words, each where it was met first."""
        return dict(self._uses.get(name, {}))

    def _use(self, param: Param, how: str, here: Reason) -> None:
        self._uses.setdefault(param.name, {}).setdefault(how, here)
        self._sites.setdefault(param.name, set()).add(here.order)


def _narrowed(labels: Tensor) -> Tensor:
    """Of size 1 along the dimensions in which no label changes."""
    for dim in range(labels.ndim):
        if _constant_along(labels, dim):
            labels = labels.narrow(dim, 0, 1)
    return labels


def _constant_along(labels: Tensor, dim: int) -> bool:
    if labels.shape[dim] == 1 or labels.stride(dim) == 0:
        return True
    spread = [d for d in range(labels.ndim) if labels.stride(d) == 0]
    for d in spread:
        labels = labels.narrow(d, 0, 1)
    if labels.numel() > MAX_ELEMENTS:
        return False
    return bool((labels == labels.narrow(dim, 0, 1)).all())
