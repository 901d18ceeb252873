"""Other tools' recipes, read: the mappings in them, as they were written."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from autoquant.errors import AutoQuantError
from autoquant.recipes.matching import WrittenMapping

TOOLS = ("llm-compressor", "quark")
_SCALERS = ("SmoothQuantModifier", "AWQModifier")
_QUARK = ("smooth", "awq", "autosmoothquant")


def read_recipe(path: Path, tool: str) -> list[WrittenMapping]:
    """The smoothing mappings of a recipe file. Raises AutoQuantError for a file that holds none."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise AutoQuantError(f"{path}: {getattr(error, 'strerror', None) or 'not UTF-8 text'}") from error
    try:
        content = json.loads(text) if path.suffix.lower() == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise AutoQuantError(f"{path}: neither JSON nor YAML: {str(error).splitlines()[0]}") from error
    try:
        found = mappings_in(content, tool)
    except AutoQuantError as error:
        raise AutoQuantError(f"{path}: {error.message}") from error
    if not found:
        raise AutoQuantError(f"{path}: no mappings of {' or '.join(_SCALERS if tool == 'llm-compressor' else _QUARK)}")
    return found


def mappings_in(content: Any, tool: str) -> list[WrittenMapping]:
    """The mappings in a parsed recipe. Raises AutoQuantError for one that is not as the tool writes it."""
    if tool == "llm-compressor":
        return list(_of_modifiers(content))
    if tool == "quark":
        return list(_of_quark(content))
    raise AutoQuantError(f"no recipes of '{tool}' are read; known: {', '.join(TOOLS)}")


def _of_modifiers(content: Any) -> Iterator[WrittenMapping]:
    """Those below any key that is a modifier's name: stages and groups have names of their own."""
    if isinstance(content, Mapping):
        for key, value in content.items():
            if key in _SCALERS and isinstance(value, Mapping):
                for entry in value.get("mappings") or []:
                    yield _llm_compressor(entry, key)
            else:
                yield from _of_modifiers(value)
    elif isinstance(content, list):
        for entry in content:
            yield from _of_modifiers(entry)


def _llm_compressor(entry: Any, modifier: str) -> WrittenMapping:
    """``[[balance, ...], smooth]``, or a mapping with these two keys."""
    if isinstance(entry, Mapping):
        smooth, balance = entry.get("smooth_layer", entry.get("smooth_layers")), entry.get("balance_layers")
        return _mapping(smooth, balance, modifier=modifier, observed=entry.get("activation_hook_target") or "")
    if isinstance(entry, list | tuple) and len(entry) == 2:
        return _mapping(entry[1], entry[0], modifier=modifier)
    raise AutoQuantError(f"mapping {entry!r:.80}: expected [[balance, ...], smooth]")


def _mapping(smooth: Any, balance: Any, layers: str = "", modifier: str = "", observed: Any = "") -> WrittenMapping:
    balance = [balance] if isinstance(balance, str) else balance
    if (
        not isinstance(smooth, str)
        or not isinstance(balance, list | tuple)
        or not all(isinstance(b, str) for b in balance)
    ):
        raise AutoQuantError(f"mapping {smooth!r:.40} <- {balance!r:.80}: expected one name and a list of names")
    if not balance:
        raise AutoQuantError(f"mapping {smooth!r:.40}: no layer undoes it")
    if not isinstance(observed, str):
        raise AutoQuantError(f"mapping {smooth!r:.40}: where activations are looked at: expected a name")
    return WrittenMapping(smooth, tuple(balance), layers, modifier, observed)


def _of_quark(content: Any) -> Iterator[WrittenMapping]:
    sections = content.get("algo_config", content) if isinstance(content, Mapping) else content
    for section in [sections] if isinstance(sections, Mapping) else sections or []:
        if not isinstance(section, Mapping) or section.get("name") not in _QUARK:
            continue
        layers = section.get("model_decoder_layers")
        if not isinstance(layers, str) or not layers:
            raise AutoQuantError("model_decoder_layers: expected the name of a module list, as 'model.layers'")
        for entry in section.get("scaling_layers") or []:
            if not isinstance(entry, Mapping):
                raise AutoQuantError(f"scaling_layers: {entry!r:.80}: expected prev_op, layers and inp")
            name = str(section["name"])
            yield _mapping(entry.get("prev_op"), entry.get("layers"), layers, name, entry.get("inp") or "")
