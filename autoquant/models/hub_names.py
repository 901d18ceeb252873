"""The names and shapes that a model's tensors have on the hub, and which rows of which tensor each is made of.

transformers renames, stacks and joins tensors on loading: the experts of a layer become one parameter [E, O, I]. What
it would save is found by sending *row numbers* in place of values through its own reverse conversion. Whatever moves
whole rows can then be carried out either way and one tensor at a time: on int8 values, on the scales of their rows, on
floating-point weights. What does more than that has no layout, and says so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from autoquant.errors import AutoQuantError
from autoquant.models.source import one_line, quiet

_STRIDE = 1 << 40
"""More rows than a tensor has: row r of tensor number t is t * _STRIDE + r."""


@dataclass(frozen=True, slots=True)
class HubTensor:
    """One tensor on the hub: rows of one tensor of the model. ``rows`` [N]; None: all of them, as they are."""

    name: str
    shape: tuple[int, ...]
    rows: Tensor | None

    def taken(self, values: Tensor) -> Tensor:
        """Its values out of the model's tensor, [..., C] with any last dimension C."""
        if self.rows is None:
            return values
        flat = values.reshape(-1, values.shape[-1]) if values.dim() > 1 else values
        first, count = int(self.rows[0]), len(self.rows)
        runs = torch.equal(self.rows, torch.arange(first, first + count))
        taken = flat[first : first + count] if runs else flat[self.rows]
        return taken.reshape(*self.shape[:-1], values.shape[-1]) if values.dim() > 1 else taken

    def put_(self, values: Tensor, given: Tensor) -> None:
        """The reverse: write ``given``, whose rows are those of this tensor, into the model's contiguous tensor."""
        if self.rows is None:
            values.copy_(given.reshape(values.shape))
        elif values.dim() > 1:
            values.view(-1, values.shape[-1])[self.rows] = given.reshape(-1, values.shape[-1])
        else:
            values[self.rows] = given


Layout = Mapping[str, tuple[HubTensor, ...]]
"""The model's name of each tensor -> what it is on the hub, at least one tensor."""


def hub_layout(model: Any, shapes: Mapping[str, tuple[int, ...]]) -> Layout:
    """The layout of the tensors of those names and shapes, of a model of transformers.

    Raises AutoQuantError where a tensor on the hub is more than rows of one tensor of the model.
    """
    order = list(shapes)
    numbers = {name: _row_numbers(shape) + at * _STRIDE for at, (name, shape) in enumerate(shapes.items())}
    empty = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    found, sizes = _reverted(model, numbers), _reverted(model, empty)
    layout: dict[str, list[HubTensor]] = {name: [] for name in order}
    for hub, given in found.items():
        rows, shape = given.reshape(-1), tuple(sizes[hub].shape)
        source = order[int(rows[0]) // _STRIDE] if len(rows) else hub
        rows = rows % _STRIDE if len(rows) else rows
        whole = shapes[source]
        if not _are_rows(given, rows, shape, whole) or bool(
            (given.reshape(-1) // _STRIDE != order.index(source)).any()
        ):
            raise AutoQuantError(f"{hub}: transformers makes it of more than rows of {source}")
        same = shape == whole and torch.equal(rows, torch.arange(len(rows)))
        layout[source].append(HubTensor(hub, shape, None if same else rows))
    for name, parts in layout.items():
        count = sum(_row_count(part.shape) for part in parts)
        if not parts or count != _row_count(shapes[name]):
            raise AutoQuantError(f"{name}: transformers saves {count} of its {_row_count(shapes[name])} rows")
    return {name: tuple(parts) for name, parts in layout.items()}


def _are_rows(given: Tensor, rows: Tensor, shape: tuple[int, ...], whole: tuple[int, ...]) -> bool:
    """True if a tensor of that shape is whole rows of one of shape ``whole``."""
    if len(whole) < 2:
        return shape == tuple(given.shape) and len(shape) == len(whole)
    return len(shape) > 1 and shape[-1] == whole[-1] and tuple(given.shape) == (*shape[:-1], 1) and len(rows) > 0


def _row_count(shape: tuple[int, ...]) -> int:
    return math.prod(shape[:-1]) if len(shape) > 1 else math.prod(shape)


def _row_numbers(shape: tuple[int, ...]) -> Tensor:
    """int64 [..., 1] for [..., C], and a number for each element of a vector."""
    rows = torch.arange(_row_count(shape))
    return rows.reshape(*shape[:-1], 1) if len(shape) > 1 else rows.reshape(shape)


def _reverted(model: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    from transformers.core_model_loading import revert_weight_conversion

    try:
        with quiet():
            reverted: dict[str, Tensor] = revert_weight_conversion(model, tensors)
    except Exception as error:  # what a conversion does with shapes
        raise AutoQuantError(
            f"transformers cannot give the tensors the names that they have on the hub: {one_line(error)}"
        ) from error
    return reverted
