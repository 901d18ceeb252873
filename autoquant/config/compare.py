"""What differs between two configs, by what it means, and hand edits carried from one to another."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from autoquant.config.check import problems
from autoquant.config.format import Config, SmoothingGroup, edited
from autoquant.config.knobs import changed_knobs, default_knobs, knob_text, knobs_of, same, value_text, with_knobs
from autoquant.config.places import KNOBS, json_path
from autoquant.config.spelling import did_you_mean

_ONE = {"groups": "group", "spaces": "space", "online": "online rotation"}


@dataclass(frozen=True, slots=True)
class Difference:
    """Something that two configs do not have in common: ``part`` knobs, claims or facts."""

    part: str
    where: str
    before: str | None
    after: str | None

    @property
    def line(self) -> str:
        """In one line."""
        if self.before is None:
            return f"+ {self.where}" + (f": {self.after}" if self.after else "")
        if self.after is None:
            return f"- {self.where}" + (f": {self.before}" if self.before else "")
        return f"{self.where}: {self.before} -> {self.after}"


def differences(one: Config, other: Config) -> list[Difference]:
    """Knobs, claims and facts that differ; neither the order of entries nor how they are written counts."""
    return [*_knobs(one, other), *_claims(one, other), *_facts(one, other)]


def _knobs(one: Config, other: Config) -> Iterator[Difference]:
    before, after = knobs_of(one), knobs_of(other)
    for path in before:
        if path in after and not same(path, before[path], after[path]):
            gone, come = (
                _apart(one, other) for one, other in ((before[path], after[path]), (after[path], before[path]))
            )
            if gone or come:  # entries of a list, each by itself
                yield from (Difference("knobs", knob_text(path), value_text(one), None) for one in gone)
                yield from (Difference("knobs", knob_text(path), None, value_text(one)) for one in come)
                continue
            yield Difference("knobs", knob_text(path), value_text(before[path]), value_text(after[path]))
    usual = {**default_knobs(one), **default_knobs(other)}
    alone = [path for path in (*before, *after) if (path in before) != (path in after)]
    for path in alone:  # of what one of them does not claim, only choices are said
        value = before[path] if path in before else after[path]
        if not same(path, value, usual[path]):
            sides = (value_text(value), None) if path in before else (None, value_text(value))
            yield Difference("knobs", knob_text(path), *sides)


def _apart(one: Any, other: Any) -> list[Any]:
    """Overrides that are in one list and not in the other; none where these are no lists of overrides."""
    if not (isinstance(one, tuple) and isinstance(other, tuple)):
        return []
    return [entry for entry in one if isinstance(entry, BaseModel) and entry not in other]


def _claims(one: Config, other: Config) -> Iterator[Difference]:
    lists: dict[str, Callable[[Config], Mapping[str, Any]]] = {
        "group": lambda c: {g.name: _facts_of(g, KNOBS["smoothing", "groups"]) for g in c.smoothing.groups},
        "space": lambda c: {s.name: _facts_of(s, KNOBS["rotation", "spaces"]) for s in c.rotation.spaces},
        "online": lambda c: {f"{o.kind} {o.path}": {"layers": o.layers, "size": o.size} for o in c.rotation.online},
        "blocked": lambda c: {f"{b.what} of {b.path}": {"layers": b.layers, "reason": b.reason} for b in c.blocked},
        "linear": lambda c: {_linear(x): x.model_dump(mode="json") for x in c.model.linears},
    }
    for what, listed in lists.items():
        before, after = listed(one), listed(other)
        yield from (Difference("claims", f"{what} {name}", "", None) for name in before if name not in after)
        yield from (Difference("claims", f"{what} {name}", None, "") for name in after if name not in before)
        for name in before:
            if name in after and before[name] != after[name]:
                keys = [key for key in before[name] if before[name][key] != after[name].get(key)]
                yield Difference("claims", f"{what} {name}", *(_said(x[name], keys) for x in (before, after)))


def _facts(one: Config, other: Config) -> Iterator[Difference]:
    for section in ("provenance", "model"):
        before, after = (getattr(c, section).model_dump(mode="json") for c in (one, other))
        for key in before:
            if key != "linears" and before[key] != after[key]:
                yield Difference("facts", f"{section}.{key}", str(before[key]), str(after[key]))
    certificates = [None if c.certificate is None else c.certificate.digest for c in (one, other)]
    if certificates[0] != certificates[1]:
        yield Difference("facts", "certificate.digest", str(certificates[0]), str(certificates[1]))


def _facts_of(one: Any, knobs: Sequence[str]) -> dict[str, Any]:
    content: dict[str, Any] = one.model_dump(mode="json", exclude={*knobs, "name"})
    return content


def _linear(linear: Any) -> str:
    return f"{linear.path} ({linear.layers})" if linear.layers else str(linear.path)


def _said(content: Mapping[str, Any], keys: Sequence[str]) -> str:
    return ", ".join(f"{key} {_size(content.get(key))}" for key in keys)


def _size(value: Any) -> str:
    return f"of {len(value)} entr{'y' if len(value) == 1 else 'ies'}" if isinstance(value, list) else str(value)


@dataclass(frozen=True, slots=True)
class Merged:
    """A config with the hand edits of another: what was carried over, and what could not be, with the reason."""

    config: Config
    carried: tuple[str, ...]
    conflicts: tuple[str, ...]


def merge(new: Config, old: Config, take: str | None = None) -> Merged:
    """``new`` with the knobs that are not at their defaults in ``old``, and with its groups by hand.

    A knob that both have set to different values is a conflict, unless ``take`` is 'new' or 'old'. So is one of a group
    that ``new`` does not have, and one that does not fit ``new``; those are never carried.
    """
    config, carried, conflicts = _with_handmade(new, old)
    edits, own, there = changed_knobs(old), changed_knobs(new), knobs_of(config)
    for path, value in edits.items():
        said = f"{knob_text(path)} = {value_text(value)}"
        if path not in there:
            near = did_you_mean(str(path[2]), [str(p[2]) for p in there if len(p) == 4 and p[:2] == path[:2]])
            conflicts.append(f"{said}: the new config has no such {_ONE[str(path[1])]}{near}")
        elif path in own and not same(path, own[path], value) and take is None:
            conflicts.append(f"{said}: the new config has {value_text(own[path])}; --take says which")
        elif path in own and (take == "new" or same(path, own[path], value)):
            continue
        else:
            changed = with_knobs(config, {path: value})
            wrong = _new_problems(changed, config)
            if wrong:
                conflicts.append(f"{said}: {wrong[0]}")
            else:
                config = changed
                carried.append(said)
    return Merged(config, tuple(carried), tuple(conflicts))


def _with_handmade(new: Config, old: Config) -> tuple[Config, list[str], list[str]]:
    """``new`` with the groups by hand of ``old`` that it does not have, what was carried over, and what was not."""
    config, carried, conflicts = new, list[str](), list[str]()
    names = {group.name for group in new.smoothing.groups}
    for group in old.smoothing.groups:
        if not group.by_hand or group.name in names:
            continue
        said = f"group '{group.name}', by hand"
        changed = edited(config, smoothing=edited(config.smoothing, groups=(*config.smoothing.groups, _plain(group))))
        if new.provenance.fingerprint != old.provenance.fingerprint:
            conflicts.append(f"{said}: the new config is of another structure")
        elif wrong := _new_problems(changed, config):
            conflicts.append(f"{said}: {wrong[0]}")
        else:
            config = changed
            carried.append(said)
    return config, carried, conflicts


def _plain(group: SmoothingGroup) -> SmoothingGroup:
    """The group without a person's choices, which are carried over by themselves."""
    fields = type(group).model_fields
    return edited(group, **{name: fields[name].default for name in KNOBS["smoothing", "groups"]})


def _new_problems(changed: Config, before: Config) -> list[str]:
    known = {problem.text for problem in problems(before)}
    return [f"{json_path(p.path)}: {p.message}" for p in problems(changed) if p.text not in known]
