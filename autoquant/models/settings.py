"""What a configuration says that may change what a model computes, and that no shape of a parameter shows."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from autoquant.models.source import sub_configs

_NO_MATTER = re.compile(
    r"^_|token_id|token_index|version|^architectures$|dtype|^id2label$|^label2id$|initializer|init_std|dropout"
    r"|^use_cache$|^output_|return_dict|^tie_|^problem_type$|^auto_map$|^quantization_config$|^tokenizer|^task_specific"
)
"""Fields that name, train, store or sample: the logits are the same function of the parameters whatever they say."""


def settings_of(config: Any) -> dict[str, str]:
    """Each field by its dotted path, as text; those that are None are not there, since a class may lack them."""
    found = {}
    for path, part in sub_configs(config).items():
        for name, value in vars(part).items():
            if value is not None and not _NO_MATTER.search(name) and not hasattr(value, "to_dict"):
                where = f"{path}.{name}" if path else name
                found[where] = json.dumps(_plain(value), sort_keys=True, default=str)
    return found


def settings_digest(config: Any) -> str:
    """``'sha256:…'`` of :func:`settings_of`: two models of one structure and one digest have one graph."""
    lines = sorted(f"{name} {value}" for name, value in settings_of(config).items())
    return "sha256:" + hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _plain(value: Any) -> Any:
    """Whole numbers as integers, which a file may write as floats; keys as text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
