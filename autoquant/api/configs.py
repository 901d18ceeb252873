"""Configs in files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from autoquant.config.file import load_config as _load_config
from autoquant.config.file import save_config as _save_config
from autoquant.config.format import SCHEMA_NAME
from autoquant.config.jsonschema import schema_text
from autoquant.io.files import write_text

if TYPE_CHECKING:
    from autoquant.config.format import Config


def load_config(path: str | Path) -> Config:
    """Read and check a config file. Raises AutoQuantError for every problem in it."""
    return _load_config(Path(path))


def save_config(config: Config, path: str | Path, *, force: bool = False) -> None:
    """Write a config, whole or not at all; ``force`` replaces a file. Raises AutoQuantError.

    The schema is put beside it where its ``$schema`` says so: an editor completes and checks the file offline.
    """
    path = Path(path)
    _save_config(config, path, force=force)
    if config.schema_ in (None, SCHEMA_NAME):
        write_text(path.parent / SCHEMA_NAME, schema_text(), force=True)
