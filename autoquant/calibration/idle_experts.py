"""Experts that no calibration token reached: what their scales are worth is unknown, so they are named."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from autoquant.quantizer.linear import Maxima
from autoquant.quantizer.strategies import PlannedLinear

IdleExperts = Mapping[str, tuple[int, ...]]
"""Numbers of the idle experts by the module that holds the stack."""

_SHOWN = 8
_NUMBERED = re.compile(r"(?P<owner>.*)\.(?P<number>\d+)\.[^.]")
"""The last list that a linear is in, and its number there."""


def idle_experts(planned: Sequence[PlannedLinear], maxima: Maxima) -> dict[str, tuple[int, ...]]:
    """The experts whose inputs were always 0, by module; ``maxima`` [E, I] by weight name, others are passed over.

    An expert is idle only if none of its weights saw anything: behind a ReLU an input may be 0 for every token.
    """
    if not maxima:  # nothing was calibrated
        return {}
    found: dict[str, set[int]] = {}
    for entry in planned:
        if entry.stack is not None and entry.weight in maxima:
            largest_E = maxima[entry.weight].expand(entry.stack, -1).amax(-1)
            idle = {number for number, value in enumerate(largest_E.tolist()) if value == 0}
            owner = entry.weight.rpartition(".")[0]
            found[owner] = found.get(owner, idle) & idle
    _add_modules_(found, planned, maxima)
    return {owner: tuple(sorted(idle)) for owner, idle in found.items() if idle}


def _add_modules_(found: dict[str, set[int]], planned: Sequence[PlannedLinear], maxima: Maxima) -> None:
    """The same for experts that are modules of a list: those of which no linear ran, where another of the list did."""
    lists: dict[str, dict[int, bool]] = {}
    for entry in planned:
        match = _NUMBERED.match(entry.weight)
        if match is None or entry.stack is not None:
            continue
        ran = entry.weight in maxima and bool(maxima[entry.weight].any())
        members = lists.setdefault(match["owner"], {})
        members[int(match["number"])] = members.get(int(match["number"]), False) or ran
    for owner, members in lists.items():
        if any(members.values()) and not all(members.values()):
            found[owner] = found.get(owner, set()) | {number for number, ran in members.items() if not ran}


def idle_text(idle: IdleExperts) -> str:
    """One line that names them and says what to do."""
    names = [f"{owner} {number}" for owner, numbers in idle.items() for number in numbers]
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    experts = "expert" if len(names) == 1 else "experts"
    return (
        f"no calibration token reached {len(names)} {experts}, whose scales no data tells: "
        f"{', '.join(names[:_SHOWN])}{more}; calibrate on more, or more varied, text"
    )
