"""Tensors of a checkpoint for which the model's class has no place: heads for further tokens, adapters, old buffers.

A layer for multi-token prediction reads the embedding and the residual of the model. If these are rotated and it is
not, speculative decoding goes on and accepts nothing; a value head gives other values. Nothing tells what such a tensor
reads, so each that could read, by its sizes and its place, what is rotated or scaled is refused.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from torch import nn

from autoquant.errors import AutoQuantError
from autoquant.executor.resolved import Resolved
from autoquant.io.safetensors_stream import Shards
from autoquant.models.load import OLD_BUFFER, listed
from autoquant.models.structure import FLOATING


def unplaced(shards: Shards, places: Collection[str]) -> tuple[str, ...]:
    """Stored names that are in no ``places``, the stored names of the model's parameters and buffers; buffers that a
    class made once come last.
    """
    names = [name for name in shards.entries if name not in places]
    return tuple(sorted(names, key=lambda name: (OLD_BUFFER.search(name) is not None, name)))


def weights_among(shards: Shards, names: Iterable[str]) -> tuple[str, ...]:
    """Those that are no buffers of an older class, which compute nothing that the model does not."""
    return tuple(name for name in names if not (_is_buffer(shards, name) or _is_mask(shards, name)))


def buffer_names(model: nn.Module) -> set[str]:
    """The names that a model's buffers may be stored under, with the first component and without it."""
    names = [name for name, _ in model.named_buffers()]
    return {*names, *(name.partition(".")[2] for name in names)}


def check_unturned(folder: Path, shards: Shards, names: Iterable[str], resolved: Resolved) -> None:
    """Raise AutoQuantError where tensors without a place could read what is rotated or scaled."""
    changed = [*_changed(resolved)]
    met: dict[str, str] = {}
    for name in names:
        if _is_buffer(shards, name):
            continue
        shape = shards.entries[name].shape
        for what, near, size in changed:
            if name.startswith(near) and any(n and n % size == 0 for n in shape) and not _is_mask(shards, name):
                met[name] = what
                break
    if met:
        spaces = ", ".join(dict.fromkeys(met.values()))
        raise AutoQuantError(
            f"{folder}: the model's class has no place for {listed(tuple(met))}, which may read what {spaces} changes "
            "and would not be changed with it; delete them, or disable that (--transforms fc_fc leaves the residual)"
        )


def _changed(resolved: Resolved) -> Iterator[tuple[str, str, int]]:
    """What is rotated or scaled, the beginning of the names that could read it, and its number of channels."""
    for space in resolved.spaces:
        members = [space.writers[0].name] if space.writers else []
        yield space.name, _layer(members, space.layer), space.size
    for group in resolved.groups:
        yield group.name, _layer([slot.name for slot in group.sources], group.layer), group.channels


def _layer(members: list[str], layer: int | None) -> str:
    """The layer's part of a member's name, with a dot; empty for what is of no layer."""
    head, number, _ = members[0].partition(f".{layer}.") if members and layer is not None else ("", "", "")
    return f"{head}{number}" if number else ""


def _is_buffer(shards: Shards, name: str) -> bool:
    return OLD_BUFFER.search(name) is not None or shards.entries[name].dtype not in FLOATING


def _is_mask(shards: Shards, name: str) -> bool:
    """True if a tensor of more dimensions than a weight holds zeros and ones alone: an old attention mask."""
    if len(shards.entries[name].shape) < 3:
        return False
    tensor = shards.read(name)
    return bool(((tensor == 0) | (tensor == 1)).all())
