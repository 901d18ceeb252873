"""Scale variables and the equations between them.

Every element of every tensor carries a label: the number of the variable that says by which power of its channel's
scale the element grows. Rules add linear equations between variables (``x = r * y`` and ``z = x + y`` in log-scales);
``solve`` finds which variables are left free, and which of them are one and the same degree of freedom.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

ZERO = 0
"""Label of an element whose value is 0: it has every scale."""
MAX_STATE = 1 << 16
"""Most variables for what one tensor carries from one call of a model to the next."""
ONE = 1
"""Label of an element of a constant: its scale is 1."""
KEPT = "it is multiplied by another scaled tensor, which keeps the scale"


@dataclass(frozen=True, slots=True)
class Reason:
    """Why a scale must be 1 or a space cannot be rotated: an operator at a place."""

    text: str
    operator: str
    at: str
    order: int
    """Position of the operator in the graph."""


@dataclass(slots=True)
class Variables:
    """Variables under construction. Label ``i`` is variable ``i``; fixed ones carry a reason."""

    count: int = 2
    reasons: dict[int, Reason] = field(default_factory=dict)
    _fixed_ids: dict[tuple[str, str, int], int] = field(default_factory=dict)
    _left: list[Ints] = field(default_factory=list)
    _right: list[Ints] = field(default_factory=list)
    _ratio: list[Floats] = field(default_factory=list)
    _order: list[Ints] = field(default_factory=list)
    _products: list[tuple[Ints, Ints, Ints, int]] = field(default_factory=list)
    _made: dict[tuple[bytes, bytes, bool], Ints] = field(default_factory=dict)
    _stored: list[Ints] = field(default_factory=list)
    _tags: list[tuple[int, Ints]] = field(default_factory=list)
    _mixed: list[Ints] = field(default_factory=list)
    _tag_cache: Ints = field(default_factory=lambda: np.zeros(2, dtype=np.int64))
    _fixed_cache: Bools = field(default_factory=lambda: np.array([True, True]))

    def __post_init__(self) -> None:
        self.reasons[ONE] = Reason("it is a constant", "constant", "", -1)

    def fresh(self, number: int, tags: int | Ints = 0) -> Tensor:
        """``number`` new free variables, as an int64 tensor of consecutive labels.

        A tagged variable stands for one scale per expert; the tag says by which grouping of the tokens.
        """
        start = self.count
        self.count += number
        if np.any(tags):
            self._tags.append((start, np.broadcast_to(np.asarray(tags, dtype=np.int64), (number,))))
        return torch.arange(start, start + number)

    def state(self, shape: Sequence[int], along: Collection[int]) -> Tensor:
        """New free variables for a tensor of some shape, the same ones along some dimensions.

        One with very many elements has the same ones along its first and its longest dimensions too.
        """
        sizes = [1 if d in along else size for d, size in enumerate(shape)]
        for dim in (0, *sorted(range(len(sizes)), key=lambda d: -sizes[d])):
            if math.prod(sizes) > MAX_STATE:
                sizes[dim] = 1
        return self.fresh(math.prod(sizes)).view(sizes).expand(tuple(shape))

    @property
    def tagged(self) -> bool:
        return bool(self._tags)

    def tags(self, labels: Tensor) -> Tensor:
        """The tag of every label, 0 for none."""
        if len(self._tag_cache) < self.count:
            cache = np.zeros(self.count, dtype=np.int64)
            for start, tags in self._tags:
                cache[start : start + len(tags)] = tags
            self._tag_cache = cache
        return torch.from_numpy(self._tag_cache)[labels]

    def mix(self, labels: Tensor) -> None:
        """Tokens of different experts meet here: every tagged label must be one scale for all experts."""
        tagged = torch.unique(labels[self.tags(labels) != 0])
        if tagged.numel():
            self._mixed.append(tagged.numpy())

    def mixed(self) -> Ints:
        return np.concatenate(self._mixed) if self._mixed else np.zeros(0, dtype=np.int64)

    def fixed(self, reason: Reason) -> int:
        """The label for scale 1 because of ``reason``; one label per site and text."""
        key = (reason.text, reason.at, reason.order)
        if key not in self._fixed_ids:
            label = self.count
            self.count += 1
            self._fixed_ids[key] = label
            self.reasons[label] = reason
        return self._fixed_ids[key]

    def is_fixed(self, labels: Tensor) -> Tensor:
        """Where the label is known to be fixed already (true also for ZERO), bool tensor of the labels' shape."""
        if len(self._fixed_cache) < self.count:
            flags = np.zeros(self.count, dtype=np.bool_)
            flags[[ZERO, *self.reasons]] = True
            self._fixed_cache = flags
        return torch.from_numpy(self._fixed_cache)[labels]

    def all_fixed(self, labels: Tensor) -> bool:
        """True if every label is known to be fixed already."""
        return bool(self.is_fixed(*without_repeats(labels)).all())

    def equal(self, left: Tensor, right: Tensor, order: int, ratio: float = 1.0) -> None:
        """Demand ``left = ratio * right`` elementwise (log-scales, same shape). ZERO on either side demands nothing."""
        a, b = without_repeats(*torch.broadcast_tensors(left, right))
        demands = (a != ZERO) & (b != ZERO)
        if ratio == 1.0:
            demands &= a != b
        a_ids, b_ids, _ = _unique_pairs_inverse(a[demands], b[demands])
        if len(a_ids):
            self._left.append(a_ids)
            self._right.append(b_ids)
            self._ratio.append(np.full(len(a_ids), ratio))
            self._order.append(np.full(len(a_ids), order, dtype=np.int64))

    def merge(self, left: Tensor, right: Tensor, order: int) -> Tensor:
        """Labels of a tensor whose elements come from either side: both must agree; ZERO gives way."""
        shape = torch.broadcast_shapes(left.shape, right.shape)
        a, b = without_repeats(*torch.broadcast_tensors(left, right))
        self.equal(a, b, order)
        return torch.where(a == ZERO, b, a).expand(shape)

    def merge_along(self, labels: Tensor, dims: Sequence[int], order: int, keepdim: bool = False) -> Tensor:
        """Labels of a reduction: all elements along ``dims`` must agree."""
        if not dims or labels.ndim == 0:
            return labels
        top = labels.amax(tuple(dims), keepdim=True)
        self.equal(labels, top, order)
        return top if keepdim else top.squeeze(tuple(dims))

    def fix(self, labels: Tensor, reason: Reason) -> None:
        """Demand scale 1 for every label."""
        (labels,) = without_repeats(labels)
        free = labels[~self.is_fixed(labels)]
        if free.numel():
            self.equal(free, torch.tensor(self.fixed(reason)), reason.order)

    def power(self, labels: Tensor, exponent: float, order: int) -> Tensor:
        """Labels of ``x ** exponent``."""
        if exponent == 1.0:
            return labels
        shape = labels.shape
        (labels,) = without_repeats(labels)
        free = ~self.is_fixed(labels)
        out = labels.clone()
        if bool(free.any()):
            ids, inverse = torch.unique(labels[free], return_inverse=True)
            powers = self.fresh(len(ids), self.tags(ids).numpy())
            self.equal(powers, ids, order, exponent)
            out[free] = powers[inverse]
        return out.expand(shape)

    def product(self, left: Tensor, right: Tensor, order: int, *, stored: bool = False) -> Tensor:
        """Labels of ``left * right``: log-scales add. A side with scale 1 passes the other through at once.

        ``stored``: both sides may keep a scale where nothing reads the product by itself (``factors``). The solution
        then does not say what its own is.
        """
        shape = torch.broadcast_shapes(left.shape, right.shape)
        a, b = without_repeats(*torch.broadcast_tensors(left, right))
        a_fixed, b_fixed = self.is_fixed(a), self.is_fixed(b)
        out = torch.where(a_fixed, b, a)
        out = torch.where((a == ZERO) | (b == ZERO), torch.tensor(ZERO), out)
        both = ~a_fixed & ~b_fixed
        if bool(both.any()):
            x, y, inverse = _unique_pairs_inverse(a[both], b[both])
            key = x.tobytes(), y.tobytes(), stored  # the same product again, such as that of another token
            if key not in self._made:
                tags = torch.maximum(self.tags(torch.from_numpy(x)), self.tags(torch.from_numpy(y)))
                self._made[key] = self.fresh(len(x), tags.numpy()).numpy()
                self._products.append((self._made[key], x, y, order))
                if stored:
                    self._stored.append(self._made[key])
            out = out.clone()
            out[both] = torch.from_numpy(self._made[key][inverse])
        return out.expand(shape)

    def factors(self, labels: Tensor) -> tuple[Tensor, Tensor] | None:
        """The labels of what was multiplied where all of ``labels`` are products; ZERO of ZERO."""
        shape = labels.shape
        (labels,) = without_repeats(labels)
        ids, inverse = np.unique(labels.numpy(), return_inverse=True)
        found = np.zeros((2, len(ids)), dtype=np.int64)
        for z, x, y, _ in self._products:
            here = (ids >= z[0]) & (ids <= z[-1])  # those of one product are numbered one after the other
            found[:, here] = x[ids[here] - z[0]], y[ids[here] - z[0]]
        if bool((found[0] == ZERO)[ids != ZERO].any()) or not ids.any():
            return None
        one, other = (torch.from_numpy(side[inverse]).view(labels.shape).expand(shape) for side in found)
        return one, other

    def solve(self, keep: Bools) -> Solution:
        """Solve all equations.

        ``keep`` marks, per variable, the rows of linears: where a product has two free factors one of them must be
        given up, and a lone parameter vector (a gain) is given up before the row of a linear is.
        """
        equations = Equations(
            _ints(self._left), _ints(self._right), np.concatenate([np.zeros(0), *self._ratio]), _ints(self._order)
        )
        z, x, y = (
            _ints([p[0] for p in self._products]),
            _ints([p[1] for p in self._products]),
            _ints([p[2] for p in self._products]),
        )
        order = _ints([np.full(len(product[0]), product[3], dtype=np.int64) for product in self._products])
        while True:
            solution = _components(self, equations)
            if not len(order):
                return solution
            done = np.zeros(len(z), dtype=np.bool_)
            found: list[Equations] = []
            for known, one, other, factor in ((x, z, y, 1.0), (y, z, x, 1.0), (z, x, y, -1.0)):
                hit = solution.fixed[known] & ~done
                found.append(_equations(one[hit], other[hit], factor, order[hit]))
                done |= hit
            lone = self._unread(z, x, y, solution) & ~done
            apart = solution.component[x] != solution.component[y]
            for one, other in ((x, y), (y, x)):  # z = y, so x = 1
                own = ~done & ~lone & apart & (solution.component[z] == solution.component[other])
                own &= np.abs(solution.weight[z] - solution.weight[other]) < 1e-9
                if own.any():
                    kept = self.fixed(Reason(KEPT, "mul", "", int(order[own].min())))
                    found.append(_equations(one[own], np.full(int(own.sum()), kept), 1.0, order[own]))
                done |= own
            done |= lone
            same = ~done & (solution.component[x] == solution.component[y])
            done |= same
            share = solution.weight[y] / solution.weight[x]  # log y = share * log x, so log z = (1 + share) log x
            for value in np.unique(share[same]):
                hit = same & (share == value)
                if value == -1.0:  # the scale cancels
                    found.append(_equations(z[hit], np.full(int(hit.sum()), ONE), 1.0, order[hit]))
                else:
                    found.append(_equations(z[hit], x[hit], 1.0 + float(value), order[hit]))
            if not done.any():
                found.append(self._give_up(x, y, order, solution, keep))
            equations = Equations(*(np.concatenate(parts) for parts in zip(equations, *found, strict=True)))
            z, x, y, order = z[~done], x[~done], y[~done], order[~done]

    def _unread(self, z: Ints, x: Ints, y: Ints, solution: Solution) -> Bools:
        """Where nothing depends on what is stored but other products of the same: both factors may keep a scale."""
        made = np.zeros(len(solution.component), dtype=np.bool_)
        made[_ints(self._stored)] = True
        read = np.zeros(int(solution.component.max()) + 1, dtype=np.bool_)
        read[solution.component[~made]] = True
        read[solution.component[np.concatenate([x, y])]] = True
        at = solution.component[z]
        sides = [
            solution.component[side] * 1e4 + np.round(solution.weight[side] / solution.weight[z], 3) for side in (x, y)
        ]
        for side in (np.minimum(*sides), np.maximum(*sides)):
            low, high = np.full(len(read), np.inf), np.full(len(read), -np.inf)
            np.minimum.at(low, at, side)
            np.maximum.at(high, at, side)
            read |= low < high
        unread: Bools = made[z] & ~read[at] & ~solution.fixed[z]
        return unread

    def _give_up(self, x: Ints, y: Ints, order: Ints, solution: Solution, keep: Bools) -> Equations:
        """Fix one factor of the earliest products whose factors are both free."""
        first = order == order.min()
        held = np.zeros(int(solution.component.max()) + 1, dtype=np.bool_)
        held[solution.component[: len(keep)][keep]] = True
        x_held, y_held = held[solution.component[x[first]]], held[solution.component[y[first]]]
        fewer = len(np.unique(y[first])) < len(np.unique(x[first]))  # a number per head, of channels
        chosen = np.where(x_held & (~y_held | fewer), y[first], x[first])
        reason = Reason(KEPT, "mul", "", int(order.min()))
        return _equations(chosen, np.full(len(chosen), self.fixed(reason)), 1.0, order[first])


