"""A checkpoint's parameters with plans carried out, computed one by one from the folder when asked for."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autoquant.checkpoint.apply import match_names
from autoquant.checkpoint.finite import UnusedRows, find_unused
from autoquant.checkpoint.unplaced import buffer_names, unplaced
from autoquant.errors import AutoQuantError
from autoquant.executor.apply import check_finite, is_finite
from autoquant.executor.pieces import Fitted, carry_out, execute, fit
from autoquant.executor.plan import Plan
from autoquant.io.safetensors_stream import Shards
from autoquant.models.checkpoint_source import open_checkpoint
from autoquant.models.hub_names import HubTensor, hub_layout
from autoquant.models.load import listed, load_skeleton
from autoquant.models.structure import ModelStructure, structure_of
from autoquant.models.vocabulary import token_tables

_LARGE = 1 << 25
"""Elements; a tensor of more is not held in float32 beside what it becomes."""


class StoredOtherwise(AutoQuantError):
    """Nothing tells what a parameter is in the file."""


@dataclass(frozen=True, slots=True)
class Weights:
    """A checkpoint's parameters in float32 with plans carried out, computed when asked for.

    ``stored``: the stored tensors that each is made of. ``inventory`` describes them as they are after the plans;
    ``tables``: those with a row for each token; ``unplaced`` are stored tensors without a place; ``fetch`` reads a
    stored tensor to ``device``, None: ``shards.read``.
    """

    shards: Shards
    stored: Mapping[str, tuple[HubTensor, ...]]
    inventory: ModelStructure
    plans: tuple[Plan, ...] = ()
    inventories: tuple[ModelStructure, ...] = field(default=())
    tables: frozenset[str] = frozenset()
    unused: UnusedRows | None = None
    unplaced: tuple[str, ...] = ()
    trust_remote_code: bool = False
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    fetch: Callable[[str], Tensor] | None = None

    def read(self, name: str) -> Tensor:
        """One parameter, float32."""
        return self._read(name, len(self.plans))

    def _read(self, name: str, plans: int) -> Tensor:
        if not plans:
            return self._checked(name).float()
        plan, before = self.plans[plans - 1], self.inventories[plans - 1]
        if name in plan.created:
            tensor = torch.zeros(before.shapes[plan.created[name]][0], device=self.device)
        else:
            name = name if name in plan.untied else before.canonical[name]
            tensor = self._read(name, plans - 1)
        operations = plan.operations.get(name, ())
        if operations:
            tensor = execute(operations, tensor)
            check_finite(name, tensor, "overflows float32 when transformed")
        return tensor

    def rounded(self, name: str, dtype: torch.dtype) -> Tensor:
        """One parameter, rounded to float32 and then to ``dtype``; a large one some rows at a time."""
        steps = self._by_rows(name)
        stored = None if steps is None else self._checked(steps[0])
        if steps is None or stored is None or stored.numel() <= _LARGE:
            return self.read(name).to(dtype)
        result = torch.empty(stored.shape, dtype=dtype, device=stored.device)
        count = max(_LARGE // math.prod(stored.shape[1:]), 1)
        for first in range(0, len(stored), count):
            rows = stored[first : first + count].float()
            for fitted in steps[1]:
                changed = torch.empty_like(rows)
                carry_out(fitted, rows, changed, first)
                check_finite(name, changed, "overflows float32 when transformed")
                rows = changed
            result[first : first + count] = rows
        return result

    def _by_rows(self, name: str) -> tuple[str, list[Fitted]] | None:
        """A parameter's first name and what all plans do to it, where they do it row by row."""
        steps: list[Fitted] = []
        for plan, before in zip(reversed(self.plans), reversed(self.inventories), strict=True):
            if name in plan.created:
                return None
            name = name if name in plan.untied else before.canonical[name]
            if operations := plan.operations.get(name, ()):
                fitted = fit(operations, before.shapes[name])
                if fitted is None or fitted.rows != 1 or fitted.shape != before.shapes[name]:
                    return None
                steps.insert(0, fitted)
        return name, steps

    def _checked(self, name: str) -> Tensor:
        """One parameter as it is stored, zeros where unused rows were. Raises AutoQuantError where it is not finite."""
        tensor = self.as_stored(name)
        if self.unused is not None:
            tensor = self.unused.hidden(name, tensor)
            if self.device.type != "cpu" and tensor.is_floating_point() and not is_finite(tensor):
                look_through(self)
        return tensor

    def as_stored(self, name: str) -> Tensor:
        """One parameter of the folder, joined of the tensors that it is stored in."""
        fetch, parts = self.fetch or self.shards.read, self.stored[name]
        if len(parts) == 1 and parts[0].rows is None:
            return fetch(parts[0].name)
        dtype = self.shards.entries[parts[0].name].dtype
        joined = torch.empty(self.shapes_stored[name], dtype=dtype, device=self.device)
        for part in parts:
            part.put_(joined, fetch(part.name))
        return joined

    @property
    def shapes_stored(self) -> Mapping[str, tuple[int, ...]]:
        """The shapes before all plans."""
        return (self.inventories[0] if self.inventories else self.inventory).shapes

    def planned(self, plan: Plan) -> Weights:
        """The same with one more plan."""
        before = self.inventory
        gone = tuple(f"{path}." for path in plan.identities)
        shapes = {n: s for n, s in before.shapes.items() if not (gone and n.startswith(gone))}
        shapes |= {bias: before.shapes[weight][:1] for bias, weight in plan.created.items()}
        canonical = {n: n if n in plan.untied or n in plan.created else before.canonical[n] for n in shapes}
        after = ModelStructure(
            shapes,
            dict.fromkeys(shapes, torch.float32),
            canonical,
            before.modules,
            before.shared_modules,
            before.growable - set(plan.created),
        )
        return dataclasses.replace(
            self, inventory=after, plans=(*self.plans, plan), inventories=(*self.inventories, before)
        )


