"""What a config says about each linear, in words. No torch: everything is read from the config."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from autoquant.config.format import Blocked, Config, Linear, Slot, SmoothingGroup, SmoothingKind, Space
from autoquant.config.layers import LAYER, fill, layer_numbers, layer_set, module_of, tail
from autoquant.config.slots import positions_of


def summarise(config: Config, unknown_operators: Sequence[str] = ()) -> Summary:
    """Every linear with what reaches it, what is blocked, and totals. ``unknown_operators`` had no rule."""
    lookup = _Lookup(config)
    sections: dict[tuple[str, str | None], list[Row]] = {}
    for linear in config.model.linears:
        sections.setdefault((stack_of(linear.path), linear.layers), []).append(_row(lookup, linear))
    paths = {linear.path for linear in config.model.linears}
    for blocked in config.blocked:
        if blocked.what == "smoothing" and blocked.path not in paths:  # a part that no linear stands for
            lookup.note(f"{blocked.path}{_in_layers(blocked.layers)}: {because(blocked)}", "")
    stacks = {stack for stack, layers in sections if layers is not None}
    return Summary(
        sections=tuple(
            Section(layers, tuple(rows), stack if len(stacks) > 1 else "") for (stack, layers), rows in sections.items()
        ),
        notes=tuple(lookup.notes),
        spaces=tuple(_space(space) for space in config.rotation.spaces),
        query_keys=tuple(_query_key(group) for group in config.smoothing.groups if _is_query_key(group)),
        blocked_rotations=tuple(
            f"{b.path}{_in_layers(b.layers)}: {because(b)}" for b in config.blocked if b.what == "rotation"
        ),
        totals=_totals(config, unknown_operators),
    )


def because(blocked: Blocked) -> str:
    """``'it is normalised (aten.add at model.norm)'``."""
    return f"{blocked.reason} ({blocked.operator}{f' at {blocked.at}' if blocked.at else ''})"


def reached(config: Config, linear: Linear) -> dict[int | None, bool]:
    """Per layer of ``linear`` (None where it is in none): True if smoothing groups reach every column.

    Query-key groups do not count: they scale keys in the cache, not what a linear reads.
    """
    found: list[tuple[frozenset[int | None], Slot]] = []
    for group in config.smoothing.groups:
        if _is_query_key(group):
            continue
        for slot in _slots(group.targets, linear):
            written_out = _weights(linear)[slot.path]
            found.append((frozenset(_numbers(group.layers) if written_out is None else (written_out,)), slot))
    known: dict[tuple[int, ...], bool] = {}  # layers that the same slots reach are looked at once

    def whole(layer: int | None) -> bool:
        key = tuple(number for number, (layers, _) in enumerate(found) if layer in layers)
        if key not in known:
            known[key] = _covers(linear, [found[number][1] for number in key])
        return known[key]

    return {layer: whole(layer) for layer in _numbers(linear.layers)}


def _covers(linear: Linear, slots: Iterable[Slot]) -> bool:
    """True if slots reach every column of a linear."""
    columns = linear.in_features * (linear.stack or 1)
    covered = np.zeros(columns, dtype=np.bool_)
    for slot in slots:
        expert = np.arange(columns // slot.size)[:, None] * slot.size  # a slot without a stack is for all of them
        covered[(positions_of(slot) + expert).reshape(-1)] = True
    return bool(covered.all())


def stack_of(path: str) -> str:
    """The list of layers that a path is in, empty where it is in none."""
    return path.partition(f".{LAYER}.")[0] if LAYER in path else ""


def _row(lookup: _Lookup, linear: Linear) -> Row:
    sources = [
        _source(lookup, linear, group, slot)
        for group in lookup.config.smoothing.groups
        if not _is_query_key(group) and _overlap(group.layers, linear.layers)
        for slot in _slots(group.targets, linear)
    ]
    layers = reached(lookup.config, linear)
    smoothing = list(dict.fromkeys(sources))
    if not all(layers.values()):
        blocked = [
            b
            for b in lookup.config.blocked
            if b.what == "smoothing" and b.path == linear.path and _overlap(b.layers, linear.layers)
        ]
        references = [lookup.note(because(b), linear.path) for b in blocked]
        missing = [layer for layer, whole in layers.items() if not whole and layer is not None]
        where = f" in layers {layer_set(missing)}" if missing and len(missing) < len(layers) else ""
        what = "part of it" if sources and not where else "no"
        smoothing.append(f"{what}{where}" + (f", see {_listed(references)}" if references else ""))
    shape = f"{linear.in_features} -> {linear.out_features}" + (f" x {linear.stack}" if linear.stack else "")
    name = _inside(linear.path) + (f" ({linear.role})" if linear.role == "router" else "")
    return Row(name, shape, tuple(smoothing), tuple(_rotations(lookup, linear)), all(layers.values()))


def _source(lookup: _Lookup, linear: Linear, group: SmoothingGroup, target: Slot) -> str:
    """``'norm input_layernorm'``, ``'v -> o from v_proj'``, ``'up -> down from 3072 rows of gate_up_proj'``."""
    first = group.sources[0]
    name = tail(module_of(first.path), linear.path)
    if first.index is not None and first.stack is None:
        positions = positions_of(first)
        if len(positions) < first.size:
            name = f"{len(positions)} rows of {name}"
    elif first.index is not None and first.stack is not None:
        positions = positions_of(first)
        if len(positions) < first.size:
            name = f"{len(positions) // first.stack} rows of {name}"
    if group.kind is SmoothingKind.NORM_LINEAR:
        text = f"norm {name}"
    elif target.path in lookup.values:
        text = f"v -> o from {name}"
    else:
        text = f"{'up -> down ' if linear.path in lookup.products or linear.stack else ''}from {name}"
    if group.layers is None or linear.layers is None or set(_numbers(linear.layers)) <= set(_numbers(group.layers)):
        return text
    return f"{text} (layers {layer_set(set(layer_numbers(group.layers)) & set(layer_numbers(linear.layers)))})"


def _rotations(lookup: _Lookup, linear: Linear) -> Iterator[str]:
    """Which spaces the linear reads and writes: ``'R1 in'``, ``'R2 out'``, ``'R4 online in'``."""
    config, inside, outside = lookup.config, [], []
    for space in config.rotation.spaces:
        for read in space.reads:
            if _overlap(read.layers or space.layers, linear.layers) and _slots(read.readers, linear):
                inside.append(space.kind)
        # Rows that a gain is folded into stand among those that are read, and write all the same.
        for writer in (*space.writers, *(reader for read in space.reads for reader in read.readers)):
            if writer.path in _weights(linear) and writer.dim != linear.in_dim:
                outside.append(space.kind)
    online = [
        o.kind
        for o in config.rotation.online
        if o.kind != "R3" and o.path == linear.path and _overlap(o.layers, linear.layers)
    ]
    yield from (f"{kind} in" for kind in dict.fromkeys(inside))
    if not inside:
        yield from (f"online {kind} in".replace(" input ", " ") for kind in dict.fromkeys(online))
    yield from (f"{kind} out" for kind in dict.fromkeys(outside))


def _space(space: Space) -> str:
    blocks = f"{space.blocks} blocks of {space.size}" if space.blocks > 1 else f"{space.size}"
    centre = ", writers centred first (LayerNorm)" if space.centre else ""
    layers = _in_layers(space.layers) if LAYER in space.writers[0].path or space.kind != "R1" else ""
    return f"{space.kind} {space.name}{layers}: {blocks}{centre}"


def _query_key(group: SmoothingGroup) -> str:
    return f"{group.name.replace(' -> ', ' <-> ')}{_in_layers(group.layers)}: {group.channels} scales"


def _is_query_key(group: SmoothingGroup) -> bool:
    return group.kind is SmoothingKind.QUERY_KEY


def _totals(config: Config, unknown: Sequence[str]) -> str:
    flags = [whole for linear in config.model.linears for whole in reached(config, linear).values()]
    spaces = [space for space in config.rotation.spaces if space.kind == "R1"]
    tables = [b for b in config.blocked if b.what == "rotation" and LAYER not in b.path]
    if spaces:
        sizes = ", ".join(str(space.size) for space in spaces)
        residual = f"residual rotatable ({sizes})"
    elif tables:
        first = tables[0]
        residual = f"residual blocked by {first.operator} at {first.at or 'the model'} ({first.reason})"
    else:
        residual = "no residual that could be rotated"
    names = f" ({', '.join(unknown)})" if unknown else ""
    paths = {linear.path for linear in config.model.linears}
    parts = {(b.path, b.layers) for b in config.blocked if b.what == "smoothing" and b.path not in paths}
    beside = sum(len(_numbers(layers)) for _, layers in parts)
    more = f" ({beside} more {'part' if beside == 1 else 'parts'} with matrices: see the notes)" if beside else ""
    return (
        f"{sum(flags)} of {len(flags)} linears smoothable{more}, {residual}, "
        f"{len(unknown)} {'operator' if len(unknown) == 1 else 'operators'} without a rule{names}"
    )


def _slots(slots: Iterable[Slot], linear: Linear) -> list[Slot]:
    """The slots that are columns of the linear's weight."""
    weights = _weights(linear)
    return [slot for slot in slots if slot.path in weights and slot.dim == linear.in_dim]


