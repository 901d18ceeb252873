"""Modules in whose place a forward puts others, as an attention that is sparse for long inputs alone.

What is put before the products of one of them is not before those of the other: no trace shows both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from torch import nn

from autoquant.analyzer.findings import Findings
from autoquant.analyzer.lengths import longer_inputs
from autoquant.config.format import Blocked
from autoquant.models.source import LoadedModel

LONGEST = 1 << 13
"""Tokens up to which the length is looked for from which on nothing is replaced."""

Run = Callable[[nn.Module, LoadedModel], object]
Classes = Mapping[str, tuple[str, str]]
"""By path: the class of a module, and that of the one in its place after a run."""


def without_replaced(found: Findings, module: nn.Module, loaded: LoadedModel, run: Run) -> Findings:
    """``found`` without online rotations between queries and keys of modules that ``run`` replaces; these are blocked.

    ``found`` is read off ``module`` on the inputs of ``loaded``.
    """
    try:
        classes = _replaced(module, loaded, run)
    except Exception:  # the model's own code, which is traced by other operators
        return found
    if not classes:
        return found
    until = _until(module, loaded, run)
    which = "these inputs" if until is None else f"inputs of up to {until} tokens"
    online, blocked = [], list(found.blocked)
    for one in found.online:
        inside = [path for path in classes if one.kind == "R3" and _within(path, one.path)]
        for path in inside:
            reason = f"{which} put a {classes[path][1]} in the place of its {classes[path][0]}, and one alone is traced"
            blocked.append(Blocked(path=path, what="rotation", reason=reason, operator="R3", at=path))
        online += [] if inside else [one]
    return replace(found, online=tuple(online), blocked=tuple(dict.fromkeys(blocked)))


def _within(path: str, other: str) -> bool:
    """True if one of two modules holds the other, or is it."""
    return f"{path}.".startswith(f"{other}.") or f"{other}.".startswith(f"{path}.")


def _replaced(module: nn.Module, loaded: LoadedModel, run: Run) -> Classes:
    before = {path: type(part).__name__ for path, part in module.named_modules()}
    after: dict[str, str] = {}
    handle = module.register_forward_hook(
        lambda module, args, output: after.update({p: type(part).__name__ for p, part in module.named_modules()})
    )
    try:
        run(module, loaded)
    finally:
        handle.remove()
    return {path: (name, after[path]) for path, name in before.items() if after.get(path, name) != name}


def _until(module: nn.Module, loaded: LoadedModel, run: Run) -> int | None:
    """The longest inputs by which modules are replaced; None where they are so at every length, or none can be run."""
    low, high = 0, 64
    while _at(module, loaded, run, high):
        low, high = high, 2 * high
        if high > LONGEST:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _at(module, loaded, run, middle) else (low, middle)
    return low or None


def _at(module: nn.Module, loaded: LoadedModel, run: Run, length: int) -> bool:
    failed = False
    for longer in longer_inputs(loaded, length):
        try:
            return bool(_replaced(module, longer, run))
        except Exception:  # the model's own code: it takes no inputs of this shape
            failed = True
    return not failed  # shorter ones than those that are traced are as these
