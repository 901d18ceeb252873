"""Knobs set by short texts: ``smoothing.alpha=0.7``, ``layers 0-3: enable=false``, ``v_proj -> o_proj: alpha=0.6``,
``layers 0: mlp.down_proj: strategy=null``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError as PydanticError

from autoquant.config.check import problems
from autoquant.config.format import (
    Config,
    QuantizationOverride,
    RotationMethod,
    Rounding,
    SmoothingGroup,
    SmoothingMethod,
    SmoothingOverride,
    StaticClip,
    Strategy,
    edited,
)
from autoquant.config.knobs import knob_text, knobs_of, names_of, with_knobs
from autoquant.config.layers import layer_bits, layer_set, numbers_in
from autoquant.config.places import JsonPath, json_path
from autoquant.config.spelling import counted, cut, did_you_mean, did_you_mean_or, with_ends
from autoquant.config.strategies import parse_strategy
from autoquant.config.text import WORDS
from autoquant.errors import AutoQuantError

_LAYERS = re.compile(r"layers?\s+(?P<layers>[\d,:\-]+)\s*:\s*((?P<name>.+?)\s*:\s+)?(?P<rest>[^:]+=.*)")
_NAMED = re.compile(r"(?P<name>.+?)\s*:\s+(?P<rest>[a-z]+\s*=.+)")
_LIST = r"(?P<list>smoothing\.groups|rotation\.spaces|rotation\.online)"
_ENTRY = re.compile(_LIST + r"\[(?P<number>\d+)\]\.(?P<knob>\w+)\s*=(?P<value>.*)", re.DOTALL)
_QUOTED = re.compile(_LIST + r"\[(?P<quote>['\"])(?P<name>.+)(?P=quote)\]\.(?P<knob>\w+)\s*=(?P<value>.*)", re.DOTALL)
_EXPECTED = {
    "float_type": "expected a number",
    "finite_number": "expected a finite number",
    "int_type": "expected a whole number",
    "bool_type": "expected true or false",
    "string_type": "expected a text",
    "less_than_equal": "expected at most {le:g}",
    "greater_than_equal": "expected at least {ge:g}",
    "greater_than": "expected more than {gt:g}",
}
"""What pydantic's errors are about, by their type."""
_OF_LAYERS = ("enable", "alpha", "method")
FORMS = "'smoothing.alpha=0.7', 'layers 0-3: enable=false', 'NAME: alpha=0.6' or 'LINEAR: strategy=null'"


def assign(config: Config, assignments: Sequence[str]) -> Config:
    """``config`` with all of ``assignments`` made, in order. Raises AutoQuantError for one that cannot be."""
    for text in assignments:
        try:
            config = _assigned(config, text)
        except AutoQuantError as error:
            raise AutoQuantError(error.message.replace(text, cut(text)), error.details) from error
    wrong = problems(config)
    if wrong:
        lines = tuple(f"{json_path(problem.path)}: {problem.message}" for problem in wrong[:20])
        raise AutoQuantError(f"the config would not fit together: {counted(len(wrong), 'problem')}", lines)
    return config


def _assigned(config: Config, text: str) -> Config:
    if match := _LAYERS.fullmatch(text.strip()):
        knob, value = _pair(match["rest"], text)
        if match["name"] is not None and knob == "strategy":
            return _of_linear(config, match["name"], match["layers"], value, text)
        if match["name"] is not None:
            return _of_group(config, match["name"], match["layers"], knob, value, text)
        return _in_layers(config, match["layers"], knob, value, text)
    if re.match(r"layers?\s", text.strip()):
        raise AutoQuantError(f"'{text}': layers are given as in 'layers 0-3: enable=false'")
    if (match := _NAMED.fullmatch(text.strip())) is not None:
        knob, value = _pair(match["rest"], text)
        if knob == "strategy":
            return _of_linear(config, match["name"], None, value, text)
        return _set(config, (*_named(config, match["name"], knob, text), knob), value, text)
    if match := _ENTRY.fullmatch(text.strip()) or _QUOTED.fullmatch(text.strip()):
        section, _, key = match["list"].partition(".")
        there = [known for known in names_of(config) if known[:2] == (section, key)]
        _, value = _pair(f"={match['value']}", text)
        return _set(config, (*_entry(there, match, text), match["knob"]), value, text)
    name, value = _pair(text, text)
    return _set(config, tuple(name.split(".")), value, text)


def _entry(there: Sequence[tuple[str, str, str]], match: re.Match[str], text: str) -> tuple[str, str, str]:
    """The entry of a list that is given by its number or, as `autoquant diff` shows it, by its name in quotes."""
    if "name" in match.groupdict():
        for one in there:
            if one[2] == match["name"]:
                return one
        near = did_you_mean(match["name"], [one[2] for one in there])
        raise AutoQuantError(f"'{text}': no '{cut(match['name'])}' in {match['list']}{near}")
    if int(match["number"]) >= len(there):
        raise AutoQuantError(f"'{text}': {match['list']} has {len(there)} entries, counted from 0")
    return there[int(match["number"])]


