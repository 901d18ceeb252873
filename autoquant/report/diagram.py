"""One layer of each kind as boxes and lines: who feeds whom, by which group or rotation, and what is blocked. No torch.

A kind of layer is a set of layers for which the config says the same. What stands in it is drawn for its first layer;
what differs by a number alone (experts as modules of a list) is one box.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from autoquant.config.format import Config, Norm, Online, Slot, SmoothingGroup, SmoothingOverride, Space
from autoquant.config.layers import LAYER, fill, layer_numbers, layer_set, module_of
from autoquant.report.summary import because

RESIDUAL = "residual"
"""The box of the residual stream."""
OUTSIDE = "(outside)"
"""What stands in no layer, as a kind of its own."""

_NUMBER = re.compile(r"\.\d+\.")


@dataclass(slots=True)
class Box:
    """A norm, a linear, the residual or something outside of the layer; ``about``: its lines on hover."""

    key: str
    name: str
    kind: str
    shape: str = ""
    count: int = 1
    row: int = 0
    about: list[str] = field(default_factory=list)
    blocked: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Line:
    """From a box to a box, for the group or space ``of``; ``kind``: that of the group or space."""

    start: str
    end: str
    kind: str
    of: str


@dataclass(frozen=True, slots=True)
class LayerKind:
    """Layers that have the same boxes and lines."""

    title: str
    layers: str
    boxes: tuple[Box, ...]
    lines: tuple[Line, ...]

    @property
    def groups(self) -> tuple[str, ...]:
        """Names of the groups and spaces that lines are drawn for, in their order."""
        return tuple(dict.fromkeys(line.of for line in self.lines))


def layer_kinds(config: Config) -> tuple[LayerKind, ...]:
    """A diagram for each kind of layer, in the order of the layers, and one for what stands outside of them."""
    kinds = [_kind(config, stack, layers) for stack in _stacks(config) for layers in _alike(config, stack)]
    outside = _kind(config, "", ())
    return (*kinds, *([outside] if len(outside.boxes) > 1 else []))


def _stacks(config: Config) -> list[str]:
    """Lists of layers that linears are in, in the order of the config."""
    return list(dict.fromkeys(linear.path.partition(LAYER)[0] for linear in config.model.linears if linear.layers))


def _alike(config: Config, stack: str) -> list[tuple[int, ...]]:
    """The layers of a stack, those together of which the config says the same."""
    sets: dict[str, None] = {}
    for path, layers in _members(config):
        if layers is not None and path.startswith(stack):
            sets.setdefault(layers)
    numbers = {layers: frozenset(layer_numbers(layers)) for layers in sets}
    kinds: dict[tuple[bool, ...], list[int]] = {}
    for layer in sorted(frozenset().union(*numbers.values())):
        kinds.setdefault(tuple(layer in members for members in numbers.values()), []).append(layer)
    return [tuple(layers) for layers in kinds.values()]


def _members(config: Config) -> Iterator[tuple[str, str | None]]:
    """Paths with the layers that they stand for."""
    yield from ((linear.path, linear.layers) for linear in config.model.linears)
    for group in config.smoothing.groups:
        yield from ((slot.path, group.layers) for slot in (*group.sources, *group.targets))
    for space in config.rotation.spaces:
        yield from ((writer.path, writer.layers or space.layers) for writer in space.writers)
        yield from ((reader.path, read.layers or space.layers) for read in space.reads for reader in read.readers)


def _kind(config: Config, stack: str, layers: tuple[int, ...]) -> LayerKind:
    drawing = _Drawing(stack, layers[0] if layers else None)
    for linear in config.model.linears:
        if drawing.holds(linear.layers, linear.path):
            shape = f"{linear.in_features:,} → {linear.out_features:,}"
            stacked = linear.stack or 1
            drawing.add(linear.path, linear.role if stacked == 1 else "experts", shape, stacked, linear.weight)
    for group in config.smoothing.groups:
        drawing.draw_group(group)
    for space in config.rotation.spaces:
        drawing.draw_space(space)
    for online in config.rotation.online:
        drawing.mark_online(online)
    for blocked in config.blocked:
        drawing.mark(blocked.path, blocked.layers, f"{blocked.what}: {because(blocked)}")
    boxes = drawing.placed()
    number = f"{len(layers)} {'layer' if len(layers) == 1 else 'layers'}"
    inside = f" of {stack.rstrip('.')}" if stack else ""
    title = f"{number}{inside}: {layer_set(layers)}" if layers else "Outside of the layers"
    return LayerKind(title, layer_set(layers) if layers else OUTSIDE, tuple(boxes), tuple(dict.fromkeys(drawing.lines)))


class _Drawing:
    """Boxes and lines of one layer, collected."""

    def __init__(self, stack: str, layer: int | None) -> None:
        self.prefix = f"{stack}{layer}." if layer is not None else ""
        self.layer = layer
        self.boxes: dict[str, Box] = {}
        self.of_parameter: dict[str, str] = {}
        self.lines: list[Line] = []

    def holds(self, layers: str | None, path: str) -> bool:
        """True if what has this path and stands for these layers is (also) of the layer drawn."""
        if self.layer is None:
            return layers is None and LAYER not in path
        if layers is not None and self.layer not in layer_numbers(layers):
            return False
        return self.filled(path).startswith(self.prefix)

    def filled(self, path: str) -> str:
        return path if self.layer is None else fill(path, self.layer)

    def key(self, path: str) -> str:
        """Of the box that the module or parameter belongs to, numbers of lists below the layer left out."""
        path = self.of_parameter.get(self.filled(path), module_of(self.filled(path)))
        return self.prefix + _NUMBER.sub(".*.", f".{path.removeprefix(self.prefix)}").lstrip(".")

    def add(self, path: str, kind: str, shape: str = "", count: int = 1, parameter: str | None = None) -> str:
        """The key of a box, made where there is none."""
        if parameter is not None:
            self.of_parameter[self.filled(parameter)] = self.filled(path)
        key = self.key(path)
        if key not in self.boxes:
            self.boxes[key] = Box(key, key.removeprefix(self.prefix), kind, shape, 0)
        self.boxes[key].count += count
        return key

    def end(self, path: str, layers: str | None, kind: str) -> str | None:
        """The box of a member of a group or space: in the layer, or outside of all; None where it is elsewhere."""
        key = self.key(path)
        if key in self.boxes:
            return key
        if self.holds(layers, path):
            return self.add(path, kind)
        if LAYER in path or self.layer is None or layers is not None:
            return None
        return self.add(path, "outside") if kind == "norm" else None

    def draw_group(self, group: SmoothingGroup) -> None:
        """Lines from what makes the channels to what reads them."""
        if self.layer is not None and group.layers is not None and self.layer not in layer_numbers(group.layers):
            return
        source_kind = "norm" if group.kind.value == "norm_linear" else "linear"
        targets = [(slot, end) for slot in group.targets if (end := self.end(slot.path, group.layers, "linear"))]
        if not targets:
            return
        sources = [(slot, end) for slot in group.sources if (end := self.end(slot.path, group.layers, source_kind))]
        for slot, end in (*sources, *targets):
            self.tell(end, f"{group.name}: {_slot(slot)}, {group.channels:,} channels")
        for start in dict.fromkeys(end for _, end in sources):
            for end in dict.fromkeys(end for _, end in targets):
                if start != end:
                    self.lines.append(Line(start, end, group.kind.value, group.name))

    def draw_space(self, space: Space) -> None:
        """Lines into the residual and out of it, and of other spaces from writers to readers."""
        name = f"{space.kind} {space.name}"  # a smoothing group may have the same name
        writers = self.ends((w.path, w.layers or space.layers) for w in space.writers)
        readers: list[str] = []
        for read in space.reads:
            layers = read.layers or space.layers
            ends = self.ends((reader.path, layers) for reader in read.readers)
            if not ends:
                continue
            norm = self.norm(read.norm, layers)
            readers += ends if norm is None else [norm]
            if norm is not None:
                self.lines += [Line(norm, end, "norm", name) for end in ends if not self.joined(norm, end)]
        if space.kind == "R1":
            if writers or readers:
                self.boxes.setdefault(RESIDUAL, Box(RESIDUAL, space.name, RESIDUAL, f"{space.size:,}", 1))
            self.lines += [Line(RESIDUAL, end, "R1", name) for end in dict.fromkeys(readers)]
            self.lines += [Line(start, RESIDUAL, "R1", name) for start in writers]
        else:
            self.lines += [Line(a, b, space.kind, name) for a in writers for b in readers if a != b]
        blocks = f"{space.blocks} blocks of {space.size}" if space.blocks > 1 else f"{space.size:,} channels"
        for end in dict.fromkeys((*writers, *readers)):
            self.tell(end, f"{name}: {blocks}")

    def ends(self, members: Iterable[tuple[str, str | None]]) -> list[str]:
        """The boxes of those that are in this layer."""
        found = (self.key(path) for path, layers in members if self.holds(layers, path))
        return [key for key in dict.fromkeys(found) if key in self.boxes]

    def norm(self, norm: Norm | None, layers: str | None) -> str | None:
        path = None if norm is None else norm.weight or norm.bias
        return None if path is None else self.end(path, layers, "norm")

    def joined(self, start: str, end: str) -> bool:
        return any((line.start, line.end) == (start, end) for line in self.lines)

    def mark_online(self, online: Online) -> None:
        """A remark on what an online rotation can precede."""
        self.mark(online.path, online.layers, f"online {online.kind} of {online.size:,}: {_used(online)}", hinder=False)

    def mark(self, path: str, layers: str | None, text: str, *, hinder: bool = True) -> None:
        key = self.key(path)
        if key in self.boxes and self.holds(layers, path):
            self.tell(key, text)
            if hinder:
                self.boxes[key].blocked.append(text)

    def tell(self, key: str, text: str) -> None:
        about = self.boxes[key].about
        if text not in about:
            about.append(text)

    def placed(self) -> Sequence[Box]:
        """The boxes with their rows: parts that hang together one below the other, each by who feeds whom."""
        parent = {key: key for key in self.boxes}

        def root(key: str) -> str:
            while parent[key] != key:
                key = parent[key]
            return key

        inner = [line for line in self.lines if RESIDUAL not in (line.start, line.end)]
        for line in inner:
            parent[root(line.end)] = root(line.start)
        parts: dict[str, list[str]] = {}
        for key in self.boxes:
            if key != RESIDUAL:
                parts.setdefault(root(key), []).append(key)
        row = 1
        for keys in parts.values():
            depth = _depths(keys, [line for line in inner if line.kind != "query_key"])
            for key in keys:
                self.boxes[key].row = row + depth[key]
            row += max(depth.values()) + 1
        return list(self.boxes.values())


def _depths(keys: Sequence[str], lines: Sequence[Line]) -> dict[str, int]:
    """How many lines lie before each box at most; a circle ends after as many rounds as there are boxes."""
    depth = dict.fromkeys(keys, 0)
    for _ in keys:
        for line in lines:
            if line.start in depth and line.end in depth and depth[line.end] <= depth[line.start] < len(keys):
                depth[line.end] = depth[line.start] + 1
    return depth


def _slot(slot: Slot) -> str:
    """``'up_proj.weight, axis 0, 8 positions'``."""
    leaf = ".".join(slot.path.rsplit(".", 2)[-2:])
    stacked = f" of {slot.stack} matrices" if slot.stack else ""
    blocks = "" if slot.index is None else f" in {len(slot.index)} {'block' if len(slot.index) == 1 else 'blocks'}"
    return f"{leaf}, axis {slot.dim}, {slot.size:,} positions{stacked}{blocks}"


def _used(online: Online) -> str:
    return "on" if online.enable else "possible, off"


def used_group(config: Config, layer: int | None = None) -> dict[str, str]:
    """What is switched on (in ``layer``), by the name of the group or space, in words."""
    smoothing, rotation = config.smoothing, config.rotation
    said = {}
    for group in smoothing.groups:
        default = smoothing.enable and group.kind.value != "query_key"
        chosen: list[SmoothingGroup | SmoothingOverride] = [
            group,
            *(o for o in group.overrides if layer is not None and layer in layer_numbers(o.layers)),
        ]
        on = next((one.enable for one in reversed(chosen) if one.enable is not None), default)
        alpha = next((one.alpha for one in reversed(chosen) if one.alpha is not None), smoothing.alpha)
        others = ", ".join(o.layers for o in group.overrides) if layer is None else ""
        some = f"; otherwise in layers {others}" if others else ""
        each = " a layer" if group.layers else ""
        hand = ", by hand" if group.by_hand else ""
        said[group.name] = f"{group.channels:,} scales{each}{hand}; " + (f"on, alpha {alpha:g}" if on else "off") + some
    for space in rotation.spaces:
        on = rotation.enable if space.enable is None else space.enable
        method = (space.method or rotation.method).value
        blocks = f"{space.blocks} blocks of {space.size}" if space.blocks > 1 else f"{space.size:,} channels"
        said[f"{space.kind} {space.name}"] = f"{blocks}; " + (f"on, {method}" if on else "off")
    return said
