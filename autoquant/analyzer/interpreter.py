"""Walks a captured graph once, handing every operator to its rule.

What is common to both analyses lives here: constants are really computed, data movement on a parameter is remembered
rather than done, integers that depend on the data are known to be unknown. What a rule gets is the values of its
arguments; what it returns becomes the value of the node.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from autoquant.analyzer.axes import Param
from autoquant.analyzer.extents import EXTENTS, by_number, indexed_dims, size_of, sized
from autoquant.analyzer.movement import dim_of, function_of
from autoquant.analyzer.shared_parameters import parameter_names
from autoquant.analyzer.variables import ZERO, Reason
from autoquant.aten import (
    CASTS,
    CHOOSING,
    COUNTING,
    FILLS,
    LIKE_ANOTHER,
    MOVEMENT,
    MULTIPLIED,
    PARTING,
    RANDOM,
    RANDOM_LIKE,
    operator_name,
    rescales,
)
from autoquant.capture.routes import Captured, GraphInput, Subgraph, module_path
from autoquant.capture.untraceable import OPERATOR, UNTRACED
from autoquant.library_patches import FakeTensor
from autoquant.models.source import one_line

MAX_CONSTANT = 1 << 24
"""Largest constant that is computed."""


@dataclass(frozen=True, slots=True)
class Constant:
    """A constant whose value is known, whatever the weights and the data.

    ``settled``: also for every length, position and checkpoint. One that is not (positions, what an integer buffer
    holds) is known as an index or a condition alone: as a number it may be 0 here and something else elsewhere.
    """

    value: Tensor
    settled: bool = True


@dataclass(frozen=True, slots=True)
class Dynamic:
    """A tensor that no scale and no rotation reaches, of unknown value: token ids, routing decisions, cosines."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Untracked:
    """A tensor that cannot be followed: its size depends on the data in a way that is not known, or it is too large.
    Nothing passes it.
    """


MAX_FOLLOWED = 1 << 25
"""Largest activation that is labelled element by element."""


def unwieldy(fake: Tensor) -> bool:
    """True if this is a tensor that cannot be followed."""
    return any(not isinstance(size, int) for size in fake.shape) or fake.numel() > MAX_FOLLOWED


@dataclass(frozen=True, slots=True)
class Site:
    """Where a rule is applied."""

    node: fx.Node
    order: int
    operator: str
    at: str
    outputs: tuple[Tensor, ...]
    """Fake tensors: shapes and dtypes of what the node makes."""

    def because(self, text: str) -> Reason:
        return Reason(text, self.operator, self.at, self.order)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.outputs[0].shape)


Value = Any
"""A Constant, a Dynamic, a Param, what the analysis puts on an activation, or a plain Python argument."""


class Rule(Protocol):
    """What the interpreter asks of an operator's rule (``rules.registry.Rule``)."""

    @property
    def apply(self) -> Callable[..., Value]:
        """``apply(state, site, *args, **kwargs)`` gives the value of the result."""

    def takes(self, node: fx.Node) -> bool:
        """True if the rule was written for the overload that ``node`` calls."""


