"""What the JSON Schema cannot say about a config: names, layers, slots and paths must agree with each other.

Every function yields problems and raises nothing, so that a person sees all of them at once.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from autoquant.config.format import Config, IndexMap, Slot, SmoothingGroup, Space
from autoquant.config.layers import LAYER, MAX_LAYERS, last_layer, layer_bits, layer_set, numbers_in
from autoquant.config.places import JsonPath, json_path
from autoquant.config.slots import MAX_POSITIONS, channels_of, index_problems
from autoquant.config.spelling import cut, did_you_mean
from autoquant.errors import AutoQuantError

MAX_EXPANDED = 1 << 25
TOO_MANY = (
    f"the file's slots have more than {MAX_EXPANDED} positions together, or one of them more than {MAX_POSITIONS}"
)


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong with the value at a JSON path, or with its key.

    ``rest`` makes the end of the message, where that takes a search: it is called for the few problems that are shown.
    """

    path: JsonPath
    text: str
    key: bool = False
    rest: Callable[[], str] | None = field(default=None, compare=False)

    @property
    def message(self) -> str:
        """What is wrong and what was expected, in full."""
        return self.text if self.rest is None else self.text + self.rest()


def problems(config: Config) -> list[Problem]:
    """Everything that does not fit together in a config that the classes accept."""
    budget = _Budget()
    return [
        *_model(config),
        *_smoothing(config, budget),
        *_rotation(config, budget),
        *_quantization(config),
        *_blocked(config),
    ]


def _model(config: Config) -> Iterator[Problem]:
    owners: dict[str, list[tuple[int, int]]] = {}
    for number, linear in enumerate(config.model.linears):
        where = ("model", "linears", number)
        names = [linear.path, linear.weight, linear.bias]
        yield from _layers(where, linear.layers, names, config.model.layers)
        mine = _bits(linear.layers)
        others = owners.setdefault(linear.path, [])
        if again := next(((i, mine & bits) for i, bits in others if mine & bits), None):
            first, common = again
            layer = "" if linear.layers is None else f" in layer {numbers_in(common & -common)[0]}"
            text = f"'{linear.path}'{layer} is there twice, first as $.model.linears[{first}]"
            yield Problem((*where, "path"), text)
        elif mine:
            others.append((number, mine))
    for number, tie in enumerate(config.model.tied):
        if len(set(tie)) < max(2, len(tie)):
            yield Problem(("model", "tied", number), "expected at least two different parameter names")


def _smoothing(config: Config, budget: _Budget) -> Iterator[Problem]:
    yield from _unique(("smoothing", "groups"), [group.name for group in config.smoothing.groups])
    for number, group in enumerate(config.smoothing.groups):
        where = ("smoothing", "groups", number)
        names = [slot.path for slot in (*group.sources, *group.targets)]
        yield from _layers(where, group.layers, names, config.model.layers)
        yield from _overrides(where, group, config.model.layers)
        members = [(("sources", i), slot) for i, slot in enumerate(group.sources)]
        members += [(("targets", i), slot) for i, slot in enumerate(group.targets)]
        yield from _slots([((*where, *at), slot, None) for at, slot in members], group.channels, None, budget)


def _overrides(where: JsonPath, group: SmoothingGroup, total: int) -> Iterator[Problem]:
    known, _ = _numbers(group.layers, (), total)
    expected = f"; expected some of '{group.layers}'"
    for number, override in enumerate(group.overrides):
        at = (*where, "overrides", number, "layers")
        numbers, mistakes = _numbers(override.layers, at, total)
        yield from mistakes
        if group.layers is None:
            yield Problem(at, "the group has no layers; set its own enable and alpha")
        elif known and (foreign := numbers & ~known):
            yield Problem(at, "the group has no layer ", rest=partial(_some, foreign, expected))


def _rotation(config: Config, budget: _Budget) -> Iterator[Problem]:
    rotation = config.rotation
    weights: dict[str, int] = {name: 0 for tie in config.model.tied for name in tie}
    for linear in config.model.linears:
        for name in (linear.weight, linear.bias):  # a gain behind a linear is folded into its bias too
            if name is not None:
                weights[name] = weights.get(name, 0) | _bits(linear.layers)
    for path, layers in _not_quantized(config):
        weights[path] = weights.get(path, 0) | _bits(layers)
    yield from _unique(("rotation", "spaces"), [space.name for space in rotation.spaces])
    for number, space in enumerate(rotation.spaces):
        yield from _space(("rotation", "spaces", number), space, config.model.layers, weights, budget)
    linears = tuple(linear.path for linear in config.model.linears)
    known = frozenset(linears)
    for number, online in enumerate(rotation.online):
        where = ("rotation", "online", number)
        yield from _layers(where, online.layers, [online.path], config.model.layers)
        if online.kind != "R3":
            yield from _known((*where, "path"), online.path, known, linears, "linear in model.linears")


