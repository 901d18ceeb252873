"""Regenerates the committed recipes: ``python -m autoquant.survey.recipes [FOLDER]``.

For each config of the folder one recipe for each tool that takes pairs, below ``recipes/``: a file for LLM Compressor,
one for Quark, each as the tool reads it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from autoquant.config.file import load_config
from autoquant.io.files import write_text
from autoquant.recipes.tools import write_recipe
from autoquant.survey.generate import FOLDER, names_in

RECIPES = "recipes"
ENDINGS = {"llm-compressor": ".llm-compressor.yaml", "quark": ".quark.json"}
COMMAND = "python -m autoquant.survey.recipes"


def recipes_of(folder: Path) -> Iterator[tuple[Path, str]]:
    """Where each recipe of the configs in ``folder`` is kept, and its text."""
    for name in names_in(folder):
        config = load_config(folder / f"{name}.json")
        for tool, ending in ENDINGS.items():
            yield folder / RECIPES / f"{name}{ending}", write_recipe(config, tool)[0]


def main(folder: Path = FOLDER) -> None:
    """Write all of them."""
    for path, text in recipes_of(folder):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text, force=True)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
