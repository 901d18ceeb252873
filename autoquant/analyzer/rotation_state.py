"""What an activation carries through the rotation analysis, and the state of that analysis.

An activation that may be rotated is a :class:`Vector`. Each element carries the label of its *coordinate* (the variable
of the weight row that made it; equal coordinates are merged as scales are) and of its *instance* (the token or the
token of a head that it belongs to). A rotation mixes the coordinates of one instance.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, fx

from autoquant.analyzer.axes import Axes, Param
from autoquant.analyzer.interpreter import Constant, Dynamic, Site, Untracked, Value, unwieldy
from autoquant.analyzer.rotation_notes import Product, Read, Split
from autoquant.analyzer.variables import ZERO, Ints, Reason, Variables
from autoquant.aten import NO_ROTATION, operator_name
from autoquant.config.format import Norm

_next_origin = itertools.count().__next__


@dataclass(frozen=True, slots=True)
class Vector:
    """Labels of an activation, int64 tensors of its shape."""

    coordinates: Tensor
    instances: Tensor
    gain: Norm | None = None
    gain_index: Tensor | None = None
    """Position on the norm's weight, where a gain is pending."""
    table: str | None = None
    """The embedding table that alone made it: a norm applied now can be folded into the table."""
    centred: bool = False
    """The mean was subtracted: behind a LayerNorm."""
    factors: Tensor | None = None
    """A number for what each element was multiplied by on its way, None for nothing."""
    origin: int = field(default_factory=_next_origin)
    """The same for what only data movement made of one and the same tensor: parts of others cannot stand in for it."""

    def times(self, keys: Tensor) -> Tensor:
        """``factors`` after a product with the factors that ``keys`` number."""
        before = torch.zeros_like(self.coordinates) if self.factors is None else self.factors
        return mixed(before, keys.expand_as(before))


@dataclass(frozen=True, slots=True)
class Square:
    """The squares of a vector's elements: only their sum over whole blocks is unchanged by a rotation."""

    of: Vector


@dataclass(frozen=True, slots=True)
class Mean:
    """The mean of a vector's elements: only subtracting it makes sense, and needs centred writers."""

    of: Vector


@dataclass(frozen=True, slots=True)
class Beside:
    """Vectors behind different gains, joined along their last axis, which linears alone read."""

    parts: tuple[Vector, ...]

    @property
    def coordinates(self) -> Tensor:
        """Those of all parts."""
        return torch.cat([part.coordinates for part in self.parts], -1)


@dataclass(frozen=True, slots=True)
class Gain:
    """A parameter, or one plus a parameter."""

    param: Param
    offset: int

    @property
    def words(self) -> str:
        """What it is used as, in words."""
        return "1 + a gain" if self.offset else "a gain"


