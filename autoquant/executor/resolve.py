"""Config x inventory -> what exactly is asked of which parameter, with every path, index and shape checked.

Nothing is read or written here. All problems are collected and raised together, each with the nearest valid name.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Literal

from autoquant.config.format import Config, Online, Read, RotationMethod, Slot, SmoothingGroup, SmoothingKind, Space
from autoquant.config.layers import LAYER, did_you_mean, fill, layer_numbers
from autoquant.errors import AutoQuantError
from autoquant.executor.checker import Checker
from autoquant.executor.resolved import (
    Resolved,
    ResolvedGroup,
    ResolvedOnline,
    ResolvedRead,
    ResolvedSpace,
    RotatedSlot,
    SmoothedSlot,
)
from autoquant.models.inventory import Inventory

Smooth = Literal["all", "fc_fc", "none"]
Layers = tuple[int | None, ...]


def resolve(
    config: Config,
    inventory: Inventory,
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
    check = Checker(inventory)
    if only is not None:
        _check_names(config, only, check)
    if config.model.parameters != inventory.parameters():
        check.problem(
            f"the config is for a model of {config.model.parameters} parameters, this one has {inventory.parameters()}"
        )
    spaces = [s for s in config.rotation.spaces if _selected(s.name, only, rotate and _space_enabled(config, s))]
    resolved_spaces = [r for s in spaces for r in _resolve_space(config, s, check, seed)]
    folded = {n.weight for space in resolved_spaces for n in space.norms() if n.weight}
    groups = [r for g in config.smoothing.groups for r in _resolve_group(config, g, check, smooth, only, folded)]
    online = [
        r
        for o in config.rotation.online
        if _selected(o.path, only, rotate and o.enable)
        for r in _resolve_online(config, o, check)
    ]
    check.begin("")
    for path in {o.path for o in online if sum(o.path == other.path for other in online) > 1}:
        check.problem(f"{path}: is rotated online twice; disable one")
    check.finish()
    if not (resolved_spaces or groups or online):
        raise AutoQuantError("nothing to do: no smoothing group, rotation space or online rotation is selected")
    return Resolved(tuple(resolved_spaces), tuple(groups), tuple(online))


def _selected(name: str, only: Collection[str] | None, enabled: bool) -> bool:
    return enabled if only is None else name in only


def _space_enabled(config: Config, space: Space) -> bool:
    return config.rotation.enable if space.enable is None else space.enable


def _check_names(config: Config, only: Collection[str], check: Checker) -> None:
    names = [g.name for g in config.smoothing.groups] + [s.name for s in config.rotation.spaces]
    names += [o.path for o in config.rotation.online]
    for name in only:
        if name not in names:
            check.problem(f"the config has no group or space '{name}'{did_you_mean(name, names)}")


def _resolve_space(config: Config, space: Space, check: Checker, seed: int | None) -> Iterator[ResolvedSpace]:
    """One resolved space, or one per layer where each layer has its own.

    Giving layers one Q or several is a matter of chance only where they really are separate, so several are made for R2
    alone, whose heads belong to one attention; every other space gets one Q wherever its members lie.
    """
    own_layers = any(w.layers for w in space.writers) or any(r.layers for r in space.reads)
    if space.kind == "R2" and space.layers is not None and not own_layers:
        for layer in layer_numbers(space.layers):
            yield _space_at(config, space, (layer,), layer, check, seed)
    else:
        yield _space_at(config, space, _layers(space.layers), None, check, seed)


def _space_at(
    config: Config, space: Space, layers: Layers, layer: int | None, check: Checker, seed: int | None
) -> ResolvedSpace:
    base = seed if seed is not None else config.rotation.seed
    text = f"{base}:{space.name}" if space.seed is None or seed is not None else f"{space.seed}"
    where = space.name if layer is None else f"{space.name} (layer {layer})"
    check.begin(where)
    channels = space.size * space.blocks
    writers = []
    for writer in space.writers:
        for at in _expand(writer.path, writer.layers, layers, check):
            if (member := check.slot(writer, at, channels)) is None:
                continue
            norm = None if writer.fold_norm is None else check.norm(writer.fold_norm, at, (channels,))
            blocks = check.blocks(member, space.size, space.blocks)
            writers.append(RotatedSlot(member.name, member.axis, blocks, norm, None))
            check.claim(member)
    reads = []
    for read in space.reads:
        paths = [r.path for r in read.readers]
        for at in _expand(paths[0], read.layers, layers, check):
            norm = None if read.norm is None else check.norm(read.norm, at, (channels, space.size))
            if norm is not None:
                check.claim_norm(norm)
            if space.centre and (read.norm is None or read.norm.kind != "layer"):
                check.problem(
                    f"centre: {fill(paths[0], at or 0)} reads the space without a LayerNorm, centring would change it"
                )
            reads.append(ResolvedRead(norm, tuple(_readers(read, at, space, channels, check))))
    keep_ones = space.centre or any(read.norm is not None and read.norm.kind == "layer" for read in space.reads)
    method = _method(config, space, keep_ones, check)
    seeds = tuple(f"{text}:{layer}:{block}" for block in range(space.blocks))
    return ResolvedSpace(
        space.name,
        layer,
        space.kind,
        method,
        seeds,
        space.size,
        space.blocks,
        keep_ones,
        space.centre,
        tuple(writers),
        tuple(reads),
    )


def _method(config: Config, space: Space, keep_ones: bool, check: Checker) -> RotationMethod:
    """How a space's rotation is made. ``rotation.method`` learned is for the residual stream, the rest is Hadamard."""
    method = space.method or config.rotation.method
    if method is not RotationMethod.LEARNED:
        return method
    if space.kind != "R1":
        if space.method is RotationMethod.LEARNED:
            check.problem(f"method: only R1 can be learned, this is {space.kind}; choose hadamard or orthogonal")
        return RotationMethod.HADAMARD
    if keep_ones:
        check.problem("method: a space that a LayerNorm reads cannot be learned; choose hadamard or orthogonal")
    return method


