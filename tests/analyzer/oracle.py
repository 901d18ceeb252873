"""An independent judge of the analyzer: does what findings claim to a real module, and measures what changes.

Written from the description of the file format alone. It shares no code with the executor, so that a mistake would have
to be made twice to stay unseen.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from autoquant.analyzer.analysis import analyse
from autoquant.analyzer.findings import Findings
from autoquant.capture.routes import capture
from autoquant.config.format import Norm, Online, Read, Slot, SmoothingGroup, Space

Run = Callable[[nn.Module], Any]


@dataclass(frozen=True, slots=True)
class Outcome:
    """Relative change of the outputs after one claim, or after all of them."""

    name: str
    change: float


def outcomes(module: nn.Module, run: Run, findings: Findings, seed: int = 0) -> list[Outcome]:
    """Every group alone, all groups together, every space alone, and everything together."""
    none = replace(findings, groups=(), spaces=(), online=())
    trials = [(f"group {g.name}", replace(none, groups=(g,))) for g in findings.groups]
    trials += [(f"space {s.name}", replace(none, spaces=(s,))) for s in findings.spaces]
    if len(findings.groups) > 1:
        trials.append(("all groups", replace(none, groups=findings.groups)))
    if findings.spaces and len(trials) > 1:
        trials.append(("all groups and spaces", findings))
    with torch.no_grad():
        expected = outputs_of(run(module))
        return [Outcome(n, change_of(outputs_of(run(apply_claims(module, f, seed))), expected)) for n, f in trials]


def apply_claims(module: nn.Module, findings: Findings, seed: int) -> nn.Module:
    """A copy of ``module`` with random scales in every group and a random rotation in every space.

    Groups first: a norm that is folded into an embedding table is gone afterwards.
    """
    changed = copy.deepcopy(module)
    _untie_(changed)
    carry_out_(changed, replace(findings, online=()), seed)
    return changed


def carry_out_(module: nn.Module, findings: Findings, seed: int) -> None:
    """:func:`apply_claims` in place, with whatever is tied left so."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for group in findings.groups:
            _scale_(module, group, generator)
        original = {name: p.detach().clone() for name, p in _parameters(module)}
        for space in findings.spaces:
            _rotate_(module, space, original, generator)
        for online in findings.online:
            _rotate_online_(module, online, generator)


def expand(slot: Slot) -> tuple[list[int], list[int]]:
    """Positions on the slot's axis and the channel of each."""
    if slot.index is None:
        return list(range(slot.size)), list(range(slot.size))
    positions: list[int] = []
    channels: list[int] = []
    for block in slot.index:
        where = [(block.start, block.channel_start)]
        for extent, stride, channel_stride in zip(block.shape, block.stride, block.channel_stride, strict=True):
            where = [(p + i * stride, c + i * channel_stride) for p, c in where for i in range(extent)]
        positions += [p for p, _ in where]
        channels += [c for _, c in where]
    assert len(set(positions)) == len(positions), f"{slot.path}: a position has two channels"
    assert min(positions) >= 0 and max(positions) < slot.size, f"{slot.path}: a position is off the axis"
    return positions, channels


# --- scales ---------------------------------------------------------------------------------------------------------


def _scale_(module: nn.Module, group: SmoothingGroup, generator: torch.Generator) -> None:
    s = torch.exp(torch.rand(group.channels, generator=generator, dtype=torch.float64) * 2 - 1)
    for slots, sign in ((group.sources, 1), (group.targets, -1)):
        for slot in slots:
            weight = _get(module, slot.path)
            positions, channels = expand(slot)
            assert set(channels) <= set(range(group.channels)), f"{group.name}: {slot.path}: no such channel"
            factor = torch.ones(slot.size, dtype=weight.dtype)
            factor[positions] = (s[channels] ** (sign * slot.power)).to(weight.dtype)
            axis = _axis_first(weight, slot)
            axis.copy_((axis + slot.offset) * factor.view(-1, *(1,) * (axis.ndim - 1)) - slot.offset)
            _set(module, slot.path, _axis_back(axis, weight, slot))


# --- rotations ------------------------------------------------------------------------------------------------------


def _rotate_(module: nn.Module, space: Space, original: dict[str, Tensor], generator: torch.Generator) -> None:
    rotations = [_orthogonal(space.size, space.centre, generator) for _ in range(space.blocks)]
    for writer in space.writers:
        if writer.fold_norm is not None:
            _fold_into_table_(module, writer.path, writer.fold_norm)
        if space.centre:
            _per_block_(module, writer, space, lambda x, _: x - x.mean(0, keepdim=True))
        _per_block_(module, writer, space, lambda x, block: rotations[block].T @ x)
    for read in space.reads:
        _fold_(module, read, space, rotations, original)
        for reader in read.readers:
            _per_block_(module, reader, space, lambda x, block: rotations[block].T @ x)