def open_weights(source: Path, *, trust_remote_code: bool = False) -> Weights:
    """The parameters of a checkpoint folder, from its headers alone. Warns of tensors that are not used.

    Raises StoredOtherwise where transformers makes a parameter of more than rows of the stored tensors.
    """
    shards = open_checkpoint(source)
    skeleton = load_skeleton(source, trust_remote_code=trust_remote_code)
    inventory = structure_of(skeleton)
    stored = _stored(source, skeleton, inventory, shards)
    placed = {part.name for parts in stored.values() for part in parts}
    left = unplaced(shards, {*placed, *buffer_names(skeleton)})
    if left:
        warnings.warn(f"{source}: the model's class has no place for {listed(left)}: not loaded", stacklevel=2)
    float32 = dataclasses.replace(inventory, dtypes=dict.fromkeys(inventory.shapes, torch.float32))
    tables = token_tables(skeleton)
    return Weights(shards, stored, float32, tables=tables, unplaced=left, trust_remote_code=trust_remote_code)


def _stored(source: Path, skeleton: Any, inventory: ModelStructure, shards: Shards) -> dict[str, tuple[HubTensor, ...]]:
    """The stored tensors by parameter; experts are stored one by one."""
    names = match_names(inventory, shards)
    if names is not None:
        return {name: (HubTensor(stored, inventory.shapes[name], None),) for name, stored in names.items()}
    first = {name: shape for name, shape in inventory.shapes.items() if inventory.canonical[name] == name}
    try:
        layout = hub_layout(skeleton, first)
    except AutoQuantError as error:
        raise StoredOtherwise(f"{source}: transformers converts its tensors on loading ({error.message})") from error
    missing = [
        part.name
        for parts in layout.values()
        for part in parts
        if part.name not in shards.entries or shards.entries[part.name].shape != part.shape
    ]
    if missing:
        raise StoredOtherwise(f"{source}: transformers converts its tensors on loading; there is no {listed(missing)}")
    return {name: layout[inventory.canonical[name]] for name in inventory.shapes}


def looked_through(weights: Weights, *, all_now: bool = True) -> Weights:
    """The same, told of rows of token tables that are not finite; ``all_now`` False: all else is looked at when read.

    Warns and raises AutoQuantError as ``find_unused`` does.
    """
    names = None if all_now else weights.tables
    return dataclasses.replace(weights, unused=look_through(weights, names))


def look_through(weights: Weights, names: Collection[str] | None = None) -> UnusedRows:
    """What ``find_unused`` says of the named parameters, None: of all."""
    inventory = weights.inventory if not weights.inventories else weights.inventories[0]
    first = [name for name in inventory.shapes if inventory.canonical[name] == name and (not names or name in names)]
    source = weights.shards.folder
    return find_unused(source, first, weights.as_stored, weights.tables).tied(inventory.canonical)
