"""Does a config fit a model: every path, shape, range, tie, and the structure as a whole."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

from torch import nn

from autoquant.config.check import JsonPath, Problem, json_path
from autoquant.config.format import Config, Linear, Norm, Slot
from autoquant.config.layers import LAYER, did_you_mean, fill, layer_numbers, layer_set
from autoquant.config.text import line_column, parse
from autoquant.errors import AutoQuantError
from autoquant.models.structure import fingerprint, shapes_of, ties_of

Layers = tuple[int | None, ...]
Wrong = Callable[[Sequence[int]], str | None]


def structure_of(module: nn.Module) -> Structure:
    """What is compared with a config; the module may be on the meta device."""
    modules = frozenset(name for name, _ in module.named_modules(remove_duplicate=False))
    return Structure(shapes_of(module), ties_of(module), modules)


def model_problems(config: Config, model: Structure) -> list[Problem]:
    """Everything in ``config`` that does not fit ``model``, in the order of the file. Raises nothing."""
    return [
        *_whole(config, model),
        *_linears(config, model),
        *_groups(config, model),
        *_spaces(config, model),
        *_online(config, model),
        *_blocked(config, model),
    ]


def problems_error(file: Path, model: str, found: Sequence[Problem]) -> AutoQuantError:
    """The problems as one error, each with line and column of the file that ``load_config`` has read."""
    document = parse(file.read_text(encoding="utf-8"))
    lines = []
    for problem in found:
        line, column = line_column(document.text, document.offset(problem.path, key=problem.key))
        lines.append((line, column, f"{file}:{line}:{column}: {json_path(problem.path)}: {problem.message}"))
    texts = [text for _, _, text in sorted(lines)]
    count = f"{len(texts)} {'problem' if len(texts) == 1 else 'problems'}"
    return AutoQuantError(f"{file}: does not fit {model}: {count}", tuple(texts))


def _whole(config: Config, model: Structure) -> Iterator[Problem]:
    facts = config.model
    actual = fingerprint(model.shapes, model.tied)
    if config.provenance.fingerprint != actual:
        message = f"the model's is {actual}: its parameters, shapes or ties are not those that were analyzed"
        yield Problem(("provenance", "fingerprint"), message)
    layers = max((model.depth(linear.weight) for linear in facts.linears), default=0)
    if layers != facts.layers and any(LAYER in linear.weight for linear in facts.linears):
        yield Problem(("model", "layers"), f"the model has {layers} layers, not {facts.layers}")
    parameters = model.parameters
    if parameters != facts.parameters:
        yield Problem(("model", "parameters"), f"the model has {parameters:,} parameters, not {facts.parameters:,}")
    ours, theirs = {frozenset(tie) for tie in facts.tied}, {frozenset(tie) for tie in model.tied}
    for number, tie in enumerate(facts.tied):
        for i, name in enumerate(tie):
            yield from model.parameter(("model", "tied", number, i), name, (None,))
        if frozenset(tie) not in theirs and all(name in model.shapes for name in tie):
            yield Problem(("model", "tied", number), f"the model does not tie {' and '.join(tie)}")
    for names in sorted(" and ".join(sorted(tie)) for tie in theirs - ours):
        yield Problem(("model", "tied"), f"the model ties {names}, which is not listed")


def _linears(config: Config, model: Structure) -> Iterator[Problem]:
    for number, linear in enumerate(config.model.linears):
        at = ("model", "linears", number)
        layers = _numbers(linear.layers)
        yield from model.module((*at, "path"), linear.path, layers)
        yield from model.parameter((*at, "weight"), linear.weight, layers)
        yield from model.shape(at, linear.weight, layers, partial(_matrix, linear))
        if linear.bias is not None:
            yield from model.parameter((*at, "bias"), linear.bias, layers)
            yield from model.shape((*at, "bias"), linear.bias, layers, partial(_vector, linear.out_features))


def _vector(size: int, shape: Sequence[int]) -> str | None:
    """What is wrong with the shape of a bias or a norm weight, if anything."""
    return None if shape and shape[-1] == size else f"the config says {size} elements"


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


def _groups(config: Config, model: Structure) -> Iterator[Problem]:
    for number, group in enumerate(config.smoothing.groups):
        for key, slots in (("sources", group.sources), ("targets", group.targets)):
            for i, slot in enumerate(slots):
                yield from _slot(("smoothing", "groups", number, key, i), slot, _numbers(group.layers), model)


def _spaces(config: Config, model: Structure) -> Iterator[Problem]:
    for number, space in enumerate(config.rotation.spaces):
        at = ("rotation", "spaces", number)
        for i, writer in enumerate(space.writers):
            layers = _numbers(writer.layers or space.layers)
            yield from _slot((*at, "writers", i), writer, layers, model)
            if writer.fold_norm is not None:
                yield from _norm((*at, "writers", i, "fold_norm"), writer.fold_norm, layers, space.size, model)
        for i, read in enumerate(space.reads):
            layers = _numbers(read.layers or space.layers)
            if read.norm is not None:
                yield from _norm((*at, "reads", i, "norm"), read.norm, layers, space.size, model)
            for j, reader in enumerate(read.readers):
                where = (*at, "reads", i, "readers", j)
                yield from _slot(where, reader, layers, model)
                if reader.bias is not None:
                    yield from model.parameter((*where, "bias"), reader.bias, layers)


def _online(config: Config, model: Structure) -> Iterator[Problem]:
    for number, online in enumerate(config.rotation.online):
        yield from model.module(("rotation", "online", number, "path"), online.path, _numbers(online.layers))


def _blocked(config: Config, model: Structure) -> Iterator[Problem]:
    for number, blocked in enumerate(config.blocked):
        yield from model.module(("blocked", number, "path"), blocked.path, _numbers(blocked.layers))


def _slot(at: JsonPath, slot: Slot, layers: Layers, model: Structure) -> Iterator[Problem]:
    yield from model.parameter((*at, "path"), slot.path, layers)
    yield from model.shape(at, slot.path, layers, partial(_axis, slot))


def _axis(slot: Slot, shape: Sequence[int]) -> str | None:
    """What is wrong with a parameter of ``shape`` for ``slot``, if anything."""
    if slot.dim >= len(shape):
        return f"it has no dimension {slot.dim} (dim)"
    stacks = (shape[:-2], shape[: slot.dim], shape[: min(slot.dim, 1)])
    if slot.stack is not None and slot.stack not in map(math.prod, stacks):
        return f"the config says {slot.stack} stacked matrices (stack)"
    if slot.size != shape[slot.dim] * (slot.stack or 1):
        stacked = f", {slot.stack} matrices together" if slot.stack else ""
        return f"the config says {slot.size} positions (size) along dimension {slot.dim}{stacked}"
    return None


def _norm(at: JsonPath, norm: Norm, layers: Layers, size: int, model: Structure) -> Iterator[Problem]:
    for key, name in (("weight", norm.weight), ("bias", norm.bias)):
        if name is not None:
            yield from model.parameter((*at, key), name, layers)
            yield from model.shape((*at, key), name, layers, partial(_vector, size))


def _numbers(layers: str | None) -> Layers:
    return (None,) if layers is None else layer_numbers(layers)


def _name(path: str, layer: int | None) -> str:
    return path if layer is None else fill(path, layer)


def _where(layers: Collection[int | None]) -> str:
    numbers = [layer for layer in layers if layer is not None]
    return f" (layers {layer_set(numbers)})" if numbers else ""


@dataclass(frozen=True)
class Structure:
    """Names, shapes and ties of a model."""

    shapes: Mapping[str, tuple[int, ...]]
    tied: tuple[tuple[str, ...], ...]
    modules: frozenset[str]
    _depths: dict[str, int] = field(default_factory=dict)

    @cached_property
    def parameters(self) -> int:
        """Number of parameters, tied ones counted once."""
        again = {name for tie in self.tied for name in tie[1:]}
        return sum(math.prod(shape) for name, shape in self.shapes.items() if name not in again)

    @cached_property
    def templates(self) -> tuple[str, ...]:
        """All names, and all with ``{layer}`` for a number, to look for near ones."""
        numbered = (re.sub(r"(?<=\.)\d+(?=\.)", LAYER, name, count=1) for name in (*self.shapes, *self.modules))
        return tuple(dict.fromkeys((*self.shapes, *self.modules, *numbered)))

    def depth(self, path: str) -> int:
        """How many layers the model has where ``path`` has ``{layer}``; 0 where it has none."""
        head, layer, _ = path.partition(LAYER)
        if head not in self._depths:
            numbers = (name[len(head) :].partition(".")[0] for name in self.shapes if name.startswith(head))
            counts = [int(number) + 1 for number in numbers if number.isdecimal()] if layer else []
            self._depths[head] = max(counts, default=0)
        return self._depths[head] if layer else 0

    def parameter(self, at: JsonPath, path: str, layers: Layers) -> Iterator[Problem]:
        """A problem where ``path`` is no parameter in some of the layers."""
        yield from self._missing(at, path, layers, "parameter", self.shapes)

    def module(self, at: JsonPath, path: str, layers: Layers) -> Iterator[Problem]:
        """A problem where ``path`` is neither a module nor a parameter in some of the layers."""
        yield from self._missing(at, path, layers, "module", self.modules | self.shapes.keys())

    def _missing(self, at: JsonPath, path: str, layers: Layers, what: str, names: Collection[str]) -> Iterator[Problem]:
        depth = self.depth(path)
        # That the model has fewer layers is a problem of model.layers, and not of each path once more.
        expected = [layer for layer in layers if layer is None or not depth or layer < depth]
        missing = [layer for layer in expected if _name(path, layer) not in names]
        if missing:
            some = _where(missing) if len(missing) < len(expected) else ""
            near = "" if some else did_you_mean(path, self.templates)
            yield Problem(at, f"the model has no {what} '{path}'{some}{near}")

    def shape(self, at: JsonPath, path: str, layers: Layers, wrong: Wrong) -> Iterator[Problem]:
        """A problem for each wrong shape that ``path`` has; ``wrong`` says what is wrong with one."""
        shapes: dict[tuple[int, ...], list[int | None]] = {}
        for layer in layers:
            if (shape := self.shapes.get(_name(path, layer))) is not None:
                shapes.setdefault(shape, []).append(layer)
        for shape, same in shapes.items():
            if (reason := wrong(shape)) is not None:
                yield Problem(at, f"'{path}'{_where(same)} is {list(shape)} in the model; {reason}")
