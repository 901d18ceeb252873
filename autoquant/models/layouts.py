"""What layouts of images and of sounds are made of: what the model names, its configuration's fields, and numbers."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

Values = dict[str, Tensor]
Fields = Mapping[str, Any]
Layout = Callable[[], Values]
"""Makes inputs of one way to lay out an image or a sound; whether the model runs on them is tried."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a layout is made for."""

    module: Any
    """The model, with or without weights."""
    names: tuple[str, ...]
    """Parameters of the model's forward."""
    fields: Fields
    """Those of its configuration."""
    floats: Callable[..., Tensor]
    """A tensor of a shape: random numbers, or none on the meta device."""


def feature_methods(module: Any, what: str) -> list[Callable[..., Any]]:
    """A model's own methods that make vectors of an ``image``, an ``audio`` or a ``video``; the outer one first."""
    owners = (module, getattr(module, "model", None))
    return [method for owner in owners if (method := getattr(owner, f"get_{what}_features", None)) is not None]


def part(fields: Fields, pattern: str) -> Fields:
    """The fields of the configuration that a name such as ``vision_config`` leads to, else the fields themselves."""
    for name, value in fields.items():
        if re.search(pattern, name) and callable(getattr(value, "to_dict", None)):
            inner = vars(value)
            return {
                **inner,
                **part({k: v for k, v in inner.items() if callable(getattr(v, "to_dict", None))}, pattern),
            }
    return fields


def first(fields: Fields, *names: str) -> Any:
    """The first field that is there and not None, else None."""
    return next((fields[name] for name in names if fields.get(name) is not None), None)


def edge(size: Any) -> int:
    """One edge of an image or a patch, of a number, a pair or a mapping; 0 where there is none."""
    if isinstance(size, Mapping):
        size = next(iter(size.values()), 0)
    if isinstance(size, Sequence):
        size = size[0] if size else 0
    return size if isinstance(size, int) else 0