@dataclass(frozen=True, slots=True)
class Solution:
    """What the equations leave.

    ``component[i]`` is the degree of freedom of variable ``i``, ``weight[i]`` its power (log-scale = weight * log s),
    ``fixed[i]`` whether the scale must be 1, ``reason[i]`` then a label in ``Variables.reasons``.
    """

    component: Ints
    weight: Floats
    fixed: Bools
    reason: Ints


class Equations(NamedTuple):
    """``left = ratio * right`` in log-scales, demanded by the operator at position ``order``: aligned arrays."""

    left: Ints
    right: Ints
    ratio: Floats
    order: Ints


def _equations(left: Ints, right: Ints, ratio: float, order: Ints) -> Equations:
    return Equations(left, right, np.full(len(left), ratio), order)


def _ints(parts: Sequence[Ints]) -> Ints:
    return np.concatenate([np.zeros(0, dtype=np.int64), *parts])


def _components(variables: Variables, equations: Equations) -> Solution:
    count = variables.count
    left, right, ratio, order = equations
    plain = ratio == 1.0
    coarse = _connected(count, left[plain], right[plain])
    parts = int(coarse.max()) + 1
    u, v, r, at = coarse[left[~plain]], coarse[right[~plain]], ratio[~plain], order[~plain]
    component = _connected(parts, u, v)
    weight = np.full(parts, np.nan)
    roots = np.unique(component, return_index=True)[1]
    weight[roots] = 1.0
    while np.isnan(weight).any():
        forward = np.isnan(weight[u]) & ~np.isnan(weight[v])
        weight[u[forward]] = r[forward] * weight[v[forward]]
        backward = np.isnan(weight[v]) & ~np.isnan(weight[u])
        weight[v[backward]] = weight[u[backward]] / r[backward]
    reason_of = np.zeros(int(component.max()) + 1, dtype=np.int64)
    clashes = np.flatnonzero(np.abs(weight[u] - r * weight[v]) > 1e-9)
    for edge in clashes[np.unique(component[u[clashes]], return_index=True)[1]]:
        label = variables.fixed(Reason("the scale is needed to two different powers", "", "", int(at[edge])))
        reason_of[component[u[edge]]] = label
    full = component[coarse]
    labels = np.array(sorted(variables.reasons, key=lambda label: -variables.reasons[label].order), dtype=np.int64)
    labels = labels[labels < count]
    labels = np.concatenate([labels[labels == ONE], labels[labels != ONE]])
    reason_of[full[labels]] = labels  # the earliest site is written last and wins
    return Solution(full, weight[coarse], reason_of[full] != 0, reason_of[full])


