"""Repeated layers: where they are, which are alike, and a model that holds only representatives of them.

A stack is a list of blocks, ``model.layers``. Two layers are of one *kind* if nothing that could change what is found
in them differs: the class of every submodule, names, shapes and dtypes of parameters and buffers, ties, attributes
(``sliding_window``, ``is_causal``), hooks, the layer's entry in every list of the config that has one for each layer,
and the operators that it executes. A layer's own number is no difference by itself.

:func:`represent` keeps the first and the last layer of each kind. Two, because what depends on the position (a first
layer that is read differently, pairs of layers that share keys) shows as a difference between them:
``folding.disagreement`` compares what was found in the two, and the whole model is traced where it differs.
"""

from __future__ import annotations

import contextlib
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from autoquant.analyzer.templates import StackMap
from autoquant.capture.alike import (
    MODULE_FIELDS,
    POINTER,
    Describe,
    describe_block,
    is_config,
    points_elsewhere,
    position_attributes,
    shared_parameters,
)
from autoquant.capture.copies import copied
from autoquant.capture.executed import Between, Executed, Signature, execute, loose
from autoquant.capture.side_by_side import Ranks, keeps_beside, own_sources
from autoquant.models.sizes import GIVEN

# Configs and modules name their number of layers in many ways: num_hidden_layers, n_layer, encoder_layers, depth.
COUNT = re.compile(r"(^|_)(layers|blocks|depth)$|^n_(layer|block)$|^num_\w*(layer|block)")
# A list of layer numbers: mlp_only_layers, attn_layer_indices, hybrid_layer_ids.
NUMBERS = re.compile(r"layer|block|(indices|indexes|ids|idxs?)$")


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

    A list is an ``nn.ModuleList`` of at least one, or an ``nn.Sequential`` (or an ``nn.ModuleDict`` with the numbers
    from 0 on for keys) of at least two modules, each of which has submodules and parameters. Lists inside a layer
    (experts) belong to the layer.
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
    return _numbered([-1, *kinds[1:-1], -2] if len(kinds) > 1 else kinds)


def represent(
    module: nn.Module, stacks: Sequence[LayerStack], forward: Callable[[nn.Module], object] | None = None
) -> tuple[nn.Module, tuple[StackMap, ...]]:
    """A model with representatives for the layers of each stack, and what each of them stands for.

    The model is a copy that shares the parameters of ``module``; layers that are left out are never copied, so that the
    cost does not grow with depth. Layers are renumbered, in the module list and in their own ``layer_idx``. The config
    and the modules above a stack are made to fit where they hold the number of layers, a list with an entry per layer
    or a list of layer numbers. ``module`` and its config are untouched.

    ``forward`` runs a model on some input, ``module`` and then the copy. Layers that run differently are of different
    kinds; where a layer does not do the same in the copy, or the copy raises, the model depends on its depth in a way
    that cannot be seen from outside. Then, and where there is nothing to leave out, the result is ``module`` itself and
    :func:`whole`.
    """
    ran = None if forward is None else _ran(module, stacks, forward)
    beside: dict[str, tuple[Ranks, ...]] = {}
    if isinstance(ran, Executed):
        beside = {stack.path: own_sources(stack.path, stack.kinds, ran)[1] for stack in stacks}
        stacks = refined(stacks, ran)
    kept, clash = _settle(module, stacks, beside)
    maps = tuple(_stack_map(stack, kept[stack.path], stack.whole or clash.get(stack.path)) for stack in stacks)
    if all(len(kept[stack.path]) == stack.length for stack in stacks):
        return module, maps
    pruned = _prune(module, stacks, kept)
    misfit = _trial(pruned, stacks, maps, ran, forward, beside) if forward is not None and ran is not None else None
    return (pruned, maps) if misfit is None else (module, whole(stacks, misfit))


def _trial(
    pruned: nn.Module,
    stacks: Sequence[LayerStack],
    maps: Sequence[StackMap],
    ran: Executed | Exception,
    forward: Callable[[nn.Module], object],
    beside: Mapping[str, Sequence[Ranks]],
) -> str | None:
    """Why ``pruned`` does not run as a model with fewer layers should, None where it does."""
    again = _ran(pruned, [LayerStack(stack.path, stack.kinds) for stack in maps], forward)
    if isinstance(ran, Executed) and isinstance(again, Executed):
        return _misfit(stacks, maps, ran, again) or _moved(maps, again, beside)
    # What stops the whole model in the same way (shapes that depend on values) has nothing to do with its depth.
    same = isinstance(ran, Exception) and isinstance(again, Exception) and _said(ran) == _said(again)
    return None if same else f"the model does not run with fewer layers: {_said(again)}"


def _said(what: Executed | Exception) -> str:
    if isinstance(what, Executed):
        return "with all of them it does not"
    return f"{type(what).__name__}: {next(iter(str(what).splitlines()), '')}"