@dataclass(slots=True)
class Interpreter:
    """One pass over the subgraphs of a capture."""

    captured: Captured
    rules: Mapping[str, Rule]
    state: Any
    """Of the analysis: the first argument of every rule."""
    movement: Callable[..., Value]
    """Applied to data movement of an activation: ``movement(site, function, args, kwargs)``."""
    graph_break: Callable[[Site], Value]
    """Makes the value of a tensor that comes out of a graph break."""
    no_rule: Callable[[Site, Sequence[Value]], Value]
    give_up: Callable[[Site, Sequence[Value], str], Value]
    """Blocks all values that meet at a site, for the reason given."""
    finish: Callable[[Site, Sequence[Value]], None]
    """Called with everything that a subgraph returns."""
    rescales: bool = False
    """Whether a weight times a number is the weight itself, where products alone read it."""
    extent: int = EXTENTS[0]
    """How many rows there are where the data say how many."""
    values: dict[fx.Node, Value] = field(default_factory=dict)
    states: dict[str, Value] = field(default_factory=dict)
    """By placeholder, what tensors carry that the graph reads and writes anew."""
    order: int = 0
    precision: float = field(init=False)
    """Distance from 1 to the next number in the least precise floating-point format of the parameters, or in float32.

    Norms compute in float32 whatever the model is in, and what that rounds is far below what a proof tells apart.
    """

    def __post_init__(self) -> None:
        self.precision = max(
            (
                torch.finfo(node.meta["val"].dtype).eps
                for subgraph in self.captured.subgraphs
                for node in subgraph.graph.graph.nodes
                if node.op == "placeholder"
                and node.name in subgraph.inputs
                and subgraph.inputs[node.name].kind == "parameter"
                and node.meta["val"].is_floating_point()
            ),
            default=math.inf,
        )
        self.precision = max(self.precision, torch.finfo(torch.float32).eps)

    def run(self) -> None:
        names = parameter_names(self.captured)
        for subgraph in self.captured.subgraphs:
            for node in subgraph.graph.graph.nodes:
                self.order += 1
                site = self._site(node)
                if node.op == "placeholder":
                    self.values[node] = self._input(site, subgraph, subgraph.inputs.get(node.name))
                elif node.op == "get_attr":
                    held = getattr(subgraph.graph, str(node.target), None)
                    settled = not self.captured.by_position
                    self.values[node] = _constant(held, settled) if isinstance(held, Tensor) else held
                elif node.op == "output":
                    self._keep(site, subgraph, node)
                    values = [v for v in _flat(self._value(self._results(subgraph, node))) if not _plain(v)]
                    self.finish(site, [v for v in values if not isinstance(v, Untracked)])
                else:
                    self.values[node] = _aligned(site, self._call(site, names))

    def _site(self, node: fx.Node) -> Site:
        outputs = tuple(sized(v, self.extent) for v in _flat(node.meta.get("val")) if isinstance(v, Tensor))
        return Site(node, self.order, operator_name(node), module_path(node), outputs)

    def _input(self, site: Site, subgraph: Subgraph, what: GraphInput | None) -> Value:
        if what is None or not site.outputs:
            return None
        fake = site.outputs[0]
        if what.kind == "parameter" and not fake.shape:
            return Dynamic((), fake.dtype)  # one number for all channels: it has no axis to carry a scale
        if what.kind == "parameter":
            return Param(what.name, tuple(fake.shape), (), tuple(fake.shape))
        kept = site.node.name in subgraph.written and what.kind != "graph break"
        if kept and fake.is_floating_point() and fake.ndim > 1 and not unwieldy(fake):
            self.states[site.node.name] = self.state.held(site, indexed_dims(site.node))
            return self.states[site.node.name]
        if what.kind == "graph break" and fake.is_floating_point():
            return self.graph_break(site)
        if what.kind in ("buffer", "constant") and site.node.name in subgraph.constants:
            settled = what.kind == "constant" and not self.captured.by_position
            return _constant(subgraph.constants[site.node.name], settled)
        return Dynamic(tuple(fake.shape), fake.dtype)

    def _keep(self, site: Site, subgraph: Subgraph, output: fx.Node) -> None:
        """What the graph writes over a state is what it reads of it the next time: both carry the same."""
        results: Any = output.args[0]
        for name, result in zip(subgraph.written, results, strict=False):
            if name in self.states:
                self.state.keeps(site, self.states[name], self._value(result))

    def _results(self, subgraph: Subgraph, output: fx.Node) -> Any:
        """What a subgraph returns, without the states that it keeps."""
        results: Any = output.args[0]
        kept = [n for n, name in enumerate(subgraph.written) if name in self.states]
        return [result for n, result in enumerate(results) if n not in kept]

    def _narrower(self, site: Site) -> str | None:
        """Why a scale does not pass a result of less precision than all parameters have; None where it is as precise.

        Parameters of that precision are rounded anyway, when they are stored.
        """
        for fake in site.outputs:
            if fake.is_floating_point() and torch.finfo(fake.dtype).eps > self.precision:
                return f"it is rounded to {str(fake.dtype).removeprefix('torch.')}"
        return None

    def _unrounded(self, site: Site, result: Value, tensors: Sequence[Value]) -> Value:
        """A rule's result, unless what carries a scale became an integer on the way (written into a buffer of them)."""
        values = result if isinstance(result, tuple) else (result,)
        for fake, value in zip(site.outputs, values, strict=False):
            rounded = not (fake.is_floating_point() or fake.is_complex())
            if rounded and not _plain(value) and not isinstance(value, (Constant, Dynamic, Untracked)):
                return self.give_up(site, tensors, "it is rounded")
        return result

    def _value(self, argument: Any) -> Value:
        return fx.map_arg(argument, lambda node: self.values[node])

    def _number(self, node: fx.Node) -> Value:
        """How large a tensor is, or what is computed from that; a number that is read off a tensor is unknown."""
        taken = [self.values[argument] for argument in node.all_input_nodes]
        known = operator_name(node).startswith("sym_size") or all(isinstance(value, int) for value in taken)
        size = size_of(node.meta["val"], self.extent) if known and taken else None
        return Dynamic((), torch.int64) if size is None else size

    def _call(self, site: Site, names: Mapping[tuple[str, str], str]) -> Value:
        if isinstance(site.node.meta.get("val"), torch.SymInt):
            return self._number(site.node)
        args, kwargs = self._value(site.node.args), dict(self._value(site.node.kwargs))
        args = tuple(args)
        if site.operator == "getitem":
            return args[0][args[1]] if isinstance(args[0], (tuple, list)) else self.no_rule(site, [args[0]])
        args = tuple(_named(a, site, names) for a in args)
        if site.operator in LIKE_ANOTHER:
            args = args[:1]
        tensors = [v for v in _flat((args, kwargs)) if not _plain(v)]
        narrower = self._narrower(site)
        if narrower is not None and any(not isinstance(v, (Constant, Dynamic, Untracked)) for v in tensors):
            return self.give_up(site, [v for v in tensors if not isinstance(v, Untracked)], narrower)
        if isinstance(args[0] if args else None, Param) and len(tensors) == 1:
            if site.operator in CASTS and site.outputs[0].is_floating_point():
                return args[0]
            if site.operator in MOVEMENT:
                return _moved_param(args[0], site, args, kwargs)
            if self.rescales and rescales(site.node):
                return args[0]
        if site.operator == OPERATOR:
            return self.give_up(site, [v for v in tensors if not isinstance(v, Untracked)], UNTRACED)
        if any(isinstance(v, Untracked) for v in tensors) or any(unwieldy(fake) for fake in site.outputs):
            rest = [v for v in tensors if not isinstance(v, Untracked)]
            return self.give_up(site, rest, "it meets a tensor that is too large to follow, or sized by the data")
        if site.operator in FILLS and site.outputs and site.outputs[0].numel() <= MAX_CONSTANT:
            fill = FILLS[site.operator]
            return Constant(torch.full(site.shape, args[-1] if fill is None else fill, dtype=site.outputs[0].dtype))
        if all(isinstance(v, Constant) for v in tensors):
            known = _evaluate(site, args, kwargs)
            if known is not None:
                return known
        if site.operator in CHOOSING and isinstance(args[0], Constant) and _uniform(args[0].value) and tensors[1:]:
            value = args[0].value.reshape(-1)[:1]  # whichever rows the data choose
            return Constant(value.expand(site.shape), args[0].settled)
        if site.operator in MULTIPLIED and any(map(_is_zero, tensors)):  # the first state of a recurrence
            return Constant(torch.zeros((), dtype=site.outputs[0].dtype).expand(site.shape))
        if site.operator in MULTIPLIED and _meet_nothing(tensors):  # what is left of it in a table of states
            return torch.full((), ZERO).expand(site.shape)
        if all(isinstance(v, (Constant, Dynamic)) for v in tensors) or site.operator in RANDOM_LIKE:
            return _unknowns(site)
        if not site.outputs:  # it can only write to what it is given
            return self.give_up(site, tensors, "it returns nothing: what it writes to is not known")
        dtype = kwargs.get("dtype")
        if isinstance(dtype, torch.dtype) and not (dtype.is_floating_point or dtype.is_complex):
            return self.give_up(site, tensors, "it is rounded")  # before anything else is done with it
        if site.operator == "mul" and _sized_by_data(site.node):
            args = tuple(_fitted(value, site.shape) for value in args)
        is_movement = site.operator in MOVEMENT
        if site.operator == "index_select" and by_number(site.node):
            return self.state.part(site, args[0], args[1])
        rule = self.rules.get(site.operator)
        if rule is not None and rule.takes(site.node):
            try:
                result = rule.apply(self.state, site, *args, **kwargs)
            except RuntimeError:  # of sizes that only fit for as many rows as the data really choose
                if not any(_sized_by_data(node) for node in (site.node, *site.node.all_input_nodes)):
                    raise
                return self.give_up(site, tensors, "how many rows it has of each tensor is chosen by the data")
            return self._unrounded(site, result, tensors)
        by_data = site.operator in CHOOSING | PARTING
        if is_movement and (by_data or not any(isinstance(v, Dynamic) for v in _flat(args[1:]))):
            try:
                if site.operator in PARTING and any(isinstance(v, Dynamic) for v in _flat((args, kwargs))):
                    return self.state.part(site, args[0], dim_of(site.operator, args, kwargs))
                return self.movement(site, function_of(site.node, site.shape), args, kwargs)
            except (RuntimeError, TypeError) as error:  # torch refuses what stands for its arguments: said, not hidden
                return self.give_up(site, tensors, f"its elements cannot be followed: {one_line(error)}")
        return self.no_rule(site, tensors)  # also where the data decide how far elements move