def _fold_(
    module: nn.Module, read: Read, space: Space, rotations: Sequence[Tensor], original: dict[str, Tensor]
) -> None:
    """The norm's gain into its readers, and its bias into theirs where all have one.

    Where they have none the norm keeps a bias: ``W (g x + b) = (W g) (x + b / g)``, and ``b / g`` is rotated like x.
    """
    norm = read.norm
    if norm is None:
        return
    channels = space.size * space.blocks
    gain = torch.ones(channels, dtype=torch.float64)
    if norm.weight is not None:
        gain = _over_blocks(original[norm.weight] + norm.offset, channels)
    bias = None if norm.bias is None else _over_blocks(original[norm.bias], channels)
    into_biases = bias is not None and all(r.bias is not None and r.stack is None for r in read.readers)
    for reader in read.readers:
        weight = _get(module, reader.path)
        columns = _axis_first(weight, reader)
        positions, c = expand(reader)
        shape = (-1, *(1,) * (columns.ndim - 1))
        if into_biases:
            assert bias is not None and reader.bias is not None
            _set(module, reader.bias, _get(module, reader.bias) + (columns[positions] * bias[c].view(shape)).sum(0))
        columns[positions] = columns[positions] * gain[c].view(shape).to(columns.dtype)
        _set(module, reader.path, _axis_back(columns, weight, reader))
    if norm.weight is not None:
        _set(module, norm.weight, torch.full_like(original[norm.weight], 1 - norm.offset))
    if norm.bias is not None and bias is not None:
        kept = torch.zeros_like(bias) if into_biases else bias / gain
        blocks = kept.view(space.blocks, space.size).unbind()
        rotated = torch.cat([q.T @ b for q, b in zip(rotations, blocks, strict=True)])
        _set(module, norm.bias, rotated[: original[norm.bias].numel()].view(original[norm.bias].shape))


def _fold_into_table_(module: nn.Module, path: str, norm: Norm) -> None:
    table = _get(module, path)
    if norm.kind == "layer":
        table = table - table.mean(-1, keepdim=True)
    assert norm.eps is not None, f"{path}: a norm is folded into it, its epsilon is not given"
    table = table * torch.rsqrt(table.square().mean(-1, keepdim=True) + norm.eps)
    name = norm.weight or norm.bias
    assert name is not None, "the oracle finds a norm by its parameters"
    if norm.weight is not None:
        table = table * (_get(module, norm.weight) + norm.offset)
    if norm.bias is not None:
        table = table + _get(module, norm.bias)
    _set(module, path, table)
    owner = name.rpartition(".")[0]
    parent, _, leaf = owner.rpartition(".")
    setattr(module.get_submodule(parent), leaf, nn.Identity())


def _per_block_(module: nn.Module, slot: Slot, space: Space, change: Callable[[Tensor, int], Tensor]) -> None:
    """Apply ``change`` to the rows ``[size, rest]`` of every block; the n-th rows of all channels belong together."""
    weight = _get(module, slot.path)
    axis = _axis_first(weight, slot)
    flat = axis.reshape(slot.size, -1)
    seen: dict[int, list[int]] = {}
    for position, channel in zip(*expand(slot), strict=True):
        seen.setdefault(channel, []).append(position)
    for block in range(space.blocks):
        rows = [seen.get(block * space.size + i, []) for i in range(space.size)]
        assert len({len(r) for r in rows}) == 1, f"{space.name}: {slot.path}: part of a block"
        for copy_ in zip(*rows, strict=True):
            flat[list(copy_)] = change(flat[list(copy_)], block)
    _set(module, slot.path, _axis_back(flat.reshape(axis.shape), weight, slot))


def _orthogonal(size: int, keep_ones: bool, generator: torch.Generator) -> Tensor:
    """A random orthogonal matrix; with ``keep_ones`` one that leaves the mean alone, so that a LayerNorm may stay."""
    q, _ = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    if not keep_ones:
        return q
    ones = torch.full((size, 1), size**-0.5, dtype=torch.float64)
    basis, _ = torch.linalg.qr(torch.cat([ones, torch.eye(size, size - 1, dtype=torch.float64)], 1))
    inner, _ = torch.linalg.qr(torch.randn(size - 1, size - 1, generator=generator, dtype=torch.float64))
    return basis @ torch.block_diag(torch.ones(1, 1, dtype=torch.float64), inner) @ basis.T


