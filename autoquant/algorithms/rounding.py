"""Which int8 values a weight gets, given what it will be multiplied with.

Rounding to the nearest value minimises the error of the weight. What counts is the error of the product, and over the
calibration tokens that is a quadratic form of the weight's error, which rounding can be steered by:

- **GPTQ** (Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
  section 3 and algorithm 1) rounds column by column and lets the columns that are still free make up for the error.
- **Qronos** (Zhang et al. 2025, "Qronos: Correcting the Past by Shaping the Future in Post-Training Quantization")
  asks for ``min |X W^T - X~ V^T|^2``, where X are the float model's inputs and X~ those of the quantized one, rounded.
  With ``H = X~^T X~`` and ``G = X^T X~`` the real-valued minimum is ``V* = W G H^-1``, and
  ``|X W^T - X~ V^T|^2 = |X~ (V* - V)^T|^2 + constant``: so GPTQ of V* with H solves it.

Shapes: T tokens, O output channels, I input channels.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from autoquant.quantizer.int8 import QMAX

DAMPING = 0.01
"""Added to the diagonal of H, as a share of its mean (GPTQ, section 3.3)."""
RIDGE = 0.01
"""How strongly V* is held to W, as a share of H's mean diagonal: directions that calibration hardly saw stay put."""
BLOCK = 64
ROWS = 8192
RECORDED = 4
"""Heights of weights whose kernels are kept: a model has few. Each takes some ten blocks of memory."""


def cross_moment(x_TI: Tensor, y_TI: Tensor) -> Tensor:
    """``x^T y``, float64 [I, I]; products are float32 over chunks of tokens, sums float64."""
    total = torch.zeros(x_TI.shape[1], y_TI.shape[1], dtype=torch.float64, device=x_TI.device)
    for x, y in zip(x_TI.split(ROWS), y_TI.split(ROWS), strict=True):
        total += (x.float().mT @ y.float()).double()
    return total


def corrected(weight_OI: Tensor, cross_II: Tensor, moment_II: Tensor) -> Tensor:
    """``V* = (W G + r W) (H + r)^-1``, float64 [O, I]: what a weight should be for the inputs that it really gets.

    ``cross_II`` is G = X^T X~ and ``moment_II`` H = X~^T X~; r is ``RIDGE`` times H's mean diagonal.
    """
    ridge = RIDGE * moment_II.diagonal().mean().clamp_min(1e-30)
    weight = weight_OI.double()
    regular = moment_II + ridge * torch.eye(len(moment_II), dtype=torch.float64, device=moment_II.device)
    solved: Tensor = torch.linalg.solve(regular, (weight @ cross_II + ridge * weight).mT)
    return solved.mT


def gptq(weight_OI: Tensor, moment_II: Tensor, scale_O1: Tensor) -> Tensor:
    """Int8 values [O, I] of a weight by GPTQ; ``scale_O1`` is [O, 1] or [1, 1], ``moment_II`` float64 X^T X.

    Columns go by falling diagonal of H ("act-order"). Where H is no use (all zero) this is rounding to the nearest.
    """
    diagonal = moment_II.diagonal()
    mean = diagonal.mean()
    if not bool(mean > 0):
        return _round(weight_OI.double(), scale_O1.double()).to(torch.int8)
    order = torch.argsort(diagonal, descending=True, stable=True)
    damped = moment_II + DAMPING * mean * torch.eye(len(moment_II), dtype=torch.float64, device=moment_II.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped[order][:, order]))
    upper = torch.linalg.cholesky(inverse, upper=True)
    left, scale = weight_OI.double()[:, order].clone(), scale_O1.double()
    values = torch.empty_like(left)
    columns = _columns if left.device.type != "cuda" else _replayed(len(left), len(scale), left.device)
    for start in range(0, left.shape[1], BLOCK):
        end = min(start + BLOCK, left.shape[1])
        values[:, start:end], errors = columns(left[:, start:end], upper[start:end, start:end], scale)
        left[:, end:] -= errors @ upper[start:end, end:]
    return values[:, torch.argsort(order)].to(torch.int8)


def _columns(left_OB: Tensor, upper_BB: Tensor, scale_O1: Tensor) -> tuple[Tensor, Tensor]:
    """The values of a block of columns, one after the other, and what each leaves to those behind the block."""
    block, values, errors = left_OB.clone(), torch.empty_like(left_OB), torch.empty_like(left_OB)
    for i in range(block.shape[1]):
        column = block[:, i : i + 1]
        rounded = _round(column, scale_O1)
        values[:, i : i + 1] = rounded
        error = (column - rounded * scale_O1) / upper_BB[i, i]
        errors[:, i : i + 1] = error
        block[:, i + 1 :] -= error * upper_BB[i, i + 1 :]
    return values, errors


class _Replayed:
    """:func:`_columns` on a GPU, to which starting its many small kernels takes several times what they do: they are
    recorded for one block, and played again for all others of its size.
    """

    def __init__(self, rows: int, scales: int, device: torch.device) -> None:
        self.left = torch.ones(rows, BLOCK, dtype=torch.float64, device=device)
        self.upper = torch.ones(BLOCK, BLOCK, dtype=torch.float64, device=device)
        self.scale = torch.ones(scales, 1, dtype=torch.float64, device=device)
        _columns(self.left, self.upper, self.scale)  # what is loaded at first use cannot be recorded
        self.graph = torch.cuda.CUDAGraph()
        # On a stream of its own device, which need not be the current one: what runs elsewhere would not be recorded.
        # Other threads, which read ahead, go on allocating memory: only what this one starts is recorded.
        with (
            torch.cuda.device(device),
            torch.cuda.graph(self.graph, stream=torch.cuda.Stream(device), capture_error_mode="thread_local"),
        ):
            self.made = _columns(self.left, self.upper, self.scale)

    def __call__(self, left_OB: Tensor, upper_BB: Tensor, scale_O1: Tensor) -> tuple[Tensor, Tensor]:
        """Good until the next call."""
        if left_OB.shape != self.left.shape:
            return _columns(left_OB, upper_BB, scale_O1)
        self.left.copy_(left_OB)
        self.upper.copy_(upper_BB)
        self.scale.copy_(scale_O1)
        self.graph.replay()
        return self.made


_replayed = lru_cache(maxsize=RECORDED)(_Replayed)


def _round(weight: Tensor, scale: Tensor) -> Tensor:
    return (weight / scale).round().clamp(-QMAX, QMAX)
