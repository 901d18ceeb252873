"""Ways through a captured graph along one channel, backwards from a reader."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from torch import Tensor, fx

from autoquant.analyzer.axes import Param
from autoquant.analyzer.interpreter import Interpreter
from autoquant.analyzer.rotation_spaces import Rotations
from autoquant.analyzer.rotation_state import Beside, Gain, Mean, Square, Vector
from autoquant.analyzer.rules import ROTATIONS, SCALES, Rules
from autoquant.analyzer.rules.sentences import FORMAT, MOVES, MOVES_VECTORS, is_movement, qualified
from autoquant.analyzer.smoothing_groups import Scales
from autoquant.analyzer.variables import Ints, Reason
from autoquant.aten import CASTS, NORMS, PRODUCTS, operator_name
from autoquant.capture.graph import module_path


@dataclass(frozen=True, slots=True)
class Step:
    """One operator, or a run of data movement in one module."""

    operator: str
    at: str
    effect: str


Steps = tuple[Step, ...]


def scale_chains(scales: Scales, component: int) -> Chains:
    """Ways of the channels whose scale is one degree of freedom."""
    components = scales.solution.component

    def labels(value: Any) -> Ints | None:
        return value.numpy() if isinstance(value, Tensor) else None

    reasons = scales.analysis.variables.reasons
    undoes = "this linear: its columns undo the scale"
    return Chains(scales.interpreter, components, component, labels, SCALES, reasons, undoes)


def rotation_chains(rotations: Rotations, component: int) -> Chains:
    """Ways of one coordinate of a space; -1 for none."""

    def labels(value: Any) -> Ints | None:
        vector = value.of if isinstance(value, Square | Mean) else value
        return vector.coordinates.numpy() if isinstance(vector, Vector | Beside) else None

    components = rotations.solution.component
    reasons = rotations.analysis.variables.reasons
    splits = frozenset(split.reason.order for split in rotations.analysis.splits if len(np.unique(split.keys)) > 1)
    undoes = "this linear: its columns undo the rotation"
    return Chains(rotations.interpreter, components, component, labels, ROTATIONS, reasons, undoes, splits)


@dataclass(eq=False)
class Chains:
    """The nodes that carry one component, and the ways between them."""

    interpreter: Interpreter
    components: Ints
    component: int
    labels: Callable[[Any], Ints | None]
    rules: Rules
    reasons: dict[int, Reason]
    undoes: str
    """What the reader at the end of a way does."""
    splits: frozenset[int] = frozenset()
    """Places at which channels see different factors."""

    @cached_property
    def _order(self) -> dict[fx.Node, int]:
        nodes = (node for subgraph in self.interpreter.captured.subgraphs for node in subgraph.graph.graph.nodes)
        return {node: order for order, node in enumerate(nodes, start=1)}

    @cached_property
    def _nodes(self) -> dict[int, fx.Node]:
        return {order: node for node, order in self._order.items()}

    def at(self, reason: Reason) -> fx.Node | None:
        """The node that gave ``reason``."""
        return self._nodes.get(reason.order)

    def reason(self, node: fx.Node) -> Reason | None:
        """What ``node`` blocks for, if it does."""
        order = self._order[node]
        return next((reason for reason in self.reasons.values() if reason.order == order), None)

    def carries(self, node: fx.Node, exact: int | None = None) -> bool:
        """True if what ``node`` makes holds the component (or the very label ``exact``)."""
        value = self.interpreter.values.get(node)
        for part in value if isinstance(value, tuple | list) else (value,):
            found = self.labels(part)
            if found is None or not found.size:
                continue
            if exact is not None:
                if bool((found == exact).any()):
                    return True
            elif bool((self.components[found] == self.component).any()):
                return True
        return False

    def back(self, start: fx.Node | None, until: fx.Node | None = None, exact: int | None = None) -> list[fx.Node]:
        """The shortest way from the nearest source (or from ``until``) to ``start``, both included."""
        if start is None:
            return []
        return self._search(
            start,
            lambda node: node is until if until is not None else self._is_source(node),
            lambda node: self.carries(node, exact) or (until is not None and exact is None),
        )

    def back_to(self, blocker: fx.Node, source: fx.Node | None) -> list[fx.Node]:
        """The shortest way from ``source`` (else from any source) to an argument of ``blocker``."""
        starts = [argument for argument in blocker.all_input_nodes if self.carries(argument)]
        ways = [self._search(start, lambda node: node is source, self.carries) for start in starts]
        ways = [way for way in ways if way and way[0] is source] or [self.back(start) for start in starts]
        return min(ways, key=len, default=[])

    def into(self, blocker: fx.Node) -> list[fx.Node]:
        """What feeds ``blocker``, from the nearest product or embedding on."""
        for argument in blocker.all_input_nodes:
            if (
                argument.op == "call_function"
                and self.labels(_first(self.interpreter.values.get(argument))) is not None
            ):
                return self._search(
                    argument,
                    lambda node: self._is_source(node, any_component=True),
                    lambda node: self._is_activation(node),
                )
        return []

    def end(self, start: fx.Node | None) -> fx.Node | None:
        """Where a value that carries nothing stopped carrying: the nearest node before it that blocks."""
        if start is None:
            return None
        way = self._search(
            start, lambda node: self.reason(node) is not None, lambda node: not self._is_activation(node)
        )
        return way[0] if self.reason(way[0]) is not None else None

    def first(self, blocker: fx.Node) -> fx.Node:
        """The earliest node that blocks of those that ``blocker`` blocks for; itself where it has a reason of its own.

        Where a channel meets what carries nothing, that came about before: backwards along tensors of the same width.
        """
        found, seen, queue = blocker, {blocker}, [blocker]
        while queue:
            node = queue.pop()
            for argument in node.all_input_nodes:
                if argument in seen or argument.op != "call_function" or _width(argument) != _width(blocker):
                    continue
                if self._is_activation(argument) or operator_name(argument) in PRODUCTS:
                    continue
                seen.add(argument)
                queue.append(argument)
                if self._order[argument] < self._order[found] and self.reason(argument) is not None:
                    found = argument
        return found

    def _is_activation(self, node: fx.Node) -> bool:
        return self.labels(_first(self.interpreter.values.get(node))) is not None

    def _search(
        self, start: fx.Node, found: Callable[[fx.Node], bool], follow: Callable[[fx.Node], bool]
    ) -> list[fx.Node]:
        """Breadth first, backwards. Where nothing is found: the way to the farthest node that could be followed."""
        after: dict[fx.Node, fx.Node | None] = {start: None}
        queue = deque([start])
        node = start
        while queue:
            node = queue.popleft()
            if found(node):
                break
            for argument in node.all_input_nodes:
                if argument not in after and argument.op == "call_function" and follow(argument):
                    after[argument] = node
                    queue.append(argument)
        way = [node]
        while (following := after[way[-1]]) is not None:
            way.append(following)
        return way

    def _is_source(self, node: fx.Node, any_component: bool = False) -> bool:
        """True if the channel is made here: by the rows of a weight, a table, or a gain."""
        params = self.params(node)
        if not params:
            return False
        name = operator_name(node)
        if name in PRODUCTS or name in NORMS or name == "embedding":
            return self.rules is SCALES or name not in NORMS
        carriers = [
            argument
            for argument in node.all_input_nodes
            if self._is_activation(argument) and (any_component or self.carries(argument))
        ]
        return not carriers

    def _effect(self, node: fx.Node) -> str:
        """What a node does to what is followed, in words: its rule says so, if it is no data movement."""
        name = operator_name(node)
        if name in CASTS:
            return FORMAT
        if is_movement(node):
            return MOVES if self.rules is SCALES else MOVES_VECTORS
        rule = self.rules.table.get(name)
        if rule is None or not rule.takes(node):
            return "ends here: there is no rule for it"
        return rule.sentence(node, [a for a in node.all_input_nodes if self.carries(a)], self.params(node))

    def params(self, node: fx.Node) -> list[Param]:
        """The parameters among a node's arguments."""
        values = (self.interpreter.values.get(argument) for argument in node.all_input_nodes)
        plain = (value.param if isinstance(value, Gain) else value for value in values)
        return [value for value in plain if isinstance(value, Param)]

    def steps(
        self,
        way: Sequence[fx.Node],
        reader: fx.Node | None = None,
        blocker: tuple[fx.Node, Reason] | None = None,
        blocked: bool = False,
    ) -> Steps:
        """The nodes of a way in words; data movement within one module on one line.

        ``blocked``: something that is not on the way blocks, and the reader undoes nothing.
        """
        steps: list[Step] = []
        runs: list[bool] = []
        stopped = False
        for position, node in enumerate(dict.fromkeys(way)):
            name, at = operator_name(node), module_path(node) or "the model"
            operator = qualified(name)
            if name == "getitem":
                continue
            moves = is_movement(node)
            effect = self._effect(node)
            params = sorted(self.params(node), key=lambda param: -len(param.full_shape))  # a weight before its bias
            if position == 0 and not moves and params:
                at = params[0].name
            if name == "mul" and self._order[node] in self.splits:
                effect = "multiplies each channel by a factor of its own"
            if stopped and not moves:
                effect = ""  # nothing that it could pass is left
            if blocker is not None and node is blocker[0]:
                effect, moves, stopped = f"BLOCKS: {blocker[1].text}", False, True
            if node is reader:
                at, effect, moves = (
                    params[0].name if params else at,
                    "this linear" if blocked or blocker else self.undoes,
                    False,
                )
            if moves and runs and runs[-1] and steps[-1].at == at:
                names = dict.fromkeys([*steps[-1].operator.split(", "), operator])
                merged = (
                    FORMAT if effect == steps[-1].effect == FORMAT else steps[-1].effect if effect == FORMAT else effect
                )
                steps[-1] = Step(", ".join(names), at, merged)
                continue
            steps.append(Step(operator, at, effect))
            runs.append(moves)
        return tuple(steps)


def _width(node: fx.Node) -> int | None:
    value = node.meta.get("val")
    return int(value.shape[-1]) if isinstance(value, Tensor) and value.ndim else None


def _first(value: Any) -> Any:
    return next(iter(value), None) if isinstance(value, tuple | list) else value
