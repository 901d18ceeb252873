"""Config x structure -> what exactly is asked of which parameter, with every path, index and shape checked.

Nothing is read or written here. All problems are collected and raised together, each with its JSON path.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Literal

from autoquant.config.check import Problem
from autoquant.config.format import (
    Config,
    Online,
    Read,
    RotationMethod,
    Slot,
    SmoothingGroup,
    SmoothingKind,
    SmoothingMethod,
    Space,
)
from autoquant.config.layers import LAYER, fill, layer_numbers
from autoquant.config.places import JsonPath
from autoquant.config.spelling import did_you_mean
from autoquant.errors import AutoQuantError
from autoquant.executor.checker import Checker, blocks_of
from autoquant.executor.resolved import (
    Resolved,
    ResolvedGroup,
    ResolvedOnline,
    ResolvedRead,
    ResolvedSpace,
    RotatedSlot,
    SmoothedSlot,
)
from autoquant.models.fit import check_structure, misfit, structure_problems
from autoquant.models.structure import ModelStructure

Smooth = Literal["all", "fc_fc", "none"]
Layers = tuple[int | None, ...]


def problems(config: Config, structure: ModelStructure) -> list[Problem]:
    """Everything that does not fit: each claim by itself, then those that are enabled together. Raises nothing."""
    if found := structure_problems(config, structure):
        return found
    return _resolved(config, structure, True, "all", None, None)[1]


def resolve(
    config: Config,
    inventory: ModelStructure,
    *,
    rotate: bool = True,
    smooth: Smooth = "all",
    only: Collection[str] | None = None,
    seed: int | None = None,
) -> Resolved:
    """Everything that the config and the options select, for every layer.

    ``only`` names groups and spaces (and online rotations by their path) and selects exactly these, whatever is
    enabled. ``seed`` replaces ``rotation.seed``. Raises AutoQuantError with one detail per problem, and where nothing
    is selected.
    """
    if only is not None:
        _check_names(config, only)
    check_structure(config, inventory)
    resolved, found = _resolved(config, inventory, rotate, smooth, only, seed)
    if found:
        raise misfit(found)
    if not (resolved.spaces or resolved.groups or resolved.online):
        raise AutoQuantError("nothing to do: no smoothing group, rotation space or online rotation is selected")
    return resolved


def _resolved(
    config: Config,
    structure: ModelStructure,
    rotate: bool,
    smooth: Smooth,
    only: Collection[str] | None,
    seed: int | None,
) -> tuple[Resolved, list[Problem]]:
    """What is selected of a config whose claims fit one by one, and in what those selected disagree."""
    check = Checker(structure)
    spaces = [
        resolved
        for number, space in enumerate(config.rotation.spaces)
        if _selected(space.name, only, rotate and _space_enabled(config, space))
        for resolved in _resolve_space(config, number, check, seed)
    ]
    folded = {n.weight for space in spaces for n in space.norms() if n.weight}
    groups = [
        resolved
        for number in range(len(config.smoothing.groups))
        for resolved in _resolve_group(config, number, check, smooth, only, folded)
    ]
    online: list[ResolvedOnline] = []
    paths: set[str] = set()
    for number, place in enumerate(config.rotation.online):
        if _selected(place.path, only, rotate and place.enable):
            at = ("rotation", "online", number)
            for one in _resolve_online(config, at, place, check):
                if one.path in paths:
                    check.problem((*at, "path"), f"{one.path} is rotated online twice; disable one")
                paths.add(one.path)
                online.append(one)
    return Resolved(tuple(spaces), tuple(groups), tuple(online)), list(dict.fromkeys(check.problems))


def _selected(name: str, only: Collection[str] | None, enabled: bool) -> bool:
    return enabled if only is None else name in only


def _space_enabled(config: Config, space: Space) -> bool:
    return config.rotation.enable if space.enable is None else space.enable


def _check_names(config: Config, only: Collection[str]) -> None:
    names = [g.name for g in config.smoothing.groups] + [s.name for s in config.rotation.spaces]
    names += [o.path for o in config.rotation.online]
    for name in only:
        if name not in names:
            raise AutoQuantError(f"the config has no group or space '{name}'{did_you_mean(name, names)}")


def _resolve_space(config: Config, number: int, check: Checker, seed: int | None) -> Iterator[ResolvedSpace]:
    """One resolved space, or one per layer where each layer has its own.

    Giving layers one Q or several is a matter of chance only where they really are separate, so several are made for R2
    alone, whose heads belong to one attention; every other space gets one Q wherever its members lie.
    """
    space = config.rotation.spaces[number]
    own_layers = any(w.layers for w in space.writers) or any(r.layers for r in space.reads)
    if space.kind == "R2" and space.layers is not None and not own_layers:
        for layer in layer_numbers(space.layers):
            yield _space_at(config, number, (layer,), layer, check, seed)
    else:
        yield _space_at(config, number, _layers(space.layers), None, check, seed)


def _space_at(
    config: Config, number: int, layers: Layers, layer: int | None, check: Checker, seed: int | None
) -> ResolvedSpace:
    space = config.rotation.spaces[number]
    where = ("rotation", "spaces", number)
    base = seed if seed is not None else config.rotation.seed
    text = f"{base}:{space.name}" if space.seed is None or seed is not None else f"{space.seed}"
    keep_ones = space.centre or any(read.norm is not None and read.norm.kind == "layer" for read in space.reads)
    return ResolvedSpace(
        space.name,
        layer,
        space.kind,
        _method(config, space, where, keep_ones, check),
        tuple(f"{text}:{layer}:{block}" for block in range(space.blocks)),
        space.size,
        space.blocks,
        keep_ones,
        space.centre,
        tuple(_writers(space, where, layers, check)),
        tuple(_reads(space, where, layers, check)),
    )


def _writers(space: Space, where: JsonPath, layers: Layers, check: Checker) -> Iterator[RotatedSlot]:
    for i, writer in enumerate(space.writers):
        at = (*where, "writers", i)
        for layer in _expand([writer.path], writer.layers, layers):
            member = check.slot(at, writer, layer)
            norm = None if writer.fold_norm is None else check.norm((*at, "fold_norm"), writer.fold_norm, layer)
            check.claim(at, member)
            yield RotatedSlot(member.name, member.axis, blocks_of(member, space.size, space.blocks), norm, None)


def _reads(space: Space, where: JsonPath, layers: Layers, check: Checker) -> Iterator[ResolvedRead]:
    for i, read in enumerate(space.reads):
        at = (*where, "reads", i)
        for layer in _expand([reader.path for reader in read.readers], read.layers, layers):
            norm = None if read.norm is None else check.norm((*at, "norm"), read.norm, layer)
            if norm is not None:
                check.claim_norm((*at, "norm"), norm)
            yield ResolvedRead(norm, tuple(_readers(read, at, layer, space, check)))


def _readers(read: Read, where: JsonPath, layer: int | None, space: Space, check: Checker) -> Iterator[RotatedSlot]:
    for j, reader in enumerate(read.readers):
        at = (*where, "readers", j)
        member = check.slot(at, reader, layer)
        bias = None if reader.bias is None else check.name((*at, "bias"), reader.bias, layer)
        check.claim(at, member)
        yield RotatedSlot(member.name, member.axis, blocks_of(member, space.size, space.blocks), None, bias)


def _method(config: Config, space: Space, where: JsonPath, keep_ones: bool, check: Checker) -> RotationMethod:
    """How a space's rotation is made. ``rotation.method`` learned is for the residual stream, the rest is Hadamard."""
    method = space.method or config.rotation.method
    if method is not RotationMethod.LEARNED:
        return method
    at = (*where, "method")
    if space.kind != "R1":
        if space.method is RotationMethod.LEARNED:
            check.problem(at, f"only R1 can be learned, this is {space.kind}; choose hadamard or orthogonal")
        return RotationMethod.HADAMARD
    if keep_ones:
        check.problem(at, "a space that a LayerNorm reads cannot be learned; choose hadamard or orthogonal")
    return method


