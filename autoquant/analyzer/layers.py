"""Repeated layers: where they are, which are alike, and a model that holds only representatives of them.

A stack is a list of blocks, ``model.layers``. Two layers are of one *kind* if nothing that could change what is found
in them differs: the class of every submodule, names, shapes and dtypes of parameters and buffers, ties, plain
attributes (``sliding_window``, ``is_causal``), and the layer's entry in every list of the config that has one for each
layer. A layer's own number is no difference.

:func:`represent` keeps the first and the last layer of each kind. Two, because what depends on the position (a first
layer that is read differently, pairs of layers that share keys) shows as a difference between them:
``folding.disagreement`` compares what was found in the two, and the whole model is traced where it differs.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, is_dataclass, replace
from typing import Any

import torch
from torch import nn

from autoquant.analyzer.templates import StackMap

# Configs and modules name their number of layers in many ways: num_hidden_layers, n_layer, encoder_layers, depth.
COUNT = re.compile(r"(^|_)(layers|blocks|depth)$|^n_(layer|block)$|^num_\w*(layer|block)")
# A list of layer numbers: mlp_only_layers, attn_layer_indices, hybrid_layer_ids.
NUMBERS = re.compile(r"layer|block|indices$|ids$|idxs?$")
# An attribute that points at a layer: layer_idx, kv_shared_layer_index.
POINTER = re.compile(r"layer_?(idx|index|id|number|num)$")

MODULE_FIELDS = frozenset(vars(nn.Module()))


@dataclass(frozen=True, slots=True)
class LayerStack:
    """A list of repeated blocks.

    ``kinds[i]`` numbers the kind of layer i, by first appearance. ``counted``: attributes that count along with the
    layers, as path of the submodule, name and step. ``whole``: why representatives cannot stand for the layers whatever
    their kinds, None where they can.
    """

    path: str
    kinds: tuple[int, ...]
    counted: tuple[tuple[str, str, int], ...] = ()
    whole: str | None = None

    @property
    def length(self) -> int:
        """Number of layers."""
        return len(self.kinds)


def find_stacks(module: nn.Module) -> tuple[LayerStack, ...]:
    """The outermost lists of blocks in ``module``, in order.

    A list is an ``nn.ModuleList`` of at least one, or an ``nn.Sequential`` of at least two modules, each of which has
    submodules and parameters. Lists inside a layer (experts) belong to the layer.
    """
    lists = dict(_lists(module, ""))
    inside = {id(m) for stack in lists.values() for m in stack.modules()}
    outside = [m for m in module.modules() if id(m) not in inside]
    return tuple(_stack(module, path, stack, outside) for path, stack in lists.items())


def whole(stacks: Sequence[LayerStack], reason: str | None = None) -> tuple[StackMap, ...]:
    """The map of an unpruned model: every layer stands for itself."""
    return tuple(_stack_map(stack, range(stack.length), reason or stack.whole) for stack in stacks)


def ends_apart(stacks: Sequence[LayerStack]) -> tuple[LayerStack, ...]:
    """The same stacks, whose first and last layer are of a kind of their own.

    What reads the residual before or after all layers may treat these otherwise: the norm at the end of the last layer
    of a post-norm encoder, a last layer that nothing reads.
    """
    return tuple(replace(stack, kinds=_ends_apart(stack.kinds)) for stack in stacks)


def _ends_apart(kinds: Sequence[int]) -> tuple[int, ...]:
    first: dict[int, int] = {}
    marked = [-1, *kinds[1:-1], -2] if len(kinds) > 1 else kinds
    return tuple(first.setdefault(kind, len(first)) for kind in marked)


def represent(
    module: nn.Module, stacks: Sequence[LayerStack], forward: Callable[[nn.Module], object] | None = None
) -> tuple[nn.Module, tuple[StackMap, ...]]:
    """A model with representatives for the layers of each stack, and what each of them stands for.

    The model is a copy that shares the parameters of ``module``; layers that are left out are never copied, so that the
    cost does not grow with depth. Layers are renumbered, in the module list and in their own ``layer_idx``. The config
    and the modules above a stack are made to fit where they hold the number of layers, a list with an entry per layer
    or a list of layer numbers. ``module`` and its config are untouched.

    ``forward`` runs the copy on some input. If it raises what ``module`` itself does not, or does not call all layers
    of a kind equally often, the model depends on its depth in a way that cannot be seen from outside. Then, and where
    there is nothing to leave out, the result is ``module`` itself and :func:`whole`.
    """
    kept, clash = _settle(module, stacks)
    maps = tuple(_stack_map(stack, kept[stack.path], stack.whole or clash.get(stack.path)) for stack in stacks)
    if all(len(kept[stack.path]) == stack.length for stack in stacks):
        return module, maps
    pruned = _prune(module, stacks, kept)
    misfit = _trial(module, pruned, maps, forward) if forward is not None else None
    return (pruned, maps) if misfit is None else (module, whole(stacks, misfit))


def _lists(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if _is_stack(child):
            yield path, child
        else:
            yield from _lists(child, f"{path}.")


def _is_stack(module: nn.Module) -> bool:
    least = 1 if isinstance(module, nn.ModuleList) else 2
    if not isinstance(module, nn.ModuleList | nn.Sequential) or len(module) < least:
        return False
    numbered = list(module._modules) == [str(i) for i in range(len(module))]
    return numbered and all(
        next(layer.children(), None) is not None and next(layer.parameters(), None) is not None for layer in module
    )


# What makes two layers alike


def _stack(module: nn.Module, path: str, layers: nn.Module, outside: Sequence[nn.Module]) -> LayerStack:
    blocks = [layers.get_submodule(str(i)) for i in range(len(layers._modules))]
    configs: list[object] = []
    structures = [_structure(layer, configs) for layer in blocks]
    position = _position_attributes([attributes for _, attributes in structures])
    per_layer = [
        _entries(name, value, len(blocks))
        for holder in _holders(module, path)
        for name, value in {**vars(holder), **_computed(holder)}.items()
    ]
    tied, shared = _shared(blocks, outside)
    kinds: dict[object, int] = {}
    numbers = []
    for i, (structure, attributes) in enumerate(structures):
        own = frozenset((key, value) for key, value in attributes.items() if key not in position)
        entries = tuple(entries[i] for entries in per_layer if entries is not None)
        numbers.append(kinds.setdefault((structure, own, entries, i if i in tied else None), len(kinds)))
    reason = (
        (shared if len(tied) == len(blocks) else None)
        or _points_elsewhere([attributes for _, attributes in structures], position)
        or _boundary(module, path, len(blocks))
        or _one_per_layer(module, outside, len(blocks))
    )
    counted = tuple((where, name, step) for (where, name), step in position.items() if step != 0)
    return LayerStack(path, tuple(numbers), counted, reason)


def _structure(layer: nn.Module, configs: list[object]) -> tuple[object, dict[tuple[str, str], object]]:
    """Classes, tensors and ties of a layer, and its plain attributes by submodule and name."""
    seen: dict[int, str] = {}
    structure: list[object] = []
    attributes: dict[tuple[str, str], object] = {}
    for path, module in layer.named_modules(remove_duplicate=False):
        structure.append((path, type(module), seen.setdefault(id(module), path)))
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                tie = seen.setdefault(id(tensor), f"{path}.{name}")
                structure.append((name, tuple(tensor.shape), tensor.dtype, tie if name in module._parameters else ""))
        for name, value in vars(module).items():
            if name not in MODULE_FIELDS:
                attributes[path, name] = _plain(value, configs)
    return tuple(structure), attributes


def _plain(value: object, configs: list[object]) -> object:
    """A hashable description of an attribute: equal where the values are equal for all that a forward could do."""
    if value is None or isinstance(value, bool | int | float | str | bytes):
        return type(value), value if value == value else "nan"
    if isinstance(value, list | tuple | set | frozenset):
        items = sorted(value, key=repr) if isinstance(value, set | frozenset) else value
        return type(value), tuple(_plain(item, configs) for item in items)
    if isinstance(value, Mapping):
        return type(value), tuple((repr(key), _plain(item, configs)) for key, item in value.items())
    if isinstance(value, torch.Tensor):
        return torch.Tensor, tuple(value.shape), value.dtype
    if isinstance(value, torch.dtype | torch.device | type):
        return type(value), str(value)
    if callable(value) and hasattr(value, "__qualname__"):
        return "function", value.__module__, value.__qualname__
    if _is_config(value):
        same = next(
            (i for i, other in enumerate(configs) if other is value or vars(other) == vars(value)), len(configs)
        )
        if same == len(configs):
            configs.append(value)
        return "config", same
    return (type(value),)


def _position_attributes(layers: Sequence[Mapping[tuple[str, str], object]]) -> dict[tuple[str, str], int]:
    """Attributes that are a function of the layer's position and nothing else, with the step of those that count.

    An integer that goes up by one over three or more layers is the layer's number; with fewer layers or a larger step
    (two attentions in each) its name has to say so. A float that only rises or only falls over all layers (drop path
    rates, 1 / depth) is a schedule, and no symmetry depends on the value of a factor.
    """
    found: dict[tuple[str, str], int] = {}
    for key in dict.fromkeys(key for layer in layers for key in layer):
        values = [(i, layer[key]) for i, layer in enumerate(layers) if key in layer]
        numbers = [value[1] for _, value in values if isinstance(value, tuple) and value[0] in (int, float)]
        if len(numbers) < len(values):
            continue
        if all(isinstance(number, int) for number in numbers):
            step = _step([i for i, _ in values], numbers)
            if (step == 1 and len(numbers) > 2) or (step > 0 and POINTER.search(key[1])):
                found[key] = step
        elif len(layers) == len(numbers) > 2:
            rises = [a < b for a, b in itertools.pairwise(numbers)]
            falls = [a > b for a, b in itertools.pairwise(numbers)]
            if all(rises) or all(falls):
                found[key] = 0
    return found


def _step(positions: Sequence[int], numbers: Sequence[int]) -> int:
    """How much ``numbers`` go up from one position to the next, 0 where that is not the same everywhere."""
    if len(numbers) == 1:
        return int(numbers == positions)
    step = (numbers[1] - numbers[0]) // (positions[1] - positions[0])
    offsets = {number - step * position for position, number in zip(positions, numbers, strict=True)}
    return step if len(offsets) == 1 else 0


def _shared(blocks: Sequence[nn.Module], outside: Sequence[nn.Module]) -> tuple[set[int], str | None]:
    """Layers that share parameters with one another, each of which stands for itself; and what is shared first.

    All of them where one shares a parameter with the rest of the model.
    """
    owner: dict[int, int | None] = {id(p): None for m in outside for p in m._parameters.values() if p is not None}
    tied: set[int] = set()
    reason = None
    for i, block in enumerate(blocks):
        for name, parameter in block.named_parameters():
            other = owner.setdefault(id(parameter), i)
            if other == i:
                continue
            if other is None:
                return set(range(len(blocks))), f"layer {i} and the model share the parameter {name}"
            tied |= {i, other}
            reason = reason or f"layer {i} and layer {other} share the parameter {name}"
    return tied, reason


def _points_elsewhere(
    layers: Sequence[Mapping[tuple[str, str], object]], position: Mapping[tuple[str, str], int]
) -> str | None:
    for i, layer in enumerate(layers):
        for (path, name), value in layer.items():
            if (path, name) in position or not POINTER.search(name) or value == (int, -1):
                continue  # -1 is the last layer, or none: the same with fewer of them
            if isinstance(value, tuple) and value[0] is int:
                return f"layer {i} refers to layer {value[1]} ({path}.{name})"
    return None


def _boundary(module: nn.Module, path: str, length: int) -> str | None:
    for holder in _holders(module, path):
        for name, value in vars(holder).items():
            if POINTER.search(name) and type(value) is int and 0 < value < length:
                return f"the model does something of its own at layer {value} ({name})"
    return None


def _one_per_layer(module: nn.Module, outside: Sequence[nn.Module], length: int) -> str | None:
    outer = {id(p) for m in outside for p in m._parameters.values() if p is not None}
    for name, parameter in module.named_parameters():
        if length > 1 and id(parameter) in outer and parameter.dim() > 0 and parameter.shape[0] == length:
            return f"{name} may hold one entry for each layer"
    return None


# Keeping representatives


def _representatives(stack: LayerStack) -> tuple[int, ...]:
    if stack.whole is not None:
        return tuple(range(stack.length))
    first = {kind: i for i, kind in reversed(list(enumerate(stack.kinds)))}
    last = {kind: i for i, kind in enumerate(stack.kinds)}
    return tuple(sorted({*first.values(), *last.values()}))


def _settle(module: nn.Module, stacks: Sequence[LayerStack]) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Which layers each stack keeps. Stacks of one length under one config must keep the same, or keep all."""
    kept = {stack.path: _representatives(stack) for stack in stacks}
    clash: dict[str, str] = {}
    for _ in stacks:  # a stack that has to keep all may take others with it
        for one in stacks:
            for other in stacks:
                common = {id(h) for h in _holders(module, one.path)} & {id(h) for h in _holders(module, other.path)}
                if common and one.length == other.length and kept[one.path] != kept[other.path]:
                    for stack in (one, other):
                        kept[stack.path] = tuple(range(stack.length))
                        clash[stack.path] = f"{one.path} and {other.path} are described by one config and differ"
    return kept, clash