@dataclass(slots=True)
class RotationAnalysis:
    """Coordinates, the splits between them, and who reads them."""

    variables: Variables = field(default_factory=Variables)
    axes: Axes = field(init=False)
    splits: list[Split] = field(default_factory=list)
    reads: list[Read] = field(default_factory=list)
    products: dict[fx.Node, Product] = field(default_factory=dict)
    """By node, which weight made it."""
    gain_sizes: dict[str, int] = field(default_factory=dict)
    """Number of elements of the parameters that are gains."""
    lookups: Counter[str] = field(default_factory=Counter)
    """How often each embedding table is used."""
    folded: dict[str, Norm] = field(default_factory=dict)
    values: list[tuple[Site, Tensor]] = field(default_factory=list)
    """Attention sites and the coordinates of their values."""
    arranged: list[tuple[Site, Tensor]] = field(default_factory=list)
    """Coordinates as they lie along the last axis where vectors are added or read, ``[rows, channels]``."""

    def __post_init__(self) -> None:
        self.axes = Axes(self.variables)

    def end(self, site: Site, values: Sequence[Value], text: str) -> Value:
        """No rotation gets past this operator."""
        reason = site.because(text)
        for value in itertools.chain(*(one.parts if isinstance(one, Beside) else (one,) for one in values)):
            vector = value.of if isinstance(value, (Square, Mean)) else value
            if isinstance(vector, Vector):
                self.variables.fix(vector.coordinates, reason)
                for name in (vector.gain.weight, vector.gain.bias) if vector.gain else ():
                    if name is not None:
                        self.axes.other_use(Param(name, ()), reason)
            param = value.param if isinstance(value, Gain) else value
            if isinstance(param, Param):
                self.axes.other_use(param, reason)
        return self.unknown(site)

    def unknown(self, site: Site) -> Value:
        made = tuple(Untracked() if unwieldy(f) else Dynamic(tuple(f.shape), f.dtype) for f in site.outputs)
        return made if isinstance(site.node.meta.get("val"), (tuple, list)) else made[0] if made else None

    def no_rule(self, site: Site, values: Sequence[Value]) -> Value:
        return self.end(site, values, NO_ROTATION)

    def graph_break(self, site: Site) -> Value:
        return Dynamic(site.shape, site.outputs[0].dtype)

    def held(self, site: Site, along: Collection[int]) -> Vector:
        """A tensor that the graph reads and writes anew: rows of it are vectors."""
        labels = self.variables.state(site.shape, along)
        return Vector(labels, fresh_instances(labels))

    def keeps(self, site: Site, held: Vector, written: Value) -> None:
        """What is written is what is read the next time, vector by vector."""
        if not isinstance(written, Vector) or written.gain is not None or written.factors is not None:
            self.end(site, [held, written], "it is kept for the next call, and no vector is written to it")
            return
        self.arrange(site, held.coordinates, written.coordinates)
        self.variables.equal(held.coordinates, written.coordinates, site.order)

    def finish(self, site: Site, values: Sequence[Value]) -> None:
        self.end(site, values, "it is an output of the model")

    def split(
        self, vector: Vector, keys: Tensor, reason: Reason, *, centre: bool = False, length: bool = False
    ) -> None:
        """Coordinates may be mixed only if they see the same keys, instance by instance."""
        flat = vector.coordinates.reshape(-1).numpy()
        self._split(flat, mixed(vector.instances, keys).reshape(-1).numpy(), reason, centre, length)

    def split_columns(self, columns: Tensor, keys: Tensor, reason: Reason) -> None:
        """Columns of a weight may be mixed only if they see the same keys, ``[in]``."""
        self._split(columns.reshape(-1).numpy(), keys.expand_as(columns).reshape(-1).numpy(), reason)

    def _split(self, flat: Ints, code: Ints, reason: Reason, centre: bool = False, length: bool = False) -> None:
        real = flat != ZERO
        labels, inverse = np.unique(flat[real], return_inverse=True)
        sums = np.zeros(len(labels), dtype=np.int64)
        with np.errstate(over="ignore"):
            np.add.at(sums, inverse, code[real])
        self.splits.append(Split(labels, sums, reason, centre, length))

    def arrange(self, site: Site, *coordinates: Tensor, order: Tensor | slice = slice(None)) -> None:
        """Note in which order channels lie, or are taken. Rows that are alike, as those of all tokens, count once."""
        for labels in coordinates:
            for d in range(labels.ndim - 1):
                if not varies(labels, d):
                    labels = labels.narrow(d, 0, 1)
            self.arranged.append((site, labels.reshape(-1, labels.shape[-1])[:, order]))

    def stay_apart(self, site: Site, *vectors: Vector) -> None:
        """Before instances are forgotten: channels of different ones that lie side by side cannot be mixed."""
        for vector in vectors:
            if any(
                varies(vector.instances, d) for d in range(vector.coordinates.ndim) if varies(vector.coordinates, d)
            ):
                self.split(
                    vector,
                    torch.zeros_like(vector.instances),
                    site.because("channels of different vectors lie side by side"),
                )

    def added_along(self, site: Site, vector: Vector, dims: Sequence[int]) -> Vector:
        """Vectors that lie along ``dims``, which are not the last axis, are added: they are rotated alike.

        The axes stay, of size 1. Whatever tokens meet, meet in one instance.
        """
        self.arrange(site, vector.coordinates)
        coordinates = self.variables.merge_along(vector.coordinates, dims, site.order, keepdim=True)
        instances, factors = vector.instances, vector.factors
        for dim in dims:
            instances = _folded(instances, dim)
            factors = None if factors is None else _folded(factors, dim)
        instances = torch.unique(instances, return_inverse=True)[1].view(coordinates.shape)
        return Vector(coordinates, instances, factors=factors)

    # --- data movement ------------------------------------------------------------------------------------------

    def move(
        self, site: Site, function: Callable[..., Value], args: tuple[Value, ...], kwargs: dict[str, Value]
    ) -> Value:
        first = args[0]
        if isinstance(first, (tuple, list)):
            return self._join(site, function, args, kwargs)
        if isinstance(first, Param) and site.operator == "index" and first.is_table and _is_lookup(list(args[1])):
            # A bias or an embedding per expert, or positions: whichever row is chosen, its columns write to the space.
            labels = self.axes.axis(first, 1, "row", site.because("it is a table"), stacked=False)
            labels = labels.expand(site.shape)
            return Vector(labels, fresh_instances(labels))
        if isinstance(first, Param) and len(first.shape) > 2 and not first.views and picks_rows(site, args):
            return first.picked(site.shape, 1)  # one rotation for all matrices of the stack
        if not isinstance(first, Vector):
            return self.end(site, [first, *args[1:]], NO_ROTATION)
        if site.operator == "index" and any(isinstance(i, Dynamic) for i in args[1]):
            return self._pick(site, first, list(args[1]))
        if site.operator == "index_select" and isinstance(args[2], Dynamic):
            return self._pick(site, first, [None] * (int(args[1]) % first.coordinates.ndim) + [args[2]])
        if site.operator == "gather" and isinstance(args[2], Dynamic):
            return self._gather(site, first, int(args[1]) % first.coordinates.ndim)
        rest = [_plain(arg) for arg in args[1:]]
        if any(isinstance(arg, (Dynamic, Vector, Square, Mean, Param)) for arg in rest):
            return self.end(site, [first], "it is rearranged by the data")
        if site.operator in ("constant_pad_nd", "pad"):
            if len(rest) > 1 and rest[-1] not in (0, 0.0, None, "constant"):
                return self.end(site, [first], "it is padded with a constant")
            if first.gain is not None and first.gain.bias is not None:
                return self.end(site, [first], f"it is padded with 0, to which {first.gain.bias} was not added")
            rest = rest[:1]
        moved = apply(first, lambda labels: function(labels, *rest, **kwargs))
        if site.operator in ("tril", "triu", "constant_pad_nd", "pad") and isinstance(moved, Vector):
            here = site.because("some of its channels become 0")
            self.split(moved, torch.zeros_like(moved.instances), here)
        return moved

    def _join(
        self, site: Site, function: Callable[..., Value], args: tuple[Value, ...], kwargs: dict[str, Value]
    ) -> Value:
        parts = [self.as_vector(site, p) for p in args[0] if 0 not in shape_of(p)]
        rest = [_plain(arg) for arg in args[1:]]
        vectors = [p for p in parts if isinstance(p, Vector)]
        if len(vectors) + sum(map(is_nothing, parts)) < len(parts) or not vectors:
            return self.end(site, parts, "it is joined with something else")
        gain = vectors[0].gain
        if any(part.gain != gain for part in vectors):
            if site.operator == "cat" and len(vectors) == len(parts) and _linears_read(site, vectors[0], rest, kwargs):
                return Beside(tuple(vectors))
            return self.end(site, parts, "its parts are behind different gains")
        if gain is not None and gain.bias is not None and len(vectors) < len(parts):
            return self.end(site, parts, f"it is joined with 0, to which {gain.bias} was not added")
        offset = 0
        coordinates, instances, indices, factors = [], [], [], []
        origins = {part.origin for part in vectors}
        for part in parts:  # instances of different parts are different, unless the parts come from one vector
            none = torch.zeros(shape_of(part), dtype=torch.int64)
            part = part if isinstance(part, Vector) else Vector(none, none)
            coordinates.append(part.coordinates)
            instances.append(part.instances if site.operator == "cat" else part.instances + offset)
            indices.append(none if part.gain_index is None else part.gain_index)
            seen = none if part.factors is None else part.factors
            # of two tensors neither is whole: what each channel is of counts
            factors.append(mixed(seen, torch.tensor(part.origin)) if len(origins) > 1 else seen)
            offset += int(part.instances.max()) + 1
        joined = Vector(
            function(coordinates, *rest, **kwargs),
            function(instances, *rest, **kwargs),
            gain,
            None if gain is None else function(indices, *rest, **kwargs),
            centred=all(part.centred for part in vectors),
            factors=function(factors, *rest, **kwargs),
        )
        if len(vectors) < len(parts):
            self.split(joined, torch.zeros_like(joined.instances), site.because("some of its channels become 0"))
        return joined

    def written_by(self, site: Site, param: Param) -> Tensor | None:
        """Labels of a parameter that is a vector, or several, in the shape it is seen in; None if it is too large.

        Where a run of a matrix's rows is taken (positions, as far as these tokens go) all of its rows carry the same.
        """
        if not param.is_run_of_rows:
            return self.axes.leaf(param, 0, site.because("it is a parameter"))
        labels = self.axes.axis(param, 1, "row", site.because("it is a table"), stacked=False)
        return labels.expand(param.shape)

    def as_vector(self, site: Site, part: Value) -> Value:
        """A parameter that is one vector or several, such as class tokens and registers, is written by itself."""
        if not isinstance(part, Param) or not part.shape:
            return part
        labels = self.written_by(site, part)
        return part if labels is None else Vector(labels, fresh_instances(labels))

    def part(self, site: Site, x: Value, dim: int) -> Value:
        """Runs of what lies along ``dim``, as long as the data say: any of it may be in any of them."""
        vector = self.as_vector(site, x)
        if not isinstance(vector, Vector):
            return self.end(site, [x], NO_ROTATION)
        dim %= vector.coordinates.ndim
        if varies(vector.coordinates, dim):
            if dim == vector.coordinates.ndim - 1 or vector.gain is not None:
                return self.end(site, [x], "its channels are chosen by the data")
            vector = self.added_along(site, vector, [dim])
        rows = ([None] * dim + [Dynamic((fake.shape[dim],), torch.int64)] for fake in site.outputs)
        made = tuple(self._pick(site, vector, list(chosen)) for chosen in rows)
        return made if isinstance(site.node.meta.get("val"), (tuple, list)) else made[0]

    def _gather(self, site: Site, vector: Vector, dim: int) -> Value:
        """Rows chosen by data, position by position: whole vectors where the index is one for all channels."""
        rows = whole_rows(site.node.args[2], None) and site.shape[-1:] == vector.coordinates.shape[-1:]
        if vector.gain_index is not None:
            moved = self._gather(site, replace(vector, gain=None, gain_index=None), dim)
            index = vector.gain_index.narrow(dim, 0, 1).expand(site.shape)
            return replace(moved, gain=vector.gain, gain_index=index) if isinstance(moved, Vector) else moved
        sizes = zip(site.shape, vector.coordinates.shape, strict=True)
        alike = all(n == m for d, (n, m) in enumerate(sizes) if d != dim)
        if not (rows and alike) or varies(vector.coordinates, dim) or dim == len(site.shape) - 1:
            return self.end(site, [vector], "its channels are chosen by the data")
        self.stay_apart(site, vector)
        coordinates = vector.coordinates.narrow(dim, 0, 1).expand(site.shape)
        factors = seen_along(vector, [dim], True, site.shape)
        return Vector(coordinates, fresh_instances(coordinates), centred=vector.centred, factors=factors)

    def _pick(self, site: Site, vector: Vector, indices: list[Value]) -> Value:
        """Rows chosen by data: whole instances, as long as no coordinate axis is indexed."""
        dims = [d for d, i in enumerate(indices) if i is not None]
        if vector.gain_index is not None:
            moved = self._pick(site, replace(vector, gain=None, gain_index=None), indices)
            index = _index_any(vector.gain_index, indices)
            return replace(moved, gain=vector.gain, gain_index=index) if isinstance(moved, Vector) else moved
        if any(varies(vector.coordinates, d) for d in dims):
            return self.end(site, [vector], "its channels are chosen by the data")
        self.stay_apart(site, vector)
        coordinates = _index_any(vector.coordinates, indices)
        factors = vector.factors
        if factors is not None:  # any row may be picked: what a channel saw in all of them counts
            factors = _index_any(factors.sum(dims, keepdim=True).expand(factors.shape), indices)
        return Vector(coordinates, fresh_instances(coordinates), centred=vector.centred, factors=factors)


