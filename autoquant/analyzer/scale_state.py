"""The state of the scale analysis: variables, parameter axes, products met, and what any argument's labels are."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from autoquant.analyzer.axes import Axes, Param
from autoquant.analyzer.interpreter import Constant, Dynamic, Site, Untracked, Value, unwieldy
from autoquant.analyzer.variables import ONE, ZERO, Reason, Variables
from autoquant.aten import COUNTS, NO_RULE, SAME_INDICES, base_name


@dataclass(frozen=True, slots=True)
class Use:
    """A product of an activation with a weight: who reads which labels."""

    site: Site
    weight: str
    bias: str | None
    contracted_dim: int
    stack: int | None
    in_features: int
    out_features: int
    labels: Tensor
    """[in_features]: the labels that arrive at the columns."""


@dataclass(frozen=True, slots=True)
class Scores:
    """A place where queries meet keys."""

    site: Site
    heads: int
    kv_heads: int
    head_size: int


@dataclass(slots=True)
class ScaleAnalysis:
    """The state of the scale analysis: variables, parameter axes, and the linears met so far."""

    variables: Variables = field(default_factory=Variables)
    axes: Axes = field(init=False)
    uses: list[Use] = field(default_factory=list)
    grouped_by: dict[int, int] = field(default_factory=dict)
    scores: list[Scores] = field(default_factory=list)
    lead: int = 1
    """How many leading axes say which expert a row is for: those of the largest index that chose matrices."""
    cancelled: list[Tensor] = field(default_factory=list)
    """Labels of queries whose scales the keys cancel, and the like."""

    def __post_init__(self) -> None:
        self.axes = Axes(self.variables)

    # --- what arguments become ---------------------------------------------------------------------------------

    def labels(self, site: Site, value: Value, offset: int = 0) -> Tensor:
        """The labels of any argument."""
        if isinstance(value, Tensor):
            return value
        if isinstance(value, Param):
            found = self.axes.leaf(value, offset, site.because("it is a parameter"))
            if found is not None:
                return found
            return self.fixed(value.shape, site.because("a large parameter is used as a tensor"))
        if isinstance(value, Constant) and not value.settled:
            return torch.full(tuple(value.value.shape), ONE)
        if isinstance(value, Constant):
            # 0 and the infinities of a mask stay what they are under any scale.
            anything = (
                (value.value == 0) | value.value.isinf() if value.value.dtype.is_floating_point else value.value == 0
            )
            return torch.where(anything, torch.tensor(ZERO), torch.tensor(ONE))
        if isinstance(value, Dynamic):
            return torch.full(value.shape, ONE)
        return torch.tensor(ZERO if value == 0 or (isinstance(value, float) and math.isinf(value)) else ONE)

    def fixed(self, shape: Sequence[int], reason: Reason) -> Tensor:
        return torch.full(tuple(shape), self.variables.fixed(reason))

    # --- results ------------------------------------------------------------------------------------------------

    def block(self, site: Site, values: Sequence[Value], text: str) -> Value:
        """The operator allows no scale on anything it touches."""
        reason = site.because(text)
        for value in values:
            if isinstance(value, Param):
                # No labels, of which the matrices of a module of many experts would have a thousand million: a
                # parameter with a second kind of use is fixed as a whole.
                self.axes.other_use(value, reason, "a tensor that keeps its scale")
            elif isinstance(value, Tensor):
                self.mixed(self.labels(site, value))
                self.variables.fix(self.labels(site, value), reason)
        return self.outputs(site, reason)

    def outputs(self, site: Site, reason: Reason) -> Value:
        made = tuple(
            Untracked()
            if unwieldy(f)
            else self.fixed(f.shape, reason)
            if f.is_floating_point() or f.is_complex()
            else Dynamic(tuple(f.shape), f.dtype)
            for f in site.outputs
        )
        return made if isinstance(site.node.meta.get("val"), (tuple, list)) else made[0] if made else None

    def mixed(self, labels: Tensor) -> None:
        if self.variables.tagged:
            self.variables.mix(labels)

    def meet(self, site: Site, *operands: Tensor) -> None:
        """Operands of an elementwise operator: tokens of different experts stay apart where row stays on row."""
        lead = self.lead
        if self.variables.tagged and any(
            o.ndim not in (0, len(site.shape)) or (o.ndim and o.shape[:lead] != site.shape[:lead]) for o in operands
        ):
            for operand in operands:
                self.mixed(operand)

    def no_rule(self, site: Site, values: Sequence[Value]) -> Value:
        return self.block(site, values, NO_RULE)

    def graph_break(self, site: Site) -> Value:
        return self.fixed(site.shape, site.because("it crosses a graph break"))

    def held(self, site: Site, along: Collection[int]) -> Tensor:
        """A tensor that the graph reads and writes anew: a cache, the state of a scan."""
        return self.variables.state(site.shape, along)

    def keeps(self, site: Site, held: Tensor, written: Value) -> None:
        """What is written is what is read the next time."""
        labels = self.labels(site, written)
        self.mixed(labels)
        self.variables.equal(held, labels.expand(held.shape), site.order)

    def finish(self, site: Site, values: Sequence[Value]) -> None:
        for value in values:
            if isinstance(value, (Tensor, Param)):
                self.mixed(self.labels(site, value))
                self.variables.fix(self.labels(site, value), site.because("it is an output of the model"))

    # --- data movement ------------------------------------------------------------------------------------------

    def move(
        self, site: Site, function: Callable[..., Value], args: tuple[Value, ...], kwargs: dict[str, Value]
    ) -> Value:
        """Run the operator on the labels; indices that depend on the data could pick any row."""
        if site.operator in ("index", "index_select", "gather", "take_along_dim"):
            indices = args[1] if site.operator == "index" else [args[1 if site.operator == "take_along_dim" else 2]]
            if not all(index is None or isinstance(index, Constant) for index in indices):
                return self._pick(site, args, function)
        if site.operator == "pad" and any(isinstance(arg, str) and arg != "constant" for arg in args):
            return self.block(site, [args[0]], "it is padded with its own elements")
        moved = function(*_to_labels(self, site, args), **kwargs)
        results = moved if isinstance(moved, (tuple, list)) else (moved,)
        if self.variables.tagged and not self._keeps_rows(site, function, args, kwargs):
            for value in args:
                for labels in value if isinstance(value, (tuple, list)) else (value,):
                    if isinstance(labels, Tensor):
                        self.mixed(labels)
        return tuple(results) if isinstance(moved, (tuple, list)) else moved

    def part(self, site: Site, x: Value, dim: int) -> Value:
        """Runs of what lies along ``dim``, as long as the data say: any of it may be in any of them."""
        labels = self.labels(site, x)
        self.mixed(labels)
        merged = self.variables.merge_along(labels, [dim % labels.ndim], site.order, keepdim=True)
        made = tuple(merged.expand(fake.shape) for fake in site.outputs)
        return made if isinstance(site.node.meta.get("val"), (tuple, list)) else made[0]

    def _keeps_rows(
        self, site: Site, function: Callable[..., Value], args: tuple[Value, ...], kwargs: dict[str, Value]
    ) -> bool:
        """True if every row (the leading axes) of the result is made of the same row of the argument."""
        if not isinstance(args[0], Tensor) or args[0].ndim < self.lead:
            return False
        shape = args[0].shape[: self.lead]
        numbers = torch.arange(shape.numel())
        rows = numbers.view(*shape, *(1,) * (args[0].ndim - self.lead)).expand(args[0].shape)
        moved = function(*_to_labels(self, site, (rows, *args[1:])), **kwargs)
        for result in moved if isinstance(moved, (tuple, list)) else (moved,):
            if result.shape[: self.lead] != shape:
                return False
            if not bool((result == numbers.view(*shape, *(1,) * (result.ndim - self.lead))).all()):
                return False
        return True

    def _pick(self, site: Site, args: tuple[Value, ...], function: Callable[..., Value]) -> Value:
        """``x[i]`` with unknown ``i``: the rows it chooses from must agree, and then it does not matter which."""
        source = args[0]
        if site.operator == "index":
            indices = args[1]
        else:
            dim, index = (args[2], args[1]) if site.operator == "take_along_dim" else (args[1], args[2])
            indices = [None] * (dim % max(len(shape_of(source)), 1)) + [index]
        dims = [d for d, i in enumerate(indices) if i is not None]
        if (
            isinstance(source, Param)
            and dims == [0]
            and len(source.shape) > 1
            and isinstance(indices[0], Dynamic)
            and not source.views
        ):
            key = self.grouping(site.node.args[1][0], source.full_shape[0])  # type: ignore[index]  # the same indices, as nodes
            self.lead = max(self.lead, len(indices[0].shape))
            return source.picked(site.shape, key)
        labels = self.labels(site, source)
        self.mixed(labels)
        if any(isinstance(i, Tensor) for i in indices):
            return self.block(site, [source, *indices], "it is used as an index")
        if site.operator in ("gather", "take_along_dim"):
            merged = self.variables.merge_along(labels, dims, site.order, keepdim=True)
            shape = list(labels.shape)
            shape[dims[0]] = site.shape[dims[0]]
            return (
                merged.expand(shape).contiguous() if tuple(shape) == site.shape else self.block(site, [source], NO_RULE)
            )
        merged = self.variables.merge_along(labels, dims, site.order, keepdim=True)
        known = [
            None
            if i is None
            else i.value
            if isinstance(i, Constant) and d not in dims
            else torch.zeros(shape_of(i), dtype=torch.int64)
            for d, i in enumerate(indices)
        ]
        return torch.ops.aten.index.Tensor(merged, known)

    def grouping(self, node: object, experts: int) -> int:
        """A number for the way in which ``node`` (offsets or indices of ``experts`` experts) groups the rows.

        Offsets are the running sum of how often each index occurs: they group as the indices do.
        """
        node = _same_indices(node, experts)
        if _is_call(node, frozenset(("cumsum",))):
            counts = _same_indices(node.args[0], experts)  # type: ignore[attr-defined]  # a call
            if _is_call(counts, COUNTS):
                node = _same_indices(counts.args[0], experts)  # type: ignore[attr-defined]  # a call
        return self.grouped_by.setdefault(id(node), len(self.grouped_by) + 1)


def _is_call(node: object, names: frozenset[str]) -> bool:
    return isinstance(node, torch.fx.Node) and node.op == "call_function" and base_name(node) in names


def _same_indices(node: object, experts: int) -> object:
    """Where the indices that ``node`` holds come from: through casts, reshapes and clamps to the experts there are."""
    while isinstance(node, torch.fx.Node) and node.args and isinstance(node.args[0], torch.fx.Node):
        if not (_is_call(node, SAME_INDICES) and _holds_indices(node)) and not _clamps_to(node, experts):
            break
        node = node.args[0]
    return node


def _holds_indices(node: torch.fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dtype in (torch.int32, torch.int64, torch.float32, torch.float64)


def _clamps_to(node: torch.fx.Node, experts: int) -> bool:
    """Whether no index of an expert is changed by ``node``: it is clamped to numbers of experts."""
    if not _is_call(node, frozenset(("clamp", "clamp_max", "clamp_min"))):
        return False
    name, bounds = base_name(node), [*node.args[1:], *node.kwargs.values()]
    low = node.args[1] if name != "clamp_max" and len(node.args) > 1 else node.kwargs.get("min")
    position = 2 if name == "clamp" else 1
    high = node.args[position] if name != "clamp_min" and len(node.args) > position else node.kwargs.get("max")
    numbers = all(bound is None or isinstance(bound, int) for bound in bounds)
    return bool(numbers and (low is None or low <= 0) and (high is None or high >= experts - 1))  # type: ignore[operator]  # numbers


def shape_of(value: Value) -> tuple[int, ...]:
    """Shape of any argument that is a tensor."""
    if isinstance(value, (Param, Dynamic)):
        return value.shape
    return tuple(value.value.shape) if isinstance(value, Constant) else tuple(value.shape)


def _to_labels(analysis: ScaleAnalysis, site: Site, args: tuple[Value, ...]) -> list[Value]:
    """Arguments for running a movement on labels: data become labels, indices their values."""
    first = args[0]
    if isinstance(first, (tuple, list)):
        data: Value = [analysis.labels(site, v) for v in first]
        if site.operator == "cat":
            data = [d for d, v in zip(data, first, strict=True) if d.numel() or len(first) == 1]
    else:
        data = analysis.labels(site, first)
    rest = [_index(v) for v in args[1:]]
    if site.operator in ("constant_pad_nd", "pad"):
        fill = rest[-1] if len(rest) > 1 and isinstance(rest[-1], (int, float)) else 0
        mode = ["constant"] if site.operator == "pad" else []
        return [data, rest[0], *mode, ZERO if fill == 0 else ONE]
    return [data, *rest]


def _index(value: Value) -> Value:
    if isinstance(value, (tuple, list)):
        return [_index(v) for v in value]
    return value.value if isinstance(value, Constant) else value


def scalar(value: Value) -> float | None:
    """The number that ``value`` is, if it is one."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, Constant) and value.settled and value.value.numel() == 1 and not value.value.is_complex():
        return float(value.value)
    return None
