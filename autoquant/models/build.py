"""Modules with inputs to call them by: at full size on the meta device, or wherever a small one is wanted."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch

from autoquant.models.inputs import Inputs, make_inputs, reads_text, runs_on, takes_media
from autoquant.models.sizes import fewer_positions, shorter_windows
from autoquant.models.source import (
    LoadedModel,
    ModelSource,
    build_module,
    call_factory,
    depths,
    layer_count,
    limit_depth,
    limit_layers,
    sub_configs,
)

META = torch.device("meta")
_MOST_TOKENS = 256
"""A trace keeps a label for each element of each tensor; what is found does not depend on how many tokens there are."""


def build_meta(source: ModelSource) -> LoadedModel:
    """The full-size module on the meta device, without weights, and three tokens of input, or as many as fill two of
    the windows that it makes one of, and do not end with one.

    Configurations: float32, no cache, scaled-dot-product attention where the class takes it and eager attention
    elsewhere. Factories are called with floating-point tensors on the meta device and integers for real. A model that
    takes images or sound comes with small ones, and with a version of itself (``short``) whose tables of positions are
    of their size; one with windows with a version whose windows are short.
    """
    if source.config is None:
        return call_factory(source, META)
    module = build_module(source, source.config, META, torch.float32)
    windows = shorter_windows(source.config)
    if not takes_media(module):
        if not windows:
            return with_inputs(module, META, torch.float32, (1, 3))
        shorter = build_module(source, changed(source.config, windows), META, torch.float32)
        return replace(
            with_inputs(shorter, META, torch.float32, (1, 5)), module=module, config=module.config, short=shorter
        )
    config = changed(source.config, fewer_positions(source.config))
    inputs = _probe(source, config)
    short = build_module(source, config, META, torch.float32) if inputs.known or _media(inputs) else None
    if short is not None and not runs_on(short, inputs):  # each layer of a tower may halve what it is given
        inputs = make_inputs(short, META, (1, 3), torch.float32)
    return LoadedModel(
        module, (), inputs.kwargs, module.config, inputs.known, inputs.missing, short, unseen=inputs.unseen
    )


def build(
    source: ModelSource, config: Any, device: torch.device, dtype: torch.dtype, without: Collection[str] = ()
) -> LoadedModel:
    """A model of ``config``, which is copied, with three tokens of input. Raises AutoQuantError."""
    return with_inputs(build_module(source, config, device, dtype), device, dtype, (1, 3), without=without)


def with_inputs(
    module: Any,
    device: torch.device,
    dtype: torch.dtype,
    shape: tuple[int, int],
    seed: int = 0,
    *,
    without: Collection[str] = (),
) -> LoadedModel:
    """A model of transformers with inputs of ``shape`` (sequences, tokens), those in ``without`` left out."""
    inputs = make_inputs(module, device, shape, dtype, seed, without=without)
    return LoadedModel(module, (), inputs.kwargs, module.config, inputs.known, inputs.missing, unseen=inputs.unseen)


def changed(config: Any, changes: Mapping[str, Any]) -> Any:
    """A copy with new values by dotted path; a stack that becomes shorter takes its per-layer lists with it."""
    config = copy.deepcopy(config)
    parts = sub_configs(config)
    for name, value in changes.items():
        path, _, leaf = name.rpartition(".")
        if leaf in depths(parts[path]):
            limit_depth(parts[path], leaf, value)
        else:
            setattr(parts[path], leaf, value)
    return config


def on_text(loaded: LoadedModel, why: str) -> LoadedModel | None:
    """A model that cannot be captured on its images or sound, which ``why`` says, with text alone.

    None where it has been given nothing else, or takes no text alone.
    """
    module: Any = loaded.short or loaded.module
    media = [value for value in loaded.kwargs.values() if value.is_floating_point()]
    if loaded.config is None or not media or not takes_media(module) or not reads_text(module):
        return None
    shape = (1, 3) if media[0].is_meta else (2, 8)
    inputs = make_inputs(module, media[0].device, shape, media[0].dtype, media=False)
    return replace(loaded, kwargs=inputs.kwargs, known=inputs.known, uncaptured=why)


def _probe(source: ModelSource, config: Any) -> Inputs:
    """Inputs for ``config``, found on two layers of it where that works: they hardly ever depend on its depth."""
    found = long = None
    for shallow in (True, False):
        tried = two_layers(config) if shallow else config
        try:
            module = build_module(source, tried, META, torch.float32)
        except Exception:  # a class may count on its layers; then the whole depth has to do
            if not shallow:
                raise
            continue
        if long is not None and runs_on(module, long):  # nothing shorter at its whole depth
            break
        inputs = make_inputs(module, META, (1, 3), torch.float32)
        longest = max((v.shape[1] for n, v in inputs.kwargs.items() if n.endswith("input_ids")), default=0)
        if longest > _MOST_TOKENS:
            long = inputs
            text = make_inputs(module, META, (1, 3), torch.float32, media=False)
            reason = f"it takes {longest} tokens, more than {_MOST_TOKENS}"
            inputs = Inputs(text.kwargs, missing={name: reason for name in _media(inputs)}, unseen=True)
        found = inputs if found is None or len(inputs.missing) < len(found.missing) else found
        if not found.missing:
            break
    assert found is not None
    return found


def _media(inputs: Inputs) -> list[str]:
    return [name for name, value in inputs.kwargs.items() if value.is_floating_point()]


def two_layers(config: Any) -> Any:
    """A copy of which every stack has two layers at most."""
    config = copy.deepcopy(config)
    for part in sub_configs(config).values():
        for name in depths(part):
            limit_depth(part, name, 2)
    if layer_count(config) is not None:
        limit_layers(config, 2)
    return config
