"""Norms whose gain is 1 + weight, as other tools know them."""

from __future__ import annotations

import json
from functools import lru_cache
from importlib.resources import files


@lru_cache
def offset_norms(tool: str) -> frozenset[str]:
    """Classes of norms of which ``tool`` knows that the gain is 1 + weight, at the version in tools.json."""
    content = json.loads(files("autoquant.recipes").joinpath("tools.json").read_text())
    return frozenset(content[tool].get("offset_norms", []))