def _readers(read: Read, at: int | None, space: Space, channels: int, check: Checker) -> Iterator[RotatedSlot]:
    for reader in read.readers:
        if (member := check.slot(reader, at, channels)) is None:
            continue
        bias = None
        if reader.bias is not None and (bias := check.name(reader.bias, at)) is not None:
            weight = list(check.inventory.shapes[member.name])
            del weight[reader.dim]
            if check.inventory.shapes[bias] != tuple(weight):
                check.problem(f"{bias}: shape {check.inventory.shapes[bias]} does not fit the linear's {tuple(weight)}")
        check.claim(member)
        yield RotatedSlot(member.name, member.axis, check.blocks(member, space.size, space.blocks), None, bias)


def _resolve_group(
    config: Config,
    group: SmoothingGroup,
    check: Checker,
    smooth: Smooth,
    only: Collection[str] | None,
    folded: set[str],
) -> Iterator[ResolvedGroup]:
    smoothing = config.smoothing
    default = smoothing.enable if group.kind is not SmoothingKind.QUERY_KEY else False
    wanted = {"all": True, "fc_fc": group.kind is SmoothingKind.LINEAR_LINEAR, "none": False}[smooth]
    for layer in _layers(group.layers):
        enable, alpha, method = group.enable, group.alpha, group.method
        for override in group.overrides:
            if layer is not None and layer in layer_numbers(override.layers):
                enable = enable if override.enable is None else override.enable
                alpha = alpha if override.alpha is None else override.alpha
                method = method if override.method is None else override.method
        # A norm whose gain went into its readers before a rotation is not smoothed as well, unless it is asked for by
        # name.
        skip = enable is None and any(fill(s.path, layer or 0) in folded for s in group.sources)
        chosen = wanted and not skip and (default if enable is None else enable)
        if not _selected(group.name, only, chosen):
            continue
        check.begin(group.name if layer is None else f"{group.name} (layer {layer})")
        sides, named = [], []
        for slots in (group.sources, group.targets):
            members = [(s, check.slot(s, layer, group.channels)) for s in slots]
            sides.append(tuple(SmoothedSlot(m.name, m.axis, s.power, s.offset) for s, m in members if m is not None))
            named += [m for _, m in members if m is not None]
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


def _resolve_online(config: Config, online: Online, check: Checker) -> Iterator[ResolvedOnline]:
    linears = {linear.path: linear for linear in config.model.linears}
    for layer in _layers(online.layers):
        path = online.path if layer is None else fill(online.path, layer)
        check.begin(f"{online.kind} {path}")
        if online.kind == "R3":
            if not any(name.startswith(path + ".") for name in check.inventory.shapes):
                check.problem(f"no module '{path}'")
            yield ResolvedOnline(online.kind, path, online.size, None)
            continue
        linear = linears.get(online.path)
        if linear is None:
            check.problem(f"'{online.path}' is not in model.linears{did_you_mean(online.path, list(linears))}")
            continue
        if linear.stack is not None or linear.weight == linear.path:
            check.problem("an online rotation cannot be put inside fused experts; disable it")
            continue
        slot = Slot(path=linear.weight, dim=linear.in_dim, size=linear.in_features)
        member = check.slot(slot, layer, online.size)
        if member is not None:
            blocks = check.blocks(member, online.size, 1)
            yield ResolvedOnline(
                online.kind, path, online.size, RotatedSlot(member.name, member.axis, blocks, None, None)
            )


def _layers(text: str | None) -> Layers:
    return (None,) if text is None else layer_numbers(text)


def _expand(path: str, own: str | None, outer: Layers, check: Checker) -> Layers:
    """The layers of one member: its own, else the space's; one time where its path has no layer index."""
    if LAYER not in path:
        return (None,)
    layers = _layers(own) if own is not None else outer
    if layers == (None,):
        check.problem(f"{path}: no layers are given for '{LAYER}'")
        return ()
    return layers