def _resolve_group(
    config: Config,
    number: int,
    check: Checker,
    smooth: Smooth,
    only: Collection[str] | None,
    folded: set[str],
) -> Iterator[ResolvedGroup]:
    smoothing, group = config.smoothing, config.smoothing.groups[number]
    where = ("smoothing", "groups", number)
    default = smoothing.enable if group.kind is not SmoothingKind.QUERY_KEY else False
    wanted = {"all": True, "fc_fc": group.kind is SmoothingKind.LINEAR_LINEAR, "none": False}[smooth]
    for layer in _layers(group.layers):
        enable, alpha, method = _knobs(group, layer)
        # A norm whose gain went into its readers before a rotation is not smoothed as well, unless it is asked for by
        # name.
        skip = enable is None and any(fill(s.path, layer or 0) in folded for s in group.sources)
        chosen = wanted and not skip and (default if enable is None else enable)
        if not _selected(group.name, only, chosen):
            continue
        sides, named = [], []
        for key, slots in (("sources", group.sources), ("targets", group.targets)):
            members = [((*where, key, i), s, check.slot((*where, key, i), s, layer)) for i, s in enumerate(slots)]
            sides.append(tuple(SmoothedSlot(m.name, m.axis, s.power, s.offset) for _, s, m in members))
            named += [(at, m) for at, _, m in members]
        check.once(named)
        yield ResolvedGroup(
            group.name,
            layer,
            group.kind,
            smoothing.alpha if alpha is None else alpha,
            group.channels,
            sides[0],
            sides[1],
            method or smoothing.method,
        )