def _folded(labels: Tensor, dim: int) -> Tensor:
    """A number for each sequence of labels along ``dim``, which stays with size 1."""
    first, *rest = labels.unbind(dim)
    for part in rest:
        first = mixed(first, part)
    return first.unsqueeze(dim)


def fresh_instances(coordinates: Tensor) -> Tensor:
    """A new instance for every position of the axes along which the coordinates do not change."""
    shape = [1 if varies(coordinates, d) else size for d, size in enumerate(coordinates.shape)]
    return torch.arange(int(np.prod(shape))).view(shape).expand(coordinates.shape)


def broadcast(vector: Vector, shape: Sequence[int]) -> Vector:
    """Copies of a vector along new or leading axes of size 1; its channels are the last axis."""
    moved: Vector = apply(vector, lambda labels: labels.expand(tuple(shape)))
    return moved


def seen_along(vector: Vector, dims: Sequence[int], keepdim: bool, shape: Sequence[int]) -> Tensor | None:
    """What each channel of a sum over ``dims`` was multiplied by, anywhere along them."""
    return None if vector.factors is None else vector.factors.sum(list(dims), keepdim=keepdim).expand(tuple(shape))


def whole_rows(node: object, mask: Value) -> bool:
    """True if the mask chooses whole vectors of the last axis. Of one that depends on the data the graph says so."""
    if isinstance(mask, Constant):
        return bool((mask.value == mask.value[..., :1]).all())
    while isinstance(node, torch.fx.Node) and node.op == "call_function":
        if node.meta["val"].shape[-1:] == (1,):
            return True
        if operator_name(node) not in ("expand", "expand_as", "to", "alias", "clone", "broadcast_to", "repeat"):
            return False
        node = node.args[0]
    return False