def _stack_map(stack: LayerStack, kept: Sequence[int], reason: str | None) -> StackMap:
    if len(kept) == stack.length:
        return StackMap(stack.path, tuple((i,) for i in range(stack.length)), tuple(range(stack.length)), reason)
    last = {kind: i for i, kind in enumerate(stack.kinds)}
    originals = tuple(
        (i,)
        if last[stack.kinds[i]] == i
        else tuple(j for j, kind in enumerate(stack.kinds) if kind == stack.kinds[i] and j != last[kind])
        for i in kept
    )
    return StackMap(stack.path, originals, tuple(stack.kinds[i] for i in kept))


def _prune(module: nn.Module, stacks: Sequence[LayerStack], kept: Mapping[str, tuple[int, ...]]) -> nn.Module:
    """Copy ``module`` with the kept layers only; parameters are shared, dropped layers are never visited."""
    memo: dict[int, Any] = {id(parameter): parameter for parameter in module.parameters()}
    for stack in stacks:
        layers = module.get_submodule(stack.path)
        dropped = (layers.get_submodule(str(i)) for i in range(stack.length) if i not in kept[stack.path])
        memo |= {id(layer): nn.Identity() for layer in dropped}  # what deepcopy finds here it takes for copied
    pruned = copy.deepcopy(module, memo)
    done: set[tuple[int, int]] = set()
    visited: set[int] = set()
    for stack in stacks:
        if len(kept[stack.path]) == stack.length:
            continue
        layers = pruned.get_submodule(stack.path)
        blocks = [layers._modules[str(i)] for i in kept[stack.path]]
        layers._modules.clear()
        for new, (old, block) in enumerate(zip(kept[stack.path], blocks, strict=True)):
            assert block is not None
            layers.add_module(str(new), block)
            for where, name, step in stack.counted:
                _renumber(block, where, name, step * (new - old))
            for part in block.modules():
                if id(part) not in visited:
                    visited.add(id(part))
                    _fit_mappings(part, stack.length, kept[stack.path])
        for before, after in zip(_holders(module, stack.path), _holders(pruned, stack.path), strict=True):
            if (id(after), stack.length) not in done:
                done.add((id(after), stack.length))
                _fit(before, after, stack.length, kept[stack.path])
    return pruned


