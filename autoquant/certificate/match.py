"""The claims of a written config, carried over to a small model of the same structure.

A small model is analysed too, because sizes and indices are others there. Its claims are then given the layer sets of
the config that is written: what is proved is what is said, of the layers of which it is said.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TypeVar

from autoquant.certificate.claims import Claim, claims, keep, plain
from autoquant.config.format import Config, Linear, Online, Read, Slot, SmoothingGroup, Space, Writer, edited
from autoquant.config.layers import LAYER, layer_numbers, layer_set

Shape = tuple[object, ...]
_Claimed = TypeVar("_Claimed", Space, Online)
_EXPERT = r"(?<=expert_)\d+(?!\w)"
"""The number of an expert that is known by a name of its own."""


@dataclass(frozen=True, slots=True)
class Match:
    """``config``: the large model's claims with the small one's sizes; ``refused``: claims of the large one that the
    small one does not allow, with the reason.
    """

    config: Config
    refused: Mapping[Claim, str]


def match(
    large: Config, reduced: Config, held: Collection[str] = (), *, aligned: bool = True, some: bool = False
) -> Match:
    """Claims of ``large`` that ``reduced`` makes too: the same axes of the same parameters to the same powers.

    ``held``: the small model's parameters. Of parts that are numbered within a layer (adapters, experts) it has the
    first ones only: what is said of a further one has to be what is said of one of these. ``aligned``: layer i of the
    small model stands for layer i of the large one, so that layer sets are carried over. ``some``: ``large`` holds
    some of the claims of an analysis, and not all.
    """
    both = {plain(name) for name, _ in claims(large)} & {plain(name) for name, _ in claims(reduced)}
    mine, theirs = _shape_of_claims(large, both), _shape_of_claims(reduced, both)
    proved = _shape_of_claims(reduced, ())
    apart = [claim for claim in claims(large) if plain(claim[0]) not in both]
    shown = _shape_of_claims(keep(large, [claim for claim in apart if not held or _shows(large, claim, held)]), both)
    bad: dict[Claim, str] = {}
    for key in dict.fromkeys(chain(mine, theirs)):
        further = key not in theirs and key not in shown and set(mine[key]) <= set(proved.get(key, ()))
        same = key not in mine or mine[key] == theirs.get(key)
        within = some and key in mine and set(mine[key]) <= set(theirs.get(key, ()))
        if not (same or within or further):
            other = "with other members than" if key in theirs else "but not"
            bad[key] = f"'{key[0]}' is found in the full-size model {other} in the small one: it cannot be proved"
    refused = {claim: bad[key] for claim, key, _ in _keyed(large, both) if key in bad}
    chosen = [claim for claim, key, said in _keyed(reduced, both) if said in mine.get(key, ()) and key not in bad]
    wanted = {online.path for online in large.rotation.online}
    chosen += [(online.path, online.kind) for online in reduced.rotation.online if online.path in wanted]
    missing = wanted - {online.path for online in reduced.rotation.online}
    for online in large.rotation.online:
        if online.path in missing and not _is_further(online, reduced, held):
            reason = f"'{online.path}' is found in the full-size model but not in the small one: it cannot be proved"
            refused[online.path, online.kind] = reason
    mapped = keep(reduced, chosen)
    return Match(_with_layers_of(large, mapped, held) if aligned and held else mapped, refused)


def _is_further(online: Online, reduced: Config, held: Collection[str]) -> bool:
    """True if the small model has no such module, in whatever layer, and says the same of one with another number."""
    pattern = re.compile(re.escape(online.path).replace(re.escape(LAYER), r"\d+") + r"\.")
    if not held or any(pattern.match(name) for name in held):
        return False
    same = (_without_numbers(online.path), online.kind)
    return any((_without_numbers(other.path), other.kind) == same for other in reduced.rotation.online)


def _shows(large: Config, claim: Claim, held: Collection[str]) -> bool:
    """True if a claim of ``large`` starts at one of a small model's parameters ``held``, in whatever layer."""
    alone = keep(large, [claim])
    paths = [group.sources[0].path for group in alone.smoothing.groups]
    paths += [space.writers[0].path for space in alone.rotation.spaces]
    pattern = "|".join(re.escape(path).replace(re.escape(LAYER), r"\d+") for path in paths)
    return any(re.fullmatch(pattern, name) for name in held)


