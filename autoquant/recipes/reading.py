"""Other tools' recipes, read: the mappings in them, as they were written."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from autoquant.errors import AutoQuantError
from autoquant.recipes.matching import RE, WrittenMapping

TOOLS = ("llm-compressor", "quark", "brevitas")
UNPAIRED = ("modelopt", "auto-round")
_SCALERS = ("SmoothQuantModifier", "AWQModifier")
_QUARK = ("smooth", "awq", "autosmoothquant")
_NAMES = {"llm-compressor": " or ".join(_SCALERS), "quark": " or ".join(_QUARK), "brevitas": "PAIRS"}


def read_recipe(path: Path, tool: str) -> list[WrittenMapping]:
    """The smoothing mappings of a recipe file. Raises AutoQuantError for a file that holds none."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise AutoQuantError(f"{path}: {getattr(error, 'strerror', None) or 'not UTF-8 text'}") from error
    try:
        return mappings_of(text, tool, path.suffix)
    except AutoQuantError as error:
        raise AutoQuantError(f"{path}: {error.message}") from error


def mappings_of(text: str, tool: str, suffix: str = "") -> list[WrittenMapping]:
    """The mappings in the text of a recipe, JSON where the ``suffix`` says so. Raises AutoQuantError."""
    if tool in UNPAIRED:
        raise AutoQuantError(f"recipes of '{tool}' hold no pairs: there is nothing to import or to judge")
    if tool == "brevitas":
        found = list(_of_brevitas(text))
    else:
        try:
            content = json.loads(text) if suffix.lower() == ".json" else yaml.safe_load(text)
        except (ValueError, RecursionError, yaml.YAMLError) as error:
            raise AutoQuantError(f"neither JSON nor YAML: {str(error).splitlines()[0]}") from error
        found = mappings_in(content, tool)
    if not found:
        raise AutoQuantError(f"no mappings of {_NAMES.get(tool, tool)}")
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
                alpha = _alpha(value.get("smoothing_strength"))
                for entry in _entries(value, "mappings"):
                    yield replace(_llm_compressor(entry, key), alpha=alpha)
            else:
                yield from _of_modifiers(value)
    elif isinstance(content, list):
        for entry in content:
            yield from _of_modifiers(entry)


def _entries(section: Mapping[str, Any], key: str) -> list[Any]:
    """A list of mappings. Raises AutoQuantError for anything else."""
    found = section.get(key)
    if found is None:
        return []
    if not isinstance(found, list):
        raise AutoQuantError(f"{key}: expected a list, not {found!r:.40}")
    return found


def _alpha(value: Any) -> float | None:
    """SmoothQuant's strength; None where nothing is said. Raises AutoQuantError for what is none."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise AutoQuantError(f"a strength of {value!r:.40}: expected a number from 0 to 1")
    return float(value)


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
    for name in (smooth, *balance):
        _check_expression(name)
    return WrittenMapping(smooth, tuple(balance), layers, modifier, observed)


def _check_expression(name: str) -> None:
    if name.startswith(RE):
        try:
            re.compile(name.removeprefix(RE))
        except re.error as error:
            raise AutoQuantError(f"{name!r:.80} is no regular expression: {error}") from error


def _of_quark(content: Any) -> Iterator[WrittenMapping]:
    sections = content.get("algo_config", content) if isinstance(content, Mapping) else content
    for section in [sections] if isinstance(sections, Mapping) else sections if isinstance(sections, list) else []:
        if not isinstance(section, Mapping) or section.get("name") not in _QUARK:
            continue
        layers = section.get("model_decoder_layers")
        if not isinstance(layers, str) or not layers:
            raise AutoQuantError("model_decoder_layers: expected the name of a module list, as 'model.layers'")
        name, alpha = str(section["name"]), _alpha(section.get("alpha"))
        for entry in _entries(section, "scaling_layers"):
            if not isinstance(entry, Mapping):
                raise AutoQuantError(f"scaling_layers: {entry!r:.80}: expected prev_op, layers and inp")
            found = _mapping(entry.get("prev_op"), entry.get("layers"), layers, name, entry.get("inp") or "")
            yield replace(found, alpha=alpha)


def _of_brevitas(text: str) -> Iterator[WrittenMapping]:
    """The pairs in the Python that is written for Brevitas: read, never run."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError) as error:
        raise AutoQuantError(f"no Python: {error}") from error
    for node in tree.body:
        if isinstance(node, ast.Assign) and [getattr(target, "id", None) for target in node.targets] == ["PAIRS"]:
            try:
                pairs = ast.literal_eval(node.value)
            except ValueError as error:
                raise AutoQuantError("PAIRS: expected a list of names, nothing to be computed") from error
            for entry in pairs if isinstance(pairs, list) else []:
                if not isinstance(entry, tuple) or len(entry) != 2:
                    raise AutoQuantError(f"PAIRS: {entry!r:.80}: expected (source, (sink, ...))")
                yield _mapping(entry[0], entry[1])
