"""Operations on one parameter, carried out in float64 in pieces that stay in the cache.

A Hadamard rotation is a few products by small matrices, between two buffers; its signs, and the gains and scales beside
it, are one product elementwise. A parameter is cut along a dimension that no operation mixes, or mixes in short runs
alone (heads); where there is none, in several passes with a copy in float64 between them. It is rounded once.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from autoquant.executor.hadamard import factor_matrices, find_construction
from autoquant.executor.operations import Add, Axis, Centre, Fill, Normalise, Operation, Rotate, Scale, run, run_all

PIECE = 1 << 18
"""Elements of a float64 piece on the CPU: two buffers of 2 MiB. A writer's pieces are columns, which are dear to gather
where few lie side by side; what does not stay in the cache of a core comes from the next one."""
PIECE_OF_MANY = 1 << 20
"""The same where many threads fold: with small pieces they would wait for the interpreter, and not for the memory."""
GPU_PIECE = 1 << 24
"""The same on a GPU, whose memory the buffers only have to fit."""
FOLD_BITS = 4
"""Sylvester factors of a fold have up to 2**4 rows: a third of the additions of 2**6, and still few passes."""
SMALL = 32
"""Factors of up to so many rows are numpy's to multiply by on the CPU, whose BLAS takes half the time of torch's ..."""
FEW = 128
"""... where no more than so many columns lie beside each other."""
_ALONE = 1 << 18
"""Multiplications of one call that OpenBLAS, which is numpy's, does not share with other threads yet: the workers are
threads or processes, one for each core."""
GPU_FOLD_BITS = 6
"""The same on a GPU, to which passes are dearer than additions."""
NARROWEST = 32
"""Elements next to each other in memory that a piece takes at least; fewer are slow to gather."""
_WIDE = 4
"""Pieces of so many times the size are still better than a copy of the whole parameter in float64."""


@dataclass(frozen=True, slots=True, eq=False)
class Times:
    """``(t + offset) * factors - offset``; ``factors`` broadcast against the whole parameter."""

    factors: Tensor
    offset: int


@dataclass(frozen=True, slots=True, eq=False)
class Mix:
    """Each run of ``size`` positions along ``dim`` times the Hadamard matrix of that size, not normalised."""

    dim: int
    size: int


Step = Times | Mix | Operation


@dataclass(frozen=True, slots=True)
class Pass:
    """Steps on pieces cut along ``dim``, each a multiple of ``granule`` positions long."""

    dim: int
    granule: int
    steps: tuple[Step, ...]


@dataclass(frozen=True, slots=True)
class Fitted:
    """Operations fitted to a parameter. ``shape``: its own, or with the matrices of a stack in a dimension of their
    own.
    """

    shape: tuple[int, ...]
    passes: tuple[Pass, ...]

    @property
    def rows(self) -> int | None:
        """The rows (of ``shape``) whose results depend on each other alone; None where all do."""
        cut = self.passes[0]
        return cut.granule if len(self.passes) == 1 and cut.dim == 0 else None


@torch.no_grad()
def execute(operations: Sequence[Operation], tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The parameter after all operations in order: a new tensor of the same shape, in ``dtype`` (its own if None).

    Computed in float64 where the tensor is, and rounded once.
    """
    result = torch.empty(tensor.shape, dtype=dtype or tensor.dtype, device=tensor.device)
    fitted = fit(operations, tuple(tensor.shape))
    if fitted is None:
        return result.copy_(run_all(operations, tensor.double()))
    carry_out(fitted, tensor, result)
    return result


