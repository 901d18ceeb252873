"""Smoothing scales from activation and weight maxima.

SmoothQuant (Xiao et al. 2023, "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language
Models", eq. 4) divides the activation of channel j by ``max|X_j| ** alpha / max|W_j| ** (1 - alpha)`` and multiplies
the weight's column by it. Here s is what the *sources* are multiplied by, the inverse of the paper's: ``s = max|W| **
(1 - alpha) / max|X| ** alpha``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from autoquant.calibration.group_maxima import GroupMaxima
from autoquant.errors import AutoQuantError
from autoquant.executor.resolved import Resolved, ResolvedGroup
from autoquant.executor.scales import merge_channels


def smoothing_scales(activation_max: Tensor, weight_max: Tensor, alpha: float, power: int = 1) -> tuple[Tensor, int]:
    """Scales of the sources and the number of channels left alone (SmoothQuant eq. 4, inverted).

    ``activation_max``, ``weight_max`` ``[channels]``: absolute maxima over tokens and over all targets, tied channels
    merged. A target with ``power`` p sees ``s ** p``, so s is the p-th root. Channels whose activation or weight is
    dead (0) or not finite get scale 1. Returns float64 ``[channels]``.
    """
    activation, weight = activation_max.double(), weight_max.double()
    scales = (weight ** (1 - alpha) / activation**alpha) ** (1 / power)
    alive = activation.isfinite() & weight.isfinite() & (activation > 0) & (weight > 0)
    usable = alive & scales.isfinite() & (scales > 0)
    return torch.where(usable, scales, 1.0), int((~usable).sum())


def group_scales(
    resolved: Resolved,
    maxima: GroupMaxima,
    read: Callable[[str], Tensor],
    alpha: float | None = None,
    known: dict[tuple[str, int | None], Tensor] | None = None,
) -> dict[tuple[str, int | None], Tensor]:
    """Scales of every selected group. ``read(name)`` gives the parameter as it is before smoothing.

    ``alpha`` replaces the config's; ``known``: the groups' :func:`weight_maxima` as far as they are, which takes those
    that were not. Warns with the number of channels that keep scale 1 because they are dead or not
    finite. Raises AutoQuantError for a group without maxima and for query-key groups, whose scales no activation
    maximum tells.
    """
    scales, left, total = {}, 0, 0
    for group in resolved.groups:
        where = group.name if group.layer is None else f"{group.name} (layer {group.layer})"
        if group.kind.value == "query_key":
            raise AutoQuantError(
                f"{where}: query_key groups are scaled by cached keys, which only `quantize` observes; disable it"
            )
        if (group.name, group.layer) not in maxima:
            raise AutoQuantError(f"{where}: the calibration has no activation maxima for it")
        power = group.targets[0].power
        weight_max = weight_maxima_once(group, read, known if known is not None else {})
        chosen = group.alpha if alpha is None else alpha
        s, skipped = smoothing_scales(maxima[group.name, group.layer], weight_max, chosen, power)
        scales[group.name, group.layer] = s
        left, total = left + skipped, total + len(s)
    if left:
        warnings.warn(f"{left} of {total} channels are dead or not finite and keep scale 1", stacklevel=2)
    return scales


def weight_maxima_once(
    group: ResolvedGroup, read: Callable[[str], Tensor], known: dict[tuple[str, int | None], Tensor]
) -> Tensor:
    """What ``known`` has of a group, or else :func:`weight_maxima`, which it takes."""
    key = (group.name, group.layer)
    if key not in known:
        known[key] = weight_maxima(group, read)
    return known[key]


def weight_maxima(group: ResolvedGroup, read: Callable[[str], Tensor]) -> Tensor:
    """Largest absolute weight per channel over all targets, float64 ``[channels]``; tied positions take the maximum."""
    result = torch.zeros(group.channels, dtype=torch.float64)
    for slot in group.targets:
        view = slot.axis.view(read(slot.name).detach())
        kept = {slot.axis.view_dim} if slot.axis.stack is None else {0, slot.axis.view_dim}
        others = [d for d in range(view.dim()) if d not in kept]
        positions = view.abs().amax(others) if others else view.abs()
        result = merge_channels(result, slot, positions.flatten().double().cpu())
    return result
