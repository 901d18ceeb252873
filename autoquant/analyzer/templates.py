"""Findings of single layers <-> ``{layer}`` templates with explicit layer sets.

A trace names every path in full: ``model.layers.3.mlp.up_proj.weight``. :func:`fold` writes what is the same in several
layers once, ``model.layers.{layer}.mlp.up_proj.weight`` with ``layers="0-31"``, and :func:`unfold` writes it back out.

The trace may hold a few representatives of a deep stack only (``layers.represent``). Then its layer 1 may be the
model's layer 125 and stand for others besides. What was found must be the same for all representatives of a kind of
layer before it may be written for the layers that were never traced: :func:`disagreement` says where it is not.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from pydantic import BaseModel

from autoquant.analyzer.findings import Findings
from autoquant.config.format import Blocked, Read, Reader, Slot, SmoothingGroup, Space, Writer, edited
from autoquant.config.layers import LAYER, fill, layer_numbers, layer_set, tail

Model = TypeVar("Model", bound=BaseModel)
Named = TypeVar("Named", SmoothingGroup, Space)
Member = TypeVar("Member", Writer, Read)
Axis = TypeVar("Axis", bound=Slot)
Ref = tuple[str, int]  # path of the stack, index of the layer in the traced model

WORDS = frozenset({"name", "reason", "at", "operator"})  # words about the paths, not paths to act on


@dataclass(frozen=True, slots=True)
class StackMap:
    """Which layers of the whole model each layer of the traced one stands for.

    ``originals[i]``: the layers that traced layer i stands for, ascending; the first is the one that was traced.
    ``kinds[i]``: layers of one kind must have the same findings. ``whole``: why
    every layer was traced, None where representatives were enough.
    """

    path: str
    originals: tuple[tuple[int, ...], ...]
    kinds: tuple[int, ...]
    whole: str | None = None


def fold(findings: Findings, stacks: Sequence[StackMap]) -> Findings:
    """Write what layers have in common once, with ``{layer}`` and the set of the original layers.

    Every ``layers`` of ``findings`` is None and its layer numbers are those of the traced model. Graph order is kept,
    by first appearance. Members of a space that spans layers get layer sets of their own. Anything else that spans
    layers keeps its concrete paths, written out for all layers that its representatives stand for.

    Raises ValueError where the representatives disagree; see :func:`disagreement`.
    """
    reason = disagreement(findings, stacks)
    if reason is not None:
        raise ValueError(f"these findings cannot be written for the layers that were not traced: {reason}")
    layers = _Layers(tuple(stacks))
    return Findings(
        linears=layers.fold(findings.linears),
        groups=_unique_names(layers.fold(findings.groups)),
        spaces=_unique_names(layers.fold(findings.spaces)),
        online=layers.fold(findings.online),
        blocked=layers.fold(findings.blocked),
        unknown_operators=tuple(dict.fromkeys(map(layers.numbered, findings.unknown_operators))),
    )


def name_across_layers(findings: Findings, stacks: Sequence[StackMap]) -> Findings:
    """Folded findings, whose groups across layers have names that neither list all layers nor depend on their number.

    Names leave out what paths have in common, so that a stack goes by the end of its path, and a layer of the stack
    that the source lies in by its number alone. Where several groups would share a name, each says its layers.
    """
    ends = {".".join(parts[i:]) for stack in stacks for parts in [stack.path.split(".")] for i in range(len(parts))}
    if not ends:
        return findings
    known = "|".join(re.escape(end) for end in sorted(ends, key=len, reverse=True))
    pattern = re.compile(rf"(?<![\w.])({known})\.\d+(?!\w)")
    layers = _Layers(tuple(stacks))

    def renamed(item: Named) -> Named:
        sources, arrow, targets = item.name.partition(" -> ")
        stack = layers.stack_of(sources)
        if not arrow or (isinstance(item, Space) and stack is None):  # the residual stream, or written once outside
            return item
        written_out = _unfold_members(item) if isinstance(item, Space) else item
        named = pattern.sub(rf"\1.{LAYER}", sources)
        short = []
        for target in targets.split(", "):
            _, _, rest = target.partition(".")
            same = stack is not None and layers.is_layer_of(written_out, stack, target)
            short.append(tail(f"{stack}.{LAYER}.{rest}", named) if same else pattern.sub(rf"\1.{LAYER}", target))
        return edited(item, name=named + arrow + ", ".join(dict.fromkeys(short)))

    def across(items: tuple[Named, ...]) -> tuple[Named, ...]:
        named = [item if item.layers is not None else renamed(item) for item in items]
        count = Counter(item.name for item in named)
        return tuple(
            new if count[new.name] == 1 or new.name == old.name else _named_by_layers(new, layers.numbers(new))
            for new, old in zip(named, items, strict=True)
        )

    return replace(findings, groups=across(findings.groups), spaces=across(findings.spaces))


def unfold(findings: Findings) -> Findings:
    """Write every template out for each of its layers: the inverse of :func:`fold`."""
    return Findings(
        linears=_unfold_all(findings.linears),
        groups=_unfold_all(findings.groups),
        spaces=_unfold_all(_unfold_members(space) for space in findings.spaces),
        online=_unfold_all(findings.online),
        blocked=_unfold_all(findings.blocked),
        unknown_operators=findings.unknown_operators,
    )


def canonical(findings: Findings) -> Findings:
    """The same findings with all sets sorted, and readers without a norm each in a ``Read`` of its own."""
    groups = (edited(g, sources=_sorted(g.sources), targets=_sorted(g.targets)) for g in findings.groups)
    spaces = (
        edited(space, writers=_sorted(space.writers), reads=_sorted(_split_reads(space.reads)))
        for space in findings.spaces
    )
    return Findings(
        linears=_sorted(findings.linears),
        groups=_sorted(groups),
        spaces=_sorted(spaces),
        online=_sorted(findings.online),
        blocked=_sorted(findings.blocked),
        unknown_operators=tuple(sorted(set(findings.unknown_operators))),
    )


def disagreement(findings: Findings, stacks: Sequence[StackMap]) -> str | None:
    """Why the representatives do not stand for the other layers of their kind, or None where they do.

    Each finding inside one layer, and each member of a finding across layers, must be there for all representatives of
    a kind or for none. Layers that depend on their position (the first one, pairs that share keys, a norm at the end of
    one layer that is read in the next) fail this, and the whole model has to be traced.
    """
    layers = _Layers(tuple(stacks))
    if not layers.pruned:
        return None
    for objects in _fields(findings):
        inside: dict[BaseModel, set[Ref]] = {}
        for item, text, ref in layers.located(objects):
            if ref is not None:
                inside.setdefault(text, set()).add(ref)
            elif (reason := layers.uneven_members(item)) is not None:
                return f"{_label(item)}: {reason}"
        for text, refs in inside.items():
            if (reason := layers.uneven(refs)) is not None:
                return f"{_label(text)}: {reason}"
    return None


class _Layers:
    """The layer numbers in paths, for one set of stacks."""

    def __init__(self, stacks: tuple[StackMap, ...]) -> None:
        self.stacks = {stack.path: stack for stack in stacks}
        names = "|".join(re.escape(path) for path in sorted(self.stacks, key=len, reverse=True))
        # A path may stand within words: 'added to the residual at model.layers.3.mlp'.
        self.pattern = re.compile(rf"(?<![\w.])({names})\.(\d+)(?!\w)") if stacks else re.compile(r"(?!)()()")
        self.pruned = any(originals != (i,) for s in stacks for i, originals in enumerate(s.originals))

    def originals(self, ref: Ref) -> tuple[int, ...]:
        path, index = ref
        return self.stacks[path].originals[index]

    def refs(self, item: BaseModel) -> list[Ref]:
        """The layers in the paths of ``item``, each once, in order."""
        found = (match for text in _paths(item) for match in self.pattern.finditer(text))
        return list(dict.fromkeys((match[1], int(match[2])) for match in found))

    def numbers(self, item: SmoothingGroup | Space) -> str:
        """The set of the layers that ``item``, folded, has paths in."""
        written_out = _unfold_members(item) if isinstance(item, Space) else item
        return layer_set(number for _, number in self.refs(written_out))

    def stack_of(self, path: str) -> str | None:
        """The stack that a path starts in one layer of."""
        match = self.pattern.match(path)
        return None if match is None else match[1]

    def is_layer_of(self, item: BaseModel, stack: str, name: str) -> bool:
        """Whether ``name``, as in '7.linear', is a module of ``stack`` that ``item`` has a path in."""
        path = f"{stack}.{name}"
        inside = self.pattern.match(path) is not None and "." in name
        return inside and any(other == path or other.startswith(f"{path}.") for other in _paths(item))

    def sole(self, item: BaseModel) -> Ref | None:
        """The one layer that all paths of ``item`` in any stack lie in, None where there is none or there are several.

        Stacks side by side (``attentions.3`` and ``ffns.3``) count as one layer where they stand for the same layers.
        """
        refs = self.refs(item)
        if not refs or any(r[1] != refs[0][1] or self.originals(r) != self.originals(refs[0]) for r in refs):
            return None
        # A space with members outside is the residual stream of a one-layer model: its members get their own sets.
        if isinstance(item, Space) and not all(self.refs(member) for member in (*item.writers, *item.reads)):
            return None
        return refs[0]

    def numbered(self, text: str, ref: Ref | None = None, layer: int | str = LAYER) -> str:
        """``text`` with ``layer`` for the number of the traced layer ``ref`` and original numbers for all others."""

        def number(match: re.Match[str]) -> str:
            other = (match[1], int(match[2]))
            same = ref is not None and other[1] == ref[1] and self.originals(other) == self.originals(ref)
            return f"{match[1]}.{layer if same else self.originals(other)[0]}"

        return self.pattern.sub(number, text)

    def write(self, item: Model, ref: Ref | None = None, layer: int | str = LAYER) -> Model:
        """``item`` with every string :meth:`numbered`."""
        return _map(item, lambda text: self.numbered(text, ref, layer))

    def located(self, objects: Sequence[Model]) -> Iterator[tuple[Model, Model, Ref | None]]:
        """Each object, its template (without a layer: itself with original numbers), and its layer.

        What is said about a blocked path may point to one place for many layers: 0 to 31 are blocked at
        ``model.layers.0.norm``. Then layer 0 keeps the concrete place as well, so as to be like the others.
        """
        found = [(item, self.sole(item)) for item in objects]
        texts = [(self.write(item, ref), self._fixed_words(item, ref)) for item, ref in found]
        places = {fixed for text, fixed in texts if text == fixed}
        for (item, ref), (text, fixed) in zip(found, texts, strict=True):
            yield item, fixed if fixed in places else text, ref

    def _fixed_words(self, item: Model, ref: Ref | None) -> Model:
        text = self.write(item, ref)
        if not isinstance(item, Blocked):
            return text
        return edited(text, at=self.numbered(item.at), reason=self.numbered(item.reason))

    def uneven(self, refs: set[Ref]) -> str | None:
        """Which representative of a kind is missing from ``refs`` though another is there."""
        for stack in self.stacks.values():
            present = {index for path, index in refs if path == stack.path}
            kinds = {stack.kinds[index] for index in present}
            missing = [i for i, kind in enumerate(stack.kinds) if kind in kinds and i not in present]
            if missing:
                here, there = stack.originals[min(present)][0], stack.originals[missing[0]][0]
                return f"found in layer {here} of {stack.path} and not in layer {there}, which is of the same kind"
        return None

    def uneven_members(self, item: BaseModel) -> str | None:
        """The same for each member of a finding that spans layers."""
        members: dict[tuple[str, BaseModel], set[Ref]] = {}
        for field, member in self._members(item):
            ref = self.sole(member)
            if ref is not None:
                members.setdefault((field, self.write(member, ref)), set()).add(ref)
            elif any(self._stands_for_others(r) for r in self.refs(member)):
                return "spans several layers"
        return next((reason for refs in members.values() if (reason := self.uneven(refs)) is not None), None)

    def _members(self, item: BaseModel) -> Iterator[tuple[str, BaseModel]]:
        """What must be there for all layers of a kind or for none, each with the part that it plays."""
        if isinstance(item, SmoothingGroup):
            yield from (("source", slot) for slot in item.sources)
            yield from (("target", slot) for slot in item.targets)
        elif isinstance(item, Space):
            yield from (("writer", writer) for writer in item.writers)
            for read in item.reads:
                # One norm outside the stacks (an encoder's last) may stand before readers in all layers.
                if self.sole(read) is None and (read.norm is None or not self.refs(read.norm)):
                    part = f"reader behind {read.norm and read.norm.weight}"
                    yield from ((part, reader) for reader in read.readers)
                else:
                    yield "read", read
        else:
            yield "", item

    def _stands_for_others(self, ref: Ref) -> bool:
        stack = self.stacks[ref[0]]
        return len(self.originals(ref)) > 1 or stack.kinds.count(stack.kinds[ref[1]]) > 1

    def fold(self, objects: Sequence[Model]) -> tuple[Model, ...]:
        layers: dict[Model, list[int]] = {}
        for item, text, ref in self.located(objects):
            if ref is not None:
                layers.setdefault(text, []).extend(self.originals(ref))
            else:
                layers.setdefault(self._fold_members(item), [])
        return tuple(_with_layers(text, numbers) for text, numbers in layers.items())

    def _fold_members(self, item: Model) -> Model:
        if isinstance(item, Space):
            update: dict[str, object] = {
                "writers": self._fold_set(item.writers),
                "reads": self._fold_set(self._split_by_layer(item.reads)),
            }
        elif isinstance(item, SmoothingGroup):
            update = {"sources": self._write_out(item.sources), "targets": self._write_out(item.targets)}
        else:
            update = {}
        if isinstance(item, SmoothingGroup | Space):
            update["name"] = self._name(item)
        return edited(self.write(item), **update)

    def _name(self, item: SmoothingGroup | Space) -> str:
        """With original numbers: a target in another layer of the source's stack goes by '7.linear'."""
        source, arrow, targets = item.name.partition(" -> ")
        stack = self.stack_of(source)
        if stack is None or not arrow:
            return self.numbered(item.name)
        names = []
        for target in targets.split(", "):
            number, _, rest = target.partition(".")
            same = self.is_layer_of(item, stack, target)
            names.append(f"{self.originals((stack, int(number)))[0]}.{rest}" if same else self.numbered(target))
        return self.numbered(source) + arrow + ", ".join(names)

    def _fold_set(self, members: Iterable[Member]) -> tuple[Member, ...]:
        layers: dict[Member, list[int]] = {}
        for member in members:
            ref = self.sole(member)
            if ref is not None:
                layers.setdefault(self.write(member, ref), []).extend(self.originals(ref))
            elif isinstance(member, Read):
                readers = self._write_out(member.readers)
                layers.setdefault(edited(self.write(member), readers=readers), [])
            else:
                layers.setdefault(self.write(member), [])
        return tuple(_with_layers(text, numbers) for text, numbers in layers.items())

    def _split_by_layer(self, reads: Iterable[Read]) -> Iterator[Read]:
        """Readers need not stay together unless a norm with parameters binds them."""
        for read in reads:
            if _binds(read):
                yield read
                continue
            parts: dict[Ref | None, list[Reader]] = {}
            for reader in read.readers:
                parts.setdefault(self.sole(reader), []).append(reader)
            yield from (edited(read, readers=tuple(part)) for part in parts.values())

    def _write_out(self, slots: Sequence[Axis]) -> tuple[Axis, ...]:
        """Concrete slots for every layer that the traced ones stand for."""
        out: list[Axis] = []
        for ref, run in itertools.groupby(slots, key=self.sole):
            part = tuple(run)
            if ref is None:
                out.extend(self.write(slot) for slot in part)
            else:
                out.extend(self.write(slot, ref, layer) for layer in self.originals(ref) for slot in part)
        return tuple(out)