@torch.no_grad()
def carry_out(fitted: Fitted, tensor: Tensor, result: Tensor, first: int = 0, piece: int | None = None) -> None:
    """Write to ``result`` what the operations make of ``tensor``, both contiguous: the parameter or, where it has
    ``rows``, some of them that begin at ``first``. ``piece``: elements at once on the CPU, None: ``PIECE``.
    """
    shape = (tensor.numel() // max(math.prod(fitted.shape[1:]), 1), *fitted.shape[1:])
    source, target = tensor.reshape(shape), result.view(shape)
    between = target
    if len(fitted.passes) > 1:
        between = torch.empty(shape, dtype=torch.float64, device=tensor.device)
    for number, cut in enumerate(fitted.passes):
        into = target if number == len(fitted.passes) - 1 else between
        _pass(cut, source, into, first, piece or PIECE)
        source = between


def fit(operations: Sequence[Operation], shape: tuple[int, ...]) -> Fitted | None:
    """How to carry them out on a parameter of this shape; None for layouts that are worked on as a whole."""
    stacks = {axis.stack for operation in operations if (axis := _axis(operation)) is not None and axis.unflatten}
    if len(stacks) > 1:
        return None
    stack = next(iter(stacks), None)
    viewed = shape if stack is None else (stack, shape[0] // stack, *shape[1:])
    steps: list[Step] = []
    for operation in operations:
        found = _steps(operation, shape, viewed)
        if found is None:
            return None
        for step in found:
            before = steps[-1] if steps else None
            if isinstance(step, Times) and isinstance(before, Times) and _are_one(step, before):
                steps[-1] = Times(before.factors * step.factors, 0)
            else:
                steps.append(step)
    return Fitted(viewed, tuple(_passes(steps, viewed)))


def _steps(operation: Operation, shape: tuple[int, ...], viewed: tuple[int, ...]) -> tuple[Step, ...] | None:
    """An operation in terms of the viewed shape; None where it does not fit that view."""
    axis = _axis(operation)
    if axis is None:
        assert isinstance(operation, Add | Fill)
        return (Add(operation.label, operation.value.reshape(viewed)),) if isinstance(operation, Add) else (operation,)
    if isinstance(operation, Scale):
        return (Times(_spread(axis, operation.factors, shape, viewed), operation.offset),)
    if isinstance(operation, Rotate) and (signs := _signs(operation, axis, shape, viewed)) is not None:
        size = operation.rotations[0].size
        order = size // find_construction(size).copies
        mix = Mix(axis.dim + (len(viewed) - len(shape)), size)
        if math.isqrt(order) ** 2 == order and order & (order - 1) == 0:
            return Times(_spread(axis, signs * order**-0.5, shape, viewed), 0), mix
        # Not before the sums: those of bfloat16 numbers are exact, and what cancels is 0.
        norm = torch.full([1] * len(viewed), order**-0.5, dtype=torch.float64)
        return Times(_spread(axis, signs, shape, viewed), 0), mix, Times(norm, 0)
    return (operation,) if viewed == shape else None


def _signs(rotate: Rotate, axis: Axis, shape: tuple[int, ...], viewed: tuple[int, ...]) -> Tensor | None:
    """The random signs of a Hadamard rotation by position, where its blocks are runs that cover the axis; else None."""
    size = rotate.rotations[0].size
    if shape[axis.dim] % size or (len(viewed) > len(shape) and axis.dim == 0):
        return None
    starts: list[int] = []
    found: list[Tensor] = []
    for block, positions in rotate.blocks:
        rotation = rotate.rotations[block]
        if rotation.signs is None or rotation.dense is not None or rotation.v is not None:
            return None
        begin = positions[:, :1]
        if not torch.equal(positions, begin + torch.arange(size)) or bool((begin % size).any()):
            return None
        starts += begin.flatten().tolist()
        found += [rotation.signs] * len(positions)
    if sum(map(len, found)) != len(axis.channels):
        return None
    return torch.cat([found[at] for at in sorted(range(len(starts)), key=starts.__getitem__)])


def _axis(operation: Operation) -> Axis | None:
    return None if isinstance(operation, Add | Fill) else operation.axis


def _spread(axis: Axis, values: Tensor, shape: tuple[int, ...], viewed: tuple[int, ...]) -> Tensor:
    """Values by position, shaped to broadcast against the viewed parameter."""
    spread = axis.spread(values, len(shape))
    if spread.dim() == len(viewed):
        return spread
    rows = spread.shape[0]
    return spread.reshape(1 if rows == 1 else viewed[0], rows if rows == 1 else viewed[1], *spread.shape[1:])


def _are_one(one: Times, other: Times) -> bool:
    """True if the product of the factors is no larger than they are."""
    if one.offset or other.offset:
        return False
    return one.factors.shape == other.factors.shape or 1 in (one.factors.numel(), other.factors.numel())


def _passes(steps: Sequence[Step], shape: tuple[int, ...]) -> list[Pass]:
    """As few as can be whose pieces are small."""
    done: list[Pass] = []
    current: list[Step] = []
    for step in steps:
        together = _cut([*current, step], shape)
        alone = _cut([step], shape)
        most = _elements(together, shape)
        if current and most > _WIDE * PIECE and _elements(alone, shape) < most:
            done.append(_cut(current, shape))
            current = [step]
        else:
            current.append(step)
    return [*done, _cut(current, shape)]


def _cut(steps: Sequence[Step], shape: tuple[int, ...]) -> Pass:
    """Along the outermost of the dimensions that give the smallest pieces."""
    if not shape:
        return Pass(0, 1, tuple(steps))
    granules = [1] * len(shape)
    granules[-1] = min(NARROWEST, shape[-1]) if len(shape) > 1 else 1
    for step in steps:
        for dim, granule in _mixed(step, shape).items():
            granules[dim] = min(math.lcm(granules[dim], granule), shape[dim])
    cuts = [Pass(dim, granule, tuple(steps)) for dim, granule in enumerate(granules)]
    return min(cuts, key=lambda cut: max(_elements(cut, shape), PIECE))


def _elements(cut: Pass, shape: tuple[int, ...]) -> int:
    """Of the smallest piece."""
    return math.prod(shape) // max(shape[cut.dim], 1) * cut.granule if shape else 1


def _mixed(step: Step, shape: tuple[int, ...]) -> dict[int, int]:
    """The dimensions along which a step's results depend on each other, in runs of so many positions."""
    match step:
        case Mix(dim=dim, size=size):
            return {dim: size}
        case Centre(axis=axis) | Rotate(axis=axis) | Normalise(axis=axis):
            dims = (axis.dim,) if axis.stack is None else (0, axis.dim)
            return {dim: shape[dim] for dim in dims}
        case _:
            return {}


def _pass(cut: Pass, source: Tensor, target: Tensor, first: int, piece: int) -> None:
    most = piece if source.device.type == "cpu" else GPU_PIECE
    length = source.shape[cut.dim] if source.dim() else 1
    across = source.numel() // max(length, 1)
    step = min(max(most // max(across, 1) // cut.granule, 1) * cut.granule, length)
    rooms = _rooms(step * across, source.device)
    steps = [_on_device(one, source.device) for one in cut.steps]
    for start in range(0, length, max(step, 1)):
        count = min(step, length - start)
        given, taken = (
            (source, target)
            if not source.dim()
            else (source.narrow(cut.dim, start, count), target.narrow(cut.dim, start, count))
        )
        held = rooms[0][: given.numel()].view(given.shape).copy_(given)
        taken.copy_(_run(steps, held, rooms[1], cut.dim, start + (first if cut.dim == 0 else 0)))


_kept = threading.local()


def _rooms(elements: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Two buffers of float64; on the CPU those that this thread had before, whose memory is there."""
    rooms: tuple[Tensor, Tensor] | None = getattr(_kept, "rooms", None) if device.type == "cpu" else None
    if rooms is None or len(rooms[0]) < elements:
        one, other = (torch.empty(elements, dtype=torch.float64, device=device) for _ in range(2))
        rooms = one, other
        if device.type == "cpu" and elements <= 2 * PIECE_OF_MANY:
            _kept.rooms = rooms
    return rooms


def _run(steps: Sequence[Step], piece: Tensor, room: Tensor, dim: int, start: int) -> Tensor:
    """The steps on a float64 piece that begins at ``start`` of ``dim``; it and ``room`` are written to."""
    free = [room]
    for step in steps:
        match step:
            case Times(factors=factors, offset=offset):
                if factors.shape[dim] > 1:
                    factors = factors.narrow(dim, start, piece.shape[dim])
                if offset:
                    piece.add_(offset).mul_(factors).sub_(offset)
                else:
                    piece.mul_(factors)
            case Mix():
                piece = _mix(step, piece, free)
            case Add(value=value):
                piece.add_(value.narrow(dim, start, piece.shape[dim]) if value.dim() else value)
            case Fill(value=value):
                piece.fill_(value)
            case _:
                piece = run(step, piece).contiguous()  # _mix views it as rows
    return piece


def _mix(step: Mix, piece: Tensor, free: list[Tensor]) -> Tensor:
    """The product, written to the first of the ``free`` buffers and back; what is free afterwards is there then."""
    shape = piece.shape
    inner = math.prod(shape[step.dim + 1 :])
    for right, left in factors_on(step.size, str(piece.device), inner == 1):
        rows = len(right)
        into = free.pop()[: piece.numel()]
        if inner == 1:
            _times_right(piece.reshape(-1, rows), right, into.view(-1, rows))
        else:
            _times_left(left, piece.reshape(-1, rows, inner), into.view(-1, rows, inner))
        free.append(piece.view(-1))
        piece = into
        inner *= rows
    return piece.view(shape)


def _times_right(given: Tensor, factor: Tensor, into: Tensor) -> None:
    """``[n, rows]`` times ``[rows, rows]``."""
    if given.device.type != "cpu" or len(factor) > SMALL:
        torch.mm(given, factor, out=into)
        return
    step = _ALONE // len(factor) ** 2
    source, matrix, target = given.numpy(), factor.numpy(), into.numpy()
    for start in range(0, len(source), step):
        np.matmul(source[start : start + step], matrix, out=target[start : start + step])


def _times_left(factor: Tensor, given: Tensor, into: Tensor) -> None:
    """``[rows, rows]`` times each of ``[n, rows, inner]``."""
    if given.device.type == "cpu" and len(factor) <= SMALL and given.shape[2] <= FEW:
        np.matmul(factor.numpy(), given.numpy(), out=into.numpy())
    else:  # bmm: matmul would transpose to make one product of it
        torch.bmm(factor.expand(len(given), *factor.shape), given, out=into)


@lru_cache(maxsize=64)
def factors_on(size: int, device: str, neighbours: bool) -> tuple[tuple[Tensor, Tensor], ...]:
    """The factors of the Hadamard matrix as they multiply from the right and from the left, innermost first.

    ``neighbours``: the innermost mixes what lies side by side in memory; on the CPU it is the largest then, and the
    others have as many neighbours to move together, where few cost twice as much. The right ones are views of
    transposed matrices, which is how torch's BLAS is a quarter quicker.
    """
    on_cpu = torch.device(device).type == "cpu"
    bits, innermost = (FOLD_BITS, FOLD_BITS if neighbours else 0) if on_cpu else (GPU_FOLD_BITS, 0)
    matrices = [torch.from_numpy(f).to(device, torch.float64) for f in factor_matrices(size, bits, innermost)]
    return tuple((left.mT, left) for left in (matrix.mT.contiguous() for matrix in reversed(matrices)))


def _on_device(step: Step, device: torch.device) -> Step:
    match step:
        case Times(factors=factors, offset=offset):
            return Times(factors.to(device), offset)
        case Add(label=label, value=value):
            return Add(label, value.to(device))
        case _:
            return step