def _knobs(group: SmoothingGroup, layer: int | None) -> tuple[bool | None, float | None, SmoothingMethod | None]:
    """enable, alpha and method of a group at one layer, overrides over its own."""
    enable, alpha, method = group.enable, group.alpha, group.method
    for override in group.overrides:
        if layer is not None and layer in layer_numbers(override.layers):
            enable = enable if override.enable is None else override.enable
            alpha = alpha if override.alpha is None else override.alpha
            method = method if override.method is None else override.method
    return enable, alpha, method


def _resolve_online(config: Config, at: JsonPath, online: Online, check: Checker) -> Iterator[ResolvedOnline]:
    # Layers of one path may have other widths: one linear is listed for each.
    named = [linear for linear in config.model.linears if linear.path == online.path]
    widths = [(frozenset(_layers(linear.layers)), linear) for linear in named]
    for layer in _layers(online.layers):
        path = online.path if layer is None else fill(online.path, layer)
        if online.kind == "R3":
            if not any(name.startswith(path + ".") for name in check.structure.shapes):
                check.problem((*at, "path"), f"no module '{path}'")
            yield ResolvedOnline(online.kind, path, online.size, None)
            continue
        linear = next((one for layers, one in widths if layer in layers), named[0] if named else None)
        if linear is None:
            near = did_you_mean(online.path, [linear.path for linear in config.model.linears])
            check.problem((*at, "path"), f"'{online.path}' is not in model.linears{near}")
            continue
        if linear.stack is not None or linear.weight == linear.path:
            check.problem(at, "an online rotation cannot be put inside fused experts; disable it")
            continue
        if linear.in_features != online.size:
            check.problem((*at, "size"), f"the linear '{online.path}' has {linear.in_features} columns (in_features)")
            continue
        member = check.slot(at, Slot(path=linear.weight, dim=linear.in_dim, size=linear.in_features), layer)
        columns = RotatedSlot(member.name, member.axis, blocks_of(member, online.size, 1), None, None)
        yield ResolvedOnline(online.kind, path, online.size, columns)


def _layers(text: str | None) -> Layers:
    return (None,) if text is None else layer_numbers(text)


def _expand(paths: Collection[str], own: str | None, outer: Layers) -> Layers:
    """The layers of one member: its own, else the space's; one time where no path has a layer index."""
    if LAYER not in next(iter(paths)):
        return (None,)
    return _layers(own) if own is not None else outer
