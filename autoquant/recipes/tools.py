"""The tools that a config is written for."""

from __future__ import annotations

import importlib
from types import ModuleType

from autoquant.config.format import Config
from autoquant.config.spelling import did_you_mean_or
from autoquant.errors import AutoQuantError
from autoquant.recipes.pairs import Refusal

TOOLS = {
    "llm-compressor": "llm_compressor",
    "quark": "quark",
    "modelopt": "modelopt",
    "brevitas": "brevitas",
    "auto-round": "auto_round",
}
"""A tool is a module of this package with ``ALGORITHMS``, the first of which is its default, and ``recipe``."""


def write_recipe(config: Config, tool: str, algorithm: str | None = None) -> tuple[str, list[Refusal]]:
    """The text for ``tool``, and what of the config it cannot say. Raises AutoQuantError for an unknown tool."""
    module = tool_named(tool)
    text, refused = module.recipe(config, algorithm or module.ALGORITHMS[0])
    return text, refused


def tool_named(tool: str) -> ModuleType:
    """The module of a tool. Raises AutoQuantError, with the nearest name."""
    if tool not in TOOLS:
        raise AutoQuantError(f"no tool '{tool}'{did_you_mean_or(tool, list(TOOLS))}")
    return importlib.import_module(f"autoquant.recipes.{TOOLS[tool]}")