def varies(labels: Tensor, dim: int) -> bool:
    """True if the labels change along ``dim``."""
    return labels.shape[dim] > 1 and bool((labels != labels.narrow(dim, 0, 1)).any())


def apart(labels: Tensor, dim: int) -> bool:
    """True if there are different coordinates along ``dim``; 0, which pads, is none."""
    return bool(((labels != labels.amax(dim, keepdim=True)) & (labels != ZERO)).any())


def _index_any(labels: Tensor, indices: Sequence[Value]) -> Tensor:
    """Index where the labels do not depend on the index."""
    chosen = [
        None if i is None else i.value if isinstance(i, Constant) else torch.zeros(i.shape, dtype=torch.int64)
        for i in indices
    ]
    indexed: Tensor = torch.ops.aten.index.Tensor(labels, chosen)
    return indexed


def _plain(value: Value) -> Value:
    if isinstance(value, (tuple, list)):
        return [_plain(v) for v in value]
    return value.value if isinstance(value, Constant) else value


def apply(vector: Vector, move: Callable[[Tensor], Value]) -> Value:
    """Move all labels of a vector alike; a movement with several results gives a tuple of vectors."""
    coordinates, instances = move(vector.coordinates), move(vector.instances)
    index = None if vector.gain_index is None else move(vector.gain_index)
    factors = None if vector.factors is None else move(vector.factors)
    if isinstance(coordinates, (tuple, list)):
        none = [None] * len(coordinates)
        return tuple(
            Vector(c, i, vector.gain, g, None, vector.centred, f, vector.origin)
            for c, i, g, f in zip(coordinates, instances, index or none, factors or none, strict=True)
        )
    # A norm can be folded into the table of what it normalises only where its channels lie as they do there.
    table = vector.table if vector.table is not None and torch.equal(coordinates, vector.coordinates) else None
    return Vector(coordinates, instances, vector.gain, index, table, vector.centred, factors, vector.origin)


