"""How each operator carries rotations: the rotation column of the operator table.

An activation that may be rotated is a :class:`Vector`. Each element carries the label of its *coordinate* (the variable
of the weight row that made it; equal coordinates are merged as scales are) and of its *instance* (the token or the
token of a head that it belongs to). A rotation mixes the coordinates of one instance, so

- what multiplies the elements of one instance must be the same number: coordinates that see other factors fall into
  other blocks (``split``),
- a sum over tokens keeps the coordinates and makes new instances,
- a norm reads the length of an instance, which a rotation of whole blocks keeps,
- a gain is carried along until a linear reads it; anything else that meets it ends the space,
- every other operator ends the space.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from autoquant.analyzer.families import Factors, Families, Param
from autoquant.analyzer.interpret import Known, Rule, Site, Unknown, Value
from autoquant.analyzer.scale_rules import NO_RULE, scalar
from autoquant.analyzer.variables import ZERO, Ints, Reason, Variables
from autoquant.config import Norm


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


@dataclass(frozen=True, slots=True)
class Square:
    """The squares of a vector's elements: only their sum over whole blocks is unchanged by a rotation."""

    of: Vector


@dataclass(frozen=True, slots=True)
class Mean:
    """The mean of a vector's elements: only subtracting it makes sense, and needs centred writers."""

    of: Vector


@dataclass(frozen=True, slots=True)
class Gain:
    """A parameter, or one plus a parameter."""

    param: Param
    offset: int


@dataclass(frozen=True, slots=True)
class Read:
    """A linear that reads a vector."""

    site: Site
    weight: str
    bias: str | None
    dim: int
    gain: Norm | None


@dataclass(frozen=True, slots=True)
class Split:
    """Coordinates with different keys cannot be mixed."""

    labels: Ints
    keys: Ints
    reason: Reason
    centre: bool = False


