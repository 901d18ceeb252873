"""What a configuration says that may change what a model computes, and that no shape of a parameter shows."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from autoquant.models.source import sub_configs

TYPE = "model_type"

_NO_MATTER = re.compile(
    r"^_|token_id|token_index|version|^architectures$|dtype|^id2label$|^label2id$|^label_names$|initializer|init_std"
    r"|dropout|^use_cache$|^output_|return_dict|^tie_|^problem_type$|^auto_map$|^quantization_config$|^tokenizer"
    r"|^task_specific|^ignore_keys_at_"
)
"""Fields that name, train, store, check or sample: the logits are the same function of the parameters whatever they
say."""


def settings_of(config: Any) -> dict[str, str]:
    """Each field by its dotted path, as text; those that are None are not there, since a class may lack them.

    Among them the type of each part, whether the class says it, as it does of a configuration made in memory, or the
    configuration itself, as one read from a file does.
    """
    found = {}
    for path, part in sub_configs(config).items():
        fields = {**vars(part), TYPE: getattr(part, TYPE, None) or None}
        for name, value in fields.items():
            if value is not None and not _NO_MATTER.search(name) and not hasattr(value, "to_dict"):
                where = f"{path}.{name}" if path else name
                found[where] = json.dumps(_plain(value), sort_keys=True, default=str)
    return found


def settings_digest(config: Any) -> str:
    """``'sha256:…'`` of :func:`settings_of`: two models of one structure and one digest have one graph."""
    return _digest(settings_of(config))


def settings_digests(config: Any) -> tuple[str, ...]:
    """What certificates record of ``config``: :func:`settings_digest`, and what was written of a configuration made in
    memory before, without types; that one is not taken of a configuration with parts, whose types nobody else compares.
    """
    settings = settings_of(config)
    untyped = {name: value for name, value in settings.items() if name != TYPE}
    return tuple(_digest(form) for form in ((settings,) if len(sub_configs(config)) > 1 else (settings, untyped)))


def _digest(settings: Mapping[str, str]) -> str:
    lines = sorted(f"{name} {value}" for name, value in settings.items())
    return "sha256:" + hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _plain(value: Any) -> Any:
    """Whole numbers as integers, which a file may write as floats; keys as text; a set in order, since that of its
    text changes from process to process.
    """
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted((_plain(item) for item in value), key=str)
    return int(value) if isinstance(value, float) and value.is_integer() else value
