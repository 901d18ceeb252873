"""What tells one model structure from another: parameter names, shapes and ties."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence

from torch import nn


def fingerprint(shapes: Mapping[str, Sequence[int]], tied: Iterable[Sequence[str]]) -> str:
    """``'sha256:…'`` of every parameter's name and shape, and of the groups of names that share storage.

    Independent of the order of both, of dtypes, and of the versions of torch and transformers.
    """
    lines = sorted(f"{name} {'x'.join(map(str, shape))}" for name, shape in shapes.items())
    ties = sorted(" = ".join(sorted(names)) for names in tied)
    return "sha256:" + hashlib.sha256("\n".join([*lines, "tied:", *ties]).encode()).hexdigest()


def shapes_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Every parameter name, tied ones under each of their names, and its shape."""
    return {name: tuple(p.shape) for name, p in module.named_parameters(remove_duplicate=False)}


def ties_of(module: nn.Module) -> tuple[tuple[str, ...], ...]:
    """Groups of names of one parameter, in the module's order."""
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return tuple(tuple(group) for group in names.values() if len(group) > 1)


def record_untied_(model: nn.Module) -> None:
    """Models of transformers tie again when saved or loaded unless their config says otherwise."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "tie_word_embeddings"):
            config.tie_word_embeddings = False