def _fields(findings: Findings) -> tuple[Sequence[BaseModel], ...]:
    return findings.linears, findings.groups, findings.spaces, findings.online, findings.blocked


def _map(item: Model, change: Callable[[str], str]) -> Model:
    """``item`` with ``change`` applied to every string in it, members included."""
    update: dict[str, object] = {}
    for field in type(item).model_fields:
        value = getattr(item, field)
        new: object = value
        if isinstance(value, str):
            new = change(value)
        elif isinstance(value, BaseModel):
            new = _map(value, change)
        elif isinstance(value, tuple) and value and isinstance(value[0], BaseModel):
            new = tuple(_map(member, change) for member in value)
        if new != value:
            update[field] = new
    return edited(item, **update) if update else item


def _paths(item: BaseModel) -> Iterator[str]:
    for field in type(item).model_fields:
        value = getattr(item, field)
        if isinstance(value, str):
            if field not in WORDS:
                yield value
        elif isinstance(value, BaseModel):
            yield from _paths(value)
        elif isinstance(value, tuple) and value and isinstance(value[0], BaseModel):
            for member in value:
                yield from _paths(member)


def _binds(read: Read) -> bool:
    """True if the readers share a gain or a bias that is folded into all of them."""
    return read.norm is not None and (read.norm.weight is not None or read.norm.bias is not None)