def _renumber(layer: nn.Module, where: str, name: str, by: int) -> None:
    """Move a layer number that a submodule of ``layer`` may hold."""
    with contextlib.suppress(AttributeError):  # layers of another kind need not have this submodule
        fields = vars(layer.get_submodule(where))
        if name in fields:
            fields[name] += by


def _fit_mappings(part: nn.Module, length: int, kept: Sequence[int]) -> None:
    """Renumber what a layer looks up by layer numbers."""
    for name, value in list(vars(part).items()):
        if isinstance(value, dict) and (fitted := _fitted(name, value, length, kept)) is not None:
            vars(part)[name] = fitted


def _fit(before: object, after: object, length: int, kept: Sequence[int]) -> None:
    """Make the settings ``after`` describe the kept layers; ``before`` are the same for all layers."""
    for name, value in list(vars(before).items()):
        if type(value) is int and value == length and COUNT.search(name):
            vars(after)[name] = len(kept)
        elif (fitted := _fitted(name, value, length, kept)) is not None:
            vars(after)[name] = fitted
    now = _computed(after)
    shadows = {
        name: fitted
        for name, value in _computed(before).items()
        if (fitted := _fitted(name, value, length, kept)) is not None and now.get(name) != fitted
    }
    if shadows:
        # Computed from a period, for example: layers of this copy are not at the positions that it was made for.
        after.__class__ = type(type(after).__name__, (type(after),), shadows)


