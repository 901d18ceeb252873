"""Strategies by name."""

from __future__ import annotations

from autoquant.config.format import Strategy
from autoquant.config.spelling import did_you_mean
from autoquant.errors import AutoQuantError


def parse_strategies(text: str) -> tuple[Strategy, ...]:
    """Strategies by their names with commas, ``all`` for the eight. Raises AutoQuantError with the nearest name."""
    names = [strategy.value for strategy in Strategy]
    if text == "all":
        return tuple(Strategy)
    for name in text.split(","):
        if name not in names:
            near = did_you_mean(name, names) or f"; there are {', '.join(names)}"
            raise AutoQuantError(f"no strategy '{name}'{near}")
    return tuple(Strategy(name) for name in text.split(","))


def parse_strategy(text: str) -> Strategy:
    """One strategy by its name. Raises AutoQuantError."""
    chosen = parse_strategies(text)
    if len(chosen) != 1:
        raise AutoQuantError(f"strategy '{text}': expected one")
    return chosen[0]
