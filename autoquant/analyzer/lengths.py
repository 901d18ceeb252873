"""What holds at one length or offset of the input and not at another is no symmetry of the model.

A model may branch on the length, cut off what lies beyond a number of tokens (a slice that is empty in a short trace),
work in chunks, or add what hangs on the position of the first token. It is read off at two lengths and offsets, and
what is claimed is what both show with the same slots.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from autoquant.analyzer.findings import Findings
from autoquant.config.format import Blocked, Online, SmoothingGroup, Space
from autoquant.library_patches import pytree
from autoquant.models.source import LoadedModel

LONGER = 67
"""Tokens of the second reading: a prime, beyond the usual sizes of chunks and windows in small models."""

OFFSET = 29
"""What a number that is 0 among the inputs (the position of the first token) is in the second reading."""

ANOTHER_LENGTH = "it does not hold for inputs of another length"


def longer_inputs(loaded: LoadedModel, length: int = LONGER) -> Iterator[LoadedModel]:
    """The same model with inputs of ``length`` tokens, in the ways in which they may be longer.

    Tokens are counted along the last dimension of integers, else along the one before the last. Every dimension of that
    size grows, but the first one (sequences) where there are several; once the last one of floats too, as that of a
    mask, and once without it. Numbers that are 0 are another one, where the model runs so. Which of these the model
    takes, running it says.
    """
    leaves, tree = pytree.tree_flatten((loaded.args, dict(loaded.kwargs)))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim() > 0]
    counted = [t.shape[-1] for t in tensors if not t.is_floating_point()]
    counted += [t.shape[-2] for t in tensors if t.is_floating_point() and t.dim() > 2]
    if not counted or counted[0] >= length:
        return
    moved = [type(leaf)(OFFSET) if type(leaf) in (int, float) and leaf == 0 else leaf for leaf in leaves]
    for others in (moved, leaves) if any(new is not old for new, old in zip(moved, leaves, strict=True)) else (leaves,):
        for last in (False, True):
            grown = [_grown(leaf, counted[0], length, last) if isinstance(leaf, Tensor) else leaf for leaf in others]
            args, kwargs = pytree.tree_unflatten(grown, tree)
            yield replace(loaded, args=args, kwargs=kwargs)


def _grown(tensor: Tensor, short: int, length: int, last: bool) -> Tensor:
    """``tensor`` with its own elements repeated to ``length`` along every dimension of size ``short``."""
    first = int(tensor.dim() > 1)
    end = tensor.dim() - (tensor.is_floating_point() and not last)
    for dim in range(first, end):
        if tensor.shape[dim] == short:
            index = torch.arange(length, device=tensor.device) % short
            tensor = tensor.index_select(dim, index)
    return tensor


def common(found: Findings, longer: Findings) -> Findings:
    """``found`` without what is not in ``longer``; what stands in its way there, or that it does, is blocked."""
    dropped: list[Blocked] = []
    there: set[object] = {*longer.groups, *longer.spaces, *longer.online}

    def kept(items: tuple[Any, ...]) -> tuple[Any, ...]:
        dropped.extend(_blocked(item) for item in items if item not in there)
        return tuple(item for item in items if item in there)

    groups, spaces, online = kept(found.groups), kept(found.spaces), kept(found.online)
    reasons = [blocked for blocked in longer.blocked if blocked not in found.blocked] if dropped else []
    explained = {(blocked.path, blocked.what) for blocked in reasons}
    rest = [blocked for blocked in dropped if (blocked.path, blocked.what) not in explained]
    blocked = tuple(dict.fromkeys((*found.blocked, *reasons, *rest)))
    return replace(found, groups=groups, spaces=spaces, online=online, blocked=blocked)


def _blocked(item: SmoothingGroup | Space | Online) -> Blocked:
    if isinstance(item, Online):
        return Blocked(path=item.path, what="rotation", reason=ANOTHER_LENGTH, operator=item.kind, at=item.path)
    group = isinstance(item, SmoothingGroup)
    slot = item.targets[0] if isinstance(item, SmoothingGroup) else item.writers[0]
    path = slot.path.rpartition(".")[0] or slot.path
    kind = item.kind.value if isinstance(item, SmoothingGroup) else item.kind
    return Blocked(path=path, what="smoothing" if group else "rotation", reason=ANOTHER_LENGTH, operator=kind, at=path)
