"""Activation maxima of smoothing groups, from one forward sweep over calibration data."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from autoquant.calibration.observers import InputMaxima
from autoquant.errors import AutoQuantError
from autoquant.executor.resolved import Resolved
from autoquant.executor.scales import merge_channels
from autoquant.quantizer.linear import Maxima


def collect_activation_maxima(
    model: nn.Module,
    resolved: Resolved,
    batches: Iterable[Tensor],
    progress: Callable[[int], None] | None = None,
) -> dict[tuple[str, int | None], Tensor]:
    """Largest absolute activation per channel at the targets of every selected group.

    ``batches``: token ids ``[sequences, length]``. ``progress(done)`` is called after each batch. Returns float64
    ``[channels]`` per (group name, layer); tied channels are merged by the maximum. Raises AutoQuantError where a
    target was never reached, naming it.
    """
    names = {slot.name for group in resolved.groups for slot in group.targets}
    observer = InputMaxima({name: model.get_parameter(name) for name in names})
    device = next(model.parameters()).device
    with torch.no_grad(), observer:
        for done, batch in enumerate(batches, 1):
            model(batch.to(device))
            if progress is not None:
                progress(done)
    return group_maxima(resolved, observer.maxima)


def group_maxima(resolved: Resolved, maxima: Maxima) -> dict[tuple[str, int | None], Tensor]:
    """Float64 ``[channels]`` per selected group from the inputs' maxima by weight, tied channels merged.

    Raises AutoQuantError, naming it, where a target has none.
    """
    result = {}
    for group in resolved.groups:
        channels = torch.zeros(group.channels, dtype=torch.float64)
        for slot in group.targets:
            if slot.name not in maxima:
                raise AutoQuantError(f"{group.name}: {slot.name} multiplied nothing in the calibration sweep")
            positions = maxima[slot.name].flatten().double().cpu()
            if len(positions) != len(slot.axis.channels):
                positions = positions.reshape(-1, len(slot.axis.channels)).amax(0)
            channels = merge_channels(channels, slot, positions)
        result[group.name, group.layer] = channels
    return result
