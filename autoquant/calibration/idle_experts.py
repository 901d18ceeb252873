"""Experts that no calibration token reached: what their scales are worth is unknown, so they are named."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from autoquant.quantizer.linear import Maxima
from autoquant.quantizer.strategies import PlannedLinear

IdleExperts = Mapping[str, tuple[int, ...]]
"""Numbers of the idle experts by the module that holds the stack."""

_SHOWN = 8


def idle_experts(planned: Iterable[PlannedLinear], maxima: Maxima) -> dict[str, tuple[int, ...]]:
    """The experts whose inputs were always 0, by module; ``maxima`` [E, I] by weight name, others are passed over.

    An expert is idle only if none of its weights saw anything: behind a ReLU an input may be 0 for every token.
    """
    found: dict[str, set[int]] = {}
    for entry in planned:
        if entry.stack is not None and entry.weight in maxima:
            largest_E = maxima[entry.weight].expand(entry.stack, -1).amax(-1)
            idle = {number for number, value in enumerate(largest_E.tolist()) if value == 0}
            owner = entry.weight.rpartition(".")[0]
            found[owner] = found.get(owner, idle) & idle
    return {owner: tuple(sorted(idle)) for owner, idle in found.items() if idle}


def idle_text(idle: IdleExperts) -> str:
    """One line that names them and says what to do."""
    names = [f"{owner} {number}" for owner, numbers in idle.items() for number in numbers]
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    experts = "expert" if len(names) == 1 else "experts"
    return (
        f"no calibration token reached {len(names)} {experts}, whose scales no data tells: "
        f"{', '.join(names[:_SHOWN])}{more}; calibrate on more, or more varied, text"
    )
