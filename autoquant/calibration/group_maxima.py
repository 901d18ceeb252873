"""Activation maxima of smoothing groups, from one forward sweep over calibration data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from autoquant.calibration.observers import sweep
from autoquant.calibration.runner import Progress, Runner, silent, whole
from autoquant.errors import AutoQuantError
from autoquant.executor.resolved import Resolved
from autoquant.executor.scales import merge_channels
from autoquant.io.files import finished_file
from autoquant.models.inputs import takes_media
from autoquant.models.reading import Batch
from autoquant.quantizer.linear import Maxima

GroupMaxima = Mapping[tuple[str, int | None], Tensor]
"""(group name, layer or None) -> largest absolute activation per channel at the group's targets, ``[channels]``."""


def collect_activation_maxima(
    model: nn.Module,
    resolved: Resolved,
    batches: Sequence[Batch],
    *,
    runner: Runner = whole,
    progress: Progress = silent,
) -> dict[tuple[str, int | None], Tensor]:
    """Largest absolute activation per channel at the targets of every selected group.

    ``batches``: token ids ``[sequences, length]``, or examples. Returns float64 ``[channels]`` per (group name, layer);
    tied channels are merged by the maximum. Groups of which nothing is reached in a model that takes images or sound
    (by text, of its towers) are left out. Raises AutoQuantError where another target was never reached, naming it.
    """
    names = dict.fromkeys(slot.name for group in resolved.groups for slot in group.targets)
    maxima = sweep(model, names, batches, cache=False, runner=runner, progress=progress).inputs
    if takes_media(model):
        reached = tuple(group for group in resolved.groups if any(slot.name in maxima for slot in group.targets))
        resolved = replace(resolved, groups=reached)
    return group_maxima(resolved, maxima)


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


def save_maxima(path: Path, maxima: GroupMaxima) -> None:
    """Keep groups' maxima in a safetensors file, for :func:`load_maxima`. Raises AutoQuantError where it cannot be."""
    tensors = {name if layer is None else f"{name}@{layer}": tensor for (name, layer), tensor in maxima.items()}
    with finished_file(path, force=True) as temporary:
        save_file(tensors, temporary)


def load_maxima(path: Path) -> dict[tuple[str, int | None], Tensor]:
    """The maxima that :func:`save_maxima` kept. Raises AutoQuantError for anything else."""
    try:
        stored = load_file(path)
        split = {key: key.rpartition("@") for key in stored}
        return {(name, int(layer)) if name else (key, None): stored[key] for key, (name, _, layer) in split.items()}
    except (OSError, SafetensorError, ValueError) as error:
        raise AutoQuantError(f"{path}: no activation maxima ({error}); make some with --save-maxima") from error