def interpreted(
    captured: Captured,
    rules: Mapping[str, Rule],
    state: Any,
    give_up: Callable[[Site, Sequence[Value], str], Value],
    *,
    rescales: bool = False,
    extent: int = EXTENTS[0],
) -> Interpreter:
    """A pass that is done; data movement, graph breaks, operators without a rule and outputs are the ``state``'s."""
    interpreter = Interpreter(
        captured,
        rules,
        state,
        movement=state.move,
        graph_break=state.graph_break,
        no_rule=state.no_rule,
        give_up=give_up,
        finish=state.finish,
        rescales=rescales,
        extent=extent,
    )
    interpreter.run()
    return interpreter


def _named(value: Value, site: Site, names: Mapping[tuple[str, str], str]) -> Value:
    if isinstance(value, Param):
        name = names.get((value.name, site.at), value.name)
        if name != value.name:
            return Param(name, value.full_shape, value.views, value.shape, value.key)
    return value


def _moved_param(param: Param, site: Site, args: tuple[Value, ...], kwargs: dict[str, Value]) -> Value:
    move = function_of(site.node, site.shape)

    def one(index: int | None) -> Callable[[Tensor], Tensor]:
        def replay(labels: Tensor) -> Tensor:
            result = move(labels, *args[1:], **kwargs)
            return result if index is None else result[index]  # type: ignore[no-any-return]  # an ATen operator

        return replay

    if isinstance(site.node.meta.get("val"), (tuple, list)):
        return tuple(param.viewed(one(i), tuple(fake.shape)) for i, fake in enumerate(site.outputs))
    return param.viewed(one(None), site.shape)


