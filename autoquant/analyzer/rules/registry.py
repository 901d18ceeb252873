"""Where the rules of operators are kept: a rule is a top-level function that is registered under operators' names.

A rule takes the state of its analysis, the site and the operator's arguments, with what the analysis puts on
activations in place of tensors. It adds the equations that the operator demands and returns the value of the result.
Registration binds the rule to the operator's ATen schemas: one that does not fit is an error on import, not an
operator without a rule.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from autoquant.analyzer.axes import Param
from autoquant.aten import ALIASES, HIGHER_ORDER
from autoquant.library_patches import OpOverload

Says = Callable[[fx.Node, Collection[fx.Node], Collection[Param]], str]
"""What a rule does at a node, in words: ``says(node, carriers, params)``. ``carriers`` are the arguments through which
what is followed comes in, ``params`` the arguments that are parameters."""


@dataclass(frozen=True, slots=True)
class Rule:
    """How one operator carries scales, or rotations. ``apply(state, site, *args, **kwargs)``."""

    apply: Callable[..., Any]
    says: str | Says
    without: frozenset[str] = frozenset()
    """Overloads that the rule was not written for: the operator has no rule there."""

    def takes(self, node: fx.Node) -> bool:
        """True if the rule was written for the overload that ``node`` calls."""
        return getattr(node.target, "_overloadname", "") not in self.without

    def sentence(self, node: fx.Node, carriers: Collection[fx.Node], params: Collection[Param]) -> str:
        """What the rule does at ``node``, in words."""
        return self.says if isinstance(self.says, str) else self.says(node, carriers, params)


@dataclass(frozen=True, slots=True)
class Rules:
    """The rules of one analysis, by the operator's name as ``aten.operator_name`` has it."""

    kind: str
    table: dict[str, Rule] = field(default_factory=dict)

    def rule(
        self, *names: str, says: str | Says, without: str = ""
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Register the decorated function for the operators in ``names`` (each may be several, between blanks).

        ``without`` names overloads that it is not for. Raises TypeError where the function does not fit a schema of one
        of the operators, or where one has a rule already.
        """

        def register(function: Callable[..., Any]) -> Callable[..., Any]:
            rule = Rule(function, says, frozenset(without.split()))
            for name in " ".join(names).split():
                if name in self.table:
                    raise TypeError(f"{where(function)}: {name} has a {self.kind} rule already")
                check_signature(function, name, rule.without)
                self.table[name] = rule
            return function

        return register


def where(function: Callable[..., Any]) -> str:
    """``'scale_norm (autoquant/analyzer/rules/norms.py)'``: the rule and the file to edit."""
    return f"{function.__name__} ({function.__module__.replace('.', '/')}.py)"


def check_signature(function: Callable[..., Any], name: str, without: Collection[str] = ()) -> None:
    """Bind a rule to every schema of an operator, with all arguments and with the required ones alone.

    Overloads that write into an argument never stand in a graph, and are left out with those in ``without``. Raises
    TypeError where one does not fit, and where ATen has no such operator; those of other libraries are checked where
    the library has registered them.
    """
    found = list(overloads(name))
    if not found and "::" not in name and name not in HIGHER_ORDER:
        raise TypeError(f"{where(function)}: torch has no operator {name}")
    signature = inspect.signature(function)
    for overload in found:
        schema = overload._schema
        writes = any(argument.alias_info and argument.alias_info.is_write for argument in schema.arguments)
        if writes or overload._overloadname in without:
            continue
        needed = [argument for argument in schema.arguments if not argument.has_default_value()]
        for arguments in (schema.arguments, needed):
            positional = [None for argument in arguments if not argument.kwarg_only]
            keywords = {argument.name: None for argument in arguments if argument.kwarg_only}
            try:
                signature.bind(None, None, *positional, **keywords)
            except TypeError as error:
                raise TypeError(
                    f"{where(function)} does not fit {schema}: {error}; change its parameters, or name the overload "
                    f"'{overload._overloadname}' in without="
                ) from None


def overloads(name: str) -> Iterator[OpOverload]:
    """All overloads that a graph may call under a name, second names of the operator included."""
    space, _, own = name.rpartition("::")
    names = [own] if space else [name, *(alias for alias, first in ALIASES.items() if first == name)]
    for each in names:
        packet = getattr(getattr(torch.ops, space or "aten"), each, None)
        if packet is not None:
            yield from (getattr(packet, overload) for overload in packet.overloads())


SCALES = Rules("scale")
"""How operators carry per-channel scales."""

ROTATIONS = Rules("rotation")
"""How operators carry vectors that may be rotated; any other operator ends a space."""

scale_rule = SCALES.rule
rotation_rule = ROTATIONS.rule
