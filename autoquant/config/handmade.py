"""A smoothing group from the names of its parameters: the sizes are looked up, the checker says what does not fit."""

from __future__ import annotations

from collections.abc import Sequence

from autoquant.config.check import problems
from autoquant.config.format import Config, IndexMap, Linear, Slot, SmoothingGroup, SmoothingKind, edited
from autoquant.config.layers import LAYER, module_of, tail
from autoquant.config.places import json_path
from autoquant.config.spelling import did_you_mean
from autoquant.errors import AutoQuantError


def with_group(
    config: Config,
    sources: Sequence[str],
    targets: Sequence[str],
    layers: str | None = None,
    name: str | None = None,
    offset: int = 0,
) -> Config:
    """``config`` with one more smoothing group at the end.

    ``sources``: weights, whose rows make the channels, biases, or gains and biases of norms (``offset`` 1: the gain is
    1 + weight); ``targets``: weights, whose columns read them. ``layers`` None: those of the first target. Raises
    AutoQuantError for names that there are not and for what the checker refuses.
    """
    weights = {linear.weight: linear for linear in config.model.linears}
    biases = {linear.bias: linear for linear in config.model.linears if linear.bias is not None}
    stacked = any(path in weights and weights[path].stack is not None for path in sources)
    read = []
    for path in targets:
        if path not in weights:
            raise AutoQuantError(f"no weight '{path}' in model.linears{did_you_mean(path, list(weights))}")
        linear = weights[path]
        stack = linear.stack if stacked else None  # what all experts read alike has one position for each channel
        read.append(Slot(path=path, dim=linear.in_dim, stack=stack, size=linear.in_features * (stack or 1)))
    makers = [_maker(path, weights, biases, read[0].size, offset) for path in sources]
    if all(slot.index is None for slot in makers):
        read = [_repeated(config, slot, makers[0].size) for slot in read]
    norm = any(path not in weights and path not in biases for path in sources)
    if layers is None and any(LAYER in path for path in (*sources, *targets)):
        layers = weights[targets[0]].layers
    group = SmoothingGroup(
        name=name or _name(sources, targets),
        kind=SmoothingKind.NORM_LINEAR if norm else SmoothingKind.LINEAR_LINEAR,
        layers=layers,
        channels=makers[0].size,
        sources=tuple(makers),
        targets=tuple(read),
    )
    changed = edited(config, smoothing=edited(config.smoothing, groups=(*config.smoothing.groups, group)))
    known = {problem.text for problem in problems(config)}
    wrong = [problem for problem in problems(changed) if problem.text not in known]
    if wrong:
        lines = tuple(f"{json_path(problem.path)}: {problem.message}" for problem in wrong[:20])
        raise AutoQuantError(f"'{group.name}' does not fit together; nothing was written", lines)
    return changed


def _maker(path: str, weights: dict[str, Linear], biases: dict[str, Linear], channels: int, offset: int) -> Slot:
    """The slot of a source: rows of a weight, a linear's bias, or a parameter of a norm, as long as what reads it."""
    if path in weights:
        linear = weights[path]
        dim = {0: 1, 1: 0, 2: 1}[linear.in_dim] if linear.stack is None else 3 - linear.in_dim
        return Slot(path=path, dim=dim, stack=linear.stack, size=linear.out_features * (linear.stack or 1))
    if path in biases:
        linear = biases[path]
        return Slot(path=path, stack=linear.stack, size=linear.out_features * (linear.stack or 1))
    if not path.rpartition(".")[0]:
        known = [*weights, *biases]
        raise AutoQuantError(f"no parameter '{path}' in model.linears{did_you_mean(path, known)}")
    return Slot(path=path, size=channels, offset=1 if offset else 0)


def _repeated(config: Config, slot: Slot, channels: int) -> Slot:
    """A target that reads each key/value head's channels for several query heads, as grouped-query attention does."""
    facts = config.model
    heads, kv, size = facts.heads, facts.kv_heads, facts.head_size
    if slot.size == channels or not (heads and kv and size) or kv * size != channels or heads * size != slot.size:
        return slot
    times = heads // kv
    block = IndexMap(shape=(kv, times, size), stride=(times * size, size, 1), channel_stride=(size, 0, 1))
    return edited(slot, index=(block,))


def _name(sources: Sequence[str], targets: Sequence[str]) -> str:
    start, ends = module_of(sources[0]), [module_of(path) for path in targets]
    return f"{start} -> {', '.join(tail(end, start) for end in ends)}"
