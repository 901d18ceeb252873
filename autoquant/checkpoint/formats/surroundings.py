"""What every folder holds beside its tensors: transformers' own files, and the config that was used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from autoquant.checkpoint.formats import Contents
from autoquant.checkpoint.provenance import CONFIG
from autoquant.config.file import config_text
from autoquant.models.tokenizer import load_tokenizer


def write_surroundings(folder: Path, contents: Contents, **settings: Any) -> None:
    """Write them; ``settings`` are added to ``config.json``. Raises OSError as the system does."""
    (folder / CONFIG).write_text(config_text(contents.config), encoding="utf-8")
    contents.model.config.save_pretrained(folder)
    if settings:
        file = folder / "config.json"
        content = {**json.loads(file.read_text(encoding="utf-8")), **settings}
        file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if contents.model.generation_config is not None:
        # As it is: save_pretrained refuses what many released models have (sampling values without sampling).
        contents.model.generation_config.to_json_file(folder / "generation_config.json")
    if contents.tokenizer is not None:
        contents.tokenizer.save_pretrained(folder)
    for file in contents.processor:
        if not (folder / file.name).exists():  # a template is the tokenizer's too
            (folder / file.name).write_bytes(file.read_bytes())


def stored_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer in a folder; None where it was written without one. Raises AutoQuantError for a damaged one."""
    if not (folder / "tokenizer_config.json").is_file():
        return None
    return load_tokenizer(folder, trust_remote_code=trust_remote_code)