def _lists(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if _is_stack(child):
            yield path, child
        else:
            yield from _lists(child, f"{path}.")


def _is_stack(module: nn.Module) -> bool:
    least = 1 if isinstance(module, nn.ModuleList) else 2
    if not isinstance(module, nn.ModuleList | nn.ModuleDict | nn.Sequential) or len(module) < least:
        return False
    numbered = list(module._modules) == [str(i) for i in range(len(module))]
    return numbered and all(
        layer is not None  # a place in the list that is left empty
        and next(layer.children(), None) is not None
        and next(layer.parameters(), None) is not None
        for layer in module._modules.values()
    )


# What makes two layers alike


def _stack(module: nn.Module, path: str, layers: nn.Module, outside: Sequence[nn.Module]) -> LayerStack:
    blocks = [layers.get_submodule(str(i)) for i in range(len(layers._modules))]
    configs: list[object] = []
    structures = [describe_block(layer, configs) for layer in blocks]
    position = position_attributes([attributes for _, attributes in structures])
    per_layer = [
        _entries(name, value, len(blocks))
        for holder in _holders(module, path)
        for name, value in {**vars(holder), **_computed(holder)}.items()
    ]
    tied, first_shared = shared_parameters(blocks, outside)
    kinds: dict[object, int] = {}
    numbers = []
    for i, (structure, attributes) in enumerate(structures):
        own = frozenset((key, value) for key, value in attributes.items() if key not in position)
        entries = tuple(entries[i] for entries in per_layer if entries is not None)
        numbers.append(kinds.setdefault((structure, own, entries, i if i in tied else None), len(kinds)))
    reason = (
        (first_shared if len(tied) == len(blocks) else None)
        or points_elsewhere([attributes for _, attributes in structures], position)
        or _boundary(module, path, len(blocks))
        or _one_per_layer(module, outside, len(blocks))
    )
    counted = tuple((where, name, step) for (where, name), step in position.items() if step != 0)
    return LayerStack(path, tuple(numbers), counted, reason)


def _boundary(module: nn.Module, path: str, length: int) -> str | None:
    for holder in _holders(module, path):
        for name, value in vars(holder).items():
            if POINTER.search(name) and type(value) is int and 0 < value < length:
                return f"the model does something of its own at layer {value} ({name})"
    *above, nearest = _holders(module, path)  # the lists of the nearest config are made to fit instead
    around = [value for holder in above for value in vars(holder).values() if is_config(value) and value is not nearest]
    given = [name for config in around for name, value in vars(config).items() if GIVEN.search(name) and value]
    return f"the model gives something of its own to some of the layers ({given[0]})" if given else None


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


def _settle(
    module: nn.Module, stacks: Sequence[LayerStack], beside: Mapping[str, Sequence[Ranks]]
) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Which layers each stack keeps. Stacks of one length that a config describes must keep the same, or keep all; so
    must a stack and those whose layers hand something to its layers of their number.
    """
    kept = {stack.path: _representatives(stack) for stack in stacks}
    handed = {(path, other) for path, layers in beside.items() for taken in layers for other in taken.values()}
    clash: dict[str, str] = {}
    for _ in stacks:  # a stack that has to keep all may take others with it
        for one in stacks:
            for other in stacks:
                around = {id(h) for h in _holders(module, other.path)}
                common = any(id(h) in around and _describes(h, one.length) for h in _holders(module, one.path))
                tied = bool(handed & {(one.path, other.path), (other.path, one.path)})
                if (tied or (common and one.length == other.length)) and kept[one.path] != kept[other.path]:
                    why = "belong together layer by layer" if tied else "are described by one config"
                    for stack in (one, other):
                        kept[stack.path] = tuple(range(stack.length))
                        clash.setdefault(stack.path, f"{one.path} and {other.path} {why} and differ")
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
    pruned = copied(module, memo)
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


def _describes(holder: object, length: int) -> bool:
    """Whether :func:`_fit` would make a holder fit a stack of ``length``."""
    fields = {**vars(holder), **_computed(holder)}.items()
    counts = any(type(value) is int and value == length and COUNT.search(name) for name, value in fields)
    return counts or any(_entries(*field, length) is not None for field in fields)


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
    describe = Describe([], {})
    if isinstance(value, dict):
        found = tuple((i in value, describe(value.get(i))) for i in range(length))
        return found if _layer_numbers(name, list(value), length) else None
    if _layer_numbers(name, value, length):
        return tuple(i in value for i in range(length))
    return tuple(map(describe, value)) if len(value) == length else None


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
    configs = (value for parent in above for value in vars(parent).values() if is_config(value))
    nearest = next(configs, None)
    return [*above, *([nearest] if nearest is not None else [])]


# What layers do when they run


def _ran(
    module: nn.Module, stacks: Sequence[LayerStack], forward: Callable[[nn.Module], object]
) -> Executed | Exception:
    try:
        return execute(module, {stack.path: stack.length for stack in stacks}, forward)
    except Exception as error:  # whatever it is, this model does not run
        return error


def refined(stacks: Sequence[LayerStack], ran: Executed) -> list[LayerStack]:
    """``stacks`` with finer kinds: layers of one kind execute the same, and so does what follows them.

    What runs between two layers, blocks of other stacks included, belongs to the model. A layer that something else
    follows than most of its kind is of a kind of its own; where these are most of a stack, none may stand for others.
    """
    finer = [_by_calls(stack, ran) for stack in stacks]
    kinds = {stack.path: stack.kinds for stack in finer}
    return [_by_what_follows(stack, kinds, ran.between) for stack in finer]


def _by_calls(stack: LayerStack, ran: Executed) -> LayerStack:
    calls, _ = own_sources(stack.path, stack.kinds, ran)
    keys: list[object] = [(kind, call) for kind, call in zip(stack.kinds, calls, strict=True)]
    # The first layer takes from the embeddings what the others take from the layer before.
    start = tuple(map(loose, calls[0]))
    alike = (i for i in range(1, stack.length) if stack.kinds[i] == stack.kinds[0])
    twin = next((i for i in alike if tuple(map(loose, calls[i])) == start), 0)
    keys[0] = keys[twin]
    return replace(stack, kinds=_numbered(keys))


def _by_what_follows(stack: LayerStack, kinds: Mapping[str, Sequence[int]], steps: Sequence[Between]) -> LayerStack:
    ways = _ways(stack.path, kinds, steps)
    usual = {blocks: Counter(ran for other, ran in ways.values() if other == blocks) for blocks, _ in ways.values()}
    alone = {i for i, (blocks, ran) in ways.items() if ran != usual[blocks].most_common(1)[0][0]}
    keys: list[object] = []
    for i, kind in enumerate(stack.kinds):
        # After the last one no other follows: it is like those of its kind.
        twin = i if i in ways else next((j for j in ways if stack.kinds[j] == kind and j not in alone), i)
        keys.append((kind, ways[twin][0] if twin in ways else None, i if i in alone else None))
    many = len(alone) > stack.length // 2
    reason = f"the model does something of its own after layer {min(alone)}" if many else None
    return replace(stack, kinds=_numbered(keys), whole=stack.whole or reason)


def _ways(
    path: str, kinds: Mapping[str, Sequence[int]], steps: Sequence[Between]
) -> dict[int, tuple[tuple[object, ...], tuple[Signature, ...]]]:
    """What ran from each layer of a stack to the next one that is called: blocks of other stacks, and operators."""
    found: dict[int, tuple[tuple[object, ...], tuple[Signature, ...]]] = {}
    start: int | None = None
    blocks: list[object] = []
    ran: list[Signature] = []
    for step in steps:
        if step.before[0] == path:
            start, blocks, ran = step.before[1], [], []
        other, number = step.after
        ran.append(loose(step.signature))
        if other != path:
            blocks.append((other, kinds[other][number]))
        elif start is not None:  # called again, a layer may be followed by something else
            before = found.get(start, ((), ()))
            found[start] = (*before[0], *blocks), (*before[1], *ran)
            start = None
    return found


def _numbered(keys: Sequence[object]) -> tuple[int, ...]:
    first: dict[object, int] = {}
    return tuple(first.setdefault(key, len(first)) for key in keys)


def _kinds_of(step: Between, kinds: Mapping[str, Sequence[int]]) -> object:
    return tuple((path, kinds[path][number]) for path, number in (step.before, step.after))


def _moved(maps: Sequence[StackMap], pruned: Executed, beside: Mapping[str, Sequence[Ranks]]) -> str | None:
    """Which layer of the copy does not take from the layers beside it what it took from them, None where all do."""
    for stack in maps:
        for i, originals in enumerate(stack.originals):
            if stack.path in beside and not keeps_beside(stack.path, i, beside[stack.path][originals[0]], pruned):
                return f"with fewer layers, layer {originals[0]} of {stack.path} takes something from another layer"
    return None


def _misfit(stacks: Sequence[LayerStack], maps: Sequence[StackMap], whole: Executed, pruned: Executed) -> str | None:
    """Why the copy ``pruned`` does not run as ``whole`` does, layer for layer, None where it does."""
    if not any(pruned.calls[stack.path][i] for stack in maps for i in range(len(stack.kinds))):
        return "with fewer layers, none is called"
    for stack in maps:
        for i, originals in enumerate(stack.originals):
            now, before = pruned.calls[stack.path][i], whole.calls[stack.path][originals[0]]
            if len(now) != len(before):
                return f"with fewer layers, those of {stack.path} are not called as often"
            if tuple(map(loose, now)) != tuple(map(loose, before)):
                return f"layer {originals[0]} of {stack.path} does something else at another position"
    kinds, fewer = {stack.path: stack.kinds for stack in stacks}, {stack.path: stack.kinds for stack in maps}
    seen = {_kinds_of(step, kinds): loose(step.signature) for step in whole.between}
    for step in pruned.between:
        same = _kinds_of(step, fewer)
        if seen.get(same, loose(step.signature)) != loose(step.signature):
            return f"with fewer layers, the model does something else between layers of {step.before[0]}"
    return None
