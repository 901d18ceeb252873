"""How a config is laid out in its file: what a person chooses stands first, what was found of the model below it.

In memory a group is one object, with its knobs and its slots. In a file its knobs are a line of ``smoothing.groups``
and the rest is in ``claims.groups``, under the same name; spaces likewise. A group that has no line has no choices of
its own. Format version 1 had both in one place (:mod:`autoquant.config.file` reads it still).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from autoquant.config.check import Problem
from autoquant.config.places import KNOBS, SECTIONS, JsonPath
from autoquant.config.spelling import cut, did_you_mean


def arranged(plain: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a file, for a config as nested dictionaries."""
    content = dict(plain)
    claims: dict[str, Any] = {}
    for (section, key), knobs in KNOBS.items():
        members = content[section][key]
        claims[key] = [{name: value for name, value in one.items() if name not in knobs} for one in members]
        lines = [{**{name: one[name] for name in knobs}, "name": one["name"]} for one in members]
        content[section] = {**content[section], key: lines}
    content["claims"] = claims
    return {name: content[name] for name in (*SECTIONS, *content) if name in content}


def gathered(content: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a file's content, groups and spaces in one piece; the inverse of :func:`arranged`.

    Raises KeyError, TypeError, AttributeError or ValueError for content that is not laid out so.
    """
    plain = {name: value for name, value in content.items() if name != "claims"}
    claims = content.get("claims", {})
    if claims.keys() - {key for _, key in KNOBS}:
        raise ValueError("unknown keys in claims")
    for (section, key), knobs in KNOBS.items():
        lines = {line["name"]: line for line in content[section].get(key, ())}
        members = claims.get(key, ())
        names = {member["name"] for member in members}
        if lines.keys() - names or len(lines) != len(content[section].get(key, ())):
            raise ValueError(f"{section}.{key} names what claims.{key} does not")
        strange = any(line.keys() - {*knobs, "name"} for line in lines.values())
        if strange or any(member.keys() & set(knobs) for member in members):
            raise ValueError(f"a key of {section}.{key} is in the wrong place")
        plain[section] = {**content[section], key: [{**member, **lines.get(member["name"], {})} for member in members]}
    return plain


def arrangement_problems(content: Mapping[str, Any]) -> list[Problem]:
    """Lines of knobs for what is not claimed, and second lines for one thing."""
    found = []
    for section, key in KNOBS:
        claimed = [member["name"] for member in content.get("claims", {}).get(key, ())]
        seen: set[str] = set()
        for number, line in enumerate(content[section].get(key, ())):
            path: JsonPath = (section, key, number, "name")
            if line["name"] in seen:
                found.append(Problem(path, f"'{cut(line['name'])}' has a line already"))
            elif line["name"] not in claimed:
                near = did_you_mean(line["name"], claimed)
                found.append(Problem(path, f"no '{cut(line['name'])}' in claims.{key}{near}"))
            seen.add(line["name"])
    return found
