"""A config in a terminal: what differs from the defaults, then one layer as a tree, or one linear in full."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from autoquant.config.format import Config, Linear, QuantizationOverride
from autoquant.config.knobs import changed_knobs, default_knobs, knob_text, value_text
from autoquant.config.layers import LAYER, fill, layer_numbers
from autoquant.config.spelling import did_you_mean
from autoquant.errors import AutoQuantError
from autoquant.io.columns import wrapped
from autoquant.io.inert import inert
from autoquant.report.diagram import RESIDUAL, Box, LayerKind, layer_kinds, used_group
from autoquant.report.summary import because


def tree_lines(config: Config, width: int, layer: int | None = None) -> list[str]:
    """The knobs that were changed, and a tree of ``layer`` (None: one of each kind). Raises AutoQuantError."""
    kinds = layer_kinds(config)
    if layer is not None:
        kinds = tuple(kind for kind in kinds if kind.layers[:1].isdigit() and layer in layer_numbers(kind.layers))
        if not kinds:
            raise AutoQuantError(f"no layer {layer}: there are {config.model.layers}, counted from 0")
    used = used_group(config, layer)
    lines = [*_knob_lines(config, width), ""]
    for kind in kinds:
        lines += [kind.title if layer is None else f"layer {layer}, as {kind.title}", *_tree(kind, used, width), ""]
    return lines[:-1]


def linear_lines(config: Config, path: str, width: int) -> list[str]:
    """All that is said of one linear. Raises AutoQuantError, with the nearest name, where there is none."""
    linear, layer = _find(config, path)
    shape = f"{linear.in_features:,} -> {linear.out_features:,}" + (f" x {linear.stack}" if linear.stack else "")
    where = f", layers {linear.layers}" if linear.layers and layer is None else ""
    rows = [f"{path}: {shape}, {linear.role}{where}"]
    rows.append(f"quantized: {_strategy(config, linear, layer)}")
    used = used_group(config, layer)
    for group in config.smoothing.groups:
        for slots, verb in ((group.targets, "smoothed by"), (group.sources, "gives its scales to")):
            if any(slot.path in (linear.weight, linear.bias) for slot in slots) and _has(group.layers, layer):
                kind = group.kind.value + (", by hand" if group.by_hand else "")
                rows.append(f"{verb} {group.name} ({kind}): {used[group.name]}")
    for space in config.rotation.spaces:
        said = used[f"{space.kind} {space.name}"]
        if any(w.path in (linear.weight, linear.bias) and _has(w.layers or space.layers, layer) for w in space.writers):
            rows.append(f"writes into {space.kind} {space.name}: {said}")
        for read in space.reads:
            dims = [reader.dim for reader in read.readers if reader.path == linear.weight]
            if dims and _has(read.layers or space.layers, layer):
                norm = f" behind {read.norm.weight}" if read.norm is not None and read.norm.weight else ""
                if linear.in_dim in dims:
                    rows.append(f"reads {space.kind} {space.name}{norm}: {said}")
                else:
                    rows.append(
                        f"writes into {space.kind} {space.name}{norm.replace(' behind', ', followed by')}: {said}"
                    )
    for online in config.rotation.online:
        if online.path == linear.path and _has(online.layers, layer):
            rows.append(f"online {online.kind} of {online.size:,}: {'on' if online.enable else 'possible, off'}")
    for blocked in config.blocked:
        if blocked.path == linear.path and _has(blocked.layers, layer):
            rows.append(f"no {blocked.what}: {because(blocked)}")
    return [line for number, row in enumerate(rows) for line in wrapped(row, width, 2 * bool(number))]


def _knob_lines(config: Config, width: int) -> Iterator[str]:
    usual, changed = default_knobs(config), changed_knobs(config)
    if not changed:
        yield from wrapped("knobs: all at their defaults", width)
        return
    yield f"{len(changed)} {'knob differs' if len(changed) == 1 else 'knobs differ'} from the defaults"
    for path, value in changed.items():
        text = f"{knob_text(path)} = {value_text(value)} (default {value_text(usual[path])})"
        yield from wrapped(text, width, indent=2)


def _tree(kind: LayerKind, used: dict[str, str], width: int) -> Iterator[str]:
    boxes = {box.key: box for box in kind.boxes if box.kind != RESIDUAL}
    feeds: dict[str, list[str]] = {}
    fed: set[str] = set()
    for line in kind.lines:
        if line.start in boxes and line.end in boxes and line.kind != "query_key":
            feeds.setdefault(line.start, []).append(line.end)
            fed.add(line.end)
    shown: set[str] = set()

    def branch(key: str, lead: str, last: bool, top: bool) -> Iterator[str]:
        box = boxes[key]
        shown.add(key)
        mark, rest = ("", "") if top else ("└─ " if last else "├─ ", "   " if last else "│  ")
        yield inert(f"{lead}{mark}{box.name}" + (f"  {_shape(box)}" if box.shape else ""))
        below = [one for one in dict.fromkeys(feeds.get(key, ())) if one not in shown]
        inner = lead + rest
        for remark in _remarks(kind, box, used):
            bar = "│ " if below else "  "
            yield from (f"{inner}{bar}{text}" for text in wrapped(remark, max(width - len(inner) - 2, 20)))
        for number, one in enumerate(below):
            if one not in shown:
                yield from branch(one, inner, number == len(below) - 1, False)

    order = sorted(boxes.values(), key=lambda box: box.row)
    for box in [*(one for one in order if one.key not in fed), *order]:
        if box.key not in shown:
            yield from branch(box.key, "", True, True)


def _remarks(kind: LayerKind, box: Box, used: dict[str, str]) -> list[str]:
    """What feeds a box by which group, its part in the residual, and what is blocked."""
    found = []
    for line in kind.lines:
        if line.end == box.key and line.start != RESIDUAL and line.kind != "norm":
            found.append(f"{line.kind}: {used.get(line.of, '')}")
        if RESIDUAL in (line.start, line.end) and box.key in (line.start, line.end):
            found.append(f"{'reads' if line.start == RESIDUAL else 'writes'} {line.of}: {used.get(line.of, '')}")
    found += [text for text in box.about if text.startswith("online ")]
    return list(dict.fromkeys([*found, *(f"no {text}" for text in box.blocked)]))


def _shape(box: Box) -> str:
    return box.shape.replace("→", "->") + (f" x {box.count}" if box.count > 1 else "")


def _find(config: Config, path: str) -> tuple[Linear, int | None]:
    """A linear by its path, with {layer} or a number in it, or by an end of it that no other has."""
    for linear in config.model.linears:
        if linear.path == path:
            return linear, None
        for layer in layer_numbers(linear.layers) if linear.layers is not None else ():
            if fill(linear.path, layer) == path:
                return linear, layer
    ends = [linear for linear in config.model.linears if linear.path.endswith(f".{path}")]
    if ends and len({linear.path for linear in ends}) == 1:
        return ends[0], None
    known = [linear.path for linear in config.model.linears]
    names = [*known, *(one.partition(f"{LAYER}.")[2] for one in known if LAYER in one)]
    several = f"; {len(ends)} end so: {', '.join(one.path for one in ends[:4])}" if ends else did_you_mean(path, names)
    raise AutoQuantError(f"no linear '{path}'{several}")


def _strategy(config: Config, linear: Linear, layer: int | None) -> str:
    section = config.quantization
    overrides = [one for one in section.overrides if one.path in _paths(linear, layer) and _applies(one, layer)]
    if overrides:
        chosen = overrides[-1].strategy
        only = f" in layers {overrides[-1].layers}" if overrides[-1].layers and layer is None else ""
        return ("no, in floating point" if chosen is None else chosen.value) + f", by an override{only}"
    return "no, excluded" if set(section.exclude) & set(_paths(linear, layer)) else section.strategy.value


def _paths(linear: Linear, layer: int | None) -> Sequence[str]:
    return (linear.path,) if layer is None else (linear.path, fill(linear.path, layer))


def _applies(override: QuantizationOverride, layer: int | None) -> bool:
    return override.layers is None or layer is None or layer in layer_numbers(override.layers)


def _has(layers: str | None, layer: int | None) -> bool:
    return layers is None or layer is None or layer in layer_numbers(layers)
