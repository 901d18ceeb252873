"""What the analysis of one graph says, with concrete paths: the input of layer folding.

The same classes as in the config file are used; here no path holds ``{layer}`` and every ``layers`` is None.
"""

from __future__ import annotations

from dataclasses import dataclass

from autoquant.config.format import Blocked, Linear, Online, SmoothingGroup, Space


@dataclass(frozen=True, slots=True)
class Findings:
    """Everything found in a graph, in graph order."""

    linears: tuple[Linear, ...]
    groups: tuple[SmoothingGroup, ...]
    spaces: tuple[Space, ...]
    online: tuple[Online, ...]
    blocked: tuple[Blocked, ...]
    unknown_operators: tuple[str, ...]
