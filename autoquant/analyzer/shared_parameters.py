"""Parameters that go by several names."""

from __future__ import annotations

from collections.abc import Iterator

from autoquant.aten import operator_name
from autoquant.capture.routes import Captured, module_path


def parameter_names(captured: Captured) -> dict[tuple[str, str], str]:
    """(canonical name, module path) -> the name that this module has for a shared parameter.

    A table that is shared with a linear is two parameters as soon as it is untied; each use goes by its own name. In a
    model that cannot be untied, and for linears that share a weight, all go by one name: their scales are the same.
    """
    return {(group[0], module): users[0][1] for group, users in _users(captured) for module, _ in users}


def shared_names(captured: Captured) -> dict[str, tuple[str, ...]]:
    """A name as the analysis uses it -> all names of the parameter that stay tied: all of them change alike."""
    return {users[0][1]: tuple(name for _, name in users) for _, users in _users(captured) if len(users) > 1}


_Users = list[tuple[str, str]]
"""(module, name) of a parameter: first those of modules that multiply with it, last of one that holds it for others."""


def _users(captured: Captured) -> Iterator[tuple[tuple[str, ...], _Users]]:
    """Every shared parameter by its names, twice where it can be untied: for those that look it up as a table, and for
    the others.
    """
    called, tables = set(), set()
    for subgraph in captured.subgraphs if captured.aliases else ():
        for node in subgraph.graph.graph.nodes:
            if node.op == "call_function":
                called.add(module_path(node))
                if operator_name(node) == "embedding":
                    tables.add(module_path(node))
    for group in captured.aliases:
        named = [(name.rpartition(".")[0], name) for name in group]
        named.sort(key=lambda user: (user[0] not in called, user[0] in tables))
        apart = (
            [named]
            if captured.inseparable
            else [[u for u in named if (u[0] in tables) is use] for use in (True, False)]
        )
        yield from ((group, users) for users in apart if users)