@dataclass(slots=True)
class RotationAnalysis:
    variables: Variables = field(default_factory=Variables)
    families: Families = field(init=False)
    splits: list[Split] = field(default_factory=list)
    reads: list[Read] = field(default_factory=list)
    folded: dict[str, Norm] = field(default_factory=dict)
    values: list[tuple[Site, Tensor]] = field(default_factory=list)
    """Attention sites and the coordinates of their values."""

    def __post_init__(self) -> None:
        self.families = Families(self.variables)

    def end(self, site: Site, values: Sequence[Value], text: str) -> Value:
        """No rotation gets past this operator."""
        reason = site.because(text)
        for value in values:
            vector = value.of if isinstance(value, (Square, Mean)) else value
            if isinstance(vector, Vector):
                self.variables.fix(vector.coordinates, reason)
            param = value.param if isinstance(value, Gain) else value
            if isinstance(param, Param):
                self.families.other_use(param, reason)
        return self.unknown(site)

    def unknown(self, site: Site) -> Value:
        made = tuple(Unknown(tuple(f.shape), f.dtype) for f in site.outputs)
        return made if isinstance(site.node.meta.get("val"), (tuple, list)) else made[0] if made else None

    def no_rule(self, site: Site, values: Sequence[Value]) -> Value:
        return self.end(site, values, NO_RULE)

    def crossing(self, site: Site) -> Value:
        return Unknown(site.shape, site.outputs[0].dtype)

    def finish(self, site: Site, values: Sequence[Value]) -> None:
        self.end(site, values, "it is an output of the model")

    def split(self, vector: Vector, keys: Tensor, reason: Reason, centre: bool = False) -> None:
        """Coordinates may be mixed only if they see the same keys, instance by instance."""
        flat = vector.coordinates.reshape(-1).numpy()
        code = _mix(vector.instances.reshape(-1).numpy().astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + keys.reshape(-1).numpy().astype(np.uint64))
        real = flat != ZERO
        labels, inverse = np.unique(flat[real], return_inverse=True)
        sums = np.zeros(len(labels), dtype=np.uint64)
        np.add.at(sums, inverse, code[real])
        self.splits.append(Split(labels, sums.view(np.int64), reason, centre))

    # --- data movement ------------------------------------------------------------------------------------------

    def move(self, site: Site, function: Callable[..., Value], args: tuple[Value, ...], kwargs: dict[str, Value]) -> Value:
        first = args[0]
        if isinstance(first, (tuple, list)):
            return self._join(site, function, args, kwargs)
        if isinstance(first, Param) and site.operator == "index" and len(first.full_shape) == 2 and not first.views:
            # A bias or an embedding per expert: whichever row the data choose, its columns write into the space.
            if len(args[1]) == 1 and isinstance(args[1][0], Unknown):
                labels = self.families.axis(first, 1, "row", site.because("it is a table"), stacked=False).expand(site.shape)
                return Vector(labels, fresh_instances(labels))
        if not isinstance(first, Vector):
            return self.end(site, [first, *args[1:]], NO_RULE)
        if site.operator == "index" and any(isinstance(i, Unknown) for i in args[1]):
            return self._pick(site, first, list(args[1]))
        if site.operator == "index_select" and isinstance(args[2], Unknown):
            return self._pick(site, first, [None] * (int(args[1]) % first.coordinates.ndim) + [args[2]])
        rest = [_plain(arg) for arg in args[1:]]
        if any(isinstance(arg, (Unknown, Vector, Square, Mean, Param)) for arg in rest):
            return self.end(site, [first], "it is rearranged by the data")
        if site.operator in ("constant_pad_nd", "pad"):
            if len(rest) > 1 and rest[-1] not in (0, 0.0, None, "constant"):
                return self.end(site, [first], "it is padded with a constant")
            rest = rest[:1]
        return _apply(first, lambda labels: function(labels, *rest, **kwargs))

    def _join(self, site: Site, function: Callable[..., Value], args: tuple[Value, ...], kwargs: dict[str, Value]) -> Value:
        parts = [p for p in args[0] if 0 not in _shape(p)]
        rest = [_plain(arg) for arg in args[1:]]
        if not all(isinstance(p, Vector) and p.gain is None for p in parts):
            return self.end(site, parts, "it is joined with something else")
        offset = 0
        instances = []
        for part in parts:  # instances of different parts are different, unless the parts come from one vector
            instances.append(part.instances if site.operator in ("cat", "concat") else part.instances + offset)
            offset += int(part.instances.max()) + 1
        return Vector(function([p.coordinates for p in parts], *rest, **kwargs), function(instances, *rest, **kwargs))

    def _pick(self, site: Site, vector: Vector, indices: list[Value]) -> Value:
        """Rows chosen by data: whole instances, as long as no coordinate axis is indexed."""
        dims = [d for d, i in enumerate(indices) if i is not None]
        if vector.gain is not None and vector.gain.bias is None and vector.gain_index is not None:
            moved = self._pick(site, replace(vector, gain=None, gain_index=None), indices)
            index = _index_any(vector.gain_index, indices)
            return replace(moved, gain=vector.gain, gain_index=index) if isinstance(moved, Vector) else moved
        if vector.gain is not None:
            index = _index_any(vector.gain_index, indices) if vector.gain_index is not None else None
            moved = self._pick(site, replace(vector, gain=None, gain_index=None), indices)
            return replace(moved, gain=vector.gain, gain_index=index) if isinstance(moved, Vector) else moved
        if any(_varies(vector.coordinates, d) for d in dims):
            return self.end(site, [vector], "its channels are chosen by the data")
        coordinates = _index_any(vector.coordinates, indices)
        return Vector(coordinates, fresh_instances(coordinates))


def fresh_instances(coordinates: Tensor) -> Tensor:
    """A new instance for every position of the axes along which the coordinates do not change."""
    shape = [1 if _varies(coordinates, d) else size for d, size in enumerate(coordinates.shape)]
    return torch.arange(int(np.prod(shape))).view(shape).expand(coordinates.shape)


def _varies(labels: Tensor, dim: int) -> bool:
    return labels.shape[dim] > 1 and bool((labels != labels.narrow(dim, 0, 1)).any())


def _index_any(labels: Tensor, indices: Sequence[Value]) -> Tensor:
    """Index where the labels do not depend on the index."""
    chosen = [
        None if i is None else i.value if isinstance(i, Known) else torch.zeros(i.shape, dtype=torch.int64) for i in indices
    ]
    return torch.ops.aten.index.Tensor(labels, chosen)


def _plain(value: Value) -> Value:
    if isinstance(value, (tuple, list)):
        return [_plain(v) for v in value]
    return value.value if isinstance(value, Known) else value


