"""What the JSON Schema cannot say about a config: names, layers, slots and paths must agree with each other.

Every function yields problems and raises nothing, so that a person sees all of them at once.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autoquant.config.format import Config, IndexMap, Linear, Slot, SmoothingGroup, Space
from autoquant.config.layers import LAYER, did_you_mean, fill, layer_numbers, layer_set
from autoquant.errors import AutoQuantError

JsonPath = tuple[str | int, ...]

MAX_POSITIONS = 1 << 26  # 512 MiB of positions; the widest expert stacks known have a few million


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong with the value at a JSON path, or with its key."""

    path: JsonPath
    message: str
    key: bool = False


def problems(config: Config) -> list[Problem]:
    """Everything that does not fit together in a config that the classes accept."""
    return [
        *_model(config),
        *_smoothing(config),
        *_rotation(config),
        *_quantization(config),
        *_blocked(config),
    ]


def positions_and_channels(slot: Slot) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The positions on the slot's axis that carry a channel, and their channels: two int64 vectors of one length."""
    if slot.index is None:
        everything = np.arange(slot.size)
        return everything, everything
    positions = [_strided(block.start, block.shape, block.stride) for block in slot.index]
    channels = [_strided(block.channel_start, block.shape, block.channel_stride) for block in slot.index]
    return np.concatenate(positions), np.concatenate(channels)


def _strided(start: int, shape: Sequence[int], stride: Sequence[int]) -> NDArray[np.int64]:
    """``start + sum(i * stride)`` for every multi-index i below ``shape``, in row-major order."""
    total = np.full((1,), start, dtype=np.int64)
    for extent, step in zip(shape, stride, strict=True):
        total = (total[:, None] + step * np.arange(extent)).reshape(-1)
    return total


def _model(config: Config) -> Iterator[Problem]:
    owner: dict[tuple[str, int | None], int] = {}
    for number, linear in enumerate(config.model.linears):
        where = ("model", "linears", number)
        names = [linear.path, linear.weight, linear.bias]
        yield from _layers(where, linear.layers, names, config.model.layers)
        for layer in _layers_of(linear):
            first = owner.setdefault((linear.path, layer), number)
            if first != number:
                yield Problem(
                    (*where, "path"),
                    f"'{linear.path}'{_in_layer(layer)} is there twice, first as $.model.linears[{first}]",
                )
                break
    for number, tie in enumerate(config.model.tied):
        if len(set(tie)) < max(2, len(tie)):
            yield Problem(("model", "tied", number), "expected at least two different parameter names")


def _smoothing(config: Config) -> Iterator[Problem]:
    yield from _unique(("smoothing", "groups"), [group.name for group in config.smoothing.groups])
    for number, group in enumerate(config.smoothing.groups):
        where = ("smoothing", "groups", number)
        names = [slot.path for slot in (*group.sources, *group.targets)]
        yield from _layers(where, group.layers, names, config.model.layers)
        yield from _overrides(where, group, config.model.layers)
        members = [(("sources", i), slot) for i, slot in enumerate(group.sources)]
        members += [(("targets", i), slot) for i, slot in enumerate(group.targets)]
        yield from _slots([((*where, *at), slot, None) for at, slot in members], group.channels)


def _overrides(where: JsonPath, group: SmoothingGroup, total: int) -> Iterator[Problem]:
    known, _ = _numbers(group.layers, (), total)
    for number, override in enumerate(group.overrides):
        at = (*where, "overrides", number, "layers")
        numbers, mistakes = _numbers(override.layers, at, total)
        yield from mistakes
        if group.layers is None:
            yield Problem(at, "the group has no layers; set its own enable and alpha")
        elif known and (foreign := set(numbers) - set(known)):
            yield Problem(at, f"the group has no layer {layer_set(foreign)}; expected some of '{group.layers}'")


def _rotation(config: Config) -> Iterator[Problem]:
    rotation = config.rotation
    weights = [linear.weight for linear in config.model.linears]
    weights += [name for tie in config.model.tied for name in tie]
    written_out = {
        fill(linear.weight, layer)
        for linear in config.model.linears
        for layer in _layers_of(linear)
        if layer is not None
    }
    yield from _unique(("rotation", "spaces"), [space.name for space in rotation.spaces])
    for number, space in enumerate(rotation.spaces):
        yield from _space(("rotation", "spaces", number), space, config.model.layers, weights, written_out)
    linears = [linear.path for linear in config.model.linears]
    for number, online in enumerate(rotation.online):
        where = ("rotation", "online", number)
        yield from _layers(where, online.layers, [online.path], config.model.layers)
        if online.kind != "R3":
            yield from _known((*where, "path"), online.path, linears, "linear in model.linears")


