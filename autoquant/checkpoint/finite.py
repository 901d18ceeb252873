"""NaNs and infinities of a checkpoint, told by tensor before any work is done.

What is in the row of a token that no text holds (a vocabulary that was padded) reaches nothing: every step takes the
token tables row by row. Such rows are worked on as zeros and written as they were.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autoquant.errors import AutoQuantError
from autoquant.executor.apply import is_finite
from autoquant.models.reading import Batch, ids_of
from autoquant.models.structure import structure_of
from autoquant.models.vocabulary import token_tables

_NAMED = 5


@dataclass(frozen=True, slots=True)
class UnusedRows:
    """Rows of token tables that are not finite, by the parameter's name, and what stands there."""

    rows: Mapping[str, Tensor] = field(default_factory=dict)
    values: Mapping[str, Tensor] = field(default_factory=dict)

    def hidden(self, name: str, tensor: Tensor) -> Tensor:
        """The tensor with zeros in these rows; itself where it has none."""
        if name not in self.rows:
            return tensor
        tensor = tensor.clone()
        tensor[self.rows[name]] = 0
        return tensor

    def restored(self, name: str, tensor: Tensor) -> Tensor:
        """The tensor with what stood in these rows; itself where it has none, or is no longer in floating point."""
        if name not in self.rows or not tensor.is_floating_point():
            return tensor
        tensor = tensor.clone()
        tensor[self.rows[name].to(tensor.device)] = self.values[name].to(tensor.device, tensor.dtype)
        return tensor

    def tied(self, canonical: Mapping[str, str]) -> UnusedRows:
        """The same, known by every name of a tied parameter."""
        names = {name: first for name, first in canonical.items() if first in self.rows}
        return UnusedRows(
            {name: self.rows[first] for name, first in names.items()},
            {name: self.values[first] for name, first in names.items()},
        )

    def check(self, batches: Iterable[Batch]) -> None:
        """Raise AutoQuantError for what calibrates that holds a token whose row is not finite."""
        for name, rows in self.rows.items():
            for batch in map(ids_of, batches):
                met = batch[torch.isin(batch, rows)]
                if len(met):
                    raise AutoQuantError(
                        f"{name}: its row {int(met[0])} holds a NaN or an infinity, and the calibration text has that "
                        "token: repair the checkpoint"
                    )


def find_unused(
    folder: Path, names: Collection[str], read: Callable[[str], Tensor], tables: Collection[str]
) -> UnusedRows:
    """Look at every parameter. ``read``: as it is stored; ``tables``: the token tables among ``names``.

    Warns of rows of these that are not finite. Raises AutoQuantError for all else that is not, with the first names.
    """
    bad: list[str] = []
    rows: dict[str, Tensor] = {}
    values: dict[str, Tensor] = {}
    for name in names:
        tensor = read(name)
        if not tensor.is_floating_point() or is_finite(tensor):
            continue
        wrong = ~tensor.isfinite()
        found = wrong.any(-1).nonzero().flatten() if name in tables else torch.empty(0)
        if name in tables and 2 * len(found) < len(tensor):
            rows[name], values[name] = found.cpu(), tensor[found].cpu()
        else:
            what = "a NaN" if tensor.isnan().any() else "an infinity"
            bad.append(f"{name} holds {what} ({int(wrong.sum())} of {tensor.numel()} elements)")
    if bad:
        more = f" and {len(bad) - _NAMED} more tensors" if len(bad) > _NAMED else ""
        raise AutoQuantError(f"{folder}: {'; '.join(bad[:_NAMED])}{more}: repair the checkpoint; nothing was changed")
    for name, found in rows.items():
        listed = ", ".join(str(row) for row in found[:_NAMED].tolist())
        more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
        warnings.warn(
            f"{folder}: {name}: row {listed}{more} holds a NaN or an infinity; it is kept, and text with that token "
            "cannot be computed",
            stacklevel=2,
        )
    return UnusedRows(rows, values)


@torch.no_grad()
def hide_unused_(folder: Path, model: Any) -> UnusedRows:
    """What :func:`find_unused` says of a model in memory, whose unused rows are zeros afterwards."""
    parameters = dict(model.named_parameters())
    found = find_unused(folder, parameters, parameters.__getitem__, token_tables(model))
    for name in found.rows:
        parameters[name].data = found.hidden(name, parameters[name].data)
    return found.tied(structure_of(model).canonical)


@torch.no_grad()
def show_unused_(model: Any, unused: UnusedRows) -> None:
    """Put what stood there back."""
    for name, parameter in model.named_parameters():
        parameter.data = unused.restored(name, parameter.data)
