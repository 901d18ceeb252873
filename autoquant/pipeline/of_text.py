"""A config for what is calibrated: the towers of a model that takes images or sound stay as they are where text alone
goes through it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import nn

from autoquant.config.format import Config, Linear, SmoothingGroup, SmoothingKind, edited
from autoquant.config.layers import fill, layer_numbers, module_of
from autoquant.config.spelling import listed
from autoquant.library_patches import marked_as_compiling
from autoquant.models.inputs import reads_text, run_without_weights, takes_media
from autoquant.models.reading import Example, read
from autoquant.quantizer.strategies import plan_linears

_TOKENS = 8


def of_text(
    config: Config, model: nn.Module, examples: Sequence[Example] = (), *, cached: bool = False
) -> tuple[Config, tuple[str, ...]]:
    """``config`` without the linears and groups that neither text nor an example reaches, and these linears' paths.

    What only images or sound go through cannot be calibrated by text: its linears are excluded, its groups are off, by
    the knobs that a person would set. So are its groups that scale keys and, where the cache has static scales
    (``cached``), values: what is cached is known by the number of a layer, and a tower has layers of the same numbers.
    ``model`` may be on the meta device. A model of text alone, and one whose code does not run without values, is taken
    as it is.
    """
    called = _called(model, examples) if takes_media(model) else None
    if called is None:
        return config, ()
    by_text, by_any = called
    kinds = {SmoothingKind.QUERY_KEY, *([SmoothingKind.LINEAR_LINEAR] if cached else [])}

    def is_off(group: SmoothingGroup) -> bool:
        return (by_text if group.kind in kinds else by_any).isdisjoint(_targets(group))

    idle = {linear.path for linear in config.model.linears if by_any.isdisjoint(_paths(linear))}
    groups = tuple(
        edited(group, enable=False, overrides=()) if is_off(group) else group for group in config.smoothing.groups
    )
    excluded = dict.fromkeys((*config.quantization.exclude, *sorted(idle)))
    changed = edited(
        config,
        smoothing=edited(config.smoothing, groups=groups),
        quantization=edited(config.quantization, exclude=tuple(excluded)),
    )
    return changed, tuple(sorted(idle))


def of_text_said(
    config: Config, model: nn.Module, examples: Sequence[Example] = (), *, cached: bool = False, stacklevel: int = 2
) -> Config:
    """What :func:`of_text` makes of a config, with a warning that names what is left as it is."""
    changed, idle = of_text(config, model, examples, cached=cached)
    if idle:
        reached = "nothing that calibrates reaches it" if examples else "text does not reach it"
        said = f"neither smoothed nor quantized, since {reached}: {listed(idle)}"
        warnings.warn(said, stacklevel=stacklevel + 1)
    return changed


def quantized_towers(config: Config, model: nn.Module) -> tuple[str, ...]:
    """The linears that ``config`` quantizes and text does not reach, as far as that can be told, by their paths."""
    planned = plan_linears(config)
    if not (planned and takes_media(model) and reads_text(model)):
        return ()
    called = _called(model, ())
    return () if called is None else tuple(linear.path for linear in planned if linear.path not in called[0])


def _called(model: nn.Module, examples: Sequence[Example]) -> tuple[set[str], set[str]] | None:
    """The paths of the modules that a pass over token ids, and one over these or an example, calls, and of their
    parameters; None where it cannot be followed without values, and where there is nothing to follow.
    """
    if not (reads_text(model) or examples):
        return None
    alike = {frozenset(example.inputs): example for example in examples}  # one of each kind
    called: set[str] = set()
    by_text: set[str] = set()
    device = next(model.parameters()).device

    def note(path: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        called.add(path)
        called.update(f"{path}.{name}" for name in module._parameters)  # which may be matrices of their own

    with ExitStack() as hooks, torch.no_grad():
        for path, module in model.named_modules():
            hooks.callback(module.register_forward_pre_hook(partial(note, path)).remove)
        try:
            if reads_text(model):
                with marked_as_compiling():  # masks are not looked at
                    read(model, torch.zeros(1, _TOKENS, dtype=torch.int64, device=device))
                by_text |= called
        except Exception:  # it runs the model's own code, which may ask for values that there are not: nothing is known
            return None
        try:
            for example in alike.values():
                if device.type == "meta":
                    run_without_weights(model, dict(example.inputs))
                else:
                    read(model, example.to(device))
        except Exception:  # as above: an image may reach everything
            for path, module in model.named_modules():
                note(path, module, ())
    return by_text, called


def _paths(linear: Linear) -> Iterator[str]:
    yield from (
        [linear.path] if linear.layers is None else (fill(linear.path, layer) for layer in layer_numbers(linear.layers))
    )


def _targets(group: SmoothingGroup) -> Iterator[str]:
    layers = [None] if group.layers is None else layer_numbers(group.layers)
    for slot in group.targets:
        path = module_of(slot.path)
        yield from (path if layer is None else fill(path, layer) for layer in layers)
