"""The code that a checkpoint brings along, for models that are no classes of transformers."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any


def copy_code(model: Any, folder: Path) -> None:
    """Put the code of a model into a folder that has its ``config.json``.

    Of a model of transformers' own classes there is none: ``auto_map``, which would name it, goes from the file then.
    """
    files = _files(model)
    for file in files:
        shutil.copyfile(file, folder / file.name)
    settings = folder / "config.json"
    if files or not settings.is_file():
        return
    content = json.loads(settings.read_text(encoding="utf-8"))
    if content.pop("auto_map", None) is not None:
        settings.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _files(model: Any) -> list[Path]:
    """The modules of a model's class and its configuration's, with those beside them that they import.

    transformers copies exactly these into a package of its own, by what is in them.
    """
    from transformers.utils.hub import TRANSFORMERS_DYNAMIC_MODULE_NAME

    found: dict[str, Path] = {}
    for part in (model, getattr(model, "config", None)):
        module = type(part).__module__
        file = getattr(sys.modules.get(module), "__file__", None)
        if file is not None and module.split(".")[0] == TRANSFORMERS_DYNAMIC_MODULE_NAME:
            found |= {path.name: path for path in Path(file).parent.glob("*.py") if path.name != "__init__.py"}
    return list(found.values())
