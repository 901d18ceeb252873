"""Tensors that are stored in few bits with scales beside them, as the numbers that they stand for.

*Float8 in blocks*: float8 [..., R, C] and a factor for each block of m x n, [..., R / m, C / n] rounded up, or one
factor for all. *MXFP4* (OCP Microscaling Formats 1.0): uint8 [E, R, G, 16], in each byte two numbers of four bits, the
lower ones first, and uint8 [E, R, G], the exponents of 32 numbers each; what they stand for is [E, 32 G, R].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

FLOAT8 = frozenset({torch.float8_e4m3fn, torch.float8_e5m2})
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_BIAS = 127
"""Of an exponent of eight bits."""


@dataclass(frozen=True, slots=True)
class Scaled:
    """The names of what a tensor is made of; ``block``: rows and columns of one factor, None: MXFP4."""

    values: str
    scales: str
    block: tuple[int, int] | None
    dtype: torch.dtype

    def rows(self, read: Callable[[str], Tensor], first: int, last: int | None) -> Tensor:
        """The numbers from ``first`` to ``last`` along the first dimension, in ``dtype``."""
        values, scales = read(self.values), read(self.scales)
        if self.block is None:
            return _from_mxfp4(values[first:last], scales[first:last]).to(self.dtype)
        factors = _factors(scales, tuple(values.shape), self.block, first, last)
        return (values[first:last].float() * factors).to(self.dtype)


def grid(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    """The shape of the factors of blocks of the last two dimensions."""
    return (*shape[:-2], math.ceil(shape[-2] / block[0]), math.ceil(shape[-1] / block[1]))


def _factors(scales: Tensor, shape: tuple[int, ...], block: tuple[int, int], first: int, last: int | None) -> Tensor:
    """A factor for each element of the rows, float32."""
    factors = (scales.float() - _BIAS).exp2() if scales.dtype is torch.uint8 else scales.float()
    if factors.numel() == 1:
        return factors.reshape(())
    rows, columns = torch.arange(shape[-2]) // block[0], torch.arange(shape[-1]) // block[1]
    if len(shape) == 2:
        return factors[rows[first:last]][:, columns]
    return factors[first:last][..., rows, :][..., columns]


def _from_mxfp4(blocks: Tensor, exponents: Tensor) -> Tensor:
    """float32 [E, 32 G, R]."""
    table = torch.tensor(_FP4)
    low, high = (blocks & 0x0F).int(), (blocks >> 4).int()
    numbers = torch.stack((table[low], table[high]), -1).flatten(-2)
    scaled = torch.ldexp(numbers, (exponents.int() - _BIAS)[..., None])
    return scaled.flatten(-2).transpose(1, 2).contiguous()