def _connected(count: int, left: Ints, right: Ints) -> Ints:
    graph = coo_array((np.ones(len(left), dtype=np.int8), (left, right)), shape=(count, count))
    labels: Ints = connected_components(graph, directed=False)[1].astype(np.int64)
    return labels


WORTH_NARROWING = 1 << 12
"""From this many elements on it is cheaper to look for repetitions than to sort them."""


def without_repeats(*labels: Tensor) -> tuple[Tensor, ...]:
    """Tensors of one shape, narrowed to size 1 along every dimension in which none of them changes."""
    if labels[0].numel() < WORTH_NARROWING:
        return labels
    for dim in range(labels[0].ndim):
        if labels[0].shape[dim] > 1 and all(_repeats(part, dim) for part in labels):
            labels = tuple(part.narrow(dim, 0, 1) for part in labels)
    return labels


def _repeats(labels: Tensor, dim: int) -> bool:
    if labels.stride(dim) == 0:
        return True
    first, last = labels.narrow(dim, 0, 1), labels.narrow(dim, labels.shape[dim] - 1, 1)
    return torch.equal(first, last) and bool((labels == first).all())  # most that change differ at their ends already


def _unique_pairs_inverse(left: Tensor, right: Tensor) -> tuple[Ints, Ints, Ints]:
    a, b = left.reshape(-1).numpy(), right.reshape(-1).numpy()
    keys, inverse = np.unique((a << 32) | b, return_inverse=True)
    return keys >> 32, keys & 0xFFFFFFFF, inverse