def _over_blocks(values: Tensor, channels: int) -> Tensor:
    """A norm's parameter, for all blocks or shared by them."""
    values = values.double().reshape(-1)
    return values.repeat(channels // values.numel())


def _rotate_online_(module: nn.Module, online: Online, generator: torch.Generator) -> None:
    """The input of a linear by blocks, and its columns."""
    linear = module.get_submodule(online.path)
    q = _orthogonal(online.size, False, generator)
    weight = _get(module, f"{online.path}.weight")
    _set(module, f"{online.path}.weight", _by_blocks(weight.double(), q))
    linear.register_forward_pre_hook(lambda _, args: (_by_blocks(args[0], q.to(args[0].dtype)), *args[1:]))


def _by_blocks(values: Tensor, q: Tensor) -> Tensor:
    return (values.unflatten(-1, (-1, len(q))) @ q).flatten(-2)


# --- parameters -----------------------------------------------------------------------------------------------------


def _axis_first(weight: Tensor, slot: Slot) -> Tensor:
    """A copy with the slot's positions as dimension 0: stacked matrices are laid one after the other."""
    lead = _lead(weight, slot)
    moved = weight.movedim(slot.dim, lead).reshape(slot.size, *_rest(weight, slot))
    return moved.clone()


def _axis_back(axis: Tensor, weight: Tensor, slot: Slot) -> Tensor:
    lead = _lead(weight, slot)
    return axis.reshape(weight.movedim(slot.dim, lead).shape).movedim(lead, slot.dim)


def _lead(weight: Tensor, slot: Slot) -> int:
    """How many leading dimensions count matrices: those that multiply to the number of stacked ones."""
    if slot.stack is None:
        assert slot.size == weight.shape[slot.dim], f"{slot.path}: the axis has {weight.shape[slot.dim]} positions"
        return 0
    assert slot.size == slot.stack * weight.shape[slot.dim], f"{slot.path}: {slot.stack} x {weight.shape[slot.dim]}"
    for lead in range(slot.dim + 1):
        if weight.shape[:lead].numel() == slot.stack:
            return lead
    raise AssertionError(f"{slot.path}: no {slot.stack} matrices in {tuple(weight.shape)}")


def _rest(weight: Tensor, slot: Slot) -> Iterable[int]:
    lead = _lead(weight, slot)
    return [size for d, size in enumerate(weight.shape) if d != slot.dim and d >= lead]


def _get(module: nn.Module, path: str) -> Tensor:
    return module.get_parameter(path).detach()


def _set(module: nn.Module, path: str, value: Tensor) -> None:
    module.get_parameter(path).data = value.to(module.get_parameter(path).dtype).contiguous()


def _parameters(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return list(module.named_parameters(remove_duplicate=False))


def _untie_(module: nn.Module) -> None:
    """Every name gets storage of its own, as long as its module is not itself shared."""
    first: dict[int, str] = {}
    for name, parameter in _parameters(module):
        other = first.setdefault(id(parameter), name)
        owner, _, leaf = name.rpartition(".")
        if other != name and module.get_submodule(owner) is not module.get_submodule(other.rpartition(".")[0]):
            setattr(module.get_submodule(owner), leaf, nn.Parameter(parameter.detach().clone()))


# --- outputs --------------------------------------------------------------------------------------------------------


def outputs_of(result: Any) -> list[Tensor]:
    leaves = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    assert leaves, "no output to compare"
    return [leaf.double() for leaf in leaves]


def change_of(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    assert all(bool(torch.isfinite(e).all()) for e in expected), "the module itself gives infinities"
    pairs = zip(actual, expected, strict=True)
    changes = [float((a - e).abs().max() / e.abs().max().clamp_min(1e-300)) for a, e in pairs]
    return max(c if c == c else float("inf") for c in changes)


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    """``module`` in float64 and evaluation mode, every parameter random: gains of 1 and biases of 0 hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    module = module.double().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            scale = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.5
            start = 0.0 if parameter.ndim > 1 else float(parameter.mean().round())
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(start + scale * noise)
    return module


def analysed(module: nn.Module, *args: Any) -> Findings:
    """What the analyzer finds in ``module(*args)``."""
    return analyse(capture(module, args, {}, "export")).findings


def proved(module: nn.Module, *args: Any, tolerance: float = 1e-9) -> Findings:
    """The findings, after every claim in them was carried out on random parameters and changed no output."""
    module = randomised(module)
    findings = analysed(module, *args)
    for outcome in outcomes(module, lambda m: m(*args), findings):
        assert outcome.change < tolerance, outcome
    return findings
