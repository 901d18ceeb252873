"""Static scales of activations from calibrated values: the maximum, or a smaller one that clips what is rare.

A static scale is paid for by every token: half of it is the largest rounding error of each value. Clipping a few large
values costs them and gains the others. Where the least error lies is a matter of measuring: of the input's own error
(MSE: Banner et al. 2019, "Post Training 4-bit Quantization of Convolutional Networks for Rapid-Deployment"), or of the
error that the linear makes of it, which weighs each channel by its columns.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional

from autoquant.config.format import ActivationQuantization, StaticClip
from autoquant.quantizer import int8

TOKENS = 1024
"""Tokens that a clipping is judged on, evenly spaced: errors are means, for which these are enough."""
SELECTED = 1 << 20
"""Elements among which the one of a rank is found at once: finding it takes several passes over all, one after the
other."""
COARSE = tuple(round(1 - 0.1 * step, 1) for step in range(9))
FINE = (0.05, 0.025)


def sampled(x_TI: Tensor, tokens: int = TOKENS) -> Tensor:
    """At most ``tokens`` rows, evenly spaced."""
    return x_TI[:: max(1, -(-len(x_TI) // tokens))]


def clipped_maximum(x_TI: Tensor, weight_OI: Tensor, choice: ActivationQuantization) -> Tensor:
    """The magnitude that becomes 127, float32 []: of inputs [T, I] of a linear with weight [O, I].

    mse and output try shares of the maximum from 1 down to 0.2, then finer around the best; on the sample never worse
    than the maximum.
    """
    largest = int8.absmax(x_TI).reshape(())
    if choice.clip is StaticClip.ABSMAX or not bool(largest > 0):
        return largest
    if choice.clip is StaticClip.PERCENTILE:
        return percentile(x_TI, choice.percentile)
    sample = sampled(x_TI).float()
    weight = weight_OI.float()

    def error(share: float) -> float:
        difference = int8.fake_quantize(sample, int8.scale_of(largest * share)) - sample
        if choice.clip is StaticClip.OUTPUT:
            difference = functional.linear(difference, weight)
        return float(difference.double().square().sum())

    return largest * best_share(error)


def best_share(error: Callable[[float], float]) -> float:
    """The share in 0.125 ... 1 of least error, coarse to fine; ties go to the larger."""
    errors = {share: error(share) for share in COARSE}
    for step in FINE:
        centre = min(sorted(errors, reverse=True), key=errors.__getitem__)
        near = (round(centre + sign * step, 3) for sign in (1, -1))
        errors |= {share: error(share) for share in near if share <= 1}
    return min(sorted(errors, reverse=True), key=errors.__getitem__)


def percentile(x: Tensor, percent: float) -> Tensor:
    """The magnitude that ``percent`` of all elements do not exceed, float32 []; the nearest rank, for any size."""
    magnitudes = x.abs().flatten().float()
    count = magnitudes.numel()
    above = count - min(max(1, -(-int(count * percent * 1e6) // 100_000_000)), count)
    step = count // SELECTED
    if step > 1 and above < count // 8:  # the rank is sought among the largest: twice as many, as a sample tells
        sample = magnitudes[::step]
        floor = sample.kthvalue(max(1, len(sample) - 2 * (above // step + 1))).values
        largest = magnitudes[~(magnitudes < floor)]  # what is not a number is larger than all
        if len(largest) > above:
            magnitudes = largest
    return magnitudes.kthvalue(len(magnitudes) - above).values