def _pair(text: str, whole: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise AutoQuantError(f"'{whole}': no '='; expected {FORMS}")
    value = value.strip()
    try:
        return name.strip(), json.loads(value)
    except ValueError:
        return name.strip(), value


def _set(config: Config, path: JsonPath, value: Any, text: str) -> Config:
    known = knobs_of(config)
    if path not in known:
        plain = [knob_text(one) for one in known if len(one) < 4]
        knobs = [str(one[3]) for one in known if len(one) == 4 and one[:3] == path[:3]]
        near = did_you_mean(str(path[-1]), knobs) if knobs else did_you_mean(knob_text(path), plain)
        there = f"; it has {', '.join(knobs)}" if knobs and not near else ""
        name = cut(knob_text(path) if len(path) < 4 else str(path[3]))
        raise AutoQuantError(f"'{text}': no knob '{name}'{near}{there}")
    if path[-1] == "strategy":
        value = parse_strategy(str(value))
    try:
        return with_knobs(config, {path: _typed(value, path)})
    except PydanticError as error:
        raise AutoQuantError(f"'{text}': {_refusal(path, value, error)}") from error


def _typed(value: Any, path: JsonPath) -> Any:
    """A value as the classes take it: a list as a tuple, a word as its enumeration, a whole number as a float."""
    if isinstance(value, list):
        return tuple(value)
    if isinstance(value, str) and path[-1] == "exclude":
        return (value,)
    if isinstance(value, int) and not isinstance(value, bool) and path[-1] in ("alpha", "percentile"):
        return float(value)
    for choices in _enumerations(path):
        words = [member.value for member in choices]
        if value in words:
            return choices(value)
    return value


def _enumerations(path: JsonPath) -> tuple[Any, ...]:
    """The words that a knob of this name may have, in one section or another."""
    return {"method": (SmoothingMethod, RotationMethod), "rounding": (Rounding,), "clip": (StaticClip,)}.get(
        str(path[-1]), ()
    )


def _refusal(path: JsonPath, value: Any, error: PydanticError) -> str:
    """What a value is refused for, with the words that there are."""
    first = error.errors()[0]
    if first["type"] in ("is_instance_of", "enum", "literal_error"):
        several = {"smoothing": (SmoothingMethod,), "rotation": (RotationMethod,)}.get(
            str(path[0]), _enumerations(path)
        )
        words = [member.value for choices in several for member in choices]
        return f"{path[-1]} is one of {', '.join(words)}, not {value!r}{did_you_mean(str(value), words)}"
    return _what(error)


def _what(error: PydanticError) -> str:
    first = error.errors()[0]
    limits = first.get("ctx", {})
    said = _EXPECTED.get(first["type"], first["msg"]).format(**limits)
    value = first["input"]
    word = f": JSON writes {WORDS[value.lower()]}" if isinstance(value, str) and value.lower() in WORDS else ""
    return f"{'.'.join(map(str, first['loc']))}: {said}, not {cut(repr(value), 40)}{word}"


def _number(known: Sequence[tuple[str, str, str]], section: str, key: str, name: str) -> int:
    return [one[2] for one in known if one[:2] == (section, key)].index(name)


def _named(config: Config, name: str, knob: str, text: str) -> tuple[str, str, str]:
    """What has this knob and goes by a name, or by the end of one that no other ends with."""
    values = knobs_of(config)
    known = [one for one in names_of(config) if (*one, knob) in values] or list(names_of(config))
    found = [one for one in known if one[2] == name] or [one for one in known if one[2].endswith(name)]
    if not found:
        near = did_you_mean(name, [one[2] for one in known])
        how = "; `autoquant show CONFIG` has the names, which are no patterns" if "*" in name else near
        raise AutoQuantError(f"'{text}': no group or space '{cut(name)}'{how}")
    if len(found) > 1:
        numbers = [f"{s}.{key}[{_number(known, s, key, one)}].{knob}" for s, key, one in found[:4]]
        raise AutoQuantError(f"'{text}': {len(found)} go by '{name}'; give one by number: {', '.join(numbers)}")
    return found[0]


def _in_layers(config: Config, layers: str, knob: str, value: Any, text: str) -> Config:
    """An override for some layers: of every smoothing group that has them, or the strategy of every linear."""
    wanted = layer_bits(layers)
    if knob == "strategy":
        strategy = None if value is None else parse_strategy(str(value))
        return _strategy_in_layers(config, wanted, strategy, text)
    if knob not in _OF_LAYERS:
        near = did_you_mean_or(knob, [*_OF_LAYERS, "strategy"], "they have")
        raise AutoQuantError(f"'{text}': layers have no '{cut(knob)}'{near}")
    groups, changed = [], 0
    for group in config.smoothing.groups:
        both = wanted & layer_bits(group.layers) if group.layers is not None else 0
        if not both or group.kind.value == "query_key":
            groups.append(group)
            continue
        groups.append(_overridden(group, layer_set(numbers_in(both)), knob, value, text))
        changed += 1
    if not changed:
        raise AutoQuantError(f"'{text}': no smoothing group has any of the layers {layers}")
    return edited(config, smoothing=edited(config.smoothing, groups=tuple(groups)))


def _of_group(config: Config, name: str, layers: str, knob: str, value: Any, text: str) -> Config:
    """A knob of one smoothing group in some of its layers."""
    if knob not in _OF_LAYERS:
        near = did_you_mean_or(knob, [*_OF_LAYERS, "strategy"], "they have")
        raise AutoQuantError(f"'{text}': layers have no '{cut(knob)}'{near}")
    names = [group.name for group in config.smoothing.groups if group.layers is not None]
    found = [one for one in names if one == name] or [one for one in names if one.endswith(name)]
    if len(found) != 1:
        several = f"; {len(found)} end so: {', '.join(found[:4])}" if found else did_you_mean(name, with_ends(names))
        raise AutoQuantError(f"'{text}': no smoothing group '{cut(name)}' in layers{several}")
    wanted, groups = layer_bits(layers), []
    for group in config.smoothing.groups:
        if group.name != found[0] or group.layers is None:
            groups.append(group)
            continue
        both = wanted & layer_bits(group.layers)
        if not both:
            raise AutoQuantError(f"'{text}': '{group.name}' is in none of these layers, but in {group.layers}")
        groups.append(_overridden(group, layer_set(numbers_in(both)), knob, value, text))
    return edited(config, smoothing=edited(config.smoothing, groups=tuple(groups)))


def _of_linear(config: Config, name: str, layers: str | None, value: Any, text: str) -> Config:
    """The strategy of one linear, of all its layers or of some: an override, or null for floating point."""
    known = list(dict.fromkeys(linear.path for linear in config.model.linears))
    found = [path for path in known if path == name] or [path for path in known if path.endswith(f".{name}")]
    if len(found) != 1:
        several = f"; {len(found)} end so: {', '.join(found[:4])}" if found else did_you_mean(name, with_ends(known))
        raise AutoQuantError(f"'{text}': no linear '{cut(name)}'{several}")
    wanted = None if layers is None else layer_bits(layers)
    strategy = None if value is None else parse_strategy(str(value))
    added = []
    for linear in config.model.linears:
        if linear.path == found[0]:
            mine = layer_bits(linear.layers) if linear.layers is not None else 0
            chosen = mine if wanted is None else wanted & mine
            if chosen or (wanted is None and linear.layers is None):
                one = layer_set(numbers_in(chosen)) if layers is not None else None
                added.append(QuantizationOverride(path=found[0], layers=one, strategy=strategy))
    if not added:
        raise AutoQuantError(f"'{text}': {found[0]} is in none of these layers")
    return _with_strategies(config, list({(one.path, one.layers): one for one in added}.values()))


def _overridden(group: SmoothingGroup, layers: str, knob: str, value: Any, text: str) -> SmoothingGroup:
    kept = [one for one in group.overrides if one.layers != layers]
    before = next((one for one in group.overrides if one.layers == layers), SmoothingOverride(layers=layers))
    try:
        override = edited(before, **{knob: _typed(value, (knob,))})
    except PydanticError as error:
        raise AutoQuantError(f"'{text}': {_what(error)}") from error
    return edited(group, overrides=(*kept, override))


def _strategy_in_layers(config: Config, wanted: int, strategy: Strategy | None, text: str) -> Config:
    added = []
    for linear in config.model.linears:
        both = wanted & layer_bits(linear.layers) if linear.layers is not None else 0
        if both and linear.path not in config.quantization.exclude:
            layers = layer_set(numbers_in(both))
            added.append(QuantizationOverride(path=linear.path, layers=layers, strategy=strategy))
    if not added:
        raise AutoQuantError(f"'{text}': no linear that is quantized has any of these layers")
    return _with_strategies(config, added)


def _with_strategies(config: Config, added: Sequence[QuantizationOverride]) -> Config:
    """The config with overrides, in place of those of the same linears and layers."""
    places = {(one.path, one.layers) for one in added}
    kept = [one for one in config.quantization.overrides if (one.path, one.layers) not in places]
    return edited(config, quantization=edited(config.quantization, overrides=(*kept, *added)))
