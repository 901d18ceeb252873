"""Smoothing groups as other tools know them: one module that is scaled, and the linears that undo it.

Those tools multiply a whole 1-D gain or all rows of a weight, and all columns of the linears behind it. What a group
has beyond that is said, never approximated.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from autoquant.config.format import Config, Slot, SmoothingGroup, SmoothingKind
from autoquant.config.layers import LAYER, fill, layer_numbers
from autoquant.config.slots import channels_of


@dataclass(frozen=True, slots=True)
class ScalePair:
    """``smooth`` is divided by the scales, ``balance`` multiplied by them: module paths, ``{layer}`` for ``layers``.

    ``layers`` is empty where no path has one. ``alpha`` is SmoothQuant's.
    """

    group: str
    smooth: str
    balance: tuple[str, ...]
    layers: tuple[int, ...]
    alpha: float

    def filled(self) -> Iterator[tuple[str, tuple[str, ...]]]:
        """The pair in each layer: the scaled module and those that undo it."""
        for layer in self.layers or (0,):
            yield fill(self.smooth, layer), tuple(fill(path, layer) for path in self.balance)


@dataclass(frozen=True, slots=True)
class Refusal:
    """What of a config another tool cannot hold: a group, a space or a linear, and why."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


def scale_pairs(
    config: Config, *, offsets: bool = False, repeats: bool = False
) -> tuple[list[ScalePair], list[Refusal]]:
    """The groups of ``config`` that are in use, by alpha, and those of them that are no such pair.

    ``offsets``: the tool knows gains that are 1 + weight; ``repeats``: it gives all query heads of a key/value head the
    same scales.
    """
    pairs: list[ScalePair] = []
    refused: list[Refusal] = []
    routers = {linear.path for linear in config.model.linears if linear.role == "router"}
    tied = {
        name: other for names in config.model.tied for name, other in zip(names, names[1:] + names[:1], strict=True)
    }
    for group in config.smoothing.groups:
        chosen = _chosen(config, group)
        if not chosen:
            continue
        head = config.model.head_size if repeats and group.kind is SmoothingKind.LINEAR_LINEAR else None
        reason = _tied(group, tied) or _reason(group, routers, offsets, head)
        if reason is not None:
            refused.append(Refusal(group.name, reason))
            continue
        smooth = _module(group.sources[0].path)
        balance = tuple(dict.fromkeys(_module(slot.path) for slot in group.targets))
        pairs += [ScalePair(group.name, smooth, balance, layers, alpha) for alpha, layers in chosen.items()]
    return pairs, refused


def _chosen(config: Config, group: SmoothingGroup) -> dict[float, tuple[int, ...]]:
    """The layers that the group is used in, by alpha."""
    section = config.smoothing
    default = section.enable and group.kind is not SmoothingKind.QUERY_KEY
    chosen: dict[float, list[int]] = defaultdict(list)
    for layer in (-1,) if group.layers is None else layer_numbers(group.layers):
        enable = default if group.enable is None else group.enable
        alpha = section.alpha if group.alpha is None else group.alpha
        for override in group.overrides:
            if layer in layer_numbers(override.layers):
                enable = enable if override.enable is None else override.enable
                alpha = alpha if override.alpha is None else override.alpha
        if enable:
            chosen[alpha].append(layer)
    return {alpha: tuple(layer for layer in layers if layer >= 0) for alpha, layers in chosen.items()}


def _tied(group: SmoothingGroup, tied: Mapping[str, str]) -> str | None:
    """Which of the group's weights is tied with another one, which would be scaled too."""
    path = next((slot.path for slot in (*group.sources, *group.targets) if slot.path in tied), None)
    return None if path is None else f"'{path}' is tied with '{tied[path]}', which would be scaled too"


def _reason(group: SmoothingGroup, routers: set[str], offsets: bool, head: int | None) -> str | None:
    """Why a group is no pair; None where it is one. ``head``: size of heads that may be repeated in the targets."""
    if group.kind is SmoothingKind.QUERY_KEY:
        return "queries against keys are of use for int8 key caches only"
    slots = (*group.sources, *group.targets)
    modules = sorted({_module(slot.path) for slot in group.sources})
    if len(modules) > 1:
        return f"several modules make its channels: {', '.join(modules)}"
    if not any(slot.path == f"{modules[0]}.weight" for slot in group.sources):
        return f"'{group.sources[0].path}' is no weight of a module"
    for slot in slots:
        if slot.stack is not None:
            return f"'{slot.path}' holds stacked experts"
        if slot.power != 1:
            return f"'{slot.path}' takes the scale to the power {slot.power}"
        if slot.offset and not offsets:
            return f"'{slot.path}' is a gain that is 1 + weight"
    for slot in group.sources:
        if slot.dim != 0:
            return f"'{slot.path}' is transposed"
        if not is_whole(slot, group.channels):
            return f"'{slot.path}' has an index map: some of its rows only, or in another order"
    for slot in group.targets:
        if not slot.path.endswith(".weight") or slot.dim != 1:
            return f"'{slot.path}' is not the weight of a linear, or is transposed"
        if _module(slot.path) in routers:
            return f"'{slot.path}' is a router"
        if not is_whole(slot, group.channels) and not (head and _repeats_heads(slot, group.channels, head)):
            return f"'{slot.path}' has an index map: channels that are repeated, or in another order"
    return None


def is_whole(slot: Slot, channels: int) -> bool:
    """True if position i of the axis carries channel i, from the first to the last."""
    if slot.size != channels:
        return False
    return slot.index is None or bool(np.array_equal(channels_of(slot), np.arange(channels)))


def _repeats_heads(slot: Slot, channels: int, head: int) -> bool:
    """True if the axis holds heads of ``head`` channels, each of them several times in a row (grouped queries)."""
    if slot.size % channels or channels % head:
        return False
    heads = np.arange(channels).reshape(-1, 1, head)
    expected = np.broadcast_to(heads, (channels // head, slot.size // channels, head)).reshape(-1)
    return bool(np.array_equal(channels_of(slot), expected))


def _module(path: str) -> str:
    return path.rpartition(".")[0]


def expressions(path: str, layers: tuple[int, ...], depth: int) -> str:
    r"""A regular expression that matches the module ``path`` in these layers of ``depth``, and no other module.

    >>> expressions("model.layers.{layer}.mlp", (0, 2), 3)
    '^model\\.layers\\.(0|2)\\.mlp$'
    """
    parts = path.split(LAYER)
    number = r"\d+" if layers == tuple(range(depth)) else f"({'|'.join(map(str, layers))})"
    return f"^{number.join(map(_escaped, parts))}$"


def _escaped(text: str) -> str:
    """Names hold letters, digits, ``_``, ``-`` and dots: only a dot means something else in an expression."""
    return text.replace(".", r"\.")