def _space(
    where: JsonPath, space: Space, total: int, weights: Sequence[str], written_out: Collection[str]
) -> Iterator[Problem]:
    templates: list[bool] = []
    for number, writer in enumerate(space.writers):
        at = (*where, "writers", number)
        yield from _layers(at, writer.layers, [writer.path], total, inherited=space.layers)
        templates.append(LAYER in writer.path)
    for number, read in enumerate(space.reads):
        at = (*where, "reads", number)
        names = [name for reader in read.readers for name in (reader.path, reader.bias)]
        names += [read.norm.weight, read.norm.bias] if read.norm is not None else []
        yield from _layers(at, read.layers, names, total, inherited=space.layers)
        templates.append(any(LAYER in name for name in names if name is not None))
        for i, reader in enumerate(read.readers):
            if reader.path not in written_out:  # what all layers read, such as an encoder's output, names each of them
                yield from _known((*at, "readers", i, "path"), reader.path, weights, "weight in model.linears")
    if space.layers is not None:
        _, mistakes = _numbers(space.layers, (*where, "layers"), total)
        yield from mistakes
        if not any(templates):
            yield Problem((*where, "layers"), f"is given, and no path of the space holds {LAYER}; expected null")
    centred = any(read.norm is not None and read.norm.kind == "layer" for read in space.reads)
    if centred != space.centre:
        reason = "a LayerNorm reads the space" if centred else "no LayerNorm reads the space, and centring changes it"
        yield Problem((*where, "centre"), f"expected {str(centred).lower()}: {reason}")
    channels = space.size * space.blocks
    yield from _slots([((*where, "writers", i), slot, slot.layers) for i, slot in enumerate(space.writers)], channels)
    readers = [
        ((*where, "reads", i, "readers", j), reader, read.layers)
        for i, read in enumerate(space.reads)
        for j, reader in enumerate(read.readers)
    ]
    yield from _slots(readers, channels)


def _quantization(config: Config) -> Iterator[Problem]:
    layers: dict[str, set[int]] = {}
    for linear in config.model.linears:
        layers.setdefault(linear.path, set()).update(n for n in _layers_of(linear) if n is not None)
    for number, path in enumerate(config.quantization.exclude):
        yield from _known(("quantization", "exclude", number), path, list(layers), "linear in model.linears")
    for number, override in enumerate(config.quantization.overrides):
        where = ("quantization", "overrides", number)
        yield from _known((*where, "path"), override.path, list(layers), "linear in model.linears")
        if override.layers is None:
            continue
        numbers, mistakes = _numbers(override.layers, (*where, "layers"), config.model.layers)
        yield from mistakes
        known = layers.get(override.path)
        if known is not None and not mistakes and (foreign := set(numbers) - known):
            expected = f"expected some of '{layer_set(known)}'" if known else "expected null"
            yield Problem((*where, "layers"), f"the linear has no layer {layer_set(foreign)}; {expected}")


def _blocked(config: Config) -> Iterator[Problem]:
    for number, blocked in enumerate(config.blocked):
        where = ("blocked", number)
        yield from _layers(where, blocked.layers, [blocked.path, blocked.at], config.model.layers)


def _slots(slots: Iterable[tuple[JsonPath, Slot, str | None]], channels: int) -> Iterator[Problem]:
    """Each slot by itself, then positions that two slots of the same axis (and layers) share."""
    taken: dict[tuple[str, int, str | None], tuple[JsonPath, NDArray[np.int64]]] = {}
    for where, slot, layers in slots:
        found = list(_slot(where, slot, channels))
        yield from found
        if found:
            continue
        axis = (slot.path, slot.dim, layers)
        positions, _ = positions_and_channels(slot)
        if axis in taken:
            first, others = taken[axis]
            both = np.intersect1d(positions, others)
            if both.size:
                yield Problem(where, f"position {both[0]} of '{slot.path}' is in {json_path(first)} as well")
            taken[axis] = (first, np.union1d(positions, others))
        else:
            taken[axis] = (where, positions)


