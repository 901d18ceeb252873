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
    """``config`` with one more smoothing group at the end, which is by hand.

    ``sources``: weights, whose rows make the channels, biases, or gains and biases of norms (``offset`` 1: the gain is
    1 + weight); ``targets``: weights, whose columns read them. ``layers`` None: those of the first target. Raises
    AutoQuantError for names that there are not and for what the checker refuses.
    """
    makers, readers = slots_of(config, sources, targets)
    for group in config.smoothing.groups:
        if [{slot.path for slot in slots} for slots in (group.sources, group.targets)] == [{*sources}, {*targets}]:
            raise AutoQuantError(f"the config has this group already: '{group.name}'")
    weights = {linear.weight: linear for linear in config.model.linears}
    known = {*weights, *(linear.bias for linear in config.model.linears)}
    makers = [edited(slot, offset=1) if offset and slot.path not in known else slot for slot in makers]
    if layers is None and any(LAYER in path for path in (*sources, *targets)):
        layers = weights[targets[0]].layers
    group = SmoothingGroup(
        name=name or _name(sources, targets),
        kind=SmoothingKind.LINEAR_LINEAR if known.issuperset(sources) else SmoothingKind.NORM_LINEAR,
        layers=layers,
        channels=makers[0].size,
        sources=tuple(makers),
        targets=tuple(readers),
        by_hand=True,
    )
    changed = edited(config, smoothing=edited(config.smoothing, groups=(*config.smoothing.groups, group)))
    before = {problem.text for problem in problems(config)}
    wrong = [problem for problem in problems(changed) if problem.text not in before]
    if wrong:
        lines = tuple(f"{json_path(problem.path)}: {problem.message}" for problem in wrong[:20])
        raise AutoQuantError(f"'{group.name}' does not fit together; nothing was written", lines)
    return changed


def of_sizes(group: SmoothingGroup, own: Config, other: Config) -> SmoothingGroup:
    """``group`` of the config ``own`` with the sizes of ``other``, which is of a model of the same names.

    Raises AutoQuantError where ``other`` has no such parameter, and where the slots are not what their names alone say.
    """
    names = [[slot.path for slot in slots] for slots in (group.sources, group.targets)]
    sides = []
    for mine, usual, theirs in zip(
        (group.sources, group.targets), slots_of(own, *names), slots_of(other, *names), strict=True
    ):
        for slot, one in zip(mine, usual, strict=True):
            if edited(slot, power=1, offset=0) != edited(one, power=1, offset=0):
                why = f"'{group.name}': its part of '{slot.path}' is told by numbers, which a small model has others of"
                raise AutoQuantError(f"{why}; leave size, index and dim as `autoquant init-group` writes them")
        sides.append(tuple(edited(t, power=s.power, offset=s.offset) for s, t in zip(mine, theirs, strict=True)))
    # Validated as what is in a file: without the fields that have their defaults.
    return edited(group, channels=sides[0][0].size, sources=sides[0], targets=sides[1])


def slots_of(config: Config, sources: Sequence[str], targets: Sequence[str]) -> tuple[list[Slot], list[Slot]]:
    """The slots of a group's members, by what ``config`` says of these parameters. Raises AutoQuantError for others."""
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
    makers = [_maker(path, weights, biases, read[0].size) for path in sources]
    if all(slot.index is None for slot in makers):
        read = [_repeated(config, slot, makers[0].size) for slot in read]
    return makers, read


def _maker(path: str, weights: dict[str, Linear], biases: dict[str, Linear], channels: int) -> Slot:
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
    return Slot(path=path, size=channels)


def _repeated(config: Config, slot: Slot, channels: int) -> Slot:
    """A target that reads each key/value head's channels for several query heads, as grouped-query attention does."""
    facts = config.model
    heads, kv, size = facts.heads, facts.kv_heads, facts.head_size
    if slot.size == channels or not (heads and kv and size) or kv * size != channels or heads * size != slot.size:
        return slot
    times = heads // kv
    block = IndexMap(shape=(kv, times, size), stride=(times * size, size, 1), channel_stride=(size, 0, 1))
    return edited(slot, index=(block,))


def said_of(config: Config, proved: bool) -> str:
    """The last group and how it was proved, in a line."""
    group = config.smoothing.groups[-1]
    said = f"{group.name}: {group.channels:,} channels, "
    if not proved:
        return said + "not proved"
    rows = () if config.certificate is None else config.certificate.rows
    worst = max((row.worst for row in rows if row.kind == "by_hand"), default=None)
    if not group.by_hand or worst is None:
        return said + "proved; the analysis finds it too"
    return said + f"proved by hand (the analysis does not find it): outputs change by at most {worst:.1e}"


def _name(sources: Sequence[str], targets: Sequence[str]) -> str:
    start, ends = module_of(sources[0]), [module_of(path) for path in targets]
    return f"{start} -> {', '.join(tail(end, start) for end in ends)}"