def _apply(vector: Vector, move: Callable[[Tensor], Value]) -> Value:
    coordinates, instances = move(vector.coordinates), move(vector.instances)
    index = None if vector.gain_index is None else move(vector.gain_index)
    if isinstance(coordinates, (tuple, list)):
        parts = index if index is not None else [None] * len(coordinates)
        return tuple(
            Vector(c, i, vector.gain, g, None, vector.centred) for c, i, g in zip(coordinates, instances, parts, strict=True)
        )
    whole = coordinates.shape == vector.coordinates.shape
    return Vector(coordinates, instances, vector.gain, index, vector.table if whole else None, vector.centred)


def _mix(values: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]  # uint64 in, uint64 out
    """splitmix64: sums of mixed values are equal for equal multisets only, up to collisions of probability 2**-64."""
    with np.errstate(over="ignore"):
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed: np.ndarray = values ^ (values >> np.uint64(31))  # type: ignore[type-arg]  # as above
        return mixed


# --- the rules ----------------------------------------------------------------------------------------------------


def rules(a: RotationAnalysis) -> dict[str, Rule]:
    """The rotation rule of every operator that is not data movement; any other operator ends a space."""
    v = a.variables

    def passes(site: Site, x: Value, *args: Value, **kwargs: Value) -> Value:
        return x if isinstance(x, (Vector, Square, Mean, Gain)) else a.end(site, [x], NO_RULE)

    def add(site: Site, x: Value, y: Value, *args: Value, **kwargs: Value) -> Value:
        if kwargs.get("alpha", args[0] if args else 1) != 1:
            return a.end(site, [x, y], "it is added with a factor")
        for one, other in ((x, y), (y, x)):
            number = scalar(other)
            if number == 0.0 or (isinstance(other, Known) and not bool(other.value.any()) and tuple(other.value.shape) == _shape(other)):
                if isinstance(one, (Vector, Square)) and site.shape == tuple(_labels(one).shape):
                    return one
            if number == 1.0 and isinstance(one, Param) and site.operator == "add":
                return Gain(one, 1)
        if site.operator == "sub" and isinstance(x, Vector) and isinstance(y, Mean) and x.coordinates is y.of.coordinates:
            return replace(x, table=None, centred=True)
        if isinstance(x, Param) or isinstance(y, Param):
            vector, param = (x, y) if isinstance(y, Param) else (y, x)
            return added_parameter(site, vector, param)
        if not isinstance(x, Vector) or not isinstance(y, Vector):
            return a.end(site, [x, y], "a tensor that is not rotated is added")
        if x.gain is not None or y.gain is not None:
            gain = x.gain or y.gain
            name = gain.weight if gain else None
            return a.end(site, [x, y], f"{name} is applied to it before it is added: it cannot be folded into a linear")
        if tuple(x.coordinates.shape) != tuple(y.coordinates.shape):
            return a.end(site, [x, y], "it is added with broadcasting")
        one, other = x.instances.reshape(-1), y.instances.reshape(-1)
        together = torch.unique(one * (int(other.max()) + 1) + other).numel()
        if together != torch.unique(one).numel() or together != torch.unique(other).numel():
            return a.end(site, [x, y], "vectors of different tokens are added")
        return Vector(v.merge(x.coordinates, y.coordinates, site.order), x.instances)

    def added_parameter(site: Site, vector: Value, param: Param) -> Value:
        """A bias or a table of positions: it writes into the space too."""
        if not isinstance(vector, Vector) or not param.shape:
            return a.end(site, [vector, param], "a parameter is added")
        if vector.gain is not None:
            if vector.gain.bias is None and param.shape == param.full_shape and len(param.shape) == 1 and vector.gain_index is not None:
                a.families.other_use(param, site.because("it is a norm's bias"), "gain")
                return replace(vector, gain=vector.gain.model_copy(update={"bias": param.name}))
            return a.end(site, [vector, param], "a parameter is added")
        if param.views or len(param.full_shape) != 1 or param.shape[-1] != vector.coordinates.shape[-1]:
            labels = a.families.leaf(param, 0, site.because("it is a parameter"))
            if labels is None or len([s for s in param.full_shape if s > 1]) > 1:
                return a.end(site, [vector, param], "a parameter is added")
        else:
            labels = a.families.leaf(param, 0, site.because("it is a parameter"))
        assert labels is not None
        return Vector(v.merge(vector.coordinates, labels, site.order).expand(site.shape), vector.instances)

    def multiply(site: Site, x: Value, y: Value, **kwargs: Value) -> Value:
        if isinstance(x, Vector) and isinstance(y, Vector):
            if x.coordinates is y.coordinates or (x.gain is None and y.gain is None and torch.equal(x.coordinates, y.coordinates) and torch.equal(x.instances, y.instances)):
                return squared(site, x)
            return a.end(site, [x, y], "it is multiplied by another activation")
        vector, factor = (y, x) if isinstance(y, (Vector, Square, Mean)) else (x, y)
        if isinstance(vector, (Square, Mean)):
            return vector if scalar(factor) is not None else a.end(site, [vector, factor], "it is multiplied")
        if not isinstance(vector, Vector):
            return a.end(site, [x, y], NO_RULE)
        if site.operator in ("div", "true_divide") and vector is not x:
            return a.end(site, [x, y], "it is divided by")
        if isinstance(factor, (Param, Gain)):
            return gained(site, vector, factor if isinstance(factor, Gain) else Gain(factor, 0))
        return scaled(site, vector, factor)

    def scaled(site: Site, vector: Vector, factor: Value) -> Value:
        if scalar(factor) is not None:
            return vector if vector.gain is None or vector.gain.bias is None else a.end(site, [vector], "a norm's bias is scaled")
        shape = _shape(factor)
        if vector.gain is not None and vector.gain.bias is not None:
            return a.end(site, [vector], "a norm's bias is scaled")
        try:
            keys = torch.arange(int(np.prod(shape))).view(shape).expand(vector.coordinates.shape)
        except RuntimeError:
            return a.end(site, [vector], "it is broadcast")
        a.split(vector, keys, site.because("its channels are multiplied by different factors"))
        return replace(vector, table=None)

    def gained(site: Site, vector: Vector, gain: Gain) -> Value:
        """A norm weight: it waits for the linears that it can be folded into."""
        shape = gain.param.full_shape
        size = max(shape, default=1)
        if vector.gain is not None or int(np.prod(shape)) != size or vector.coordinates.shape[-1] != size or site.operator != "mul":
            return a.end(site, [vector, gain], "it is multiplied by a parameter")
        a.families.other_use(gain.param, site.because("it is a gain"), f"gain{gain.offset}")
        index = torch.arange(size).expand(vector.coordinates.shape)
        norm = Norm(kind="layer" if vector.centred else "rms", weight=gain.param.name, bias=None, offset=1 if gain.offset else 0, eps=None)
        return replace(vector, gain=norm, gain_index=index, table=None)

    def squared(site: Site, x: Value, *args: Value) -> Value:
        if site.operator == "pow" and scalar(args[0]) != 2.0:
            return a.end(site, [x], "it is raised to a power")
        if not isinstance(x, Vector) or x.gain is not None:
            return a.end(site, [x], "it is squared")
        return Square(x)

    def reduce(site: Site, x: Value, dim: Value = None, keepdim: Value = False, **kwargs: Value) -> Value:
        vector = x.of if isinstance(x, Square) else x
        if not isinstance(vector, Vector) or vector.gain is not None:
            return a.end(site, [x], "it is summed")
        ndim = vector.coordinates.ndim
        dims = [d % ndim for d in ([dim] if isinstance(dim, int) and not isinstance(dim, bool) else dim or range(ndim))]
        if isinstance(x, Square):
            return measured(site, vector, dims, "its length is taken over part of its channels")
        if not any(_varies(vector.coordinates, d) for d in dims):
            coordinates = v.merge_along(vector.coordinates, dims, site.order, bool(keepdim))
            return Vector(coordinates, fresh_instances(coordinates))
        if site.operator == "mean" and keepdim and dims == [ndim - 1]:
            centred(site, vector, dims)
            return Mean(vector)
        return a.end(site, [x], "its channels are summed")

    def measured(site: Site, vector: Vector, dims: Sequence[int], text: str, centre: bool = False) -> Value:
        shape = [1 if d in dims else s for d, s in enumerate(vector.coordinates.shape)]
        keys = torch.arange(int(np.prod(shape))).view(shape).expand(vector.coordinates.shape)
        a.split(vector, keys, site.because(text), centre)
        return a.unknown(site)

    def centred(site: Site, vector: Vector, dims: Sequence[int]) -> None:
        measured(site, vector, dims, "the mean over part of its channels is subtracted", centre=True)

    def length(site: Site, x: Value, order: Value = 2, dim: Value = None, keepdim: Value = False, **kwargs: Value) -> Value:
        if scalar(order) != 2.0 or not isinstance(x, Vector):
            return a.end(site, [x], "its norm is not the Euclidean one")
        return reduce(site, squared(site, x, 2), dim, keepdim)

    def norm(site: Site, x: Value, shape: Value, weight: Value = None, bias: Value = None, eps: Value = None, *args: Value) -> Value:
        layer = site.operator == "layer_norm"
        if not isinstance(x, Vector) or x.gain is not None or len(shape) != 1 or any(not isinstance(p, (Param, type(None))) for p in (weight, bias)):
            return a.end(site, [x, weight, bias], "it is normalised")
        for param in (weight, bias):
            if isinstance(param, Param):
                a.families.other_use(param, site.because("it belongs to a norm"), "gain0")
        names = [None if param is None else param.name for param in (weight, bias)]
        found = Norm(kind="layer" if layer else "rms", weight=names[0], bias=names[1], offset=0, eps=eps)
        source = site.node.args[0]
        if x.table is not None and isinstance(source, torch.fx.Node) and len(source.users) == 1 and x.table not in a.folded:
            a.folded[x.table] = found  # of the token alone: the table can hold the result
            return replace(x, table=None)
        if layer:
            centred(site, x, [x.coordinates.ndim - 1])
        else:
            measured(site, x, [x.coordinates.ndim - 1], "its length is taken over part of its channels")
        if weight is None and bias is None:
            return replace(x, table=None, centred=layer)
        index = torch.arange(x.coordinates.shape[-1]).expand(x.coordinates.shape)
        return Vector(x.coordinates, x.instances, found, index)

    def embedding(site: Site, table: Value, indices: Value, *args: Value, **kwargs: Value) -> Value:
        if not isinstance(table, Param) or table.views or len(table.full_shape) != 2:
            return a.end(site, [table, indices], "the table is computed")
        labels = a.families.axis(table, 1, "table", site.because("it is an embedding"), stacked=False).expand(site.shape)
        return Vector(labels, fresh_instances(labels), table=table.name)

    def product(site: Site, x: Value, w: Value, contracted: int, bias: Value = None, key: int = 0) -> Value:
        if not isinstance(w, Param) or len(w.shape) < 2:
            return a.end(site, [x, w, bias], "it is a product of two activations")
        ndim = len(w.shape)
        output = ndim - 1 if contracted == ndim - 2 else ndim - 2
        weight = replace(w, key=key or w.key)
        found = a.families.factors(weight, contracted, output, site.because("it is a weight"))
        if found is None:
            return a.end(site, [x, w, bias], "rows and columns of the weight are mixed by a reshape")
        columns, rows = (found.columns[0], found.rows[0]) if key else (found.columns, found.rows)
        if isinstance(x, Vector):
            read(site, x, columns, found, w.name, bias)
        elif isinstance(x, (Square, Mean, Gain, Param)):
            a.end(site, [x], NO_RULE)
        rows = rows.unsqueeze(-2).expand(site.shape) if rows.ndim > 1 else rows.expand(site.shape)
        if isinstance(bias, Param) and not bias.views and len(bias.full_shape) == 1:
            labels = a.families.leaf(bias, 0, site.because("it is a bias"))
            rows = v.merge(rows, labels, site.order) if labels is not None else rows
        elif bias is not None:
            rows_vector = Vector(rows, fresh_instances(rows))
            return a.end(site, [rows_vector, bias], "a tensor that is not rotated is added")
        return Vector(rows, fresh_instances(rows))

    def read(site: Site, x: Vector, columns: Tensor, found: Factors, weight: str, bias: Value) -> None:
        real = x.coordinates != ZERO
        one = torch.where(real, x.instances, x.instances.amax(-1, keepdim=True))
        if bool((one != one[..., :1]).any()):
            a.end(site, [x], "channels of different tokens are read together")
            return
        summed = [x.coordinates.ndim - 2] if columns.ndim > 1 else range(x.coordinates.ndim - 1)
        labels = v.merge_along(x.coordinates, list(summed), site.order)
        v.equal(columns, labels, site.order)
        if x.gain_index is not None and not bool((x.gain_index == torch.arange(x.gain_index.shape[-1])).all()):
            a.end(site, [x], "the norm's weight is rearranged before it is read")
        name = bias.name if isinstance(bias, Param) else None
        bare = Norm(kind="layer", weight=None, bias=None, offset=0, eps=None) if x.centred else None
        a.reads.append(Read(site, weight, name, found.column_dim, x.gain or bare))

    def linear(site: Site, x: Value, w: Value, bias: Value = None) -> Value:
        return product(site, x, w, 1, bias)

    def addmm(site: Site, bias: Value, x: Value, w: Value, **kwargs: Value) -> Value:
        return product(site, x, w, 0, bias)

    def matmul(site: Site, x: Value, y: Value) -> Value:
        if isinstance(y, Param):
            return product(site, x, y, len(y.shape) - 2)
        if isinstance(y, Vector) and isinstance(x, (Unknown, Known)):
            return summed_over_tokens(site, y)
        return a.end(site, [x, y], "it is a product of two activations")

    def summed_over_tokens(site: Site, values: Vector) -> Value:
        """Sums of vectors with coefficients per position of the result: every axis but the last has its own."""
        dim = values.coordinates.ndim - 2
        if values.gain is not None or _varies(values.coordinates, dim):
            return a.end(site, [values], "its channels are summed")
        labels = v.merge_along(values.coordinates, [dim], site.order, keepdim=True).expand(site.shape)
        # The heads of a token are read together, also where they all look at the same values.
        instances = fresh_instances(labels.narrow(-3, 0, 1) if labels.ndim > 3 else labels).expand(labels.shape)
        out = Vector(labels, instances)
        keys = torch.arange(int(np.prod(site.shape[:-1]))).view(*site.shape[:-1], 1).expand(site.shape)
        a.split(out, keys, site.because("heads have attention weights of their own"))
        a.values.append((site, labels))
        return out

    def attention(site: Site, q: Value, k: Value, value: Value, mask: Value = None, *args: Value, **kwargs: Value) -> Value:
        a.end(site, [q, k, mask], "it enters attention scores")
        if not isinstance(value, Vector):
            return a.end(site, [value], NO_RULE)
        if kwargs.get("enable_gqa", len(args) > 3 and args[3]):
            repeats = site.shape[-3] // value.coordinates.shape[-3]
            value = _apply(value, lambda labels: labels.repeat_interleave(repeats, -3))
        return summed_over_tokens(site, value)

    def grouped(site: Site, x: Value, w: Value, *args: Value, **kwargs: Value) -> Value:
        if len(getattr(w, "shape", ())) != 3:
            return a.end(site, [x, w], "it is a product of two activations")
        return product(site, x, w, 1, None, key=1)

    def index_add(site: Site, x: Value, dim: int, index: Value, source: Value, **kwargs: Value) -> Value:
        empty = isinstance(x, Known) and not bool(x.value.any())
        if not empty or not isinstance(source, Vector) or source.gain is not None or _varies(source.coordinates, dim):
            return a.end(site, [x, source], "it is added to something else")
        labels = v.merge_along(source.coordinates, [dim % source.coordinates.ndim], site.order, keepdim=True).expand(site.shape)
        return Vector(labels, fresh_instances(labels))

    def masked(site: Site, x: Value, mask: Value, value: Value) -> Value:
        if isinstance(x, Vector) and scalar(value) == 0.0 and isinstance(mask, (Known, Unknown)):
            return scaled(site, x, mask)
        return a.end(site, [x, mask, value], "it is masked")

    table: dict[str, Rule] = {}
    for names, rule in (
        (("to", "_to_copy", "type_as", "float", "dropout", "neg", "_assert_tensor_metadata", "clone", "alias"), passes),
        (("add", "sub"), add),
        (("mul", "div", "true_divide"), multiply),
        (("pow", "square"), squared),
        (("mean", "sum"), reduce),
        (("linalg_vector_norm",), length),
        (("layer_norm", "rms_norm"), norm),
        (("embedding",), embedding),
        (("linear",), linear),
        (("matmul", "mm", "bmm"), matmul),
        (("addmm",), addmm),
        (("scaled_dot_product_attention",), attention),
        (("_grouped_mm", "transformers::grouped_mm_fallback"), grouped),
        (("index_add",), index_add),
        (("masked_fill",), masked),
    ):
        for name in names:
            table[name] = rule
    return table


def _labels(value: Vector | Square | Mean) -> Tensor:
    return value.coordinates if isinstance(value, Vector) else value.of.coordinates


def _shape(value: Value) -> tuple[int, ...]:
    if isinstance(value, (Vector, Square, Mean)):
        return tuple(_labels(value).shape)
    return tuple(value.value.shape) if isinstance(value, Known) else tuple(getattr(value, "shape", ()))
