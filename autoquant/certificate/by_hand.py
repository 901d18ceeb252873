"""Groups that a person wrote and the analysis does not find: nothing but the proof stands behind them.

What the analysis claims is read off the graph for every value; a trial alone shows what it ran. So a group by hand is
tried harder: on every run by itself, also with scales over forty octaves, at which whatever is bounded on the way (a
clamp, a saturating activation, an epsilon) shows, and each of its members is moved alone, which has to change an output
or nothing is known of it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

import torch
from torch import nn

from autoquant.certificate.claims import Claim
from autoquant.certificate.match import Depth
from autoquant.certificate.runs import Reference, departure
from autoquant.config.format import Config, SmoothingGroup, edited
from autoquant.config.handmade import of_sizes
from autoquant.errors import AutoQuantError
from autoquant.executor.apply import execute_
from autoquant.executor.plan import Plan, make_plan
from autoquant.executor.resolve import resolve
from autoquant.executor.resolved import Resolved, ResolvedGroup
from autoquant.executor.scales import random_scales
from autoquant.models.structure import ModelStructure, structure_of

BY_HAND = "by_hand"
"""The kind of these groups in a certificate's rows."""

OCTAVES = 20
"""Down and up: a millionth and a million times what a small model's activations are."""

Copy = Callable[[nn.Module, ModelStructure, Plan], nn.Module]


def by_hand(config: Config) -> frozenset[Claim]:
    """The claims that a person wrote."""
    return frozenset((group.name, group.kind.value) for group in config.smoothing.groups if group.by_hand)


def apart(config: Config) -> tuple[Config, tuple[SmoothingGroup, ...]]:
    """The config without its groups by hand, and these."""
    groups = config.smoothing.groups
    found = edited(config.smoothing, groups=tuple(group for group in groups if not group.by_hand))
    return edited(config, smoothing=found), tuple(group for group in groups if group.by_hand)


def beside(
    config: Config, groups: Collection[SmoothingGroup], large: Config, held: Collection[str], *, same: bool
) -> tuple[Config, dict[Claim, str]]:
    """A small model's ``config`` with ``groups`` of the full-size one, ``large``, in its sizes and layers; those that
    it cannot have, with the reason. ``same``: the small model is the full-size one.
    """
    depth, refused, taken = Depth(large, held), dict[Claim, str](), list[SmoothingGroup]()
    for group in groups:
        try:
            one = group if same else of_sizes(group, large, config)
        except AutoQuantError as error:
            refused[group.name, group.kind.value] = error.message
            continue
        if not same and group.layers is not None:
            path = one.targets[0].path
            own = next((linear.layers for linear in config.model.linears if linear.weight == path), None)
            one = edited(one, layers=depth.carried(path, [group.layers], own))
        taken.append(one)
    smoothing = edited(config.smoothing, groups=(*config.smoothing.groups, *taken))
    return edited(config, smoothing=smoothing), refused


@dataclass(frozen=True, slots=True)
class Tried:
    """The largest change of an output, and a member without which nothing is shown; empty where there is none."""

    change: float
    idle: str


@torch.no_grad()
def tried(
    module: nn.Module, reference: Reference, config: Config, claim: Claim, seed: int, tolerance: float, copy: Copy
) -> Tried:
    """A group by hand on every run, with scales between 2 ** -OCTAVES and 2 ** OCTAVES, and then each member alone."""
    inventory = structure_of(module)
    groups = resolve(config, inventory, only=[claim[0]], seed=seed).groups

    def change(groups: tuple[ResolvedGroup, ...], octaves: float) -> float:
        asked = Resolved((), groups, ())
        plan = make_plan(asked, inventory, module.get_parameter, random_scales(asked, seed + 1, octaves))
        copied = copy(module, inventory, plan)
        execute_(copied, plan)
        return departure(copied, reference)

    worst = change(groups, OCTAVES)
    for number, member in enumerate((*groups[0].sources, *groups[0].targets)):
        alone = tuple(replace(one, sources=((*one.sources, *one.targets)[number],), targets=()) for one in groups)
        if worst <= tolerance and change(alone, 1) <= tolerance:
            return Tried(worst, f"'{member.name}'")
    return Tried(worst, "")
