"""A hand-made recipe as a config: the groups that it uses are on, in the layers that it names, all others off."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

from autoquant.config.format import Config, SmoothingGroup, SmoothingOverride, edited
from autoquant.config.layers import LAYER, fill, layer_numbers, layer_set
from autoquant.errors import AutoQuantError
from autoquant.recipes.audit import Bench, Judged, Verdict, audit
from autoquant.recipes.experts import EXPERT_PARTS, experts_in, stacked
from autoquant.recipes.faults import groups_of, member_of
from autoquant.recipes.matching import WrittenMapping, matched_pairs
from autoquant.recipes.pairs import scale_pairs

FITTING = (Verdict.RIGHT, Verdict.SKIPPED, Verdict.NOT_MATCHED)
Members = frozenset[str]


def imported(
    bench: Bench, config: Config, mappings: Sequence[WrittenMapping], tool: str
) -> tuple[Config, list[str], list[WrittenMapping]]:
    """``config`` with the groups of ``mappings`` alone, their names, and the mappings that take nothing.

    ``bench`` is of the same model. Raises AutoQuantError where a mapping does not hold, or is right and no group: it
    scales what nothing reads.
    """
    found = audit(bench, mappings, tool)
    wrong = [one for one in found.judged if one.verdict not in FITTING]
    if wrong:
        raise AutoQuantError(
            f"{bench.source.name}: {len(wrong)} of {len(mappings)} mappings do not hold; nothing is written",
            details=tuple(f"{one.verdict}: {one.mapping}: {one.why}" for one in wrong),
        )
    usable = [one.mapping for one in found.judged if one.verdict is Verdict.RIGHT or _is_proved(one, config, tool)]
    unused = [one.mapping for one in found.judged if one.mapping not in usable]
    taken = taken_by(usable, config)
    groups = tuple(used(group, config, taken) for group in config.smoothing.groups)
    on = [group.name for group in groups if group.enable]
    if not on:
        raise AutoQuantError(f"{bench.source.name}: no mapping is one of the groups of the model")
    return edited(config, smoothing=edited(config.smoothing, groups=groups)), on, unused


def _is_proved(one: Judged, config: Config, tool: str) -> bool:
    """True if a mapping that takes nothing of the small model, whose layers are fewer, takes groups of ``config``."""
    if one.verdict is not Verdict.NOT_MATCHED:
        return False
    pairs, _ = scale_pairs(config, repeats=tool == "quark")
    known = {frozenset((smooth, *balance)) for pair in pairs for smooth, balance in pair.filled()}
    taken = taken_by([one.mapping], config)
    return bool(taken) and set(taken) <= known


def taken_by(mappings: Iterable[WrittenMapping], config: Config) -> dict[Members, float | None]:
    """The sets that ``mappings`` take of all layers of ``config``, as groups have them, each with its alpha.

    Experts taken one by one are their stack, where all of them are taken.
    """
    modules = modules_in(config)
    held: dict[str, set[str]] = defaultdict(set)
    for name in modules:
        held[stacked(name)].add(name)
    found: dict[Members, float | None] = {}
    for mapping in mappings:
        taken: dict[Members, set[str]] = defaultdict(set)
        for pair in matched_pairs(mapping, modules):
            names = (pair.smooth, *pair.balance)
            taken[frozenset(map(stacked, names))].update(names)
        found |= {members: mapping.alpha for members, names in taken.items() if _is_all(members, names, held)}
    return found


def _is_all(members: Members, names: set[str], held: Mapping[str, set[str]]) -> bool:
    """True if of each stack all experts are taken: each of their linears, or each that is scaled."""
    wholes = ((held[member], {name for name in held[member] if name.endswith("up_proj")}) for member in members)
    return all(whole & names in (whole, scaled) for whole, scaled in wholes)


def modules_in(config: Config) -> dict[str, str]:
    """The modules that a config names, layer by layer, with what stands for their classes; experts taken apart."""
    stacks = {linear.path: linear.stack for linear in config.model.linears if linear.stack is not None}
    kinds = {linear.path: "Linear" for linear in config.model.linears}
    layers: dict[str, set[int]] = defaultdict(set)
    for linear in config.model.linears:
        layers[linear.path].update(layer_numbers(linear.layers) if linear.layers else ())
    for group in config.smoothing.groups:
        for slot in (*group.sources, *group.targets):
            path = member_of(slot.path)
            kinds.setdefault(path, "Norm")
            layers[path].update(layer_numbers(group.layers) if group.layers and LAYER in path else ())
    places = sorted(
        (path.partition(LAYER)[0] if numbers else "~", layer, at, path)
        for at, (path, numbers) in enumerate(layers.items())
        for layer in numbers or (0,)
    )
    found: dict[str, str] = {}
    for _, layer, _, path in places:
        name = fill(path, layer)
        experts = {stacked(f"{name.rpartition('.')[0]}.0.{part}") for part in EXPERT_PARTS} if path in stacks else set()
        if name in experts:
            found |= dict.fromkeys(experts_in(name.rpartition(".")[0], stacks[path]), "Linear")
        else:
            found[name] = kinds[path]
    return found


def used(group: SmoothingGroup, config: Config, taken: Mapping[Members, float | None]) -> SmoothingGroup:
    """``group`` on in the layers in which it is taken, with the recipe's alpha where it has one; else off."""
    alphas: dict[int, float | None] = {}
    for one in groups_of(edited(config, smoothing=edited(config.smoothing, groups=(group,)))):
        members = one.sources | one.targets
        if members in taken:
            alphas[one.layer] = taken[members]
    if not alphas:
        return edited(group, enable=False, overrides=())
    common = Counter(alphas.values()).most_common(1)[0][0]
    others = defaultdict(list)
    for layer in layer_numbers(group.layers) if group.layers else ():
        if alphas.get(layer, common) != common:
            others[alphas[layer]].append(layer)
    off = [layer for layer in (layer_numbers(group.layers) if group.layers else ()) if layer not in alphas]
    overrides = [SmoothingOverride(layers=layer_set(layers), alpha=alpha) for alpha, layers in others.items()]
    if off:
        overrides.append(SmoothingOverride(layers=layer_set(off), enable=False))
    return edited(group, enable=True, alpha=common, overrides=tuple(overrides))
