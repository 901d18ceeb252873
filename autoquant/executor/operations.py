"""What can be done to one parameter: scale, add, fill, centre, rotate. All in float64 (``pieces`` says how).

An operation acts along an ``Axis``: one dimension of the parameter, or the positions of that dimension counted through
a stack of matrices (experts). ``channels[i]`` is the channel that position i carries, -1 where it carries none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import assert_never

import torch
from torch import Tensor

from autoquant.executor.rotation import Rotation

PIECE = 1 << 18
"""Elements of a float64 piece: 2 MiB stay in the cache and the allocator; with 128 MiB all takes 2.6 times as long."""


def rotated(tensor: Tensor, axis: Axis, blocks: Blocks, rotations: Sequence[Rotation]) -> Tensor:
    """What ``Rotate`` makes of a parameter, in the parameter's own dtype and differentiable in the rotations."""
    return _on_last(tensor, axis, lambda x: _rotate(x, blocks, rotations))


def contract(tensor: Tensor, axis: Axis, channel_values: Tensor) -> Tensor:
    """``sum_i W[..., i, ...] * value[channel of i]`` over the axis' dimension: what a linear makes of a constant input.

    ``channel_values [channels]`` float64. Returns float64 of the weight's shape without ``axis.dim``; stacked matrices
    keep their dimension 0. For ``nn.Linear`` this is ``W @ beta``.
    """
    values = axis.spread(axis.gather(channel_values, 0.0), tensor.dim()).to(tensor.device)
    view, dim = axis.view(tensor), axis.view_dim
    total = torch.zeros([n for d, n in enumerate(view.shape) if d != dim], dtype=torch.float64, device=tensor.device)
    step = max(1, PIECE * view.shape[dim] // max(view.numel(), 1))
    for start in range(0, view.shape[dim], step):
        length = min(step, view.shape[dim] - start)
        total += (view.narrow(dim, start, length).double() * values.narrow(dim, start, length)).sum(dim)
    return total.flatten(0, 1) if axis.unflatten else total


def run_all(operations: Sequence[Operation], t: Tensor) -> Tensor:
    """A float64 parameter after all operations in order."""
    for operation in operations:
        t = run(operation, t)
    return t


def run(operation: Operation, t: Tensor) -> Tensor:
    """A float64 parameter after one operation, or a piece of it that is whole along what the operation mixes."""
    match operation:
        case Scale(axis=axis, factors=factors, offset=offset):
            spread = axis.spread(factors, t.dim()).to(t.device)
            return ((axis.view(t) + offset) * spread - offset).reshape(t.shape)
        case Add(value=value):
            return t + value.to(t.device).reshape(t.shape)
        case Fill(value=constant):
            return torch.full_like(t, constant)
        case Centre(axis=axis, blocks=blocks):
            return _on_last(t, axis, lambda x: _centre(x, blocks))
        case Rotate(axis=axis, blocks=blocks, rotations=rotations):
            if axis.stack is None and _is_whole(blocks, t.shape[axis.dim]) and t.numel() <= PIECE:
                return rotations[blocks[0][0]].apply(t, axis.dim)
            return _on_last(t, axis, lambda x: _rotate(x, blocks, rotations))
        case Normalise():
            return _on_last(t, operation.axis, lambda x: _normalise(x, operation))
        case _ as unreachable:
            assert_never(unreachable)


def _on_last(t: Tensor, axis: Axis, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply a function of ``[..., positions]`` along the axis."""
    view = axis.view(t)
    if axis.stack is None:
        return _in_pieces(view.movedim(axis.dim, -1), function).movedim(-1, axis.dim)
    moved = view.movedim((0, axis.view_dim), (-2, -1))
    return (
        _in_pieces(moved.flatten(-2), function)
        .reshape(moved.shape)
        .movedim((-2, -1), (0, axis.view_dim))
        .reshape(t.shape)
    )


def _in_pieces(x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """A function of the last axis, over pieces of the longest other one: its temporaries stay small."""
    if x.numel() <= PIECE or x.dim() == 1:
        return function(x)
    result = torch.empty_like(x)
    dim = max(range(x.dim() - 1), key=lambda d: x.shape[d])
    step = max(1, PIECE * x.shape[dim] // x.numel())
    for start in range(0, x.shape[dim], step):
        length = min(step, x.shape[dim] - start)
        result.narrow(dim, start, length).copy_(function(x.narrow(dim, start, length)))
    return result


def _centre(x: Tensor, blocks: Blocks) -> Tensor:
    x = x.clone()
    for _, positions in blocks:
        for row in positions.to(x.device):
            x[..., row] -= x[..., row].mean(-1, keepdim=True)
    return x


def _rotate(x: Tensor, blocks: Blocks, rotations: Sequence[Rotation]) -> Tensor:
    if _is_whole(blocks, x.shape[-1]):
        return rotations[blocks[0][0]].apply(x)
    x = x.clone()
    for block, positions in blocks:
        positions = positions.to(x.device)
        x[..., positions] = rotations[block].apply(x[..., positions])
    return x


def _is_whole(blocks: Blocks, size: int) -> bool:
    """True if the one block is the whole axis in its own order."""
    if len(blocks) > 1 or blocks[0][1].shape != (1, size):
        return False
    return torch.equal(blocks[0][1][0], torch.arange(size))


def _normalise(x: Tensor, norm: Normalise) -> Tensor:
    if norm.subtract_mean:
        x = x - x.mean(-1, keepdim=True)
    x = x * (x.square().mean(-1, keepdim=True) + norm.eps).rsqrt()
    return x * norm.gain.to(x.device) + norm.bias.to(x.device)


Blocks = tuple[tuple[int, Tensor], ...]
"""(block number, positions ``[repeats, size]``) for each block that the axis carries."""


@dataclass(frozen=True, slots=True, eq=False)
class Axis:
    """One axis of a parameter. ``channels`` int64 ``[positions]``; see the module's docstring.

    ``stack`` matrices lie along dimension 0, which is ``stack`` itself or, with ``unflatten``, ``stack * rows``.
    """

    dim: int
    stack: int | None
    unflatten: bool
    channels: Tensor

    @property
    def view_dim(self) -> int:
        """The axis' dimension in ``view``."""
        return self.dim + self.unflatten

    def view(self, t: Tensor) -> Tensor:
        """The tensor with its stack, where it has one, as dimension 0."""
        return t.unflatten(0, (self.stack or 1, -1)) if self.unflatten else t

    def spread(self, positions: Tensor, ndim: int) -> Tensor:
        """Values per position, shaped to broadcast against ``view(t)`` of a tensor of ``ndim`` dimensions."""
        shape = [1] * (ndim + self.unflatten)
        if self.stack is not None:
            shape[0] = self.stack
        shape[self.view_dim] = len(self.channels) // (self.stack or 1)
        return positions.reshape(shape)

    def gather(self, channel_values: Tensor, missing: float) -> Tensor:
        """Values per position from values per channel; ``missing`` where a position carries none."""
        values = channel_values[self.channels.clamp(min=0)]
        return torch.where(self.channels >= 0, values, missing)


@dataclass(frozen=True, slots=True, eq=False)
class Scale:
    """``(t + offset) * factor - offset``, ``factors [positions]``: offset 1 where the model uses 1 + parameter."""

    label: str
    axis: Axis
    factors: Tensor
    offset: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Add:
    """Add a tensor of the parameter's shape."""

    label: str
    value: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Fill:
    """Set every element."""

    label: str
    value: float


@dataclass(frozen=True, slots=True, eq=False)
class Centre:
    """Subtract the mean over the channels of each block."""

    label: str
    axis: Axis
    blocks: Blocks


@dataclass(frozen=True, slots=True, eq=False)
class Rotate:
    """Replace each vector x of a block by ``x Q``.

    One rule serves writers and readers. A writer's vectors are what it adds to the space (rows of an embedding, columns
    of a linear's ``[out, in]`` weight, the bias itself): ``x -> x Q``. A reader computes ``x w^T`` for each row w of
    its ``[out, in]`` weight, and ``x w^T = (x Q)(w Q)^T``: ``w -> w Q`` as well.
    """

    label: str
    axis: Axis
    blocks: Blocks
    rotations: tuple[Rotation, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Normalise:
    """Replace each vector by its LayerNorm or RMSNorm; ``gain``, ``bias`` ``[size]``."""

    label: str
    axis: Axis
    subtract_mean: bool
    eps: float
    gain: Tensor
    bias: Tensor


Operation = Scale | Add | Fill | Centre | Rotate | Normalise