def _fitted(name: str, value: object, length: int, kept: Sequence[int]) -> object:
    """A list of layer numbers or with an entry per layer, or a mapping from them, for the kept layers; else None."""
    if _entries(name, value, length) is None or not isinstance(value, list | tuple | dict):
        return None
    if isinstance(value, dict):
        return {new: value[old] for new, old in enumerate(kept) if old in value}
    if _layer_numbers(name, value, length):
        return type(value)(new for new, old in enumerate(kept) if old in value)
    return type(value)(value[i] for i in kept)


def _entries(name: str, value: object, length: int) -> tuple[object, ...] | None:
    """What a field of a config says about each layer, None where it says nothing."""
    if name in MODULE_FIELDS or not isinstance(value, list | tuple | dict):
        return None
    if isinstance(value, dict):
        found = tuple((i in value, _plain(value.get(i), [])) for i in range(length))
        return found if _layer_numbers(name, list(value), length) else None
    if _layer_numbers(name, value, length):
        return tuple(i in value for i in range(length))
    return tuple(_plain(item, []) for item in value) if len(value) == length else None


def _layer_numbers(name: str, value: Sequence[object], length: int) -> bool:
    if not value or NUMBERS.search(name) is None:
        return False
    numbers = [item for item in value if type(item) is int]
    ascending = all(a < b for a, b in itertools.pairwise(numbers))
    return len(numbers) == len(value) and ascending and numbers[0] >= 0 and numbers[-1] < length


