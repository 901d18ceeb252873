"""Reads the quantization symmetries of any causal language model off its graph, and proves them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from autoquant.version import __version__

if TYPE_CHECKING:
    from autoquant.api import (
        analyze,
        apply,
        audit,
        check,
        compare,
        convert,
        evaluate,
        export_recipe,
        import_recipe,
        init_group,
        load,
        load_config,
        quantize,
        save_config,
        search,
        serve_check,
        verify,
        write_page,
    )
    from autoquant.errors import AutoQuantError

__all__ = [
    "AutoQuantError",
    "__version__",
    "analyze",
    "apply",
    "audit",
    "check",
    "compare",
    "convert",
    "evaluate",
    "export_recipe",
    "import_recipe",
    "init_group",
    "load",
    "load_config",
    "quantize",
    "save_config",
    "search",
    "serve_check",
    "verify",
    "write_page",
]


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is asked for (PEP 562). No module of the package has a name of ``__all__``."""
    if name not in __all__:
        raise AttributeError(f"module 'autoquant' has no attribute '{name}'")
    where = "autoquant.errors" if name == "AutoQuantError" else "autoquant.api"
    return getattr(importlib.import_module(where), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