def _is_zero(value: Value) -> bool:
    return isinstance(value, Constant) and value.settled and _uniform(value.value) and not value.value.any()


def _meet_nothing(values: Sequence[Value]) -> bool:
    """True if activations are multiplied, one of which has labels that are 0 (or infinite) everywhere."""
    return not any(isinstance(v, Param) for v in values) and any(
        isinstance(v, Tensor) and not bool(v.any()) for v in values
    )


def _uniform(value: Tensor) -> bool:
    return value.numel() > 0 and bool((value == value.reshape(-1)[0]).all())


def _constant(value: Tensor, settled: bool = True) -> Constant | Dynamic:
    fake = isinstance(value, FakeTensor) or value.device.type == "meta"
    if fake or value.numel() > MAX_CONSTANT:
        return Dynamic(tuple(value.shape), value.dtype)
    return Constant(value.detach().cpu(), settled)


def _sized_by_data(node: fx.Node) -> bool:
    """True if a tensor that a node makes has a size that the data say."""
    tensors = (value for value in _flat(node.meta.get("val")) if isinstance(value, Tensor))
    return any(not isinstance(size, int) for value in tensors for size in value.shape)


def _fitted(value: Value, shape: tuple[int, ...]) -> Value:
    """Unknown numbers that are broadcast to ``shape``: where they are more than one, as many as it stands for."""
    if not isinstance(value, Dynamic):
        return value
    wide = shape[len(shape) - len(value.shape) :]
    return Dynamic(tuple(1 if size == 1 else n for size, n in zip(value.shape, wide, strict=True)), value.dtype)