def _slot(where: JsonPath, slot: Slot, channels: int) -> Iterator[Problem]:
    if slot.power == 0:
        yield Problem((*where, "power"), "expected a power other than 0")
    if slot.stack is not None and slot.size % slot.stack:
        yield Problem(
            (*where, "size"), f"{slot.size} positions are not a multiple of the {slot.stack} stacked matrices"
        )
    if slot.index is None:
        if slot.size != channels:
            yield Problem((*where, "size"), f"without index, expected one position for each of the {channels} channels")
        return
    at = (*where, "index")
    if not slot.index:
        yield Problem(at, "expected at least one block, or null for the whole axis")
        return
    found = [problem for i, block in enumerate(slot.index) for problem in _block((*at, i), block, slot.size, channels)]
    yield from found
    if found:
        return
    if sum(math.prod(block.shape) for block in slot.index) > slot.size:
        yield Problem(at, f"names more positions than the {slot.size} of the axis, so some occur twice")
        return
    positions, carried = positions_and_channels(slot)
    values, counts = np.unique(positions, return_counts=True)
    if (counts > 1).any():
        yield Problem(at, f"position {values[counts > 1][0]} occurs more than once")
    # Every channel that occurs is in range, so the sorted ones are 0, 1, 2, ... up to the first that is missing.
    known = np.unique(carried)
    missing = int(np.count_nonzero(known == np.arange(known.size)))
    if missing < channels:
        yield Problem(at, f"channel {missing} of {channels} is on no position")


def _block(where: JsonPath, block: IndexMap, size: int, channels: int) -> Iterator[Problem]:
    lengths = len(block.shape), len(block.stride), len(block.channel_stride)
    if len(set(lengths)) > 1:
        yield Problem(where, "shape, stride and channel_stride differ in length: {}, {} and {}".format(*lengths))
        return
    if not block.shape or min(block.shape) < 1:
        yield Problem((*where, "shape"), "expected at least one extent, and each at least 1")
        return
    if math.prod(block.shape) > MAX_POSITIONS:
        yield Problem((*where, "shape"), f"more than {MAX_POSITIONS} positions")
        return
    for what, start, strides, limit in (
        ("position", block.start, block.stride, size),
        ("channel", block.channel_start, block.channel_stride, channels),
    ):
        # The extremes of a sum of independent terms are the sums of their extremes.
        ends = [(extent - 1) * step for extent, step in zip(block.shape, strides, strict=True)]
        low, high = start + sum(min(end, 0) for end in ends), start + sum(max(end, 0) for end in ends)
        if low < 0 or high >= limit:
            wrong = low if low < 0 else high
            yield Problem(where, f"{what} {wrong} is out of range; expected 0 to {limit - 1}")


def _layers(
    where: JsonPath, layers: str | None, names: Iterable[str | None], total: int, inherited: str | None = None
) -> Iterator[Problem]:
    """``layers`` must be there exactly if a path holds ``{layer}``, and name layers that exist."""
    template = next((name for name in names if name is not None and LAYER in name), None)
    if layers is None:
        if template is not None and inherited is None:
            expected = f"expected the layers that it stands for, such as '0-{max(total - 1, 0)}'"
            yield Problem(where, f"'{template}' holds {LAYER} and layers is missing; {expected}")
        return
    if template is None:
        yield Problem((*where, "layers"), f"is given, and no path holds {LAYER}; expected null")
    _, mistakes = _numbers(layers, (*where, "layers"), total)
    yield from mistakes


def _numbers(text: str | None, where: JsonPath, total: int) -> tuple[tuple[int, ...], list[Problem]]:
    """The layers of a set, and what is wrong with it."""
    if text is None:
        return (), []
    try:
        numbers = layer_numbers(text)
    except AutoQuantError as error:
        return (), [Problem(where, error.message)]
    if numbers[-1] >= total:
        have = f"0 to {total - 1}" if total else "none"
        return numbers, [Problem(where, f"layer {numbers[-1]} does not exist; the model's layers are {have}")]
    return numbers, []


def _layers_of(linear: Linear) -> tuple[int | None, ...]:
    """The layers of a linear, (None,) where it is in none; unreadable sets are reported elsewhere."""
    if linear.layers is None:
        return (None,)
    try:
        return layer_numbers(linear.layers)
    except AutoQuantError:
        return ()


def _in_layer(layer: int | None) -> str:
    return f" in layer {layer}" if layer is not None else ""


def _known(where: JsonPath, name: str, names: Sequence[str], what: str) -> Iterator[Problem]:
    if name not in names:
        yield Problem(where, f"'{name}' is no {what}{did_you_mean(name, names)}")


def _unique(where: JsonPath, names: Sequence[str]) -> Iterator[Problem]:
    first: dict[str, int] = {}
    for number, name in enumerate(names):
        if first.setdefault(name, number) != number:
            place = json_path((*where, first[name]))
            yield Problem((*where, number, "name"), f"the name '{name}' is taken by {place}; expected a unique name")


def json_path(path: JsonPath) -> str:
    """``$.smoothing.groups[3].name``; keys that are no identifiers stand in brackets."""
    text = "$"
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            text += f".{part}" if part.isidentifier() else f"[{part!r}]"
    return text
