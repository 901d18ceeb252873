"""Does a config fit a model: every path, shape, range and tie, and the structure as a whole.

One set of rules for whatever takes a model and a config. What only matters to the claims that are applied together
(positions that two of them change, types that cannot be folded) is ``executor.resolve``'s, in the same words.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from pathlib import Path

from autoquant.config.check import Problem
from autoquant.config.format import Config, Linear, Norm, Read, Slot, Space
from autoquant.config.layers import LAYER, fill, layer_bits, layer_set, layers_below, numbers_in
from autoquant.config.places import JsonPath, in_file, json_path, path_text
from autoquant.config.slots import index_problems
from autoquant.config.spelling import did_you_mean
from autoquant.config.text import line_column, parse
from autoquant.errors import AutoQuantError
from autoquant.models.structure import ModelStructure

MAX_SHOWN = 20
MAX_EXPLAINED = 100

Layers = tuple[int | None, ...]
Wrong = Callable[[Sequence[int]], str | None]


def structure_problems(config: Config, model: ModelStructure) -> list[Problem]:
    """Everything in ``config`` that does not fit ``model``, in the order of the file. Raises nothing."""
    return [
        *_whole(config, model),
        *_linears(config, model),
        *_groups(config, model),
        *_spaces(config, model),
        *_online(config, model),
        *_blocked(config, model),
    ]


def check_structure(config: Config, model: ModelStructure) -> None:
    """Raise AutoQuantError, with the JSON path of each problem, where ``config`` does not fit ``model``."""
    if found := structure_problems(config, model):
        raise misfit(found)


def problems_error(file: Path, model: str, found: Sequence[Problem]) -> AutoQuantError:
    """The problems as one error, each with line and column of the file that ``load_config`` has read."""
    document = parse(file.read_text(encoding="utf-8-sig"))
    lines = []
    for problem in found[:MAX_EXPLAINED]:
        path = in_file(problem.path, document.value)
        line, column = line_column(document.text, document.offset(path, key=problem.key))
        lines.append((line, column, f"{file}:{line}:{column}: {path_text(path)}: {problem.message}"))
    texts = tuple(text for _, _, text in sorted(lines))
    count = f"{len(found)} {'problem' if len(found) == 1 else 'problems'}"
    more = f", {len(texts)} of them shown" if len(found) > len(texts) else ""
    return AutoQuantError(f"{file}: does not fit {model}: {count}{more}", texts)


def misfit(found: Sequence[Problem]) -> AutoQuantError:
    """The problems of a config whose file is not known as one error, each with its JSON path."""
    shown = tuple(f"{json_path(problem.path)}: {problem.message}" for problem in found[:MAX_SHOWN])
    if len(found) == 1:
        message = f"the config does not fit the model: {shown[0]}; nothing was changed"
        return AutoQuantError(message, problems=tuple(found))
    details = shown + ((f"... and {len(found) - len(shown)} more",) if len(found) > len(shown) else ())
    return AutoQuantError(
        f"the config does not fit the model: {shown[0]} (and {len(found) - 1} more problems); nothing was changed",
        details,
        tuple(found),
    )


def _whole(config: Config, model: ModelStructure) -> Iterator[Problem]:
    facts = config.model
    if config.provenance.fingerprint != model.fingerprint:
        message = f"the model's is {model.fingerprint}: its parameters, shapes or ties are not those that were analyzed"
        yield Problem(("provenance", "fingerprint"), message)
    layers = max((model.depth(linear.weight) for linear in facts.linears), default=0)
    # The longest stack of a model may hold no linear at all: the convolutions before an encoder of fewer layers.
    longest = layers < facts.layers and facts.layers in model.stack_lengths
    if layers != facts.layers and not longest and any(LAYER in linear.weight for linear in facts.linears):
        yield Problem(("model", "layers"), f"the model has {layers} layers, not {facts.layers}")
    if model.parameters != facts.parameters:
        message = f"the model has {model.parameters:,} parameters, not {facts.parameters:,}"
        yield Problem(("model", "parameters"), message)
    ours, theirs = {frozenset(tie) for tie in facts.tied}, {frozenset(tie) for tie in model.ties}
    for number, tie in enumerate(facts.tied):
        for i, name in enumerate(tie):
            yield from _parameter(model, ("model", "tied", number, i), name, None)
        if frozenset(tie) not in theirs and all(name in model.shapes for name in tie):
            yield Problem(("model", "tied", number), f"the model does not tie {' and '.join(tie)}")
    for names in sorted(" and ".join(sorted(tie)) for tie in theirs - ours):
        yield Problem(("model", "tied"), f"the model ties {names}, which is not listed")


def _linears(config: Config, model: ModelStructure) -> Iterator[Problem]:
    for number, linear in enumerate(config.model.linears):
        at = ("model", "linears", number)
        yield from _module(model, (*at, "path"), linear.path, linear.layers)
        yield from _parameter(model, (*at, "weight"), linear.weight, linear.layers)
        yield from _shape(model, at, linear.weight, linear.layers, partial(_matrix, linear))
        if linear.bias is not None:
            yield from _parameter(model, (*at, "bias"), linear.bias, linear.layers)
            size = (linear.out_features,)
            yield from _shape(model, (*at, "bias"), linear.bias, linear.layers, partial(_vector, size, last=True))


def _vector(sizes: Sequence[int], shape: Sequence[int], *, last: bool = False) -> str | None:
    """What is wrong with the shape of a bias or a norm weight, if anything. ``last``: there may be one for each of a
    stack.
    """
    fits = bool(shape) and shape[-1] in sizes and (last or len(shape) == 1)
    fits = fits or (not last and max(shape, default=0) in sizes and math.prod(shape) in sizes)
    return None if fits else f"the config says {' or '.join(map(str, dict.fromkeys(sizes)))} elements"


def _matrix(linear: Linear, shape: Sequence[int]) -> str | None:
    """What is wrong with a weight of ``shape`` for ``linear``, if anything."""
    if linear.in_dim >= len(shape):
        return f"it has no dimension {linear.in_dim} (in_dim)"
    if shape[linear.in_dim] != linear.in_features:
        return f"the config says {linear.in_features} (in_features) in dimension {linear.in_dim}"
    others = math.prod(shape) // max(linear.in_features, 1)
    if len(shape) > 1 and others != linear.out_features * (linear.stack or 1):
        stack = f" in each of {linear.stack} matrices" if linear.stack else ""
        return f"the config says {linear.out_features} (out_features){stack} in the other dimension"
    return None


def _groups(config: Config, model: ModelStructure) -> Iterator[Problem]:
    for number, group in enumerate(config.smoothing.groups):
        for key, slots in (("sources", group.sources), ("targets", group.targets)):
            for i, slot in enumerate(slots):
                at = ("smoothing", "groups", number, key, i)
                yield from _slot(model, at, slot, group.layers, group.channels)


def _spaces(config: Config, model: ModelStructure) -> Iterator[Problem]:
    for number, space in enumerate(config.rotation.spaces):
        at = ("rotation", "spaces", number)
        channels = space.size * space.blocks
        for i, writer in enumerate(space.writers):
            layers = writer.layers or space.layers
            yield from _slot(model, (*at, "writers", i), writer, layers, channels, space.blocks)
            if writer.fold_norm is not None:
                yield from _norm(model, (*at, "writers", i, "fold_norm"), writer.fold_norm, layers, (channels,))
        for i, read in enumerate(space.reads):
            yield from _read(model, (*at, "reads", i), space, read, channels)


def _read(model: ModelStructure, at: JsonPath, space: Space, read: Read, channels: int) -> Iterator[Problem]:
    layers = read.layers or space.layers
    if read.norm is not None:
        yield from _norm(model, (*at, "norm"), read.norm, layers, (channels, space.size))
    if space.centre and (read.norm is None or (read.norm.kind != "layer" and read.norm.weight is None)):
        yield Problem(at, "reads a centred space without a LayerNorm, and centring would change it (centre)")
    for j, reader in enumerate(read.readers):
        where = (*at, "readers", j)
        yield from _slot(model, where, reader, layers, channels, space.blocks)
        if reader.bias is None:
            continue
        yield from _parameter(model, (*where, "bias"), reader.bias, layers)
        for layer in _present(model, reader.bias, layers):
            weight = model.shapes.get(_name(reader.path, layer), ())
            bias = model.shapes.get(_name(reader.bias, layer))
            expected = tuple(size for dim, size in enumerate(weight) if dim != reader.dim)
            if weight and bias is not None and bias != expected:
                message = (
                    f"'{reader.bias}'{_where([layer])} is {list(bias)} in the model; the linear's is {list(expected)}"
                )
                yield Problem((*where, "bias"), message)
                break


def _online(config: Config, model: ModelStructure) -> Iterator[Problem]:
    for number, online in enumerate(config.rotation.online):
        yield from _module(model, ("rotation", "online", number, "path"), online.path, online.layers)


def _blocked(config: Config, model: ModelStructure) -> Iterator[Problem]:
    for number, blocked in enumerate(config.blocked):
        yield from _module(model, ("blocked", number, "path"), blocked.path, blocked.layers)


def _slot(
    model: ModelStructure, at: JsonPath, slot: Slot, layers: str | None, channels: int, blocks: int | None = None
) -> Iterator[Problem]:
    """The parameter, its axis, and where they fit also the positions on it."""
    yield from _parameter(model, (*at, "path"), slot.path, layers)
    found = list(_shape(model, at, slot.path, layers, partial(axis_problem, slot)))
    yield from found
    if not found and any(_name(slot.path, layer) in model.shapes for layer in _present(model, slot.path, layers)):
        yield from (Problem((*at, *where), reason) for where, reason in index_problems(slot, channels, blocks))


def axis_problem(slot: Slot, shape: Sequence[int]) -> str | None:
    """What is wrong with a parameter of ``shape`` for ``slot``, if anything.

    Matrices that are stacked along dimension 0 may have it for themselves, (E, R, C), or share it, (E * R, C).
    """
    if slot.dim >= len(shape):
        return f"it has no dimension {slot.dim} (dim)"
    stack = slot.stack if slot.stack is not None and slot.dim > 0 else 1
    if shape[0] % stack:
        return f"the config says {stack} matrices stacked along dimension 0 (stack)"
    if slot.size != shape[slot.dim] * stack:
        stacked = f", {stack} matrices together" if slot.stack else ""
        return f"the config says {slot.size} positions (size) along dimension {slot.dim}{stacked}"
    return None


def _norm(
    model: ModelStructure, at: JsonPath, norm: Norm, layers: str | None, sizes: Sequence[int]
) -> Iterator[Problem]:
    for key, name in (("weight", norm.weight), ("bias", norm.bias)):
        if name is not None:
            yield from _parameter(model, (*at, key), name, layers)
            yield from _shape(model, (*at, key), name, layers, partial(_vector, sizes))


def _name(path: str, layer: int | None) -> str:
    return path if layer is None else fill(path, layer)


def _where(layers: Collection[int | None]) -> str:
    numbers = [layer for layer in layers if layer is not None]
    return f" (layers {layer_set(numbers)})" if numbers else ""


def _present(model: ModelStructure, path: str, layers: str | None) -> Layers:
    """The layers of a path that the model is deep enough for; that there are more is a problem of model.layers, and not
    of each path once more.
    """
    if LAYER not in path:
        return (None,)
    return numbers_in(layers_below(layer_bits(layers), model.depth(path))) if layers is not None else ()


def _parameter(model: ModelStructure, at: JsonPath, path: str, layers: str | None) -> Iterator[Problem]:
    """A problem where ``path`` is no parameter in some of the layers."""
    yield from _missing(model, at, path, layers, "parameter", model.shapes.keys())


def _module(model: ModelStructure, at: JsonPath, path: str, layers: str | None) -> Iterator[Problem]:
    """A problem where ``path`` is neither a module nor a parameter in some of the layers."""
    yield from _missing(model, at, path, layers, "module", model.modules, model.shapes.keys())


def _missing(
    model: ModelStructure, at: JsonPath, path: str, layers: str | None, what: str, *names: Collection[str]
) -> Iterator[Problem]:
    if LAYER in path and layers is None:
        yield Problem(at, f"'{path}' holds {LAYER}, and no layers are given")
        return
    expected = _present(model, path, layers)
    missing = [layer for layer in expected if not any(_name(path, layer) in known for known in names)]
    nowhere = LAYER in path and not model.depth(path)
    if missing or nowhere:
        some = _where(missing) if len(missing) < len(expected) else ""
        near = partial(_near, path, model)
        yield Problem(at, f"the model has no {what} '{path}'{some}", rest=None if some else near)


def _near(path: str, model: ModelStructure) -> str:
    return did_you_mean(path, model.templates)


def _shape(model: ModelStructure, at: JsonPath, path: str, layers: str | None, wrong: Wrong) -> Iterator[Problem]:
    """A problem for each wrong shape that ``path`` has; ``wrong`` says what is wrong with one."""
    shapes: dict[tuple[int, ...], list[int | None]] = {}
    for layer in _present(model, path, layers):
        if (shape := model.shapes.get(_name(path, layer))) is not None:
            shapes.setdefault(shape, []).append(layer)
    for shape, same in shapes.items():
        if (reason := wrong(shape)) is not None:
            yield Problem(at, f"'{path}'{_where(same)} is {list(shape)} in the model; {reason}")
