"""Weights that a model keeps the other way round, which several formats do not take."""

from __future__ import annotations

from collections.abc import Iterable

from autoquant.quantizer.strategies import PlannedLinear


def transposed_reasons(planned: Iterable[PlannedLinear]) -> list[str]:
    """One for each linear whose weight the model keeps as [I, O]."""
    return [f"{one.path}: its weight is transposed (Conv1D); exclude it" for one in planned if one.is_transposed]
