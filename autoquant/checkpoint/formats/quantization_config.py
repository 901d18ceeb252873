"""The section ``quantization_config`` of a ``config.json`` as compressed-tensors has it: symmetric int8, W8A8.

Only what we can run is read: int8 weights per tensor or per channel, int8 inputs, both symmetric. All else is left to
transformers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from autoquant.quantizer.strategies import Granularity

METHOD = "compressed-tensors"
FORM = "int-quantized"
LINEAR = "Linear"
"""The target of a group that is for all linears; those of several groups are named."""
REGEX = "re:"


@dataclass(frozen=True, slots=True)
class Group:
    """Linears that are quantized alike. ``targets``: names, regular expressions behind ``re:``, or ``Linear``."""

    weight_per_channel: bool
    activation: Granularity
    targets: tuple[str, ...]


def section_of(groups: Sequence[Group], ignore: Iterable[str]) -> dict[str, Any]:
    """The section for these groups; a group alone is for all linears, whatever its targets."""
    return {
        "quant_method": METHOD,
        "format": FORM,
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "ignore": list(ignore),
        "kv_cache_scheme": None,
        "config_groups": {
            f"group_{at}": {
                "targets": [LINEAR] if len(groups) == 1 else list(group.targets),
                "format": FORM,
                "weights": _arguments("channel" if group.weight_per_channel else "tensor"),
                "input_activations": _input_arguments(group.activation),
                "output_activations": None,
            }
            for at, group in enumerate(groups)
        },
    }


def groups_in(section: Any) -> tuple[Group, ...] | None:
    """The groups of a section; None where it is not all symmetric int8 weights and inputs."""
    if not isinstance(section, Mapping) or section.get("quant_method") != METHOD or section.get("kv_cache_scheme"):
        return None
    named = section.get("config_groups")
    if not isinstance(named, Mapping) or not named or section.get("transform_config"):
        return None
    groups = [_group(content, section) for content in named.values()]
    found = tuple(group for group in groups if group is not None)
    return found if len(found) == len(groups) else None


def group_for(groups: Sequence[Group], names: Iterable[str]) -> Group | None:
    """The group of a linear by any of its names: one that names it, else one that fits, else that of all linears."""
    known = tuple(names)
    for fits in (_is_named, _is_matched, _is_any):
        for group in groups:
            if any(fits(target, name) for target in group.targets for name in known):
                return group
    return None


def _is_named(target: str, name: str) -> bool:
    return target == name


def _is_matched(target: str, name: str) -> bool:
    return target.startswith(REGEX) and re.match(target.removeprefix(REGEX), name) is not None


def _is_any(target: str, name: str) -> bool:
    return target == LINEAR


def _group(content: Any, section: Mapping[str, Any]) -> Group | None:
    if not isinstance(content, Mapping) or (content.get("format") or section.get("format")) != FORM:
        return None
    weights, inputs = (content.get(key) or {} for key in ("weights", "input_activations"))
    targets = content.get("targets")
    if not _is_int8(weights) or not _is_int8(inputs) or not isinstance(targets, list) or weights.get("dynamic"):
        return None
    if content.get("output_activations") or weights.get("strategy") not in ("channel", "tensor"):
        return None
    granularity = {
        (False, "tensor"): Granularity.TENSOR_STATIC,
        (True, "tensor"): Granularity.TENSOR_DYNAMIC,
        (True, "token"): Granularity.TOKEN_DYNAMIC,
    }.get((inputs.get("dynamic") is True, str(inputs.get("strategy"))))
    if granularity is None:
        return None
    return Group(weights["strategy"] == "channel", granularity, tuple(map(str, targets)))


def _is_int8(arguments: Any) -> bool:
    if not isinstance(arguments, Mapping):
        return False
    return (arguments.get("num_bits"), arguments.get("type"), arguments.get("symmetric")) == (8, "int", True)


def _input_arguments(activation: Granularity) -> dict[str, Any]:
    if activation.is_static:
        return _arguments("tensor")
    return _arguments("token" if activation is Granularity.TOKEN_DYNAMIC else "tensor", dynamic=True, observer=None)


def _arguments(strategy: str, dynamic: bool = False, observer: str | None = "memoryless_minmax") -> dict[str, Any]:
    return {
        "num_bits": 8,
        "type": "int",
        "symmetric": True,
        "strategy": strategy,
        "dynamic": dynamic,
        "group_size": None,
        "block_structure": None,
        "actorder": None,
        "observer": observer,
        "observer_kwargs": {},
    }