def _shape_of_claims(config: Config, both: Collection[str]) -> dict[Claim, list[object]]:
    """Each claim with its members but without sizes and layer numbers; kinds of layers that share a name are one entry
    each. A name that is not one of ``both`` models' is taken without the numbers in it.
    """
    found: dict[Claim, list[object]] = {}
    for _, key, members in _keyed(config, both):
        found.setdefault(key, []).append(members)
    return {name: sorted(set(members), key=repr) for name, members in found.items()}


def _keyed(config: Config, both: Collection[str]) -> Iterator[tuple[Claim, Claim, object]]:
    """Each claim, its name and kind without what is another in the other model, and its members."""

    def key(name: str, members: Sequence[Shape]) -> str:
        return plain(name) if plain(name) in both else _name(plain(name), members)

    for group in config.smoothing.groups:
        sources, targets = _slots(group.sources), _slots(group.targets)
        said: object = (group.kind, _any_layer(sources), _any_layer(targets))
        kind = group.kind.value
        yield (group.name, kind), (key(group.name, (*sources, *targets)), kind), said
    for space in config.rotation.spaces:
        reads = sorted({(_any_layer_in(repr(read.norm)), _any_layer(_slots(read.readers))) for read in space.reads})
        writers = _slots(space.writers)
        slots = (*writers, *(slot for read in space.reads for slot in _slots(read.readers)))
        said = (space.kind, space.centre, frozenset(_any_layer(writers)), tuple(reads))
        yield (space.name, space.kind), (key(space.name, slots), space.kind), said


def _name(name: str, members: Sequence[Shape]) -> str:
    """A claim's name without the numbers of layers, which are others in a model of other depth (its last, or those
    that share what another made); what is said of several layers is told apart from what is said of one.
    """
    sources, arrow, targets = name.partition(" -> ")
    without = [_without_numbers(part) for part in (*sources.split(", "), *targets.split(", "))]
    count = len(sources.split(", "))
    short = ", ".join(dict.fromkeys(without[:count])) + arrow + ", ".join(dict.fromkeys(without[count:]))
    several = LAYER in short and len(_any_layer(members)) < len(set(members))
    return f"{short} (across layers)" if several and short != name else short


def _without_numbers(text: str) -> str:
    return re.sub(rf"(?<![\w-])\d+(?!\w)|{_EXPERT}", LAYER, text)


def _any_layer(slots: Iterable[Shape]) -> tuple[Shape, ...]:
    """Slots that are written out for several layers, each once: the small model has fewer layers."""
    return tuple(dict.fromkeys((_any_layer_in(str(path)), *rest) for path, *rest in slots))


def _any_layer_in(text: str) -> str:
    return re.sub(rf"(?<=\.)\d+(?=\.)|{_EXPERT}", LAYER, text)


def _slots(slots: Iterable[Slot]) -> tuple[Shape, ...]:
    return tuple(dict.fromkeys((s.path, s.dim, s.stack is None, s.power, s.offset, s.index is None) for s in slots))


# Layer sets


def _with_layers_of(large: Config, small: Config, held: Collection[str]) -> Config:
    """``small`` with the layer sets of ``large``, as far as the small model has these layers."""
    depth = Depth(large, held)

    def group(one: SmoothingGroup) -> SmoothingGroup:
        said = [g.layers for g in large.smoothing.groups if _alike(g, one) and g.layers]
        twins = [g.layers for g in small.smoothing.groups if _alike(g, one) and g.layers and g.name != one.name]
        return edited(one, layers=depth.carried(one.sources[0].path, said, one.layers, twins))

    def online(one: Online) -> Online:
        mine, theirs = (
            [o for o in config.rotation.online if (o.path, o.kind) == (one.path, one.kind)] for config in (small, large)
        )
        said = [o.layers for o in _of_its_place(one, mine, theirs) if o.layers]
        twins = [] if len(mine) == len(theirs) else [o.layers for o in mine if o.layers and o is not one]
        return edited(one, layers=depth.carried(one.path, said, one.layers, twins))

    def space(one: Space) -> Space:
        same = _of_its_place(
            one,
            [s for s in small.rotation.spaces if _alike(s, one)],
            [s for s in large.rotation.spaces if _alike(s, one)],
        )
        own = [w.layers for s in (one, *same) for w in s.writers] + [r.layers for s in (one, *same) for r in s.reads]
        if one.kind == "R2" and not any(own):
            said = [s.layers for s in same if s.layers]
            twins = [s.layers for s in small.rotation.spaces if _alike(s, one) and s.layers and s.name != one.name]
            return edited(one, layers=depth.carried(one.writers[0].path, said, one.layers, twins))
        said_by: dict[object, list[str]] = {}
        for other in same:
            members: tuple[Writer | Read, ...] = (*other.writers, *other.reads)
            for member in members:
                if member.layers:
                    said_by.setdefault(_member(member), []).append(member.layers)

        def carried(path: str, member: Writer | Read) -> str | None:
            return depth.carried(path, said_by.get(_member(member), []), member.layers)

        writers = tuple(edited(writer, layers=carried(writer.path, writer)) for writer in one.writers)
        reads = tuple(edited(read, layers=carried(read.readers[0].path, read)) for read in one.reads)
        return edited(one, writers=writers, reads=reads)

    smoothing, rotation = small.smoothing, small.rotation
    return edited(
        small,
        smoothing=edited(smoothing, groups=tuple(map(group, smoothing.groups))),
        rotation=edited(
            rotation, spaces=tuple(map(space, rotation.spaces)), online=tuple(map(online, rotation.online))
        ),
    )