def _evaluate(site: Site, args: tuple[Value, ...], kwargs: dict[str, Value]) -> Value | None:
    """Compute a constant for real, on the CPU; None where that is not possible."""
    fake = site.outputs
    if not fake or any(f.numel() > MAX_CONSTANT for f in fake) or site.operator in RANDOM:
        return None
    if "device" in kwargs:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    real = _map(
        args,
        lambda v: v.value if isinstance(v, Constant) else torch.device("cpu") if isinstance(v, torch.device) else v,
    )
    real_kwargs = _map(kwargs, lambda v: v.value if isinstance(v, Constant) else v)
    try:
        result = site.node.target(*real, **real_kwargs)  # type: ignore[operator]  # a call_function node
    except (RuntimeError, TypeError):
        return None  # no kernel for these dtypes: unknown, which is always safe
    made = [v for v in _flat(result) if isinstance(v, Tensor)]
    if any(v.shape != f.shape for v, f in zip(made, fake, strict=False)):
        return None  # as many rows as these values say; all that follows is sized for as many as any may
    settled = site.operator not in COUNTING and all(v.settled for v in _numbers(site, args, kwargs))
    return _map(result, lambda v: _computed(v, settled) if isinstance(v, Tensor) else v)


def _numbers(site: Site, args: tuple[Value, ...], kwargs: dict[str, Value]) -> list[Constant]:
    """The constants whose numbers are in the result; a condition only chooses between them."""
    taken = args[1:] if site.operator == "where" else (args[0], *args[2:]) if site.operator == "masked_fill" else args
    return [v for v in _flat((taken, kwargs)) if isinstance(v, Constant)]


def _computed(value: Tensor, settled: bool) -> Constant | Dynamic:
    """What was computed, as far as it may be known: numbers that are not settled are unknown."""
    if not settled and (value.is_floating_point() or value.is_complex()):
        return Dynamic(tuple(value.shape), value.dtype)
    return Constant(value, settled)


def _aligned(site: Site, value: Value) -> Value:
    """``value`` with None where the operator returns something else than a tensor (custom operators that write)."""
    val = site.node.meta.get("val")
    if not isinstance(val, (tuple, list)) or not isinstance(value, tuple) or len(value) != len(site.outputs):
        return value
    if len(val) == len(value):
        return value
    made = iter(value)
    return tuple(next(made) if isinstance(one, Tensor) else None for one in val)


def _unknowns(site: Site) -> Value:
    val = site.node.meta.get("val")
    made = tuple(Untracked() if unwieldy(f) else Dynamic(tuple(f.shape), f.dtype) for f in site.outputs)
    return made if isinstance(val, (tuple, list)) else made[0] if made else None


def _map(value: object, change: Callable[[Any], Any]) -> Any:
    if isinstance(value, list):
        return [_map(v, change) for v in value]
    if isinstance(value, tuple):
        return tuple(_map(v, change) for v in value)
    if isinstance(value, dict):
        return {k: _map(v, change) for k, v in value.items()}
    return change(value)


def _flat(value: object) -> list[Any]:
    if isinstance(value, (list, tuple)):
        return [leaf for item in value for leaf in _flat(item)]
    if isinstance(value, dict):
        return [leaf for item in value.values() for leaf in _flat(item)]
    return [value]


def _plain(value: object) -> bool:
    return value is None or isinstance(
        value, (bool, int, float, str, torch.dtype, torch.device, torch.layout, torch.memory_format, slice)
    )
