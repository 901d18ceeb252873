"""What is said of a config to tools that find what takes a scale themselves."""

from __future__ import annotations

from autoquant.config.format import Config, SmoothingKind
from autoquant.recipes.pairs import Refusal


def in_use(config: Config, no_pairs: str, no_spaces: str) -> list[Refusal]:
    """Every group and space that is on, with the reason why the tool is not told of it."""
    section = config.smoothing
    groups = [
        Refusal(group.name, no_pairs)
        for group in section.groups
        if (group.enable if group.enable is not None else section.enable and group.kind is not SmoothingKind.QUERY_KEY)
    ]
    spaces = [
        Refusal(f"{space.kind} {space.name}", no_spaces)
        for space in config.rotation.spaces
        if (config.rotation.enable if space.enable is None else space.enable)
    ]
    return [*groups, *spaces]


def in_float(config: Config) -> list[str]:
    """Linears that stay in floating point: those excluded, heads and routers."""
    kept = [linear.path for linear in config.model.linears if linear.role != "linear"]
    off = [entry.path for entry in config.quantization.overrides if entry.strategy is None and entry.layers is None]
    return list(dict.fromkeys([*config.quantization.exclude, *kept, *off]))