def _of_its_place(one: _Claimed, mine: Sequence[_Claimed], theirs: Sequence[_Claimed]) -> Sequence[_Claimed]:
    """Those of ``theirs`` that ``one`` of ``mine`` stands for: where each of several of one name is of layers of its
    own, and there are as many, that of its place among them.
    """
    if len(mine) == 1 or len(mine) != len(theirs):
        return theirs
    return [sorted(theirs, key=_first_layer)[sorted(mine, key=_first_layer).index(one)]]


def _first_layer(claimed: Space | Online) -> int:
    members: tuple[Space | Writer | Read | Online, ...] = (claimed,)
    if isinstance(claimed, Space):
        members = (claimed, *claimed.writers, *claimed.reads)
    return min((layer_numbers(member.layers)[0] for member in members if member.layers), default=0)


def _alike(one: SmoothingGroup | Space, other: SmoothingGroup | Space) -> bool:
    """True if two claims go by one name and have the same members, layers and sizes apart."""
    if plain(one.name) != plain(other.name) or one.kind != other.kind:
        return False
    if isinstance(one, SmoothingGroup) and isinstance(other, SmoothingGroup):
        return (_slots(one.sources), _slots(one.targets)) == (_slots(other.sources), _slots(other.targets))
    return True


def _member(member: Writer | Read) -> object:
    if isinstance(member, Writer):
        return _slots([member])
    norm = member.norm
    gain = None if norm is None else (norm.kind, norm.weight, norm.bias, norm.offset)
    return (gain, _slots(member.readers))


class Depth:
    """How deep stacks of layers are, by what stands before ``{layer}``."""

    def __init__(self, large: Config, held: Collection[str]) -> None:
        self.held = held
        self.full: dict[str, int] = {}
        claimed: Iterable[Linear | SmoothingGroup] = (*large.model.linears, *large.smoothing.groups)
        for item in claimed:
            path = item.weight if isinstance(item, Linear) else item.sources[0].path
            if item.layers is not None:
                head = path.partition(LAYER)[0]
                self.full[head] = max(self.full.get(head, 0), 1 + layer_numbers(item.layers)[-1])

    def small(self, head: str) -> int:
        pattern = re.compile(re.escape(head) + r"(\d+)\.")
        return max((1 + int(m[1]) for name in self.held if (m := pattern.match(name))), default=0)

    def same(self, path: str) -> bool:
        """True if the small model has as many layers as the large one where ``path`` is."""
        head = path.partition(LAYER)[0]
        return self.small(head) == self.full.get(head)

    def carried(self, path: str, said: Sequence[str], own: str | None, twins: Sequence[str] = ()) -> str | None:
        """The layers of ``said`` that a small model has, ``own`` where nothing is said of any; without those of
        ``twins``, which say the same in other sizes.

        Layer i stands for layer i. The last one stands for the last one too, which may be of a kind of its own: where
        the two are told apart, what the small model says of its last layer is tried.
        """
        if own is None or not said:
            return own
        head = path.partition(LAYER)[0]
        count, full = self.small(head), self.full.get(head, 0)
        wanted = {number for layers in said for number in layer_numbers(layers)}
        mine = set(layer_numbers(own))
        kept = {number for number in wanted if number < count - 1}
        same, last = count - 1 in wanted, full - 1 in wanted
        if (same and last) or ((same or last) and count - 1 in mine):
            kept.add(count - 1)
        kept -= {number for layers in twins for number in layer_numbers(layers)}
        return layer_set(kept) if kept else own