def _split_reads(reads: Iterable[Read]) -> Iterator[Read]:
    for read in reads:
        if _binds(read):
            yield edited(read, readers=_sorted(read.readers))
        else:
            yield from (edited(read, readers=(reader,)) for reader in read.readers)


def _with_layers(text: Model, numbers: Sequence[int]) -> Model:
    return edited(text, layers=_layer_set(tuple(sorted(numbers)))) if numbers else text


@functools.cache
def _layer_set(numbers: tuple[int, ...]) -> str:
    return layer_set(numbers)


def _unique_names(items: tuple[Named, ...]) -> tuple[Named, ...]:
    """Templates of two kinds of layer may share a name: then each name says its layers."""
    count = Counter(item.name for item in items)
    return tuple(
        _named_by_layers(item, item.layers) if count[item.name] > 1 and item.layers else item for item in items
    )


def _named_by_layers(item: Named, layers: str) -> Named:
    return edited(item, name=f"{item.name} @{layers}")


def _unfold_all(items: Iterable[Model]) -> tuple[Model, ...]:
    return tuple(concrete for item in items for concrete in _unfold(item))


def _unfold(item: Model) -> Iterator[Model]:
    layers: str | None = item.model_dump(include={"layers"})["layers"]
    if layers is None:
        yield item
        return
    update: dict[str, object] = {"layers": None}
    if isinstance(item, SmoothingGroup | Space):
        update["name"] = item.name.removesuffix(f" @{layers}")
    bare = edited(item, **update)
    for layer in layer_numbers(layers):
        yield _map(bare, functools.partial(fill, layer=layer))


def _unfold_members(space: Space) -> Space:
    update = {"writers": _unfold_all(space.writers), "reads": _unfold_all(space.reads)}
    return edited(space, **update)


def _sorted(items: Iterable[Model]) -> tuple[Model, ...]:
    return tuple(sorted(items, key=lambda item: item.model_dump_json()))


def _label(item: BaseModel) -> str:
    return next(str(getattr(item, field)) for field in ("name", "path") if field in type(item).model_fields)
