"""What a person chooses in a config, apart from what was found: read, compared, set, carried over."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel

from autoquant.config.format import Config, Online, Quantization, Rotation, Smoothing, edited
from autoquant.config.places import KNOBS, JsonPath

Knobs = dict[JsonPath, Any]
"""Values by where they stand; in place of a number, the name of a group or space, or what an online rotation is."""

_PLAIN: dict[str, tuple[str, ...]] = {
    "smoothing": ("enable", "alpha", "method"),
    "rotation": ("enable", "method", "seed"),
}
_NESTED = ("weights", "activations")


def knobs_of(config: Config) -> Knobs:
    """Every knob with its value."""
    found: Knobs = {}
    for section, names in _PLAIN.items():
        found.update({(section, name): getattr(getattr(config, section), name) for name in names})
    for (section, key), names in KNOBS.items():
        for one in getattr(getattr(config, section), key):
            found.update({(section, key, one.name, name): getattr(one, name) for name in names})
    found.update({("rotation", "online", online_name(one), "enable"): one.enable for one in config.rotation.online})
    for name in Quantization.model_fields:
        value = getattr(config.quantization, name)
        if name in _NESTED:
            found.update({("quantization", name, key): getattr(value, key) for key in type(value).model_fields})
        else:
            found[("quantization", name)] = value
    return found


def default_knobs(config: Config) -> Knobs:
    """The same knobs as ``autoquant analyze`` writes them."""
    plain = edited(
        config,
        smoothing=Smoothing(groups=tuple(_reset(one, KNOBS["smoothing", "groups"]) for one in config.smoothing.groups)),
        rotation=Rotation(
            spaces=tuple(_reset(one, KNOBS["rotation", "spaces"]) for one in config.rotation.spaces),
            online=tuple(_reset(one, ("enable",)) for one in config.rotation.online),
        ),
        quantization=Quantization(exclude=tuple(one.path for one in config.model.linears if one.role != "linear")),
    )
    return knobs_of(plain)


def changed_knobs(config: Config) -> Knobs:
    """Those that are not as ``autoquant analyze`` writes them."""
    usual = default_knobs(config)
    return {path: value for path, value in knobs_of(config).items() if not same(path, value, usual[path])}


def same(path: JsonPath, one: Any, other: Any) -> bool:
    """True if both mean the same; the order of what is excluded says nothing."""
    return set(one) == set(other) if path == ("quantization", "exclude") else bool(one == other)


def with_knobs(config: Config, values: Mapping[JsonPath, Any]) -> Config:
    """``config`` with other values for some knobs. Raises pydantic.ValidationError for a value that it refuses."""
    sections: dict[str, dict[str, Any]] = {}
    members: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    nested: dict[str, dict[str, Any]] = {}
    for path, value in values.items():
        if len(path) == 4:
            section, key, name, knob = map(str, path)
            members.setdefault((section, key), {}).setdefault(name, {})[knob] = value
        elif len(path) == 3:
            nested.setdefault(str(path[1]), {})[str(path[2])] = value
        else:
            sections.setdefault(str(path[0]), {})[str(path[1])] = value
    for (section, key), changes in members.items():
        listed = getattr(getattr(config, section), key)
        named = online_name if key == "online" else _name
        sections.setdefault(section, {})[key] = tuple(
            edited(one, **changes[named(one)]) if named(one) in changes else one for one in listed
        )
    for key, changes in nested.items():
        sections.setdefault("quantization", {})[key] = edited(getattr(config.quantization, key), **changes)
    return edited(config, **{name: edited(getattr(config, name), **changes) for name, changes in sections.items()})


def knob_text(path: JsonPath) -> str:
    """``smoothing.alpha``; ``smoothing.groups['mlp.up_proj -> down_proj'].alpha``."""
    if len(path) == 4:
        return f"{path[0]}.{path[1]}['{path[2]}'].{path[3]}"
    return ".".join(map(str, path))


def value_text(value: Any) -> str:
    """A value as it stands in a file, lists of objects by what they say."""
    if isinstance(value, BaseModel):
        fields = type(value).model_fields
        said = {name: getattr(value, name) for name in fields if name in value.model_fields_set}
        said = {name: item for name, item in said.items() if item is not None or name == "strategy"}
        return "{" + ", ".join(f"{name}: {value_text(item)}" for name, item in said.items()) + "}"
    if isinstance(value, tuple):
        return "[" + ", ".join(map(value_text, value)) + "]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def online_name(online: Online) -> str:
    """What an online rotation is called by: its kind, path and layers, which none shares with another."""
    return f"{online.kind} {online.path}" + (f" {online.layers}" if online.layers else "")


def names_of(config: Config) -> Iterator[tuple[str, str, str]]:
    """(section, list, name) of everything that has knobs of its own."""
    for section, key in KNOBS:
        yield from ((section, key, one.name) for one in getattr(getattr(config, section), key))
    yield from (("rotation", "online", online_name(one)) for one in config.rotation.online)


def _name(one: Any) -> str:
    return str(one.name)


def _reset(one: Any, names: tuple[str, ...]) -> Any:
    defaults = {name: type(one).model_fields[name].default for name in names}
    return edited(one, **defaults)