def _computed(holder: object) -> dict[str, object]:
    """Properties of a config that may list its layers: some compute ``layer_types``."""
    found: dict[str, object] = {}
    if isinstance(holder, nn.Module):
        return found
    for name in dir(type(holder)):
        if NUMBERS.search(name) and isinstance(getattr(type(holder), name), property):
            # A property may not apply to this config and say so by any error; then it says nothing about layers.
            with contextlib.suppress(Exception):
                found[name] = getattr(holder, name)
    return found


def _holders(module: nn.Module, path: str) -> list[object]:
    """What may describe the layers of a stack: the modules above it and the nearest config."""
    names = path.split(".")[:-1]
    above = [module.get_submodule(".".join(names[:i])) for i in range(len(names), -1, -1)]
    configs = (value for parent in above for value in vars(parent).values() if _is_config(value))
    nearest = next(configs, None)
    return [*above, *([nearest] if nearest is not None else [])]


def _is_config(value: object) -> bool:
    """Anything with fields that a module keeps as its settings."""
    if isinstance(value, type | nn.Module) or not hasattr(value, "__dict__"):
        return False
    return is_dataclass(value) or callable(getattr(value, "to_dict", None))


def _failure(module: nn.Module, forward: Callable[[nn.Module], object]) -> str | None:
    try:
        forward(module)
    except Exception as error:  # whatever it is, this model does not run
        return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
    return None


def _trial(
    module: nn.Module, pruned: nn.Module, maps: Sequence[StackMap], forward: Callable[[nn.Module], object]
) -> str | None:
    """Why ``pruned`` does not run as a model with fewer layers should, None where it does."""
    calls: Counter[str] = Counter()
    hooks = []
    for stack in maps:
        for name, layer in pruned.get_submodule(stack.path).named_children():
            path = f"{stack.path}.{name}"
            calls[path] = 0
            hooks.append(layer.register_forward_pre_hook(lambda *_, path=path: calls.update([path])))
    try:
        failure = _failure(pruned, forward)
    finally:
        for hook in hooks:
            hook.remove()
    if failure is not None:
        # What stops the whole model in the same way (shapes that depend on values) has nothing to do with its depth.
        return None if failure == _failure(module, forward) else f"the model does not run with fewer layers: {failure}"
    if not any(calls.values()):
        return "with fewer layers, none is called"
    # A kind or stack that these inputs never reach (a vision tower without images) is no fault of the copy.
    for stack in maps:
        for kind in dict.fromkeys(stack.kinds):
            if len({calls[f"{stack.path}.{i}"] for i, other in enumerate(stack.kinds) if other == kind}) > 1:
                return f"with fewer layers, those of {stack.path} are not all called equally often"
    return None
