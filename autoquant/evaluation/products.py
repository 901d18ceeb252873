"""Inputs and outputs of a model's quantized linears, kept as they come.

Imports torch alone, since servers are looked at from the inside, in environments of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

ROWS = 1024
"""Tokens that are kept, the first ones."""


class Products:
    """Keeps what the linears that are ``wanted`` are given and what they make of it, of the first ``rows`` tokens."""

    def __init__(self, wanted: Callable[[nn.Module], bool], rows: int = ROWS) -> None:
        self.wanted, self.rows = wanted, rows
        self._seen: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {}

    def attach_(self, model: nn.Module) -> None:
        """Watch the linears of ``model``, for good."""
        for module in model.modules():
            if self.wanted(module):
                module.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        y = output[0] if isinstance(output, tuple) else output
        parts = self._seen.setdefault(module, [])
        left = self.rows - sum(len(given) for given, _ in parts)
        if left > 0:
            x = args[0]
            rows = (x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1]))
            parts.append((rows[0][:left].clone(), rows[1][:left].clone()))

    def linears(self) -> list[nn.Module]:
        """The linears in the order of their first calls."""
        return list(self._seen)

    def kept(self) -> list[tuple[Tensor, Tensor]]:
        """Inputs [T, I] and outputs [T, O] by linear, in the order of the first calls."""
        return [(torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])) for parts in self._seen.values()]
