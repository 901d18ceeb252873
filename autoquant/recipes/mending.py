"""Mappings in place of those that do not hold: with more readers, or the groups of the model that were meant."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace

from autoquant.recipes.audit import Audit, Bench, Judged, Verdict, audit
from autoquant.recipes.experts import EXPERT_PARTS, modules_of, stacked
from autoquant.recipes.faults import GroupModules, groups_of
from autoquant.recipes.matching import RE, WrittenMapping, is_match

HOLDS = (Verdict.RIGHT, Verdict.SKIPPED)
_ALIKE = re.compile(r"(?<=\\\.)\d+(?=\\\.)")


def mended(bench: Bench, found: Audit) -> tuple[tuple[WrittenMapping, ...], tuple[WrittenMapping, ...]]:
    """The mappings of a recipe that hold with those that take the place of the others; and those that nothing replaces.

    Each is judged right on the same model as the others were.
    """
    kept: dict[WrittenMapping, None] = {}
    dropped = []
    for one in found.judged:
        instead = [one.mapping] if one.verdict in HOLDS else _instead(bench, one, found.tool)
        kept |= dict.fromkeys(instead)
        dropped += [] if instead else [one.mapping]
    return tuple(kept), tuple(dropped)


def _instead(bench: Bench, one: Judged, tool: str) -> list[WrittenMapping]:
    """What takes the place of a mapping: with the readers that it forgets, else the groups that it touches."""
    missing = dict.fromkeys(name for fault in one.faults for path in fault.missing for name in _expressions([path]))
    if missing:
        whole = replace(one.mapping, balance=(*one.mapping.balance, *missing))
        if _holds(bench, whole, tool):
            return [whole]
    of_groups = dict.fromkeys(_of_groups(bench, one.mapping))
    return [mapping for mapping in of_groups if _holds(bench, mapping, tool)]


def _holds(bench: Bench, mapping: WrittenMapping, tool: str) -> bool:
    return audit(bench, [mapping], tool).judged[0].verdict is Verdict.RIGHT


def _of_groups(bench: Bench, mapping: WrittenMapping) -> Iterator[WrittenMapping]:
    """The groups whose channels the mapping scales or reads, one mapping for those of all layers."""
    names = modules_of(bench.loaded.module)
    for one in _touched(mapping, names, groups_of(bench.config)):
        sources = _expressions([_written(path) for path in one.sources])
        if len(sources) == 1:
            balance = tuple(_expressions(sorted(one.targets)))
            yield replace(mapping, smooth=sources[0], balance=balance, observed="")


def _touched(mapping: WrittenMapping, names: dict[str, str], groups: Sequence[GroupModules]) -> list[GroupModules]:
    """Groups of the scaled modules; where there are none, those of the linears that read."""

    def taken(*targets: str) -> set[str]:
        found = {name for name, kind in names.items() for target in targets if is_match(name, kind, target)}
        return found | set(map(stacked, found))

    scaled, reading = taken(mapping.smooth), taken(*mapping.balance)
    return [one for one in groups if one.sources & scaled] or [one for one in groups if one.targets & reading]


def _written(path: str) -> str:
    """The linear of an expert whose rows a stacked parameter's group scales: up's, of gate and up."""
    return path.replace("gate_up_proj", "up_proj")


def _expressions(paths: Sequence[str]) -> list[str]:
    """Anchored expressions for module paths, numbers in them for all layers and experts."""
    found = dict.fromkeys(name for path in paths for name in _taken_apart(path))
    return [f"{RE}^{_numbers(re.escape(name))}$" for name in found]


def _numbers(expression: str) -> str:
    return _ALIKE.sub(r"\\d+", expression)


def _taken_apart(path: str) -> list[str]:
    """The linears of experts that a stacked parameter holds, else the path itself."""
    head, _, leaf = path.rpartition(".")
    parts = [part for part, held in EXPERT_PARTS.items() if held == leaf] if head.endswith("experts") else []
    return [f"{head}.0.{part}" for part in parts] or [path]