def anew(vector: Vector) -> Vector:
    """As the result of an operator that computes."""
    return replace(vector, origin=_next_origin())


def mixed(left: Tensor, right: Tensor) -> Tensor:
    """A number for each pair of labels (int64, same shape after broadcasting): different pairs, different numbers."""
    one, other = torch.broadcast_tensors(left, right)
    with np.errstate(over="ignore"):
        pairs = _mix(one.numpy().astype(np.uint64)) + other.numpy().astype(np.uint64)
    return torch.from_numpy(_mix(pairs).view(np.int64))


def numbered(labels: Ints) -> npt.NDArray[np.uint64]:
    """Numbers to tell sets of labels apart by their sums."""
    return _mix(labels.astype(np.uint64))


def _mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """splitmix64: sums of mixed values are equal for equal multisets only, up to collisions of probability 2**-64."""
    with np.errstate(over="ignore"):
        values = values + np.uint64(0x9E3779B97F4A7C15)  # else 0 would count for nothing
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        result: npt.NDArray[np.uint64] = values ^ (values >> np.uint64(31))
        return result


def _linears_read(site: Site, part: Vector, rest: Sequence[Value], kwargs: dict[str, Value]) -> bool:
    """True if tensors are joined along their last axis, and linears alone read the result."""
    dim: int = kwargs.get("dim", rest[0] if rest else 0)  # type: ignore[assignment]  # what cat takes
    users = list(site.node.users)
    linears = (operator_name(user) == "linear" and user.all_input_nodes.count(site.node) == 1 for user in users)
    return dim % part.coordinates.ndim == part.coordinates.ndim - 1 and all(linears) and bool(users)


