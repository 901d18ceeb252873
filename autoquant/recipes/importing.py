"""A hand-made recipe as a config: the groups that it uses are on, all others off."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from autoquant.config.format import Config, SmoothingGroup, edited
from autoquant.config.layers import LAYER
from autoquant.errors import AutoQuantError
from autoquant.models.source import ModelSource
from autoquant.recipes.audit import Verdict, audit, bench_for
from autoquant.recipes.experts import modules_of
from autoquant.recipes.faults import groups_of
from autoquant.recipes.matching import WrittenMapping, matched_pairs

FITTING = (Verdict.RIGHT, Verdict.SKIPPED, Verdict.NOT_MATCHED)


def imported(
    source: ModelSource,
    config: Config,
    mappings: Sequence[WrittenMapping],
    tool: str,
    progress: Callable[[str], None] = lambda step: None,
) -> tuple[Config, list[str], list[WrittenMapping]]:
    """``config`` with the groups of ``mappings`` alone, their names, and the mappings that take nothing.

    Raises AutoQuantError where a mapping does not hold, or is right and no group: it scales what nothing reads.
    """
    bench = bench_for(source, progress=progress)
    found = audit(bench, mappings, tool)
    wrong = [one for one in found.judged if one.verdict not in FITTING]
    if wrong:
        raise AutoQuantError(
            f"{source.name}: {len(wrong)} of {len(mappings)} mappings do not hold; nothing is written",
            details=tuple(f"{one.verdict}: {one.mapping}: {one.why}" for one in wrong),
        )
    names = modules_of(bench.loaded.module)
    wanted: set[frozenset[str]] = set()
    unused = [one.mapping for one in found.judged if one.verdict is not Verdict.RIGHT]
    for one in found.judged:
        if one.verdict is Verdict.RIGHT:
            wanted |= {frozenset({pair.smooth, *pair.balance}) for pair in matched_pairs(one.mapping, names)}
    used = {_key(one.group) for one in groups_of(bench.config) if one.sources | one.targets in wanted}
    groups = tuple(edited(group, enable=_key(group) in used) for group in config.smoothing.groups)
    on = [group.name for group in groups if group.enable]
    if not on:
        raise AutoQuantError(f"{source.name}: no mapping is one of the groups of the model")
    return edited(config, smoothing=edited(config.smoothing, groups=groups)), on, unused


def _key(group: SmoothingGroup) -> tuple[str, frozenset[str]]:
    """The same for a group of a model and of its small likeness: paths without the layers."""
    return group.kind.value, frozenset(slot.path.replace(LAYER, "#") for slot in (*group.sources, *group.targets))