def _weights(linear: Linear) -> dict[str, int | None]:
    """Names that the linear's weight goes by, and the layer that each is for, None where it does not say.

    What all layers read, such as an encoder's output, has a group without layers, whose members are written out.
    """
    return {linear.weight: None} | {fill(linear.weight, n): n for n in _numbers(linear.layers) if n is not None}


def _numbers(layers: str | None) -> tuple[int | None, ...]:
    return (None,) if layers is None else layer_numbers(layers)


def _overlap(one: str | None, other: str | None) -> bool:
    """True if they have a layer in common, or one of them is in no layer."""
    return one is None or other is None or bool(set(layer_numbers(one)) & set(layer_numbers(other)))


def _in_layers(layers: str | None) -> str:
    return f" (layers {layers})" if layers is not None else ""


def _inside(path: str) -> str:
    """The path below the repeated layer; the whole path where there is none."""
    return path.partition(f"{LAYER}.")[2] or path


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(f"[{number}]" for number in dict.fromkeys(numbers))


class _Lookup:
    """What rows need to know of the whole config; collects the footnotes."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.notes: list[str] = []
        self.values = {
            reader.path
            for space in config.rotation.spaces
            if space.kind == "R2"
            for read in space.reads
            for reader in read.readers
        }
        self.products = {online.path for online in config.rotation.online if online.kind == "R4"}

    def note(self, text: str, path: str) -> int:
        """The number of the footnote with this text, a new one where there is none."""
        text = text.replace(f"{path.partition(LAYER)[0]}{LAYER}.", "") if LAYER in path else text
        if text not in self.notes:
            self.notes.append(text)
        return self.notes.index(text) + 1


@dataclass(frozen=True, slots=True)
class Row:
    """One linear, in words."""

    name: str
    shape: str
    smoothing: tuple[str, ...]
    rotation: tuple[str, ...]
    smoothable: bool


@dataclass(frozen=True, slots=True)
class Section:
    """The linears that one set of layers has in common."""

    layers: str | None
    rows: tuple[Row, ...]
    stack: str = ""
    """The list of these layers, where the model has several."""


@dataclass(frozen=True, slots=True)
class Summary:
    """A config in words."""

    sections: tuple[Section, ...]
    notes: tuple[str, ...]
    spaces: tuple[str, ...]
    query_keys: tuple[str, ...]
    blocked_rotations: tuple[str, ...]
    totals: str