def coordinates_of(value: Vector | Square | Mean) -> Tensor:
    """The coordinates, of squares and means too."""
    return value.coordinates if isinstance(value, Vector) else value.of.coordinates


def shape_of(value: Value) -> tuple[int, ...]:
    """Shape of any argument that has one, else ``()``."""
    if isinstance(value, (Vector, Square, Mean)):
        return tuple(coordinates_of(value).shape)
    return tuple(value.value.shape) if isinstance(value, Constant) else tuple(getattr(value, "shape", ()))


def is_nothing(value: Value) -> bool:
    """True of zeros, which are the same rotated."""
    return isinstance(value, Constant) and value.settled and not bool(value.value.any())


def picks_rows(site: Site, args: Sequence[Value]) -> bool:
    """True if the data choose entries of the first dimension, and nothing else is chosen."""
    if site.operator == "index_select":
        return args[1] == 0 and isinstance(args[2], Dynamic)
    return site.operator == "index" and len(args[1]) == 1 and isinstance(args[1][0], Dynamic)


def _is_lookup(indices: Sequence[Value]) -> bool:
    """Whole rows, by their numbers: of the data's choice, or known ones."""
    index = indices[0]
    return isinstance(index, Dynamic) or (
        isinstance(index, Constant) and len(indices) == 1 and index.value.dtype == torch.int64
    )