def _not_quantized(config: Config) -> Iterator[tuple[str, str | None]]:
    """Weights that may read a space and are no linear's, such as a convolution's: other claims name them."""
    for group in config.smoothing.groups:
        for slot in (*group.sources, *group.targets):
            yield slot.path, group.layers
    for space in config.rotation.spaces:
        for writer in space.writers:
            yield writer.path, writer.layers or space.layers
    for entry in config.blocked:
        yield f"{entry.path}.weight", entry.layers
        yield entry.path, entry.layers  # a parameter's own


def _space(where: JsonPath, space: Space, total: int, weights: Mapping[str, int], budget: _Budget) -> Iterator[Problem]:
    templates: list[bool] = []
    listed = tuple(weights)
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
            # What all layers read, such as an encoder's output, names each of them.
            if not _written_out(reader.path, weights):
                yield from _known(
                    (*at, "readers", i, "path"),
                    reader.path,
                    weights,
                    listed,
                    "weight in model.linears or in another claim",
                )
    if space.layers is not None:
        _, mistakes = _numbers(space.layers, (*where, "layers"), total)
        yield from mistakes
        if not any(templates):
            yield Problem((*where, "layers"), f"is given, and no path of the space holds {LAYER}; expected null")
    centred = any(read.norm is not None and read.norm.kind == "layer" for read in space.reads)
    if centred != space.centre:
        reason = "a LayerNorm reads the space" if centred else "no LayerNorm reads the space, and centring changes it"
        yield Problem((*where, "centre"), f"expected {str(centred).lower()}: {reason}")
    channels, blocks = space.size * space.blocks, space.blocks
    writers = [((*where, "writers", i), slot, slot.layers) for i, slot in enumerate(space.writers)]
    yield from _slots(writers, channels, blocks, budget)
    readers = [
        ((*where, "reads", i, "readers", j), reader, read.layers)
        for i, read in enumerate(space.reads)
        for j, reader in enumerate(read.readers)
    ]
    yield from _slots(readers, channels, blocks, budget)


def _written_out(path: str, templates: Mapping[str, int]) -> bool:
    """True if ``path`` is one of the paths with a layer filled in."""
    parts = path.split(".")
    for i, part in enumerate(parts):
        if part.isdecimal() and part == str(int(part)) and int(part) < MAX_LAYERS:
            bits = templates.get(".".join((*parts[:i], LAYER, *parts[i + 1 :])), 0)
            if bits >> 8 * int(part) & 1:
                return True
    return False


def _quantization(config: Config) -> Iterator[Problem]:
    layers: dict[str, int] = {}
    for linear in config.model.linears:
        bits = _bits(linear.layers) if linear.layers is not None else 0
        layers[linear.path] = layers.get(linear.path, 0) | bits
    names = tuple(layers)
    for number, path in enumerate(config.quantization.exclude):
        yield from _known(("quantization", "exclude", number), path, layers, names, "linear in model.linears")
    for number, override in enumerate(config.quantization.overrides):
        where = ("quantization", "overrides", number)
        yield from _known((*where, "path"), override.path, layers, names, "linear in model.linears")
        if override.layers is None:
            continue
        numbers, mistakes = _numbers(override.layers, (*where, "layers"), config.model.layers)
        yield from mistakes
        known = layers.get(override.path)
        if known is not None and not mistakes and (foreign := numbers & ~known):
            rest = partial(_foreign_to_linear, foreign, known)
            yield Problem((*where, "layers"), "the linear has no layer ", rest=rest)


def _some(foreign: int, expected: str) -> str:
    return layer_set(numbers_in(foreign)) + expected


def _foreign_to_linear(foreign: int, known: int) -> str:
    return _some(foreign, f"; expected some of '{layer_set(numbers_in(known))}'" if known else "; expected null")


def _blocked(config: Config) -> Iterator[Problem]:
    for number, blocked in enumerate(config.blocked):
        where = ("blocked", number)
        yield from _layers(where, blocked.layers, [blocked.path, blocked.at], config.model.layers)


