"""Bias correction: what rounding does to the mean of a linear's output is taken out by its bias.

Rounding errors do not average out: over the calibration tokens ``E[X W^T - X~ V^T]``, of exact inputs and weight and of
rounded ones, is a constant per output channel, which the bias can hold (Nagel et al. 2019, "Data-Free Quantization
Through Weight Equalization and Bias Correction"; here the mean is measured, not derived from
norms).

Shapes: T tokens, O output channels, I input channels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def corrected_bias(
    exact_TI: Tensor, weight_OI: Tensor, rounded_TI: Tensor, rounded_OI: Tensor, bias_O: Tensor | None
) -> Tensor:
    """The bias [O] in the weight's dtype with which the mean output is the exact one; the mean is taken in float64."""
    difference_TO = functional.linear(exact_TI, weight_OI) - functional.linear(rounded_TI, rounded_OI)
    mean_O = difference_TO.mean(0, dtype=torch.float64).to(weight_OI.dtype)
    return mean_O if bias_O is None else bias_O + mean_O
