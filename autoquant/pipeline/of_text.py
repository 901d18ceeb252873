"""A config for what text alone goes through: the towers of a model that takes images or sound stay as they are."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import nn

from autoquant.config.format import Config, Linear, SmoothingGroup, edited
from autoquant.config.layers import fill, layer_numbers, module_of
from autoquant.config.spelling import listed
from autoquant.library_patches import marked_as_compiling
from autoquant.models.inputs import takes_media
from autoquant.models.reading import read

_TOKENS = 8


def of_text(config: Config, model: nn.Module) -> tuple[Config, tuple[str, ...]]:
    """``config`` without the linears and groups that no token reaches, and the paths of those linears.

    What only images or sound go through cannot be calibrated by text: its linears are excluded, its groups are off, by
    the knobs that a person would set. ``model`` may be on the meta device. A model of text alone, and one whose code
    does not run without values, is taken as it is.
    """
    called = _called(model) if takes_media(model) else None
    if called is None:
        return config, ()
    idle = {linear.path for linear in config.model.linears if called.isdisjoint(_paths(linear))}
    groups = tuple(
        edited(group, enable=False, overrides=()) if called.isdisjoint(_targets(group)) else group
        for group in config.smoothing.groups
    )
    excluded = dict.fromkeys((*config.quantization.exclude, *sorted(idle)))
    changed = edited(
        config,
        smoothing=edited(config.smoothing, groups=groups),
        quantization=edited(config.quantization, exclude=tuple(excluded)),
    )
    return changed, tuple(sorted(idle))


def of_text_said(config: Config, model: nn.Module, stacklevel: int = 2) -> Config:
    """What :func:`of_text` makes of a config, with a warning that names what is left as it is."""
    changed, idle = of_text(config, model)
    if idle:
        said = f"neither smoothed nor quantized, since text does not reach it: {listed(idle)}"
        warnings.warn(said, stacklevel=stacklevel + 1)
    return changed


def _called(model: nn.Module) -> set[str] | None:
    """The paths of the modules that a pass over token ids calls; None where it cannot be followed without values."""
    called: set[str] = set()
    device = next(model.parameters()).device

    def note(path: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        called.add(path)

    with ExitStack() as hooks, torch.no_grad(), marked_as_compiling():  # masks are not looked at
        for path, module in model.named_modules():
            hooks.callback(module.register_forward_pre_hook(partial(note, path)).remove)
        try:
            read(model, torch.zeros(1, _TOKENS, dtype=torch.int64, device=device))
        except Exception:  # it runs the model's own code, which may ask for values that there are not: nothing is known
            return None
    return called


def _paths(linear: Linear) -> Iterator[str]:
    yield from (
        [linear.path] if linear.layers is None else (fill(linear.path, layer) for layer in layer_numbers(linear.layers))
    )


def _targets(group: SmoothingGroup) -> Iterator[str]:
    layers = [None] if group.layers is None else layer_numbers(group.layers)
    for slot in group.targets:
        path = module_of(slot.path)
        yield from (path if layer is None else fill(path, layer) for layer in layers)