def _slots(
    slots: Iterable[tuple[JsonPath, Slot, str | None]], channels: int, blocks: int | None, budget: _Budget
) -> Iterator[Problem]:
    """Each slot by itself, then positions that two slots of the same axis (and layers) share."""
    axes: dict[tuple[str, int, str | None], list[tuple[JsonPath, Slot]]] = {}
    for where, slot, layers in slots:
        found = list(_slot(where, slot, channels, blocks, budget))
        yield from found
        if not found:
            axes.setdefault((slot.path, slot.dim, layers), []).append((where, slot))
    for members in axes.values():
        if len(members) > 1:
            yield from _shared(members, budget)


def _shared(members: Sequence[tuple[JsonPath, Slot]], budget: _Budget) -> Iterator[Problem]:
    """Positions of one axis that two of the slots name."""
    first, slot = members[0]
    seen: set[tuple[int, tuple[IndexMap, ...] | None]] = set()
    taken = np.zeros(0, dtype=bool)
    for where, slot in members:
        if (slot.size, slot.index) in seen:  # a copy
            index = slot.index
            lowest = 0 if index is None else min(_lowest(block) for block in index)
            yield Problem(where, f"position {lowest} of '{slot.path}' is in {json_path(first)} as well")
            continue
        seen.add((slot.size, slot.index))
        if slot.size > MAX_POSITIONS or not budget.spend(slot.size):
            yield Problem((*where, "size"), TOO_MANY)
            return
        mine = np.zeros(max(slot.size, len(taken)), dtype=bool)
        mine[: slot.size] = channels_of(slot) >= 0
        common = np.flatnonzero(mine[: len(taken)] & taken)
        if common.size:
            yield Problem(where, f"position {common[0]} of '{slot.path}' is in {json_path(first)} as well")
        mine[: len(taken)] |= taken
        taken = mine


def _lowest(block: IndexMap) -> int:
    ends = ((extent - 1) * step for extent, step in zip(block.shape, block.stride, strict=True))
    return block.start + sum(min(end, 0) for end in ends)


def _slot(where: JsonPath, slot: Slot, channels: int, blocks: int | None, budget: _Budget) -> Iterator[Problem]:
    if slot.power == 0:
        yield Problem((*where, "power"), "expected a power other than 0")
    if slot.stack is not None and slot.size % slot.stack:
        yield Problem(
            (*where, "size"), f"{slot.size} positions are not a multiple of the {slot.stack} stacked matrices"
        )
    if (
        slot.index is not None
        and slot.size <= MAX_POSITIONS
        and not budget.spend(slot.size + min(channels, MAX_POSITIONS))
    ):
        yield Problem((*where, "index"), TOO_MANY)
        return
    yield from (Problem((*where, *at), reason) for at, reason in index_problems(slot, channels, blocks))


@dataclass(slots=True)
class _Budget:
    """How many positions may still be expanded: a file's slots together, however they are repeated."""

    left: int = MAX_EXPANDED

    def spend(self, positions: int) -> bool:
        """True if there are so many left, which are then gone."""
        self.left -= positions
        return self.left >= 0


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


def _numbers(text: str | None, where: JsonPath, total: int) -> tuple[int, list[Problem]]:
    """The layers of a set (``layer_bits``), and what is wrong with it."""
    if text is None:
        return 0, []
    try:
        bits = layer_bits(text)
    except AutoQuantError as error:
        return 0, [Problem(where, error.message)]
    if (last := last_layer(bits)) >= total:
        have = f"0 to {total - 1}" if total else "none"
        return bits, [Problem(where, f"layer {last} does not exist; the model's layers are {have}")]
    return bits, []


def _bits(layers: str | None) -> int:
    """The layers of a linear, layer 0 where it is in none; unreadable sets are reported elsewhere."""
    if layers is None:
        return 1
    try:
        return layer_bits(layers)
    except AutoQuantError:
        return 0


def _known(where: JsonPath, name: str, names: Container[str], listed: Sequence[str], what: str) -> Iterator[Problem]:
    if name not in names:
        if set(name) & set("*?[]|^$\\") and listed:
            said = f"'{cut(name)}' is no {what}; there are no patterns: a name is written in full, as '{listed[0]}'"
            yield Problem(where, said)
        else:
            yield Problem(where, f"'{cut(name)}' is no {what}", rest=partial(did_you_mean, name, listed))


def _unique(where: JsonPath, names: Sequence[str]) -> Iterator[Problem]:
    first: dict[str, int] = {}
    for number, name in enumerate(names):
        if first.setdefault(name, number) != number:
            place = json_path((*where, first[name]))
            yield Problem(
                (*where, number, "name"), f"the name '{cut(name)}' is taken by {place}; expected a unique name"
            )
