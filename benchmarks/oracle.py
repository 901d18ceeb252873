"""What a claim of a config does to a model, carried out in float64 by code that shares nothing with the project.

A judge for :mod:`mutations`: configs are plain JSON here, and only torch is imported.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

Json = dict[str, Any]


class InFloat64(TorchFunctionMode):
    """Casts to float32 that a model makes of its own accord are to float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.float:
            func = Tensor.double
        swap = {torch.float32: torch.float64}
        named = {
            key: swap.get(item, item) if isinstance(item, torch.dtype) else item for key, item in (kwargs or {}).items()
        }
        return func(*(swap.get(a, a) if isinstance(a, torch.dtype) else a for a in args), **named)


def randomise_(model: nn.Module, seed: int) -> None:
    """Gains around 1, biases around 0, matrices of unit gain; what is small by construction is left (``_log``)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype)
            if "log" in name.lower() or name.endswith((".D", "dt_bias")):
                continue
            if parameter.dim() > 1:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
            elif name.endswith("bias"):
                parameter.copy_(0.2 * noise)
            else:
                parameter.add_(0.3 * noise)


def layer_numbers(text: str) -> list[int]:
    found: list[int] = []
    for term in text.split(","):
        span, _, step = term.partition(":")
        first, _, last = span.partition("-")
        found += range(int(first), int(last or first) + 1, int(step or 1))
    return sorted(set(found))


def fill(path: str, layer: int | None) -> str:
    return path if layer is None else path.replace("{layer}", str(layer))


def channels(slot: Json, total: int) -> Tensor:
    """The channel of each position, -1 where there is none."""
    if slot.get("index") is None:
        if slot["size"] != total:
            raise ValueError("another number of positions than channels")
        return torch.arange(total)
    found = torch.full((slot["size"],), -1)
    for block in slot["index"]:
        position, channel = torch.tensor([block.get("start", 0)]), torch.tensor([block.get("channel_start", 0)])
        for extent, step, other in zip(block["shape"], block["stride"], block["channel_stride"], strict=True):
            position = (position[:, None] + step * torch.arange(extent)).reshape(-1)
            channel = (channel[:, None] + other * torch.arange(extent)).reshape(-1)
        if position.min() < 0 or channel.min() < 0 or channel.max() >= total:
            raise ValueError("out of range")
        found[position] = channel
    return found


def axis(parameter: Tensor, slot: Json) -> Tensor:
    """A view of the parameter, its slot's positions along dimensions 0 and 1: (matrices, rows, ...)."""
    dim, stack = slot.get("dim", 0), slot.get("stack")
    if stack is not None and dim > 0:
        view = parameter.view(stack, parameter.shape[0] // stack, *parameter.shape[1:]).movedim(dim + 1, 1)
    else:
        view = parameter.movedim(dim, 0)[None]
    if view.shape[0] * view.shape[1] != slot["size"]:
        raise ValueError("another size")
    return view


class Cells:
    """The parameters of a model by name; names of one tied parameter that a claim uses apart are untied."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def untie_(self, names: Sequence[str]) -> None:
        """Each parameter named gets a storage of its own where it is tied to others."""
        held: dict[int, int] = {}
        for _, parameter in self.model.named_parameters(remove_duplicate=False):
            held[id(parameter)] = held.get(id(parameter), 0) + 1
        for name in dict.fromkeys(names):
            if held.get(id(self[name]), 0) > 1:
                owner, _, last = name.rpartition(".")
                module = self.model.get_submodule(owner)
                module._parameters[last] = nn.Parameter(self[name].detach().clone())

    def __getitem__(self, name: str) -> nn.Parameter:
        return self.model.get_parameter(name)


def scale_(cells: Cells, slot: Json, layer: int | None, scales: Tensor, sign: int) -> None:
    parameter = cells[fill(slot["path"], layer)].data
    channel = channels(slot, len(scales))
    factor = torch.where(channel >= 0, scales[channel.clamp(min=0)] ** (sign * slot.get("power", 1)), 1.0)
    view = axis(parameter, slot)
    factor = factor.view(view.shape[0], view.shape[1], *[1] * (view.dim() - 2))
    offset = slot.get("offset", 0)
    view.copy_((view + offset) * factor - offset)


def turn_(cells: Cells, slot: Json, layer: int | None, turns: Tensor) -> None:
    """Rotate the channels of a slot: each run of positions that holds every channel of a block once."""
    blocks, size = turns.shape[0], turns.shape[1]
    view = axis(cells[fill(slot["path"], layer)].data, slot)
    flat = view.reshape(view.shape[0] * view.shape[1], -1).clone()
    channel = channels(slot, blocks * size)
    for block in range(blocks):
        rows = [torch.nonzero(channel == block * size + i).flatten() for i in range(size)]
        counts = {len(row) for row in rows}
        if len(counts) > 1:
            raise ValueError("a part of a block")
        for places in zip(*(row.tolist() for row in rows), strict=True):
            flat[list(places)] = turns[block].T @ flat[list(places)]
    view.copy_(flat.view(view.shape))


def random_turns(blocks: int, size: int, generator: torch.Generator, level: bool = False) -> Tensor:
    """Rotations of blocks; ``level``: of one block, that leave a vector's mean be, so that a LayerNorm stays one."""
    if not level:
        return torch.linalg.qr(torch.randn(blocks, size, size, generator=generator, dtype=torch.float64))[0]
    basis = torch.randn(size, size, generator=generator, dtype=torch.float64)
    basis[:, 0] = 1
    basis = torch.linalg.qr(basis)[0]
    inner = torch.eye(size, dtype=torch.float64)
    inner[1:, 1:] = random_turns(1, size - 1, generator)[0]
    return (basis @ inner @ basis.T)[None]


def group_(cells: Cells, group: Json, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for layer in [None] if group.get("layers") is None else layer_numbers(group["layers"]):
        scales = torch.exp(0.5 * torch.randn(group["channels"], generator=generator, dtype=torch.float64))
        cells.untie_([fill(slot["path"], layer) for slot in (*group["sources"], *group["targets"])])
        for slot in group["sources"]:
            scale_(cells, slot, layer, scales, 1)
        for slot in group["targets"]:
            scale_(cells, slot, layer, scales, -1)


def members(space: Json) -> Iterator[tuple[Json, list[int | None]]]:
    for member in (*space["writers"], *space["reads"]):
        text = member.get("layers") or space.get("layers")
        held = member.get("path", "") + str(member.get("readers", "")) + str(member.get("norm", ""))
        yield member, [None] if text is None or "{layer}" not in held else list(layer_numbers(text))


def space_(cells: Cells, space: Json, seed: int, level: bool = False) -> None:
    """``level``: rotations that leave the mean be, where the norms are LayerNorms of the model's own."""
    generator = torch.Generator().manual_seed(seed)
    own = space["kind"] == "R2" or space["kind"] == "other"
    own = own and all("{layer}" in str(m) and not m.get("layers") for m in (*space["writers"], *space["reads"]))
    level = level and bool(space.get("centre"))
    shared = random_turns(space.get("blocks", 1), space["size"], generator, level)
    by_layer: dict[int | None, Tensor] = {}

    def turns(layer: int | None) -> Tensor:
        if not own:
            return shared
        if layer not in by_layer:
            by_layer[layer] = random_turns(space.get("blocks", 1), space["size"], generator)
        return by_layer[layer]

    names = [fill(m["path"], n) for m, ns in members(space) if "path" in m for n in ns]
    names += [fill(r["path"], n) for m, ns in members(space) for r in m.get("readers", ()) for n in ns]
    cells.untie_(names)
    for member, layers in members(space):
        for layer in layers:
            if "readers" in member:
                read_(cells, member, layer, space | ({"centre": False} if level else {}))
                for reader in member["readers"]:
                    turn_(cells, reader, layer, turns(layer))
            else:
                write_(cells, member, layer, space)
                turn_(cells, member, layer, turns(layer))


def write_(cells: Cells, writer: Json, layer: int | None, space: Json) -> None:
    if writer.get("fold_norm"):
        raise NotImplementedError("a norm folded into a table")
    if space.get("centre"):
        view = axis(cells[fill(writer["path"], layer)].data, writer)
        view.copy_(view - view.mean((0, 1), keepdim=True))


def read_(cells: Cells, read: Json, layer: int | None, space: Json) -> None:
    """Fold the norm into its readers; a LayerNorm of a centred space is an RMSNorm from then on."""
    norm = read.get("norm")
    if norm is None:
        return
    total = space["size"] * space.get("blocks", 1)
    gain = cells[fill(norm["weight"], layer)] if norm.get("weight") else None
    shift = cells[fill(norm["bias"], layer)] if norm.get("bias") else None
    offset = norm.get("offset", 0)
    for reader in read["readers"]:
        weight, channel = cells[fill(reader["path"], layer)].data, channels(reader, total)
        view = axis(weight, reader)
        if shift is not None:
            moved = torch.where(channel >= 0, shift.data[channel.clamp(min=0) % len(shift)], 0.0)
            added = (view * moved.view(view.shape[0], view.shape[1], *[1] * (view.dim() - 2))).sum((0, 1))
            if reader.get("bias"):
                cells[fill(reader["bias"], layer)].data += added.reshape(-1)
            else:  # a bias is made where there is none, as the claim says
                owner: Any = cells.model.get_submodule(fill(reader["path"], layer).rpartition(".")[0])
                owner.bias = nn.Parameter(added.reshape(-1).clone())
        if gain is not None:
            factor = torch.where(channel >= 0, (gain.data + offset)[channel.clamp(min=0) % len(gain)], 1.0)
            view *= factor.view(view.shape[0], view.shape[1], *[1] * (view.dim() - 2))
        if norm["kind"] == "rms" and space.get("centre"):  # a LayerScale: its linear writes what is centred
            view.copy_(view - view.mean((0, 1), keepdim=True))
    if gain is not None:
        gain.data.fill_(1 - offset)
    if shift is not None:
        shift.data.zero_()
    if norm["kind"] == "layer" and space.get("centre") and norm.get("weight"):
        without_mean_(cells.model.get_submodule(fill(norm["weight"], layer).rpartition(".")[0]))


def without_mean_(norm: Any) -> None:
    def forward(x: Tensor) -> Tensor:
        scaled = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps)
        return scaled * norm.weight + (0 if norm.bias is None else norm.bias)

    norm.forward = forward


def turned_online(
    model: nn.Module, path: str, weight: str, in_dim: int, size: int, run: Callable[[nn.Module], Tensor]
) -> Tensor:
    """The output where the input of a linear is rotated and its weight too, along ``in_dim``, in blocks of ``size``."""
    turn = random_turns(1, size, torch.Generator().manual_seed(0))[0]
    module, parameter = model.get_submodule(path), model.get_parameter(weight).data
    rows = parameter.movedim(in_dim, -1)
    rows.copy_((rows.reshape(*rows.shape[:-1], -1, size) @ turn).reshape(rows.shape))

    def before(_: nn.Module, args: Any) -> Any:
        x = args[0]
        return ((x.reshape(*x.shape[:-1], -1, size) @ turn).reshape(x.shape), *args[1:])

    handle = module.register_forward_pre_hook(before)
    try:
        return run(model)
    finally:
        handle.remove()


def linear_error(model: nn.Module, linear: Json, layer: int | None, run: Callable[[nn.Module], Tensor]) -> float | None:
    """How far a linear's output is from what is said of it; None where its module is no such thing, or does not run."""
    path = fill(linear["path"], layer)
    module = model.get_submodule(path)
    weight = model.get_parameter(fill(linear["weight"], layer))
    bias = None if not linear.get("bias") else model.get_parameter(fill(linear["bias"], layer))
    seen: list[float] = []

    def after(_: nn.Module, args: Any, output: Any) -> None:
        x, dim = args[0], linear["in_dim"]
        if weight.shape[dim] != linear["in_features"] or x.shape[-1] != linear["in_features"]:
            seen.append(float("inf"))
            return
        said = torch.tensordot(x, weight, dims=([-1], [dim]))
        said = said if bias is None else said + bias
        seen.append(float("inf") if said.shape != output.shape else float((said - output).norm() / output.norm()))

    handle = module.register_forward_hook(after)
    try:
        run(model)
    finally:
        handle.remove()
    return max(seen) if seen else None


def distance(
    run: Callable[[nn.Module], Tensor], model: nn.Module, before: Tensor, change: Callable[[nn.Module], None]
) -> float:
    """The relative change of the output when a copy of the model is changed; infinite where that cannot be done."""
    copied = copy.deepcopy(model)
    try:
        with torch.no_grad(), InFloat64():
            change(copied)
            after = run(copied)
    except NotImplementedError:
        raise
    except Exception:  # what a wrong claim does to a model is the model's own affair
        return float("inf")
    if after.shape != before.shape or not bool(after.isfinite().all()):
        return float("inf")
    return float((after - before).norm() / before.norm())
